"""Checkpoints: everything a run needs to go on as if it had never stopped, written by Orbax in the background.

    RUN/checkpoints/200/params      parameters (all that sampling reads)
                        training    optimizer state, step, random key, counts of skipped steps
                        data        JSON: state of the data iterator, of all rows of the batch
                        progress    JSON: seconds trained so far
                        SHA256SUMS  checksums of all of these, as `sha256sum -c` reads them

Orbax writes aside and renames when everything is there, the checksums included: a checkpoint exists wholly or not at
all. Orbax itself doesn't notice a flipped bit in an array, therefore the checksums. A model that was imported or
upcycled has parameters only, and those in another form: see `mod_star.runs.params_file`. Loading compares the
checksums of what it reads: of everything to train on, of the parameters alone to sample. `mod-star verify` reads all.

In a bucket (a directory is an `epath.Path` of gs:// then) nothing can be renamed: a checkpoint exists when Orbax has
added its last, empty file. There are no checksums of ours, see `mod_star.runs.buckets`; nor are there in a directory
that it was copied to, where a checkpoint without any counts as whole.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mod_star.data import merge_states
from mod_star.distributed.processes import gather
from mod_star.errors import InputError, TrainingError
from mod_star.runs.disk_errors import disk_errors, silence_disk_errors
from mod_star.runs.integrity import write_sums
from mod_star.runs.orbax_files import orbax_path, placed_like, restore_items
from mod_star.runs.params_file import write_params_file
from mod_star.runs.saved_checkpoints import choose_checkpoint, restore_params, saved_steps
from mod_star.storage import is_address

__all__ = [
    "CheckpointWriter",
    "choose_checkpoint",
    "delete_after",
    "require_training",
    "restore_params",
    "restore_state",
    "save_params",
    "saved_steps",
]

# After which Orbax gives up a save. It goes by the wall clock, which a laptop that slept in the middle of a save, or a
# machine that has just been told the time, find to have jumped: more than any jump.
PATIENCE_SECONDS = 100 * 365 * 24 * 3600

# How errors of XLA's collectives begin, whatever Python makes of them; those of files begin with other words.
OF_PROCESSES = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")


class State(Protocol):
    """What a checkpoint is made from: a frozen dataclass of arrays, such as `mod_star.training.state.TrainState`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> jax.Array:
        """int32 number of steps done; names the checkpoint."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """Parameters; a nested dict, kept apart from the rest."""
        ...

    @property
    def key(self) -> jax.Array:
        """Typed random key; kept as plain numbers."""
        ...


StateT = TypeVar("StateT", bound=State)


class CheckpointWriter:
    """Saves checkpoints into a directory, asynchronously, and deletes all but the latest few.

    All processes save together, each the parts of arrays that it holds, into a directory that all of them see.

    Args:
      directory: RUN/checkpoints, perhaps in a bucket; made if absent. What an interrupted save left there is removed.
      keep: how many checkpoints stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory if is_address(directory) else directory.absolute()
        self._saving = 0
        self._has_failed = False
        self._small: dict[str, Any] | None = None  # of what was saved last: what is read of it, until that is done
        if not is_address(directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            orbax_path(directory),
            item_handlers={
                # Trained weights hardly get smaller; compressing them takes twice the time of writing them.
                "params": ocp.PyTreeCheckpointHandler(use_compression=False),
                "training": ocp.PyTreeCheckpointHandler(use_compression=False),
                "data": ocp.JsonCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(PATIENCE_SECONDS, post_finalization_callback=self._write_sums),
            ),
        )
        self._log_again = silence_disk_errors()

    def save(self, state: State, batches: grain.DatasetIterator, progress: dict[str, Any]) -> None:
        """Copies the state and returns; writing goes on in the background. The state's buffers may be donated at once.

        Args:
          state: what the steps so far made.
          batches: the iterator that the next batch will come from; this process's rows of it.
          progress: JSON values to keep beside it.

        Raises:
          OSError, TrainingError: as for `wait`, of what was saved before.
        """
        step = int(state.step)
        self.wait()
        self._saving = step
        saved = _to_saved(state)
        self._small = {"params": _smallest(saved["params"]), "training": {"step": _shape(saved["training"]["step"])}}
        with self._saves(self._directory / str(step)):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(saved["params"]),
                    training=ocp.args.PyTreeSave(saved["training"]),
                    data=ocp.args.JsonSave(merge_states(gather(batches.get_state()))),
                    progress=ocp.args.JsonSave(progress),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Waits until what was saved is on disk, and opens it again: only then it is saved.

        Raises:
          OSError: it can't be written: the disk is full, say.
          TrainingError: it was written, but can't be opened by the door that `restore_state` goes through.
          jax.errors.JaxRuntimeError: another process is gone, and can't take part in opening it.
        """
        checkpoint = self._directory / str(self._saving)
        with self._saves(checkpoint):
            self._manager.wait_until_finished()
        if self._small is not None:
            small, self._small = self._small, None
            try:
                _require_opened(self._directory, self._saving, small)
            except InputError as error:
                if jax.process_count() > 1 and OF_PROCESSES.match(str(error.__cause__)):
                    raise jax.errors.JaxRuntimeError(str(error.__cause__)) from error
                earlier = [step for step in saved_steps(self._directory) if step != self._saving]
                before = (
                    f"the one before it is {self._directory / str(earlier[-1])}" if earlier else "there is no other"
                )
                raise TrainingError(f"{error}, right after it was written; {before}") from error

    def close(self) -> None:
        """Waits and ends the background threads. What went wrong in a save is `wait`'s to raise."""
        with suppress(OSError), self._saves(self._directory / str(self._saving)):
            self._manager.close()
        if not self._has_failed:  # threads of a save that failed may log until the process ends
            self._log_again()

    @contextmanager
    def _saves(self, checkpoint: Path) -> Iterator[None]:
        """`disk_errors`, and takes note of what goes wrong."""
        try:
            with disk_errors(checkpoint):
                yield
        except BaseException:
            self._has_failed = True
            raise

    def _write_sums(self) -> None:
        # Orbax calls this when all files are written, just before the rename that makes the checkpoint, and only in the
        # first process.
        if is_address(self._directory):
            return
        for written in self._directory.glob(f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}*"):
            write_sums(written)


