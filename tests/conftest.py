"""Tiny models and batches that tests share, and faster compilation: the programs here are small and run seldom."""

import atexit
import fcntl
import functools
import gc
import importlib.metadata
import os
import re
import shutil
import signal
import sys
import tempfile

# Tests start dozens of interpreters. Where bytecode isn't to be written beside the sources, it is kept here: else each
# of them would compile JAX and all the others anew, which takes as long again as importing them.
if sys.dont_write_bytecode:
    sys.pycache_prefix = os.path.join(os.path.dirname(__file__), os.pardir, ".pytest_cache", "bytecode")
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.abspath(sys.pycache_prefix)
    sys.dont_write_bytecode = False
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""

# A shell has what it starts in the background ignore Ctrl-C. Tests, and the commands that they start, are to heed it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Programs are compiled once for all tests, those in subprocesses and in other workers of pytest-xdist included: workers
# inherit the environment of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mod-star-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
# XLA's CPU compiler takes half the time without LLVM's optimisations, and a sixth without a pipeline of its own for
# each fusion as well (newer versions lack that option). The first changes machine code only; the second also writes
# scatters out as loops, so what is said of a compiled program is said of one with `AS_SHIPPED`. Before JAX starts its
# backend.
#
# Cutting a program up to compile its pieces at the same time doesn't pay for programs as small as these either.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_mlir_context import keep_contexts
from quick_pictures import draw_quickly
from shared_steps import LOWER, program_key, sharing
from some_nightly import some_nightly
from thinking_models import Thinker, scores, thinking_params, thinks
from untrained_runs import write_thinking_run

from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.presets import tiny
from mod_star.runs.directory import read_config
from mod_star.thinking.objective import Places, Talk
from mod_star.thinking.thought import Thought
from mod_star.training.optimizer import make_optimizer
from mod_star.training.state import TrainState
from mod_star.training.train import train

# Tracing makes millions of small objects, hardly any of them in cycles: the collector, which JAX makes slower still,
# would take a fifth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 50, 50)
keep_contexts()
draw_quickly()

AS_SHIPPED: dict[str, str | bool] = (
    {"xla_cpu_use_fusion_emitters": True} if "emitters=false" in os.environ["XLA_FLAGS"] else {}
)
"""`compiler_options` for the programs that users get."""


@pytest.fixture(scope="session", autouse=True)
def each_step_compiled_once() -> Iterator[dict[str, Any]]:
    """A run that goes on in this process, or is compared with another, gets the programs of the first one: these.

    And other processes get them: see shared_steps.py.
    """
    known: dict[str, Any] = {}

    def once(lower: Callable[..., Any]) -> Callable[..., Any]:
        def lowered(decoder: Decoder, run: RunConfig, *args: Any, **options: Any) -> Any:
            key = program_key(lower.__name__, decoder, run, args, options)
            if key not in known:  # with its arguments: as long as they live, nothing else has the ids in the key
                step = lower(decoder, run, *args, **options)
                known[key] = (decoder, run, args, options), SimpleNamespace(compile=functools.cache(step.compile))
            return known[key][1]

        return lowered

    programs = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "steps"
    with pytest.MonkeyPatch.context() as patched:
        for module, name in LOWER:
            patched.setattr(module, name, once(sharing(getattr(module, name), programs)))
        yield known


