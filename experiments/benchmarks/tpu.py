"""What a TPU would take, by the estimates of XLA's own compiler: Mixture-of-Depths against dense, and thinking.

    python -m experiments.benchmarks.tpu           # a table
    python -m experiments.benchmarks.tpu --json    # one flat JSON object
    python -m experiments.benchmarks.tpu --quick   # decoding at batch 16 and a training step, width 768 alone

Needs jax[tpu], which brings the compiler, but no TPU: programs are compiled for one v5e chip, in bfloat16, and what XLA
writes beside their instructions is added up (`mod_star.planning.cycles`). That is a model, good for ratios. Beside a
ratio stands its limit: for training, forward pass, prefill and thinking in training the ratio of the operations, as
counted from the configuration; for decoding that of the bytes that a token has to read. Figures are written to `--out`
as soon as a program has been compiled, with a hash of what was compiled: a later call takes from there what has not
changed.

Shapes: width 768 (12 heads; 12 layers in training, 2 elsewhere) and that of Mistral 7B (width 4,096, 32 heads, 8 of
keys, feed-forward 14,336; 2 layers). Two layers are one group, of a full and a routed block: enough for ratios, and all
that fits on one chip beside an optimizer. Vocabularies of 4,096 and 8,192 keep the share of the LM head small, as in
whole models. MoD routes 12.5 % in every second block.

On two idle cores a decoding program of width 768 takes 8 to 20 s, one of width 4,096 up to a minute, a training step
half a minute or more: some 20 minutes in all, `--quick` two or three.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.benchmarks import tpu_programs
from mod_star.atomic_files import write_atomically
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding.think import Think
from mod_star.errors import require
from mod_star.flops import forward_flops, sampling_flops, scoring_flops, training_step_flops
from mod_star.model.routing import causal_slots
from mod_star.model.rows import rows_at_once
from mod_star.planning.cycles import Expected, costliest_loop, program_cycles
from mod_star.planning.hlo import parse
from mod_star.planning.program_cost import program_cost
from mod_star.planning.topologies import devices_of, parse_topology, prepare_environment
from mod_star.views.terminal import result_table

TOPOLOGY = parse_topology("v5e:1x1")
CHIP = TOPOLOGY.chip
ARMS = {"dense": RoutingConfig(every=0), "mod": RoutingConfig(every=2, capacity=0.125, predictor_width=128)}
BATCHES, CONTEXTS = (1, 16, 64), (1024, 8192)
MODELS = {
    "w768": ModelConfig(vocab_size=8192, width=768, layers=12, heads=12, context=1024, dtype="bfloat16", remat="dots"),
    "w4096": ModelConfig(
        vocab_size=4096, width=4096, layers=2, heads=32, kv_heads=8, mlp_width=14_336, context=2048, dtype="bfloat16",
        tie_embeddings=False, remat="full",
    ),
}  # fmt: skip
TRAINED_AT_ONCE = {"w768": 8, "w4096": 1}
THINKING = ThinkingConfig(thought_length=8, n_true=4, n_thoughts=2, chunk=32)
ON_AVERAGE = Expected()
AUTO_BATCH, AUTO_SHARE = 8, 0.25


@dataclass(frozen=True)
class Entry:
    """A program, and what it is compared with."""

    lower: Callable[[jax.Device], Any]
    """Gives it, lowered; decoding gives the shapes of its caches as well."""
    expected: Expected = ON_AVERAGE
    of_a_token: bool = False
    """Whether one iteration of its costliest loop counts, not the whole."""
    flops: float | None = None
    """Operations, counted from the configuration."""
    base: str | None = None
    """The entry that it is divided by."""
    limit: float | None = None
    """What that ratio would be, if nothing but the operations or the bytes counted."""


def expected_chunks(rows: int, share: float) -> float:
    """How many chunks `mod_star.model.rows` computes on average, if each row is wanted with this probability."""
    chunk = rows_at_once(rows, share)
    wanted = [math.comb(rows, n) * share**n * (1 - share) ** (rows - n) for n in range(rows + 1)]
    return sum(probability * math.ceil(n / chunk) for n, probability in enumerate(wanted))


def token_bytes(run: RunConfig, batch: int) -> tuple[float, float]:
    """Bytes that decoding one token of each row has to read: of weights, and of caches.

    A full block reads its weights and every row's cache; a routed block its weights if a row is routed, and the caches
    of routed rows.
    """
    model, routing = run.model, run.routing
    D, E = model.width, model.head_size
    block = D * E * 2.0 * (model.heads + model.key_heads) + 3 * D * model.hidden_width
    slot = 2.0 * model.key_heads * E
    weights, caches = model.vocab_size * D * 1.0, 0.0
    for index in range(model.layers):
        if routing.every and (index + 1) % routing.every == 0:
            share = routing.capacity
            weights += (1 - (1 - share) ** batch) * block + D * (routing.predictor_width + 1)
            caches += share * batch * causal_slots(routing, model.context) * slot
        else:
            weights += block
            caches += batch * model.context * slot
    return 2 * weights, 2 * caches


def run_of(model: ModelConfig, arm: str, batch: int, **changes: Any) -> RunConfig:
    """The run of a model and an arm; `changes` are fields of the model."""
    return RunConfig(replace(model, **changes), ARMS[arm], train=TrainConfig(batch_size=batch, loss_chunk=256))


def entries(quick: bool) -> dict[str, Entry]:
    """All programs by name, dense ones before those that are divided by them."""
    found: dict[str, Entry] = {}
    for shape in ("w768",) if quick else MODELS:
        for batch in (16,) if quick else BATCHES:
            for context in CONTEXTS:
                found |= dict(_decoding(shape, batch, context))
        found |= dict(_training(shape, quick))
    return found if quick else found | dict(_thinking())


def _pair(name: str, make: Callable[[str], Entry], measure: Callable[[str], float]) -> Iterator[tuple[str, Entry]]:
    """An entry per arm; the limit is the ratio of a measure of both."""
    yield f"{name}_dense", make("dense")
    limit = measure("mod") / measure("dense")
    yield f"{name}_mod", replace(make("mod"), base=f"{name}_dense", limit=limit)


def _training(shape: str, quick: bool) -> Iterator[tuple[str, Entry]]:
    model, batch = MODELS[shape], TRAINED_AT_ONCE[shape]
    run = partial(run_of, model, batch=batch)
    work: dict[str, tuple[Callable[..., Any], Callable[[str], float]]] = {
        "train": (tpu_programs.train_step, lambda arm: training_step_flops(run(arm)))
    }
    if not quick:
        forward = lambda arm: forward_flops(model, ARMS[arm], model.context)  # noqa: E731
        # Top-k routing does not ask the predictor, and XLA leaves it out.
        work["forward"] = (tpu_programs.forward_pass, lambda arm: batch * (forward(arm).total - forward(arm).predictor))
    for kind, (lower, flops) in work.items():
        make = lambda arm, lower=lower, flops=flops: Entry(partial(lower, run(arm)), flops=flops(arm))  # noqa: E731
        yield from _pair(f"{shape}_{kind}", make, flops)
    if not quick:
        short = partial(run_of, model, batch=8, layers=2)

        def flops_of_prompts(arm: str) -> float:
            """Of the prompts alone; no logits are computed of them."""
            counted = forward_flops(short(arm).model, ARMS[arm], model.context - tpu_programs.ROOM)
            return 8 * (counted.total - counted.head)

        prefill = lambda arm: Entry(  # noqa: E731
            lambda device: tpu_programs.prefill(short(arm), 8, device), flops=flops_of_prompts(arm)
        )
        yield from _pair(f"{shape}_prefill", prefill, flops_of_prompts)


def _decoding(shape: str, batch: int, context: int) -> Iterator[tuple[str, Entry]]:
    run = partial(run_of, MODELS[shape], batch=batch, layers=2, context=context)
    share = ARMS["mod"].capacity
    chunks = expected_chunks(batch, share)
    expected = Expected(chunks, share * batch / chunks, share)
    make = lambda arm: Entry(  # noqa: E731
        lambda device: tpu_programs.decode(run(arm), batch, device), expected, of_a_token=True
    )
    yield from _pair(f"{shape}_decode_b{batch}_s{context}", make, lambda arm: sum(token_bytes(run(arm), batch)))


def _thinking() -> Iterator[tuple[str, Entry]]:
    model = replace(MODELS["w768"], context=128, layers=4)

    def run(arm: str) -> RunConfig:
        quiet = run_of(model, arm, 4)
        return replace(quiet, train=replace(quiet.train, objective="quiet_star"), thinking=THINKING)

    def sampled(arm: str) -> float:
        return 4 * (sampling_flops(run(arm), 128) + forward_flops(model, ARMS[arm], 128)).total

    kinds: dict[str, tuple[Callable[..., Any], Callable[[str], float]]] = {
        "sampling": (tpu_programs.sampling, sampled),
        "scoring": (tpu_programs.scoring, lambda arm: 4 * scoring_flops(run(arm), 128).total),
    }
    for kind, (lower, flops) in kinds.items():
        make = lambda arm, lower=lower, flops=flops: Entry(partial(lower, run(arm)), flops=flops(arm))  # noqa: E731
        yield from _pair(f"thinking_{kind}", make, flops)
    quiet = replace(run("dense"), model=replace(model, context=1024, layers=2))
    plain, auto = Think(), Think("auto", threshold=1.0, share=AUTO_SHARE)
    weights, caches = token_bytes(quiet, AUTO_BATCH)
    passes = THINKING.thought_length + 2  # <start>, the thought and <end>
    thought = passes * ((1 - (1 - AUTO_SHARE) ** AUTO_BATCH) * weights + AUTO_SHARE * caches)
    decode = lambda think: lambda device: tpu_programs.decode(quiet, AUTO_BATCH, device, think)  # noqa: E731
    expected = Expected(expected_chunks(AUTO_BATCH, AUTO_SHARE), taken=AUTO_SHARE)
    yield "thinking_never", Entry(decode(plain), of_a_token=True)
    limit = 1 + thought / (weights + caches)
    yield "thinking_auto", Entry(decode(auto), expected, of_a_token=True, base="thinking_never", limit=limit)


def figures_of(entry: Entry, device: jax.Device, known: dict[str, Any]) -> dict[str, Any]:
    """Cycles, bytes and copies of one program; those of `known` if they are of the same."""
    lowered = entry.lower(device)
    lowered, caches = lowered if isinstance(lowered, tuple) else (lowered, None)
    source = hashlib.sha256(f"{jax.__version__} {entry.expected} {lowered.as_text()}".encode()).hexdigest()
    if known.get("source") == source:
        return known
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"source": source, "error": str(error).splitlines()[0]}
    assert CHIP is not None and CHIP.flops_per_cycle is not None and CHIP.clock is not None
    program = parse(compiled.as_text() or "")
    body = costliest_loop(program, CHIP) if entry.of_a_token else None
    cycles = program_cycles(program, CHIP, entry.expected, body)
    assert cycles is not None
    memory: Any = compiled.memory_analysis()
    figures: dict[str, Any] = {
        "cycles": cycles.total,
        **{name: value for name, value in asdict(cycles).items() if name != "by_opcode"},
        "microseconds": 1e6 * cycles.total / CHIP.clock,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    if entry.flops is not None:
        figures["flop_share"] = entry.flops / CHIP.flops_per_cycle / cycles.total
        figures["bandwidth_share"] = program_cost(program).traffic / CHIP.hbm_bandwidth * CHIP.clock / cycles.total
    if caches is not None and body is not None:
        figures["cache_copies"] = len(tpu_programs.cache_writes(program, body, caches))
    return {"source": source, "compile_seconds": time.perf_counter() - began, **figures}


def measure(wanted: dict[str, Entry], out: Path) -> dict[str, dict[str, Any]]:
    """Figures of programs by name, two compiled at a time; each is written as soon as it is there."""
    device = devices_of(TOPOLOGY)[0]
    done: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    began = time.perf_counter()

    with ThreadPoolExecutor(2) as pool:
        running = {
            pool.submit(figures_of, entry, device, done.get(name, {})): name for name, entry in wanted.items()
        }  # fmt: skip
        for number, future in enumerate(as_completed(running), start=1):
            name = running[future]
            done[name] = future.result()
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, json.dumps(done, indent=1) + "\n")
            passed = time.perf_counter() - began
            print(f"{number}/{len(wanted)} {name}: {passed:.0f} s", file=sys.stderr, flush=True)
    results = {name: dict(done[name]) for name in wanted}
    for name, entry in wanted.items():
        base = results.get(entry.base or "", {})
        if "cycles" in results[name] and "cycles" in base:
            ratio = results[name]["cycles"] / base["cycles"]
            results[name] |= {"ratio": ratio, "limit": entry.limit, "over_limit": ratio / (entry.limit or math.nan)}
    return results


def table_rows(results: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row per program; of one that has no room on the chip, what the compiler said."""
    rows: list[tuple[Any, ...]] = []
    for name, figures in results.items():
        if "error" in figures:
            rows.append((name, "no room on the chip", None, None, None, None, None))
            continue
        shown = [figures.get(key) for key in ("ratio", "limit", "over_limit")]
        share = figures.get("flop_share")
        ratios = [None if value is None else f"{value:.2f}" for value in shown]
        of_peak = None if share is None else f"{share:.0%}"
        rows.append((name, f"{figures['microseconds']:,.0f}", *ratios, of_peak, figures.get("cache_copies")))
    return rows


