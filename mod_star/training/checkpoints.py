"""Checkpoints: everything a run needs to go on as if it had never stopped, written by Orbax in the background.

    RUN/checkpoints/200/params      parameters (all that sampling reads)
                        training    optimizer state, step, random key, counts of skipped steps
                        data        state of the grain iterator
                        progress    JSON: seconds trained so far
                        SHA256SUMS  checksums of all of these, as `sha256sum -c` reads them

Orbax writes aside and renames when everything is there, the checksums included: a checkpoint exists wholly or not at
all. Orbax itself doesn't notice a flipped bit in an array, therefore the checksums. A model that was imported or
upcycled has parameters only, and those in another form: see `mod_star.training.params_file`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore, CheckpointSave

from mod_star.errors import InputError
from mod_star.training.params_file import PARAMS_NAME, read_params_file, write_params_file
from mod_star.training.state import TrainState

SUMS_FILE = "SHA256SUMS"
# Orbax rewrites these two after our checksums are made: its time stamps, and an empty marker.
ORBAX_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


class CheckpointWriter:
    """Saves checkpoints into a directory, asynchronously, and deletes all but the latest few.

    Args:
      directory: RUN/checkpoints; made if absent. What an interrupted save left there is removed.
      keep: how many checkpoints stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory.absolute()
        self._saving = 0
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("params", "training", "data", "progress"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sums),
            ),
        )

    def save(self, state: TrainState, batches: grain.DatasetIterator, progress: dict[str, Any]) -> None:
        """Copies the state and returns; writing goes on in the background. The state's buffers may be donated at once.

        Args:
          state: what the steps so far made.
          batches: the iterator that the next batch will come from.
          progress: JSON values to keep beside it.
        """
        step = int(state.step)
        self.wait()
        self._saving = step
        saved = _to_saved(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(saved["params"]),
                training=ocp.args.StandardSave(saved["training"]),
                data=CheckpointSave(batches),
                progress=ocp.args.JsonSave(progress),
            ),
            force=True,
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk, and raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._manager.close()

    def _write_sums(self) -> None:
        # Orbax calls this when all files are written, just before the rename that makes the checkpoint.
        for written in self._directory.glob(f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}*"):
            _write_sums(written)


def save_params(directory: Path, params: dict[str, Any]) -> None:
    """Makes checkpoint 0 of parameters alone: of a model to start from, that no training can go on with.

    Args:
      directory: RUN/checkpoints; made if absent.
      params: float32 arrays of JAX or NumPy; see `mod_star.training.params_file`.
    """
    beside = directory / "0.new"
    shutil.rmtree(beside, ignore_errors=True)
    write_params_file(beside, params)
    _write_sums(beside)
    os.rename(beside, directory / "0")


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in RUN/checkpoints, ascending, damaged ones included."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def choose_checkpoint(directory: Path, step: int | None, option: str | None) -> int | None:
    """The checkpoint to load: the one asked for, else the newest; None if there is none at all.

    Args:
      directory: RUN/checkpoints.
      step: which one; None: the newest.
      option: name of the command's option that chooses a step, for the error message; None: it has none.

    Raises:
      InputError: the step doesn't exist, or its checkpoint is damaged. An older one is offered, never taken silently.
    """
    steps = saved_steps(directory)
    if step is None and not steps:
        return None
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise InputError(
            f"{option} = {step}: {directory} has {'checkpoints ' if steps else 'no checkpoints'}{steps or ''}"
        )
    if damage := find_damage(directory / str(step)):
        older = [earlier for earlier in steps if earlier < step and not find_damage(directory / str(earlier))]
        take = f"{option} {older[-1]} takes" if option and older else "delete it to take"
        offer = f"{take} the one before it" if older else "there is no intact one before it"
        raise InputError(f"checkpoint {directory / str(step)} is damaged ({damage}); {offer}")
    return step


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads all of them."""
    try:
        for name in () if (checkpoint / PARAMS_NAME).is_file() else ORBAX_FILES:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        lines = (checkpoint / SUMS_FILE).read_text().split("\n")
        sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines[:-1])}
        if lines[-1] or not sums:
            return f"{SUMS_FILE} is cut off"
        found = _files(checkpoint)
        for name in sorted(sums.keys() ^ set(found)):
            return f"{name} is missing" if name in sums else f"{name} is not in {SUMS_FILE}"
        for name in found:
            if _sha256(checkpoint / name) != sums[name]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{SUMS_FILE} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return None


def require_training(directory: Path) -> None:
    """Raises InputError if a run was imported or upcycled, not trained: its checkpoint holds parameters alone."""
    steps = saved_steps(directory)
    if steps and not (directory / str(steps[-1]) / "training").is_dir():
        run = directory.parent
        raise InputError(f"{run}: holds a model, not a training to go on with; mod-star train NEW --init-from {run}")


def delete_after(directory: Path, step: int) -> None:
    """Deletes the checkpoints of later steps, which a run that goes on from `step` will make again."""
    for later in saved_steps(directory):
        if later > step:
            shutil.rmtree(directory / str(later))


def restore_state(
    directory: Path, step: int, like: TrainState, batches: grain.DatasetIterator
) -> tuple[TrainState, dict[str, Any]]:
    """Loads a checkpoint to train on from; sets `batches` to where it was.

    Args:
      directory: RUN/checkpoints.
      step: which checkpoint.
      like: the state's shapes and types, as from `jax.eval_shape`.
      batches: an iterator over the same data.

    Returns:
      The state, and what `progress` was.

    Raises:
      InputError: the checkpoint can't be read or doesn't fit.
    """
    saved = _placed(jax.eval_shape(_to_saved, like))
    found = _restore(
        directory,
        step,
        params=ocp.args.StandardRestore(saved["params"]),
        training=ocp.args.StandardRestore(saved["training"]),
        data=CheckpointRestore(batches),
        progress=ocp.args.JsonRestore(),
    )
    training = dict(found["training"])
    key = jax.random.wrap_key_data(training.pop("key"))
    return TrainState(params=found["params"], key=key, **training), found["progress"]


def restore_params(directory: Path, step: int, like: Any) -> dict[str, Any]:
    """Loads only the parameters. Args and errors as for `restore_state`, with `like` the parameters' shapes."""
    if (directory / str(step) / PARAMS_NAME).is_file():
        return read_params_file(directory / str(step), like)
    return _restore(directory, step, params=ocp.args.StandardRestore(_placed(like)))["params"]


def _restore(directory: Path, step: int, **items: Any) -> Any:
    checkpoint = (directory / str(step)).absolute()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(checkpoint, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax, tensorstore and JSON each have their own
        raise _not_loaded(checkpoint, error) from error


def _not_loaded(checkpoint: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {reason}")


def _to_saved(state: TrainState) -> dict[str, Any]:
    """The state as two pytrees that Orbax can write: parameters, and the rest with the key as plain numbers."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
    return {"params": state.params, "training": rest | {"key": jax.random.key_data(state.key)}}


def _placed(like: Any) -> Any:
    """Shapes with the default device as their place; without it Orbax would look for the devices that saved them."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), like)


def _files(checkpoint: Path) -> list[str]:
    """Paths of the files that have checksums, relative and sorted. Hidden ones are none of ours."""
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(
        str(path) for path in files if str(path) not in (*ORBAX_FILES, SUMS_FILE) and not path.name.startswith(".")
    )


def _write_sums(checkpoint: Path) -> None:
    lines = [f"{_sha256(checkpoint / name)}  {name}\n" for name in _files(checkpoint)]
    (checkpoint / SUMS_FILE).write_text("".join(lines))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
