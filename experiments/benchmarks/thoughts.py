"""What thinking costs: a Quiet-STaR training step over a dense one, memory, and generation with thoughts.

    python -m experiments.benchmarks.thoughts           # a table
    python -m experiments.benchmarks.thoughts --json    # one flat JSON object
    python -m experiments.benchmarks.thoughts --only-batches

Batch 4, 128 tokens, width 256, 6 layers, vocabulary 8,192; thoughts of 8 tokens, 4 true tokens, 2 thoughts a place.
Warm, medians, in turns; compilation apart. Memory is what XLA allots to temporaries (`temp_mb_*`: of the gradient of
the loss). Takes about ten minutes on two CPU cores, half of it compilation; nothing else should run beside it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.support.timing import in_turns
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling, Think
from mod_star.flops import sampling_flops, scoring_flops, training_step_flops
from mod_star.initial_params import init_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import choose_places, sample_thoughts, talk_loss
from mod_star.thinking.parameters import thinking_init
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.objectives.next_token import forward
from mod_star.training.objectives.quiet_star import make_quiet_star_loss
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step
from mod_star.views.terminal import result_table

ROUNDS = 7
BURST, BURSTS = 16, 7
SAMPLING = Sampling(1.0)
DENSE, MOD = RoutingConfig(every=0), RoutingConfig(every=2, capacity=0.125)


def make_run(routing: RoutingConfig = DENSE, context: int = 128, batch: int = 4, **thinking: Any) -> RunConfig:
    """The run that is measured, with other fields of `thinking` if so given."""
    return RunConfig(
        ModelConfig(vocab_size=8192, width=256, layers=6, heads=4, mlp_width=704, context=context),
        routing,
        train=TrainConfig(objective="quiet_star", batch_size=batch),
        thinking=replace(ThinkingConfig(thought_length=8, n_true=4, n_thoughts=2), **thinking),
    )


def make_batch(run: RunConfig) -> dict[str, Any]:
    """Random tokens, one document per sequence."""
    B, S = run.train.batch_size, run.model.context
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, run.model.vocab_size, (B, S + 1)), jnp.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)),
        "segment_ids": jnp.ones((B, S), jnp.int32),
        "weights": jnp.ones((B, S), jnp.float32),
    }


def make_params(run: RunConfig, decoder: Decoder) -> dict[str, Any]:
    """Random parameters; of a model that thinks, if the run says so."""
    params = init_params(decoder, 0)
    if run.train.objective == "quiet_star":
        params = {**params, "thinking": thinking_init(jax.random.key(1), run.model, params["embedding"], [1], [2])}
    return params


def training_step(run: RunConfig) -> Callable[[], Any]:
    """A whole training step, optimizer included, to be called again and again."""
    decoder = Decoder(run.model, run.routing)
    state = init_state(decoder, run, 100, make_params(run, decoder))
    return partial(jax.jit(make_train_step(decoder, run, 100)), state, make_batch(run))


def sampling_and_scoring(run: RunConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The halves of a step: thoughts (and the pass over the text that they need), and the gradient given thoughts."""
    decoder, batch = Decoder(run.model, run.routing), make_batch(run)
    params, thinking = make_params(run, decoder), run.thinking

    def read(params: Any) -> Any:
        return forward(decoder, params, batch, None, "causal", keep_keys_values=True)

    @jax.jit
    def sample(params: Any, key: jax.Array) -> Any:
        text = read(params)
        places = choose_places(ThinkingDecoder(decoder, thinking), batch, text, head_matrix(params), key, 128)
        return places, sample_thoughts(
            ThinkingDecoder(decoder, thinking), params, text, batch, places, key, temperature=1.0
        )

    @jax.jit
    def score(params: Any, places: Any, thoughts: Any) -> Any:
        def loss(params: Any) -> Any:
            return talk_loss(ThinkingDecoder(decoder, thinking), params, read(params), batch, places, thoughts, 128)[0]

        return jax.grad(loss)(params)

    places, thoughts = sample(params, jax.random.key(0))
    return partial(sample, params, jax.random.key(0)), partial(score, params, places, thoughts)