@dataclass(frozen=True)
class Options:
    """Compiles programs for a v5e chip that need not be there, and adds up XLA's estimates of their cycles."""

    json: bool = False
    """Print one flat JSON object instead of a table."""
    quick: bool = False
    """Width 768 alone: a training step, and decoding at batch 16."""
    only: str = ""
    """Programs alone whose names contain this, such as decode or w768_train."""
    out: Path = Path("runs/benchmark_tpu.json")
    """File that holds what has been compiled; a later call takes from it what has not changed."""


def main() -> None:
    """Compiles and prints."""
    options = tyro.cli(Options)
    prepare_environment()
    jax.config.update("jax_platforms", "cpu")  # where JAX had read its environment before
    wanted = {name: entry for name, entry in entries(options.quick).items() if options.only in name}
    require(bool(wanted), "--only", options.only, "must be part of a program's name, such as decode or w768_train")
    results = measure(wanted, options.out)
    if options.json:
        hidden = ("source", "compile_seconds")
        flat = {
            f"{name}_{key}": v for name, figures in results.items() for key, v in figures.items() if key not in hidden
        }
        print(json.dumps({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in flat.items()}))
    else:
        columns = ("program", "us", "over dense", "limit", "over the limit", "FLOPs at the peak", "copies of caches")
        Console().print(result_table("One v5e chip, by XLA's estimates", columns, table_rows(results)))


if __name__ == "__main__":
    main()
