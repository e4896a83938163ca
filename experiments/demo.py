"""Trains a Mixture-of-Depths model beside its dense twin at equal training FLOPs, and shows what became of both.

    make demo        # or: .venv/bin/python -m experiments.demo

The text is what every CPython carries of its own language reference, read as bytes. Run it again to see the result
again; interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from mod_star import presets
from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.data import held_out_batches
from mod_star.decoding import Completion, GenerationConfig, Generator, Sampling, complete, encode_prompts
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.inspection.routes import routes_of
from mod_star.model.routing import capacity_of
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.training.interrupt import Interrupted
from mod_star.training.train import TrainingError, TrainSummary, train
from mod_star.units import duration, short_number
from mod_star.views.pictures import try_to_draw
from mod_star.views.plots import plot_curves, plot_routes
from mod_star.views.terminal import Cell, result_table, routes_text

PROMPT = "When a function is called, "
SAMPLING = Sampling(temperature=0.6)


@dataclass(frozen=True)
class Options:
    """Trains a Mixture-of-Depths model beside its dense twin at equal training FLOPs, and shows both."""

    directory: Path = Path("runs/demo")
    """Where both runs and the pictures are kept."""
    flops: float = 2.5e12
    """Training budget of each model in floating-point operations; the default takes minutes on two cores."""


def mod_run(flops: float) -> RunConfig:
    """The Mixture-of-Depths run: 6 blocks of width 128, every second one computing an eighth of 256 bytes.

    Not the default gate: sigmoid gates tend to close for good in so short a training, and a routed block whose gate is
    closed has nothing to show. The tanh gate lies between 0.8 and 1.2.
    """
    return RunConfig(
        model=ModelConfig(width=128, layers=6, heads=4, context=256),
        routing=RoutingConfig(gate="tanh"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        train=TrainConfig(
            flops=flops,
            batch_size=2,
            loss_chunk=256,
            log_every=20,
            eval_every=200,
            eval_batches=32,
            checkpoint_every=200,
            keep_checkpoints=1,
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo; what a user can cause ends in one line and an exit code, as with `mod-star`."""
    try:
        demo(parse_options(Options, sys.argv[1:] if argv is None else argv, "python -m experiments.demo"))
    except InputError as error:
        _leave(2, f"error: {error}")
    except TrainingError as error:
        _leave(1, f"error: {error}")
    except Interrupted as stopped:
        _leave(128 + stopped.signal, f"{stopped}. The same command goes on from there.")
    except KeyboardInterrupt:
        _leave(130, "aborted; what was saved before is kept")


def demo(options: Options) -> None:
    """Trains what isn't trained yet, then shows the result."""
    began = time.perf_counter()
    keep_compiled_programs()
    console = Console(highlight=False)
    mod = mod_run(options.flops)
    console.print(f"Two models, the same text, {short_number(options.flops)} FLOP of training each")
    paths = {"dense": options.directory / "dense", "MoD": options.directory / "mod"}
    summaries = {
        "dense": train(presets.dense(mod), paths["dense"]),
        "MoD": train(mod, paths["MoD"]),
    }
    loaded = {name: load_run(path) for name, path in paths.items()}
    generators = {name: Generator(run.model, (run.tokenizer.eos_id,)) for name, run in loaded.items()}

    console.print()
    console.print(Rule("Mixture-of-Depths and its dense twin, at equal training FLOPs", style="bold"))
    speeds = decode_speeds(generators, encode_prompts(loaded["MoD"].tokenizer, [PROMPT]))
    console.print(comparison(summaries, loaded, speeds))
    say(console, verdict(summaries))
    say(console, causal_routing(summaries["MoD"], loaded["MoD"].config))

    console.print(Rule("A sample of the MoD model", style="bold"))
    show_sample(console, generators["MoD"], loaded["MoD"])

    console.print(Rule("Which tokens it computes", style="bold"))
    show_routes(console, loaded["MoD"], options.directory / "routes.png")
    picture = options.directory / "curves.png"
    try_to_draw(picture, lambda: plot_curves(paths, picture, against="train_flops", title="Equal training FLOPs"))

    console.print(Rule("Where everything is", style="bold"))
    console.print(whereabouts(options.directory, paths), soft_wrap=True)
    console.print(f"\n[dim]{duration(time.perf_counter() - began)} in all[/]")