def temporaries(run: RunConfig) -> float:
    """Bytes of temporaries of the compiled gradient of the loss."""
    decoder = Decoder(run.model, run.routing)
    params = jax.eval_shape(lambda: make_params(run, decoder))
    gradient = jax.jit(jax.grad(make_quiet_star_loss(decoder, run), has_aux=True))
    batch = jax.eval_shape(lambda: make_batch(run))
    compiled = gradient.lower(params, batch, jax.random.key(0), 1.0, 1.0).compile()
    analysis: Any = compiled.memory_analysis()
    return float(analysis.temp_size_in_bytes)


def measure_steps() -> dict[str, float]:
    """Whole steps, dense and thinking, and the halves of the latter."""
    thinking = make_run()
    dense = replace(thinking, train=replace(thinking.train, objective="next_token"))
    quarter = make_run(think_fraction=0.25, think_where="entropy")
    sample, score = sampling_and_scoring(thinking)
    times = in_turns(
        {
            "dense": training_step(dense), "step": training_step(thinking), "quarter": training_step(quarter),
            "sample": sample, "score": score, "mod": training_step(make_run(MOD)),
        },
        ROUNDS,
    )  # fmt: skip
    flops = {name: training_step_flops(run) for name, run in (("dense", dense), ("step", thinking))}
    mod_flops = training_step_flops(make_run(MOD))
    return {
        "step_time_ratio": times["step"] / times["dense"],
        "step_flop_ratio": flops["step"] / flops["dense"],
        "step_time_over_flops": times["step"] / times["dense"] / (flops["step"] / flops["dense"]),
        "dense_seconds": times["dense"],
        "step_seconds": times["step"],
        "sample_seconds": times["sample"],
        "score_seconds": times["score"],
        "sample_gflops": 4 * sampling_flops(thinking, 128).total / times["sample"] / 1e9,
        "score_gflops": 4 * scoring_flops(thinking, 128).total / times["score"] / 1e9,
        "dense_gflops": flops["dense"] / times["dense"] / 1e9,
        "budget25_time_fraction": times["quarter"] / times["step"],
        "budget25_flop_fraction": training_step_flops(quarter) / flops["step"],
        "mod_step_time_fraction": times["mod"] / times["step"],
        "mod_step_flop_fraction": mod_flops / flops["step"],
    }


def measure_memory() -> dict[str, float]:
    """Temporaries as thoughts, their number, their places and the text grow."""
    runs = {"base": make_run()}
    runs |= {f"t{t}": make_run(thought_length=t) for t in (16, 32)}
    runs |= {f"n{n}": make_run(n_thoughts=n) for n in (4, 8)}
    runs |= {f"f{share:g}": make_run(think_fraction=share) for share in (0.25, 0.5)}
    runs |= {f"s{S}": make_run(context=S) for S in (256, 512)}
    return {f"temp_mb_{name}": temporaries(run) / 1e6 for name, run in runs.items()}


