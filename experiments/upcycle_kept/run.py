"""A pretrained dense model made cheaper, and kept: what each part of the recipe is worth on SmolLM2-135M and GSM8K.

    python -m experiments.upcycle_kept --model SmolLM2-135M-Instruct.gguf    # measures what is missing, then reports
    python -m experiments.upcycle_kept --report                              # reports on what there is

First without any training: routed blocks, routers fitted in closed form, kept keys and values, and an adapter, at equal
forward FLOPs. Then the last of these is trained in several ways for as many tokens as the dense model. Decoding speed
is measured in turns. `--out` holds results.json and the runs. README.md beside this file has what was measured.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.support.reporting import write_aside
from experiments.upcycle_kept.arms import TEMPLATE, Arm, Options, arms, config_of
from experiments.upcycle_kept.report import report
from mod_star.atomic_files import write_atomically
from mod_star.commands import keep_compiled_programs
from mod_star.config import DataConfig, LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from mod_star.data import held_out_batches
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.pretrained.calibration import block_changes, read_streams
from mod_star.pretrained.params_run import write_params_run
from mod_star.pretrained.upcycle import upcycled_params, with_fitted
from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.runs.metrics import read_metrics
from mod_star.runs.stored_config import SUMMARY_FILE, is_run
from mod_star.training.objectives.next_token import make_eval_step, summarise_eval
from mod_star.training.train import train

PROMPT = "Q: A farmer has 12 hens, and each lays 5 eggs a week. How many eggs does he have after 3 weeks?\nA:"


class Experiment:
    """The dense model, its text, and the file of results; everything is measured once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        path = options.model if is_run(options.model) else options.out / "imported"
        if not is_run(path):
            from mod_star.pretrained.importing import import_model, open_source

            import_model(open_source(str(options.model)), path, context=options.context)
        dense = load_run(path)
        data = DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"),), template=TEMPLATE,
            tokenizer=dense.config.data.tokenizer, seed=options.seed,
        )  # fmt: skip
        model = replace(dense.config.model, context=options.context)
        train_config = TrainConfig(
            steps=options.steps, batch_size=options.batch_size, seed=options.seed, loss_chunk=options.context,
            log_every=1, eval_every=0, eval_batches=options.eval_batches, keep_checkpoints=1, checkpoint_every=4,
        )  # fmt: skip
        optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=2, weight_decay=0.01)
        config = replace(dense.config, model=model, data=data, train=train_config, optimizer=optimizer)
        self.dense: LoadedRun = replace(dense, config=config)
        self.path = path
        self.file = options.out / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self._streams: Any = None

    def once(self, group: str, name: str, measure: Callable[[], Any]) -> Any:
        """What has been measured under this name, or is measured now and kept."""
        if name not in self.results.setdefault(group, {}):
            self.results[group][name] = measure()
            write_aside(self.file, (json.dumps(self.results, indent=2) + "\n").encode())
            print(f"{group}, {name}: {self.results[group][name]}", flush=True)
        return self.results[group][name]

    def streams(self) -> Any:
        """The dense model's streams of training text; read at the first use."""
        if self._streams is None:
            file = self.options.out / f"streams-{self.options.tokens}.bin"
            if not file.is_file():
                streams = read_streams(self.dense, self.dense.config.data, self.options.tokens)
                write_atomically(file, lambda path: streams.tofile(path))
            shape = (self.dense.config.model.layers + 1, -1, self.dense.config.model.width)
            self._streams = np.fromfile(file, np.float32).reshape(shape)
        return self._streams

    def params_of(self, arm: Arm, run: RunConfig) -> Any:
        """Parameters of an arm before training."""
        params = upcycled_params(self.dense.params, run)
        return with_fitted(params, run, self.streams()) if arm.fitted else params

    def held_out(self, run: RunConfig, params: Any) -> dict[str, Any]:
        """Held-out losses, cost and capacity of a model."""
        batches = held_out_batches(run.data, self.dense.tokenizer, run.model.context, run.train.batch_size)
        step = jax.jit(make_eval_step(Decoder(run.model, run.routing), run))
        sums = [
            jax.device_get(step(params, batch, jax.random.key(0)))
            for batch in itertools.islice(batches, run.train.eval_batches)
        ]
        losses = summarise_eval(jax.tree.map(lambda *each: np.sum(np.asarray(each, np.float64), axis=0), *sums))
        routing = run.routing
        layout = {"every": routing.every, "first": routing.first, "capacity": routing.capacity} if routing.every else {}
        return losses | layout | {"share": self.cost(run)}

    def cost(self, run: RunConfig) -> float:
        """Forward FLOPs of a model, as a share of the dense one's."""
        of = lambda each: forward_flops(each.model, each.routing, run.model.context).total  # noqa: E731
        return of(run) / of(self.dense.config)

    def measure_untrained(self) -> None:
        """Every arm at every share, and the dense model."""
        self.once("text", "changes", lambda: block_changes(self.streams()).tolist())
        self.once("untrained", "dense", lambda: self.held_out(self.dense.config, self.dense.params))
        order = sorted(self.options.shares, key=lambda share: abs(share - self.options.trained_share))
        for arm, share in itertools.product(reversed(arms(self.options, self.dense.config.data)), order):
            run = config_of(self.dense.config, arm, share)
            if run is not None:
                name = f"{arm.name} at {share:.0%}"
                self.once("untrained", name, functools.partial(self._untrained, arm, run))

    def _untrained(self, arm: Arm, run: RunConfig) -> dict[str, Any]:
        return self.held_out(run, self.params_of(arm, run))

    def start(self) -> Path:
        """The run that trained arms start from: the last arm at the share that is trained."""
        path = self.options.out / "upcycled"
        if not is_run(path):
            arm = arms(self.options, self.dense.config.data)[-1]
            run = config_of(self.dense.config, arm, self.options.trained_share)
            assert run is not None
            write_params_run(path, run, self.dense.tokenizer, self.params_of(arm, run))
        return path

    def train(self, name: str) -> dict[str, Any]:
        """Trains an arm to its end, or goes on with it, and returns its last evaluation."""
        path = self.options.out / name
        if not (path / SUMMARY_FILE).is_file():
            train(self.trained_run(name), path)
        records = read_metrics(path)
        last = [record for record in records if "eval_loss" in record][-1]
        for step in saved_steps(path / "checkpoints"):
            shutil.rmtree(path / "checkpoints" / str(step))
        summary = json.loads((path / SUMMARY_FILE).read_text())
        return last | {name: summary[name] for name in ("tokens", "flops", "seconds", "trained_parameters")}

    def trained_run(self, name: str) -> RunConfig:
        """The configuration of a trained arm."""
        dense, start = self.dense.config, str(self.path if name == "dense" else self.start())
        run = replace(dense if name == "dense" else load_run(Path(start)).config, init_from=start)
        if name in ("dense", "all"):
            return run
        run = replace(run, optimizer=replace(run.optimizer, learning_rate=1e-3))
        distilled = f"{Path(__file__).parent / 'distil.py'}:parts"
        small = replace(run, train=replace(run.train, trainable=("router", "predictor", "adapter")), parts=distilled)
        return small if name == "small" else replace(small, lora=LoraConfig(rank=16))

    def measure_decoding(self) -> None:
        """Tokens per second of one row, of the dense model and of the last arm at each share, in turns."""
        arm, options = arms(self.options, self.dense.config.data)[-1], self.options
        for share in sorted(options.shares, reverse=True):
            run = config_of(self.dense.config, arm, share)
            if run is not None:
                self.once("decoding", f"{share:.0%}", functools.partial(self._decoding, arm, run))

    def _decoding(self, arm: Arm, run: RunConfig) -> dict[str, Any]:
        params = self.params_of(arm, run)
        config = GenerationConfig(self.options.new_tokens, Sampling(0))
        prompts = [self.dense.tokenizer.encode(PROMPT)]
        speeds: dict[str, list[float]] = {"dense": [], "upcycled": []}
        pairs = {"dense": (self.dense.config, self.dense.params), "upcycled": (run, params)}
        generators = {
            name: Generator(Model(Decoder(each.model, each.routing), own, self.dense.tokenizer))
            for name, (each, own) in pairs.items()
        }
        for generator in generators.values():
            generator.generate(prompts, config)
        routed: list[float] = []
        for _, (name, generator) in itertools.product(range(self.options.rounds), generators.items()):
            began = time.perf_counter()
            (result,) = generator.generate(prompts, config)
            speeds[name].append(len(result.tokens) / (time.perf_counter() - began))
            routed = result.routed_fraction or routed
        ratios = [fast / slow for fast, slow in zip(speeds["upcycled"], speeds["dense"], strict=True)]
        return speeds | {"ratio": statistics.median(ratios), "routed": statistics.mean(routed)}


def main() -> None:
    """Measures and trains what is missing, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.upcycle_kept")
    try:
        if not options.report:
            keep_compiled_programs()
            options.out.mkdir(parents=True, exist_ok=True)
            experiment = Experiment(options)
            experiment.measure_untrained()
            experiment.measure_decoding()
            for name in options.trained:
                experiment.once("trained", name, functools.partial(experiment.train, name))
        report(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
