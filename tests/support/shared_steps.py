"""Training and evaluation steps that one process has compiled, for all later ones with the same configuration.

The cache of JAX saves their compilation. Tracing and lowering them takes a process of a tiny run longer than all else.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from mod_star.training import loop
from mod_star.training.lowering import batch_shapes

Lower = Callable[..., Any]
_HITS: list[str] = []
"""What JAX has read from its cache of programs since this was emptied."""


def share_steps(directory: Path) -> None:
    """From now on this process takes its training steps from `directory`, and leaves there what it compiles.

    Only steps of built-in functions on one device without frozen arrays: those follow from what the key is made of.
    """
    directory.mkdir(parents=True, exist_ok=True)
    jax.monitoring.register_event_listener(
        lambda event, **_: _HITS.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )
    for name in ("lower_train_step", "lower_eval_step"):
        setattr(loop, name, _sharing(getattr(loop, name), directory))


def _sharing(lower: Lower, directory: Path) -> Lower:
    @functools.wraps(lower)
    def lowered(decoder: Any, run: Any, *args: Any, **options: Any) -> Any:
        objective = options["objective"].objective
        if run.parts is not None or objective.frozen or jax.device_count() > 1 or args[-1] is not None:
            return lower(decoder, run, *args, **options)
        told = {name: value for name, value in options.items() if name != "objective"}
        key = (lower.__name__, decoder.config, decoder.routing, run, args, told, os.environ.get("XLA_FLAGS"))
        path = directory / hashlib.sha256(repr(key).encode()).hexdigest()
        return _Step(lambda: lower(decoder, run, *args, **options), path, _arguments(lower.__name__, run, args, told))

    return lowered


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
