"""Several processes that train together: how they find one another, and what they must agree on.

Each process has its own devices and makes its own rows of every batch. The first one alone prints, and alone writes
what is not an array. With a single process everything here does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from mod_star.config import ProcessesConfig
from mod_star.errors import InputError, UnavailableError

HEARTBEAT_SECONDS = 30
"""How long a process may be silent until the others take it for dead and stop."""
JOIN_SECONDS = 300
"""How long a process waits for the first one to listen; then JAX waits as long for all of them."""


def join_processes(config: ProcessesConfig) -> None:
    """Connects this process with the others, if there are any. Before anything else is asked of JAX.

    If one of them is still missing after 300 s, JAX aborts the others (SIGABRT, with a stack dump), and so it would if
    the first one can't be reached. That is why a process that is told where the first one is looks for it before.

    Raises:
      UnavailableError: the first process can't be reached, or JAX can't find out what cluster there is.
    """
    if config.coordinator is not None and config.index:
        _wait_for(config.coordinator)
    try:
        jax.distributed.initialize(
            config.coordinator, config.count, config.index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError:  # no cluster that JAX knows of: one process
        if config.coordinator is not None:
            raise
    except (RuntimeError, OSError) as error:
        if config.coordinator is None and "must be called before" in str(error):
            return  # JAX has begun, alone: the command was called as a function
        raise _not_joined(config.coordinator or "found by JAX", error) from error


def _wait_for(coordinator: str) -> None:
    """Waits until something listens at HOST:PORT. Raises UnavailableError if nothing does for `JOIN_SECONDS`."""
    host, _, port = coordinator.rpartition(":")
    limit = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=10).close()
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > limit or isinstance(error, UnicodeError):  # no host can be called that
                raise _not_joined(coordinator, error) from error
        time.sleep(0.5)


def _not_joined(where: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(error).split())[:200]
    return UnavailableError(f"processes: cannot be joined ({where}): {reason}")


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def decide_first(function: Callable[[], Any]) -> Any:
    """What the first process gets from a function, for all: they must not come to different conclusions from files.

    Args:
      function: gives a JSON value. It runs in the first process only.

    Raises:
      InputError: the function raised one; in all processes, `UnavailableError` as such.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": function()}
        except InputError as error:
            answer = {"error": str(error), "unavailable": isinstance(error, UnavailableError)}
        except BaseException as error:
            broadcast({"error": f"process 0 failed: {type(error).__name__}: {error}", "unavailable": True})
            raise
    answer = broadcast(answer)
    if "error" in answer:
        raise (UnavailableError if answer["unavailable"] else InputError)(answer["error"])
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
    try:
        alone = jax.process_count() == 1
    except Exception:  # that is the error: JAX has no devices, whatever it raises then
        alone = not jax.distributed.is_initialized()
    if alone:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class SharedStop:
    """Lets all processes stop after the same step, whichever of them was asked to.

    Every step takes the signal numbers of all processes, and gives their largest back as its metric "stop", which is
    read with the others, one step later: nothing waits for it. It is part of the step's program, for a program of its
    own could overtake the step in one process and not in another, and their messages would be taken for one another.

    Args:
      signal: gives the number of the signal that asked this process to stop; None: none did.
      mesh: all devices of all processes; None: one device.
    """

    def __init__(self, signal: Callable[[], int | None], mesh: jax.sharding.Mesh | None) -> None:
        self._signal = signal
        self._agreed: int | None = None
        self.shapes: tuple[jax.ShapeDtypeStruct, ...] = ()
        """Of what the step takes after its batch: nothing with a single process."""
        if jax.process_count() > 1:
            assert mesh is not None
            places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
            self.shapes = (jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=places),)

    def ask(self) -> tuple[jax.Array, ...]:
        """What the next step takes after its batch."""
        own = np.full(1, self._signal() or 0, np.int32)
        return tuple(
            jax.make_array_from_single_device_arrays(
                like.shape, like.sharding, [jax.device_put(own, device) for device in jax.local_devices()]
            )
            for like in self.shapes
        )

    def read(self, answer: int | None) -> None:
        """Takes note of a step's metric "stop"; None: it has none."""
        self._agreed = int(answer or 0) or None

    def __call__(self) -> int | None:
        """The signal that asked to stop, if all processes know by now."""
        return self._signal() if jax.process_count() == 1 else self._agreed
