"""Training and evaluation steps that one process has compiled, for all later ones with the same configuration.

The cache of JAX saves their compilation. Tracing and lowering them takes a process of a tiny run longer than all else.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from mod_star.config import OptimizerConfig, RunConfig
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.training import loop
from mod_star.training.lowering import batch_shapes

Lower = Callable[..., Any]
_HITS: list[str] = []
"""What JAX has read from its cache of programs since this was emptied."""


def share_steps(directory: Path) -> None:
    """From now on this process takes its training steps from `directory`, and leaves there what it compiles."""
    for name in ("lower_train_step", "lower_eval_step"):
        setattr(loop, name, sharing(getattr(loop, name), directory))


def sharing(lower: Lower, directory: Path) -> Lower:
    """`lower_train_step` or `lower_eval_step` whose steps come from `directory`, and are left there.

    Only steps of built-in functions on one device without frozen arrays: those follow from what the key is made of.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _listen()

    @functools.wraps(lower)
    def lowered(decoder: Any, run: Any, *args: Any, **options: Any) -> Any:
        objective = options["objective"].objective
        if not _built_in(decoder, run) or objective.frozen or jax.device_count() > 1 or args[-1] is not None:
            return lower(decoder, run, *args, **options)
        told = {name: value for name, value in options.items() if name != "objective"}
        key = (step_key(lower.__name__, decoder, run, args, told), os.environ.get("XLA_FLAGS"))
        path = directory / hashlib.sha256(repr(key).encode()).hexdigest()
        return _Step(lambda: lower(decoder, run, *args, **options), path, _arguments(lower.__name__, run, args, told))

    return lowered


def step_key(name: str, decoder: Any, run: RunConfig, args: tuple[Any, ...], told: dict[str, Any]) -> str:
    """What a step follows from, which is less than its run: other data, other seeds and longer runs have the same."""
    if not _built_in(decoder, run):  # a user's functions may look at all of it
        return repr((name, decoder, run, args, told))
    train = replace(
        run.train, steps=1, flops=None, seed=0, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=0,
        keep_checkpoints=1, max_skipped=1,
    )  # fmt: skip
    less = replace(run, data=RunConfig().data, init_from=None, train=train)
    if name == "lower_eval_step":
        less = replace(less, optimizer=OptimizerConfig())
    elif run.optimizer.schedule == "constant":  # of the run's length, its rate knows half: the longest warm-up
        args = (min(args[0] // 2, run.optimizer.warmup_steps), *args[1:])
    return repr((name, decoder.config, decoder.routing, less, args, told))


def _built_in(decoder: Any, run: RunConfig) -> bool:
    return run.parts is None and bool(decoder.parts == DEFAULT_PARTS)


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(
        lambda event, **_: _HITS.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )


def _arguments(name: str, run: Any, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
    """Structure of a step's arguments; see `mod_star.training.lowering`."""
    if name == "lower_train_step":
        arrays = (args[1], batch_shapes(run), *told.get("stop_shapes", ()))
    else:
        arrays = (args[0], batch_shapes(run), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.structure((arrays, {}))


class _Step:
    """Stands for a lowered step."""

    def __init__(self, lower: Callable[[], Any], path: Path, arguments: Any) -> None:
        self._lower, self._path, self._arguments = lower, path, arguments

    def compile(self) -> Any:
        """The step of another process, or one of this process's own."""
        if self._path.exists():
            program, results = pickle.loads(self._path.read_bytes())
            return serialize_executable.deserialize_and_load(program, self._arguments, self._results(results))
        _HITS.clear()
        compiled = self._lower().compile()
        if _HITS:  # a program that was read from JAX's cache can be run, but not written again: it lacks its functions
            return compiled
        program, _, results = serialize_executable.serialize(compiled)
        numbered = jax.tree.unflatten(results, range(results.num_leaves))
        # What a training step gives first has the structure of its first argument: types that pickle does not know.
        kept = numbered[1] if isinstance(numbered, tuple) else numbered
        new = self._path.with_suffix(f".{os.getpid()}")
        new.write_bytes(pickle.dumps((program, (isinstance(numbered, tuple), kept))))
        new.rename(self._path)
        return compiled

    def _results(self, kept: tuple[bool, Any]) -> Any:
        trains, values = kept
        if not trains:
            return jax.tree.structure(values)
        (state, *_), _ = jax.tree.unflatten(self._arguments, range(self._arguments.num_leaves))
        return jax.tree.structure((state, values))