@pytest.fixture(scope="module", autouse=True)
def programs_forgotten_in_time(each_step_compiled_once: dict[str, Any]) -> Iterator[None]:
    """Every program that a process keeps takes some of its memory mappings, of which Linux allows 65,530. Without more,
    XLA ends the process by a segmentation fault. With JAX 0.12 one worker's tests come to that."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_text().splitlines()) > 20_000:
        each_step_compiled_once.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_run() -> RunConfig:
    """Two groups of (full, routed) with grouped-query attention; six of 24 tokens are routed, the loss chunk is odd."""
    return RunConfig(
        model=ModelConfig(vocab_size=29, width=16, layers=4, heads=4, kv_heads=2, mlp_width=24, context=24),
        routing=RoutingConfig(capacity=0.25, predictor_width=8),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0),
        train=TrainConfig(batch_size=4, loss_chunk=10),
    )


@pytest.fixture(scope="session")
def routed_run(tiny_run: RunConfig) -> RunConfig:
    """One group of one routed block: the smallest model with routing, quick to compile."""
    model = replace(tiny_run.model, layers=1, heads=2, kv_heads=1)
    return replace(tiny_run, model=model, routing=replace(tiny_run.routing, every=1))


@pytest.fixture(scope="session")
def tiny_batch() -> dict[str, jax.Array]:
    """Four sequences of 24: one document; two; three and five pads; one of 4 tokens (fewer than C) and 20 pads."""
    return make_batch([[24], [10, 14], [7, 8, 4], [4]], 24, 29)


def make_batch(documents: list[list[int]], length: int, vocab: int, seed: int = 0) -> dict[str, jax.Array]:
    """A batch with documents of these lengths in each row, then padding; the last token of a document has weight 0."""
    rng = np.random.default_rng(seed)
    shape = (len(documents), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    weights = np.zeros(shape, np.float32)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, start=1):
            span = slice(start, start + size)
            batch["tokens"][row, span] = rng.integers(0, vocab, size)
            batch["targets"][row, span] = rng.integers(0, vocab, size)
            batch["positions"][row, span] = np.arange(size)
            batch["segment_ids"][row, span] = number
            weights[row, start : start + size - 1] = 1
            start += size
    return {name: jnp.asarray(a) for name, a in {**batch, "weights": weights}.items()}


def random_params(model: ModelConfig, routing: RoutingConfig, parts: Parts = DEFAULT_PARTS, seed: int = 0) -> Any:
    """Random parameters of the right shapes, without compiling the initialiser: no zeros, no ones, strong routers."""
    shapes = jax.eval_shape(lambda: init_params(Decoder(model, routing, parts), 0))
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(shape.shape)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif "router" not in name and "predictor" not in name:
            values = values * (1.0 if "embedding" in name else 0.25)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_state(run: RunConfig, parts: Parts = DEFAULT_PARTS, total_steps: int = 100, seed: int = 0) -> TrainState:
    """The state before the first step, with `random_params`."""
    params = random_params(run.model, run.routing, parts, seed)
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = make_optimizer(run, total_steps).init(params)
    return TrainState(step, params, opt_state, jax.random.key(seed + 7), skipped, streak)


@pytest.fixture(scope="session", name="make_batch")
def _make_batch() -> Callable[..., dict[str, jax.Array]]:
    return make_batch


@pytest.fixture(scope="session", name="random_params")
def _random_params() -> Callable[..., Any]:
    return random_params


@pytest.fixture(scope="session", name="random_state")
def _random_state() -> Callable[..., TrainState]:
    return random_state


@pytest.fixture(scope="session")
def scatters() -> Callable[[str], list[str]]:
    """Finds scatters in the text of a program: StableHLO's, XLA's, and loops that XLA made of one."""
    return re.compile(r"\"stablehlo\.scatter\"|\S+ = \S+ scatter\(|op_name=\"[^\"]*/scatter[^\"]*").findall


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the directory that `make` writes, in one worker of pytest-xdist for all of them.

    Each worker gets a copy of its own, so that what a test does to a run by mistake is seen in its own worker alone.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        original, copy = shared / "made-once" / name, tmp_path_factory.mktemp(name) / "run"
        original.parent.mkdir(exist_ok=True)
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not original.exists():
                make(copy)
                shutil.copytree(copy, original.with_suffix(".new"))
                original.with_suffix(".new").rename(original)
        if not copy.exists():
            shutil.copytree(original, copy)
        return copy

    return made


@pytest.fixture(scope="session")
def trained_run(made_once: Callable[..., Path]) -> Path:
    """Directory of a complete run with checkpoints 6 and 12, to load and sample from. Tests leave it as it is."""
    run = tiny()
    run = replace(
        run,
        model=replace(run.model, width=16, layers=2, heads=2, mlp_width=24),
        routing=replace(run.routing, causal_rule="router", headroom=1.0),  # its caches soon are full
        train=replace(run.train, steps=12, checkpoint_every=6, eval_every=0, eval_batches=1),
    )
    return made_once("trained", lambda path: train(run, path, quiet=True))


@pytest.fixture(scope="session")
def thinking_run(trained_run: Path, made_once: Callable[..., Path]) -> Path:
    """Directory of a run of 3 steps that thinks, made from `trained_run` without training. Tests leave it as it is.

    Quiet-STaR is trained, and what it trained is sampled from, elsewhere.
    """
    base = read_config(trained_run)
    run = replace(
        base,
        init_from=str(trained_run),
        train=replace(base.train, objective="quiet_star", steps=3, batch_size=2, checkpoint_every=0),
        thinking=ThinkingConfig(thought_length=3, n_true=2, n_thoughts=2, chunk=40, decider_width=4),
    )
    return made_once("thinking", lambda path: write_thinking_run(path, run))


@pytest.fixture(scope="session", params=some_nightly(["dense", "routed"], "dense"))
def thinker(request: pytest.FixtureRequest, tiny_run: RunConfig, random_params: Any, make_batch: Any) -> Thinker:
    """Two sequences of 24: documents of 13, 7 and 4 pads; one of 24. Routed blocks have room for whatever they want."""
    routing = RoutingConfig(every=0) if request.param == "dense" else replace(tiny_run.routing, headroom=4.0)
    thinking = ThinkingConfig(thought_length=3, n_true=3, n_thoughts=2, chunk=5)
    run = replace(tiny_run, model=replace(tiny_run.model, layers=2), routing=routing, thinking=thinking)
    params = thinking_params(run, random_params(run.model, run.routing))
    return Thinker(run, params, make_batch([[13, 7], [24]], 24, 29))


@pytest.fixture(scope="session")
def thought_of(thinker: Thinker) -> tuple[Places, Thought]:
    """Places and thoughts of `thinker`, sampled at temperature 1."""
    result: tuple[Places, Thought] = thinks(thinker.run)(thinker.params, thinker.batch, jax.random.key(5))
    return result


@pytest.fixture(scope="session")
def scored(thinker: Thinker, thought_of: tuple[Places, Thought]) -> tuple[jax.Array, Talk]:
    """Loss and talk of `thought_of`."""
    result: tuple[jax.Array, Talk] = scores(thinker.run)(thinker.params, thinker.batch, *thought_of)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests counted (with `record_property`), in workers of pytest-xdist too."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