def save_params(directory: Path, params: dict[str, Any]) -> None:
    """Makes checkpoint 0 of parameters alone: of a model to start from, that no training can go on with.

    Args:
      directory: RUN/checkpoints; made if absent.
      params: float32 arrays of JAX or NumPy; see `mod_star.runs.params_file`.
    """
    beside = directory / "0.new"
    shutil.rmtree(beside, ignore_errors=True)
    write_params_file(beside, params)
    write_sums(beside)
    os.rename(beside, directory / "0")


def require_training(directory: Path) -> None:
    """Raises InputError if a run was imported or upcycled, not trained: its checkpoint holds parameters alone."""
    steps = saved_steps(directory)
    if steps and not (directory / str(steps[-1]) / "training").is_dir():
        run = directory.parent
        raise InputError(
            f"{run}: holds a model without the state of a training; start one with mod-star train NEW --init-from {run}"
        )


def delete_after(directory: Path, step: int) -> None:
    """Deletes the checkpoints of later steps, which a run that goes on from `step` will make again."""
    for later in saved_steps(directory):
        if later > step:
            epath.Path(directory / str(later)).rmtree()


def restore_state(
    directory: Path,
    step: int,
    like: StateT,
    batches: grain.DatasetIterator,
    mesh: Mesh | None = None,
    data: str | None = None,
) -> tuple[StateT, dict[str, Any]]:
    """Loads a checkpoint to train on from; sets `batches` to where it was, unless the data is not what it was.

    Args:
      directory: RUN/checkpoints.
      step: which checkpoint.
      like: the state's shapes and types, as from `jax.eval_shape`; the result is of its class.
      batches: an iterator over the same data, whatever rows of the batch it makes.
      mesh: where the state is to lie, wherever it was when it was saved; None: one device.
      data: what the batches are made from, a `fingerprint` as in `progress`; None: the same as then. Other data is read
        from its beginning: a place in it means nothing.

    Returns:
      The state, and what `progress` was.

    Raises:
      InputError: the checkpoint can't be read or doesn't fit.
    """
    saved = placed_like(jax.eval_shape(_to_saved, like), mesh)
    items = restore_items(
        directory,
        step,
        params=ocp.args.StandardRestore(saved["params"]),
        training=ocp.args.StandardRestore(saved["training"]),
        data=ocp.args.JsonRestore(),
        progress=ocp.args.JsonRestore(),
    )
    if data is None or items["progress"].get("data", data) == data:
        batches.set_state(items["data"])
    training = dict(items["training"])
    key = jax.random.wrap_key_data(training.pop("key"))
    return dataclasses.replace(like, params=items["params"], key=key, **training), items["progress"]


def _require_opened(directory: Path, step: int, small: dict[str, Any]) -> None:
    """Reads a little of everything in a checkpoint, as `restore_state` reads all of it. InputError if that can't be."""
    items = restore_items(
        directory,
        step,
        data=ocp.args.JsonRestore(),
        progress=ocp.args.JsonRestore(),
        **{
            name: ocp.args.PyTreeRestore(
                like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
            )
            for name, like in small.items()
        },
    )
    if int(items["training"]["step"]) != step:
        raise InputError(f"checkpoint {directory / str(step)} is that of step {int(items['training']['step'])}")


def _smallest(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree's smallest array, as shape and place, in a tree with nothing else."""
    path, leaf = min(flatten_dict(tree).items(), key=lambda entry: entry[1].size)
    return dict(unflatten_dict({path: _shape(leaf)}))


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _to_saved(state: State) -> dict[str, Any]:
    """The state as two pytrees that Orbax can write: parameters, and the rest with the key as plain numbers."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
    return {"params": state.params, "training": rest | {"key": jax.random.key_data(state.key)}}
