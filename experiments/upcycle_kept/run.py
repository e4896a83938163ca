"""A pretrained dense model made cheaper, and kept: what each part of the recipe is worth on SmolLM2-135M and GSM8K.

    python -m experiments.upcycle_kept --model SmolLM2-135M-Instruct.gguf    # measures what is missing, then reports
    python -m experiments.upcycle_kept --report                              # reports on what there is

First without any training: routed blocks, routers fitted in closed form, kept keys and values, and an adapter, at
equal forward FLOPs. Then the last of these is trained in several ways for as many tokens as the dense model. Then
what the trained models think of right answers. Decoding speed is measured in turns. `--out` holds results.json and
the runs. README.md beside this file has what was measured.
"""

from __future__ import annotations

import functools
import itertools
import json
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
from experiments.upcycle_kept.arms import RECIPES, TEMPLATE, Arm, Options, Recipe, arms, config_of
from experiments.upcycle_kept.likelihoods import likelihoods
from experiments.upcycle_kept.report import AT, report
from mod_star.atomic_files import write_atomically
from mod_star.commands import keep_compiled_programs
from mod_star.config import DataConfig, LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from mod_star.data import held_out_batches
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.errors import InputError, require
from mod_star.flops import forward_flops
from mod_star.model import Decoder
from mod_star.pretrained.calibration import block_changes, read_streams
from mod_star.pretrained.params_run import write_params_run
from mod_star.pretrained.upcycle import default_stages, upcycled_params, with_fitted
from mod_star.runs.directory import LoadedRun, load_run, read_config
from mod_star.runs.metrics import read_metrics
from mod_star.runs.stored_config import SUMMARY_FILE, is_run
from mod_star.training.objectives.next_token import make_eval_step, summarise_eval
from mod_star.training.train import train

PROMPT = "Q: A farmer has 12 hens, and each lays 5 eggs a week. How many eggs does he have after 3 weeks?\nA:"


