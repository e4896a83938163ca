"""First states, training and evaluation steps that one process has compiled, for all later ones configured alike.

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
from mod_star.training import loop, session
from mod_star.training.lowering import batch_shapes

Lower = Callable[..., Any]
LOWER = ((session, "lower_first_state"), (loop, "lower_train_step"), (loop, "lower_eval_step"))
"""Where the package takes its programs from."""
_HITS: list[str] = []
"""What JAX has read from its cache of programs since this was emptied."""


def share_steps(directory: Path) -> None:
    """From now on this process takes these programs from `directory`, and leaves there what it compiles."""
    for module, name in LOWER:
        setattr(module, name, sharing(getattr(module, name), directory))


def sharing(lower: Lower, directory: Path) -> Lower:
    """One of `LOWER` whose programs come from `directory`, and are left there.

    Only those of built-in functions on one device without frozen arrays: they follow from what the key is made of.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _listen()

    @functools.wraps(lower)
    def lowered(decoder: Any, run: Any, *args: Any, **options: Any) -> Any:
        frozen = "objective" in options and options["objective"].objective.frozen
        if not _built_in(decoder, run) or frozen or jax.device_count() > 1 or args[-1] is not None:
            return lower(decoder, run, *args, **options)
        key = program_key(lower.__name__, decoder, run, args, options)
        path = directory / hashlib.sha256(f"{key} {os.environ.get('XLA_FLAGS')}".encode()).hexdigest()
        arguments = _arguments(lower.__name__, run, args, options)
        state = jax.tree.structure(args[-2]) if lower.__name__ != "lower_eval_step" else None
        return _Step(lambda: lower(decoder, run, *args, **options), path, arguments, state)

    return lowered


def program_key(name: str, decoder: Any, run: RunConfig, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a program follows from: of arrays the shapes; an objective follows from decoder and run.

    A step follows from less than its run: other data, other seeds and longer runs have the same.
    """
    told = {name: value for name, value in options.items() if name != "objective"}
    if "base" in told:
        told["base"] = jax.eval_shape(lambda: told["base"])
    args = tuple(getattr(each, "fingerprint", each) for each in args)
    if not _built_in(decoder, run):  # a user's functions may look at all of it
        return repr((name, decoder, run, args, told))
    if name == "lower_first_state":
        return repr((name, decoder.config, decoder.routing, run, args, told))
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
