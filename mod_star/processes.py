"""Several processes that train together: how they find one another, and what they must agree on.

Each process has its own devices and makes its own rows of every batch. The first one alone prints, and alone writes
what is not an array. With a single process everything here does nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from mod_star.devices_config import ProcessesConfig
from mod_star.errors import InputError

HEARTBEAT_SECONDS = 30
"""How long a process may be silent until the others take it for dead and stop."""


def join_processes(config: ProcessesConfig) -> None:
    """Connects this process with the others, if there are any. Before anything else is asked of JAX.

    Raises:
      InputError: the others can't be reached.
    """
    try:
        jax.distributed.initialize(
            config.coordinator, config.count, config.index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError:  # no cluster that JAX knows of: one process
        if config.coordinator is not None:
            raise
    except RuntimeError as error:
        if config.coordinator is None and "must be called before" in str(error):
            return  # JAX has begun, alone: the command was called as a function
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"processes: cannot be joined ({config.coordinator or 'found by JAX'}): {reason}") from error


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def decide_first(function: Callable[[], Any]) -> Any:
    """What the first process gets from a function, for all: they must not come to different conclusions from files.

    Args:
      function: gives a JSON value. It runs in the first process only.

    Raises:
      InputError: the function raised one; in all processes.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": function()}
        except InputError as error:
            answer = {"error": str(error)}
        except BaseException as error:
            broadcast({"error": f"process 0 failed: {type(error).__name__}: {error}"})
            raise
    answer = broadcast(answer)
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["value"]


def broadcast(value: Any) -> Any:
    """A JSON value of the first process, for all."""
    return gather(value if is_first() else None)[0]


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order, for all."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def leave(code: int) -> NoReturn:
    """Ends this process because of an error that the others may not have.

    With several processes at once: on a usual exit JAX would wait for the others, which wait for this one. They notice
    that it is gone after `HEARTBEAT_SECONDS`.
    """
    if jax.process_count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class SharedStop:
    """Lets all processes stop after the same step, whichever of them was asked to.

    Every step adds a tiny program to the queue: the largest of the signal numbers of all processes. Its result is read
    with the step's other numbers, one step later, so that nothing waits for it.
    """

    def __init__(self, asked: Callable[[], int | None]) -> None:
        self._asked = asked
        self._agreed: int | None = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
            spec = jax.sharding.PartitionSpec
            self._flags = jax.sharding.NamedSharding(mesh, spec("all"))
            self._largest = jax.jit(lambda a: a.max(), out_shardings=jax.sharding.NamedSharding(mesh, spec()))

    def ask(self) -> jax.Array | None:
        """Puts the question into the queue, after a step; None with a single process."""
        if jax.process_count() == 1:
            return None
        own = np.full(1, self._asked() or 0, np.int32)
        pieces = [jax.device_put(own, device) for device in jax.local_devices()]
        shape = (jax.device_count(),)
        return self._largest(jax.make_array_from_single_device_arrays(shape, self._flags, pieces))

    def read(self, answer: jax.Array | None) -> None:
        """Reads an answer, waiting for the step if need be."""
        if answer is not None:
            self._agreed = int(jax.device_get(answer)) or None

    def __call__(self) -> int | None:
        """The signal that asked to stop, if all processes know by now."""
        return self._asked() if jax.process_count() == 1 else self._agreed