class Experiment:
    """The dense model, its text, and the file of results; everything is measured once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        path = options.out / "imported"
        if not is_run(path):
            from mod_star.pretrained.importing import import_model, open_source

            if is_run(options.model):
                path.symlink_to(options.model.resolve())
            else:
                import_model(open_source(str(options.model)), path, context=options.context)
        dense = load_run(path)
        data = DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"),), template=TEMPLATE,
            tokenizer=dense.config.data.tokenizer, seed=options.seed,
        )  # fmt: skip
        model = replace(dense.config.model, context=options.context, dtype=options.dtype, remat="full")
        train_config = TrainConfig(
            steps=options.steps, batch_size=options.batch_size, seed=options.seed, loss_chunk=options.context,
            log_every=1, eval_every=0, eval_batches=options.eval_batches, keep_checkpoints=1, checkpoint_every=0,
        )  # fmt: skip
        optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=2, weight_decay=0.01)
        config = replace(dense.config, model=model, data=data, train=train_config, optimizer=optimizer)
        self.dense: LoadedRun = replace(dense, config=config, decoder=Decoder(model, config.routing))
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

    def start(self, recipe: Recipe, share: float) -> Path:
        """The run that a recipe starts from; made at the first use."""
        if recipe.start is None:
            return self.path
        name = f"{recipe.start} at {share:.0%}, {'distilled' if recipe.distilled else 'plain'}"
        path = self.options.out / name.replace("/", " and ")
        if not is_run(path):
            (arm,) = (arm for arm in arms(self.options, self.dense.config.data) if arm.name == recipe.start)
            run = config_of(self.dense.config, arm, share)
            require(run is not None, "--shares", share, "must be one that a layout can reach")
            assert run is not None
            params = self.params_of(arm, run)
            if recipe.stages:
                run = replace(run, routing=replace(run.routing, stages=default_stages(run.routing.capacity)))
            if recipe.distilled:  # parts must be those of the run that is started from
                run = replace(run, parts=f"{Path(__file__).parent / 'distil.py'}:parts")
            write_params_run(path, run, self.dense.tokenizer, params)
        return path

    def measure_trained(self) -> None:
        """Every recipe at the share that is trained, then the best at the others."""
        options = self.options
        for name in options.trained:
            self.once("trained", name, functools.partial(self.train, name, options.trained_share))
        for share in options.shares:
            if share != options.trained_share:
                name = f"{options.best} at {share:.0%}"
                self.once("trained", name, functools.partial(self.train, options.best, share))

    def run_of(self, name: str, share: float) -> Path:
        """The directory of a trained arm."""
        return self.options.out / f"{name} at {share:.0%}, trained".replace("/", " and ")

    def train(self, name: str, share: float) -> dict[str, Any]:
        """Trains an arm to its end, and returns its last evaluation."""
        recipe, path = RECIPES[name], self.run_of(name, share)
        start = self.start(recipe, share)
        run = self.dense.config if recipe.start is None else read_config(start)
        run = replace(
            run,
            init_from=str(start),
            optimizer=replace(run.optimizer, learning_rate=recipe.learning_rate),
            train=replace(run.train, trainable=recipe.trainable),
            lora=LoraConfig(rank=recipe.lora_rank),
        )
        began = time.process_time()
        train(run, path)
        last = [record for record in read_metrics(path) if "eval_loss" in record][-1]
        summary = json.loads((path / SUMMARY_FILE).read_text())
        measured = {name: summary[name] for name in ("tokens", "flops", "seconds", "trained_parameters")}
        return last | measured | {"cpu_seconds": time.process_time() - began, "share": self.cost(run)}

    def measure_likelihood(self) -> None:
        """Of right answers, of the dense model before training and of all trained arms that there are."""
        self.once("likelihood", "dense before training", functools.partial(self._likelihood, self.path))
        for name in self.results.get("trained", {}):
            arm, _, share = name.partition(AT)
            path = self.run_of(arm, float(share.rstrip("%")) / 100 if share else self.options.trained_share)
            self.once("likelihood", name, functools.partial(self._likelihood, path))

    def _likelihood(self, path: Path) -> dict[str, Any]:
        return likelihoods(load_run(path).model, self.options.data, self.options.questions)

    def measure_decoding(self) -> None:
        """Tokens per second of one row, of the dense model and of the best trained arm at each share, in turns."""
        for share in sorted(self.options.shares, reverse=True):
            path = self.run_of(self.options.best, share)
            if (path / SUMMARY_FILE).is_file():
                self.once("decoding", f"{share:.0%}", functools.partial(self._decoding, path))

    def _decoding(self, path: Path) -> dict[str, Any]:
        """Every round generates one token and many: the difference is what the other tokens take."""
        lengths = (1, self.options.new_tokens)
        prompts = [self.dense.tokenizer.encode(PROMPT)]
        models = {"dense": self.dense.model, "upcycled": load_run(path).model}
        seconds: dict[str, list[list[float]]] = {name: [] for name in models}
        generators = {name: Generator(model, end_ids=()) for name, model in models.items()}
        routed: list[float] = []
        for turn, (name, generator) in itertools.product(range(self.options.rounds + 1), generators.items()):
            taken = []
            for length in lengths:
                began = time.process_time()
                (result,) = generator.generate(prompts, GenerationConfig(length, Sampling(0)))
                taken.append(time.process_time() - began)
            if turn:  # the first one compiles
                seconds[name].append(taken)
            routed = result.routed_fraction or routed
        speeds = {
            name: [(lengths[1] - lengths[0]) / (whole - one) for one, whole in each] for name, each in seconds.items()
        }
        ratios = [fast / slow for fast, slow in zip(speeds["upcycled"], speeds["dense"], strict=True)]
        return speeds | {"ratios": ratios, "seconds": seconds, "routed": statistics.mean(routed)}


def main() -> None:
    """Measures and trains what is missing, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.upcycle_kept")
    try:
        if not options.report:
            keep_compiled_programs()
            options.out.mkdir(parents=True, exist_ok=True)
            experiment = Experiment(options)
            if "untrained" in options.parts:
                experiment.measure_untrained()
            if "trained" in options.parts:
                experiment.measure_trained()
            if "likelihood" in options.parts:
                experiment.measure_likelihood()
            if "decoding" in options.parts:
                experiment.measure_decoding()
        report(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