def comparison(summaries: dict[str, TrainSummary], loaded: dict[str, LoadedRun], speeds: dict[str, float]) -> Padding:
    """The table: a column per model, and what MoD comes to beside dense."""
    rows: list[list[Cell]] = []

    def row(name: str, values: dict[str, float], shown: Sequence[str], difference: bool = False) -> None:
        dense, mod = values["dense"], values["MoD"]
        rows.append([name, *shown, f"{mod - dense:+.3f}" if difference else f"× {mod / dense:.2f}"])

    def numbers(name: str, values: dict[str, float]) -> None:
        row(name, values, [short_number(values[model]) for model in summaries])

    def losses(name: str, values: dict[str, float]) -> None:
        row(name, values, [f"{values[model]:.3f}" for model in summaries], difference=True)

    numbers("parameters", {name: summary.parameters for name, summary in summaries.items()})
    numbers("training FLOPs", {name: summary.flops for name, summary in summaries.items()})
    numbers("training steps", {name: summary.steps for name, summary in summaries.items()})
    numbers("FLOPs per token, forward", {name: flops_per_token(run.config) for name, run in loaded.items()})
    evaluations = {name: summary.evaluation for name, summary in summaries.items()}
    trained = {name: evaluation["eval_loss"] for name, evaluation in evaluations.items()}
    losses("held-out loss, nats per byte", trained)
    causal = {name: evaluations[name].get("eval_loss_causal", trained[name]) for name in evaluations}
    losses("  the same under causal routing", causal)
    numbers("training steps/s", {name: summary.steps / summary.seconds for name, summary in summaries.items()})
    numbers("decoded tokens/s, one text", speeds)
    return Padding(result_table("", ["", *summaries, "MoD to dense"], rows), (0, 0, 0, 1))


def flops_per_token(run: RunConfig) -> float:
    """Operations of a forward pass over a full context, per token."""
    return forward_flops(run.model, run.routing, run.model.context).total / run.model.context


def decode_speeds(generators: dict[str, Generator], prompts: list[list[int]]) -> dict[str, float]:
    """Tokens per second at batch 1, compiled beforehand: the median of five texts, the models taking turns."""
    measured: dict[str, list[float]] = {name: [] for name in generators}
    for generator in generators.values():
        generator.warm_up(prompts, GenerationConfig(room(generator, prompts), SAMPLING))
    for seed in range(5):
        for name, generator in generators.items():
            new_tokens = room(generator, prompts)
            state = jax.block_until_ready(generator.start(prompts, GenerationConfig(new_tokens, seed=seed)))
            began = time.perf_counter()
            state = jax.block_until_ready(generator.advance(state, new_tokens, SAMPLING))
            measured[name].append(int(state.step) / (time.perf_counter() - began))
    return {name: statistics.median(speeds) for name, speeds in measured.items()}


def room(generator: Generator, prompts: list[list[int]]) -> int:
    """Tokens that the context has room for after the longest prompt."""
    return generator.decoder.config.context - max(map(len, prompts))


def verdict(summaries: dict[str, TrainSummary]) -> str:
    """What the table comes to, whichever way it went."""
    dense, mod = (summaries[name].evaluation for name in ("dense", "MoD"))
    steps = summaries["MoD"].steps / summaries["dense"].steps

    def compared(difference: float) -> str:
        return f"{abs(difference):.3f} nats per byte {'lower' if difference < 0 else 'higher'} than the dense model's"

    return (
        f"The same compute paid for {steps:.2f} times as many steps of MoD. Its held-out loss is "
        f"{compared(mod['eval_loss'] - dense['eval_loss'])} when routed as in training, and "
        f"{compared(mod['eval_loss_causal'] - dense['eval_loss'])} when routed causally, as it must be to sample. "
        "One run each: small differences are chance (experiments/mod_vs_dense takes three seeds)."
    )


