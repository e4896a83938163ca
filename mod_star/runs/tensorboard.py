"""Scalars as TensorBoard reads them."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

FLUSH_SECONDS = 30.0
"""Time after which what was written is to be seen in TensorBoard."""


class EventFile:
    """Appends scalars to a new event file.

    tensorboardX's `SummaryWriter` does that too, but in a thread of its own: if the disk is full the thread dies, the
    training steps hear nothing of it, and wait forever as soon as ten values are in the queue.

    Args:
      directory: where the file goes; made if absent.
      first_step: TensorBoard is told to forget what other files there say about this step and later ones.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # Named by the second; the suffix keeps a quick resume from writing over its predecessor's.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.from_step_{first_step}"
        self._file = RecordWriter(str(directory / name))
        self._flush_at = -math.inf
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values of a step; they can be read at once or in half a minute. Raises OSError if they can't be."""
        for name, value in values.items():
            # tensorboardX's own `scalar` warns about every NaN on standard error.
            self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))
        if time.monotonic() >= self._flush_at:
            self._file.flush()
            self._flush_at = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        """Writes what is left. Closing twice is harmless."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