def measure_generation() -> dict[str, float]:
    """Seconds per token of one row: without thoughts, with one before each token, and before a quarter of them."""
    run = make_run(context=256)
    decoder = Decoder(run.model, run.routing)
    generator = Generator(Model(decoder, make_params(run, decoder), ByteTokenizer(), run.thinking), end_ids=())
    room = BURST * (BURSTS + 1)
    prompt = np.random.default_rng(0).integers(0, run.model.vocab_size, (1, 256 - room)).tolist()
    state = generator.advance(
        generator.start(prompt, GenerationConfig(room)), room, SAMPLING, Think("auto", threshold=-1e9)
    )
    entropies = generator.results(state)[0].entropies
    ways = {
        "plain": Think(),
        "always": Think("always"),
        "auto": Think("auto", threshold=float(np.quantile(entropies, 0.75)), share=0.25),
    }
    states = {name: generator.start(prompt, GenerationConfig(room)) for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(BURSTS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            states[name] = generator.advance(states[name], BURST * (number + 1), SAMPLING, way)
            jax.block_until_ready(states[name].tokens_BxT)
            times[name].append((time.perf_counter() - began) / BURST)
    # Means: how many tokens of a burst think varies. The first burst compiles.
    seconds = {name: statistics.mean(values[1:]) for name, values in times.items()}
    thoughts = generator.results(states["auto"])[0].thoughts[BURST:]
    share = sum(thought is not None for thought in thoughts) / len(thoughts)
    t = run.thinking.thought_length
    return {
        "generate_plain_tokens_per_second": 1 / seconds["plain"],
        "generate_always_tokens_per_second": 1 / seconds["always"],
        "generate_auto_tokens_per_second": 1 / seconds["auto"],
        "generate_always_efficiency": seconds["plain"] / seconds["always"] * (t + 3),
        "generate_auto_efficiency": seconds["plain"] / seconds["auto"] * (1 + share * (t + 2)),
        "generate_auto_share": share,
    }


def measure_batches(rows: int = 8) -> dict[str, float]:
    """Generation of some rows that think before a quarter of their tokens, over what counting rows predicts.

    `alike`: one prompt, sampled in all rows. `unlike`: a prompt each, some of which make the model think more often.
    The seconds are the processor's, of all its cores: they count the same whatever else the machine does.
    """
    run = make_run(context=256)
    decoder, t = Decoder(run.model, run.routing), run.thinking.thought_length
    generator = Generator(Model(decoder, make_params(run, decoder), ByteTokenizer(), run.thinking), end_ids=())
    room = BURST * BURSTS
    rng = np.random.default_rng(0)
    figures: dict[str, float] = {}
    for kind, prompts in (("alike", 1), ("unlike", rows)):
        asked = rng.integers(0, run.model.vocab_size, (prompts, 100)).tolist() * (rows // prompts)

        def generate(way: Think, seed: int, asked: list[list[int]] = asked) -> tuple[float, Any]:
            state = jax.block_until_ready(generator.start(asked, GenerationConfig(room, seed=seed)))
            began = time.process_time()
            state = jax.block_until_ready(generator.advance(state, room, SAMPLING, way))
            return time.process_time() - began, state.record

        entropies = np.asarray(generate(Think("auto", 1e9), 0)[1].entropies_BxT)[:rows, :room]
        auto = Think("auto", float(np.quantile(entropies, 0.75)), 0.25)
        plain, thinking, thoughts = [], [], []
        for seed in range(ROUNDS + 1):  # the first one compiles
            plain.append(generate(Think(), seed)[0])
            seconds, record = generate(auto, seed)
            thinking.append(seconds)
            thoughts.append(np.asarray(record.thinks_BxT)[:rows, :room].sum(1))
        passes = room + (t + 2) * np.array(thoughts[1:])
        expected = statistics.median(plain[1:]) * passes.mean() / room
        figures |= {
            f"generate_auto_efficiency_{rows}_{kind}": expected / statistics.median(thinking[1:]),
            f"generate_auto_share_{rows}_{kind}": float(np.mean(thoughts[1:]) / room),
            f"generate_auto_busiest_{rows}_{kind}": float(np.mean(passes.max(1) / passes.mean(1))),
        }
    return figures


@dataclass(frozen=True)
class Options:
    """Measures what thinking costs in training and in generation."""

    json: bool = False
    """Print one flat JSON object instead of a table."""
    only_batches: bool = False
    """Measure generation in batches alone."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    figures = measure_batches()
    if not options.only_batches:
        figures |= measure_steps() | measure_generation() | measure_memory()
    figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
    if options.json:
        print(json.dumps(figures))
    else:
        Console().print(result_table("Thinking", ["quantity", "value"], list(figures.items())))


if __name__ == "__main__":
    main()
