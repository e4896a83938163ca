"""What a training session saves: checkpoints, and which of them is the last good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain

from mod_star.errors import InputError
from mod_star.runs import checkpoints
from mod_star.runs.buckets import checkpoints_of
from mod_star.training.state import TrainState


class Saver:
    """Saves the state and the place in the data.

    Args:
      path: directory of the run.
      keep: how many checkpoints stay.
      batches: the iterator that the steps take their batches from.
      data: `mod_star.data.identity.fingerprint` of what they are made from.
      last_saved: step of the checkpoint that the session goes on from; None: it starts from the beginning.
    """

    def __init__(
        self, path: Path, keep: int, batches: grain.DatasetIterator, data: str, last_saved: int | None
    ) -> None:
        self._batches, self._data = batches, data
        self._writer = checkpoints.CheckpointWriter(checkpoints_of(path), keep)
        self.last_saved = last_saved
        """Step of the newest checkpoint, None: there is none."""

    def save(self, state: TrainState, seconds: float) -> None:
        """Saves a checkpoint in the background. Errors as for `mod_star.runs.checkpoints.CheckpointWriter.save`."""
        progress: dict[str, Any] = {"seconds": seconds, "data": self._data}
        self._writer.save(state, self._batches, progress)
        self.last_saved = int(state.step)

    def wait(self) -> None:
        """Waits until what was saved is on disk. Errors as for `mod_star.runs.checkpoints.CheckpointWriter.wait`."""
        self._writer.wait()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._writer.close()


def last_good(directory: Path) -> str:
    """Says which checkpoint in RUN/checkpoints a run can go on from."""
    try:
        saved = checkpoints.saved_steps(directory)
    except InputError:  # of the bucket, which is what has failed
        return f"what was saved is in {directory}"
    return f"the last good checkpoint is {directory / str(saved[-1])}" if saved else "there is no checkpoint"
