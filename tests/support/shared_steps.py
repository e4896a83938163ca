"""First states, training and evaluation steps that one process has compiled, for all later ones configured alike.

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

from mod_star.training import loop, session
from mod_star.training.lowering import batch_shapes

Lower = Callable[..., Any]
LOWER = ((session, "lower_first_state"), (loop, "lower_train_step"), (loop, "lower_eval_step"))
"""Where the package takes its programs from."""
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
    for module, name in LOWER:
        setattr(module, name, _sharing(getattr(module, name), directory))


def key_of(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a program follows from. The objective follows from decoder and run; of arrays only shapes matter."""
    told = {name: value for name, value in options.items() if name != "objective"}
    if "base" in told:
        told["base"] = jax.eval_shape(lambda: told["base"])
    return repr((name, [getattr(each, "fingerprint", each) for each in args], told))


def _sharing(lower: Lower, directory: Path) -> Lower:
    @functools.wraps(lower)
    def lowered(decoder: Any, run: Any, *args: Any, **options: Any) -> Any:
        frozen = "objective" in options and options["objective"].objective.frozen
        if run.parts is not None or frozen or jax.device_count() > 1 or args[-1] is not None:
            return lower(decoder, run, *args, **options)
        key = key_of(lower.__name__, (decoder.config, decoder.routing, run, *args), options)
        path = directory / hashlib.sha256(f"{key} {os.environ.get('XLA_FLAGS')}".encode()).hexdigest()
        arguments = _arguments(lower.__name__, run, args, options)
        state = jax.tree.structure(args[-2]) if lower.__name__ != "lower_eval_step" else None
        return _Step(lambda: lower(decoder, run, *args, **options), path, arguments, state)

    return lowered


def _arguments(name: str, run: Any, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
    """Structure of a step's arguments; see `mod_star.training.lowering`."""
    if name == "lower_first_state":
        return jax.tree.structure(((told["base"],), {}))
    if name == "lower_train_step":
        arrays = (args[1], batch_shapes(run), *told.get("stop_shapes", ()))
    else:
        arrays = (args[0], batch_shapes(run), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.structure((arrays, {}))


class _Step:
    """Stands for a lowered program. `state` is the structure of what it gives alone or first; None: no state."""

    def __init__(self, lower: Callable[[], Any], path: Path, arguments: Any, state: Any) -> None:
        self._lower, self._path, self._arguments, self._state = lower, path, arguments, state

    def compile(self) -> Any:
        """The program of another process, or one of this process's own."""
        if self._path.exists():
            program, results = pickle.loads(self._path.read_bytes())
            return serialize_executable.deserialize_and_load(program, self._arguments, self._results(results))
        _HITS.clear()
        compiled = self._lower().compile()
        if _HITS:  # a program that was read from JAX's cache can be run, but not written again: it lacks its functions
            return compiled
        program, _, results = serialize_executable.serialize(compiled)
        numbered = jax.tree.unflatten(results, range(results.num_leaves))
        # A state has types that pickle does not know.
        kept = numbered if self._state is None else numbered[1] if isinstance(numbered, tuple) else None
        new = self._path.with_suffix(f".{os.getpid()}")
        new.write_bytes(pickle.dumps((program, kept)))
        new.rename(self._path)
        return compiled

    def _results(self, kept: Any) -> Any:
        if self._state is None:
            return jax.tree.structure(kept)
        state = jax.tree.unflatten(self._state, range(self._state.num_leaves))
        return jax.tree.structure(state if kept is None else (state, kept))