def causal_routing(summary: TrainSummary, run: RunConfig) -> str:
    """What the causal rule costs and how good it is."""
    evaluation = summary.evaluation
    skip = 1 - capacity_of(run.routing, run.model.context) / run.model.context
    return (
        f"Causal routing costs {evaluation['causal_gap']:+.3f} nats per byte. The predictor that decides without "
        f"seeing later tokens agrees with the router's choice for {evaluation['eval_predictor_accuracy']:.1%} of the "
        f"tokens; one that always said “skip” would for {skip:.1%}."
    )


def show_sample(console: Console, generator: Generator, run: LoadedRun) -> None:
    """Streams a text: the prompt in bold, then what the model makes of it."""
    prompts = encode_prompts(run.tokenizer, [PROMPT])
    console.print(f"[dim]prompt “{PROMPT}”, causal routing, temperature {SAMPLING.temperature}, seed 0[/]\n")
    console.print(Text(PROMPT, "bold"), end="", soft_wrap=True)
    bursts = complete(generator, [PROMPT], GenerationConfig(room(generator, prompts), SAMPLING))
    last = _stream(console, bursts)
    shares = ", ".join(f"{share:.0%}" for share in last.routed_fraction)
    console.print(f"\n\n[dim]the routed blocks computed {shares} of these tokens[/]\n")


def _stream(console: Console, bursts: Iterable[list[Completion]]) -> Completion:
    shown = 0
    for (completion,) in bursts:
        new = "".join(c if c.isprintable() or c == "\n" else "·" for c in completion.text[shown:])
        console.print(Text(new), end="", soft_wrap=True)
        shown = len(completion.text)
    return completion


def show_routes(console: Console, run: LoadedRun, path: Path) -> None:
    """A paragraph that the model has never seen, coloured by the blocks that computed each token; and as a picture."""
    routes = routes_of(run, held_out_paragraph(run))
    shown = routes.tokens, routes.routed_LxN, routes.block_names
    console.print("[dim]held-out text, causal routing: the brighter a byte, the more blocks computed it[/]\n")
    console.print(routes_text(*shown))
    console.print()
    title = "Held-out text: which bytes each routed block computed (causal routing)"
    try_to_draw(path, lambda: plot_routes(path, *shown, title=title))


def held_out_paragraph(run: LoadedRun) -> str:
    """Of the first held-out documents the paragraph with the most letters that fits into the context."""
    config = run.config
    batches = held_out_batches(config.data, run.tokenizer, config.model.context, 1)
    tokens = np.concatenate([batch["tokens"][0] for batch, _ in zip(batches, range(64), strict=False)])
    paragraphs = run.tokenizer.decode(tokens.tolist()).split("\n\n")
    fitting = [text for text in paragraphs if len(run.tokenizer.encode(text)) < config.model.context]
    fitting = [text for text in fitting if text.endswith(".")] or fitting
    return max(fitting, key=lambda text: sum(map(str.isalpha, text)))


def whereabouts(directory: Path | str, paths: dict[str, Path]) -> str:
    """The files, and commands to go on with."""
    program = os.path.relpath(Path(sys.executable).with_name("mod-star"))
    mod, directory = escape(shlex.quote(str(paths["MoD"]))), escape(str(directory))
    return (
        f"{directory}/curves.png   both runs against training FLOPs\n"
        f"{directory}/routes.png   the picture above\n"
        f"{directory}/dense, {directory}/mod   configuration, checkpoint, metrics.jsonl, TensorBoard events\n"
        "\n[bold]Try next[/]\n"
        f"{program} sample {mod} --prompt 'The import statement' --temperature 0.6\n"
        f"{program} routes {mod} --text 'If the name is not found, an exception is raised.'\n"
        f"{program} train runs/mine --data.source 'notes/*.txt'   # your own text; train --help explains the rest"
    )


def say(console: Console, sentence: str) -> None:
    """Prints a paragraph, indented like the table."""
    console.print(Padding(Text(sentence), (0, 2, 1, 2)))


def _leave(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
