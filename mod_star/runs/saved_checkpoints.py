"""Which checkpoints a run has, which of them is loaded, and its parameters: all that sampling needs of checkpoints.

Orbax, which wrote the checkpoints of training, is imported only to read one of them: importing it takes a second and
30 MB, and an imported or upcycled model has none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mod_star.distributed.sharding import place, shardings
from mod_star.errors import InputError
from mod_star.runs.integrity import COMMIT_FILE, SUMS_FILE, find_damage
from mod_star.runs.params_file import PARAMS_NAME, open_params_file, read_params_file
from mod_star.storage import find_files, is_address, read_file


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in RUN/checkpoints, ascending, damaged ones included."""
    if is_address(directory):  # nothing is renamed when all is there; what a killed save has left is no checkpoint
        ends = {COMMIT_FILE, SUMS_FILE}
        complete = {path.parent.name for path in map(Path, find_files(f"{directory}/*/*")) if path.name in ends}
        return sorted(int(name) for name in complete if name.isdecimal())
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def choose_checkpoint(directory: Path, step: int | None, option: str | None, item: str | None = None) -> int | None:
    """The checkpoint to load: the one asked for, else the newest; None if there is none at all.

    Args:
      directory: RUN/checkpoints.
      step: which one; None: the newest.
      option: name of the command's option that chooses a step, for the error message; None: it has none.
      item: what of it will be read, such as `PARAMS_ITEM`; None: everything.

    Raises:
      InputError: the step doesn't exist, or what will be read of its checkpoint is damaged. An older one is offered,
        never taken silently.
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
    if damage := find_damage(directory / str(step), item):
        older = [earlier for earlier in steps if earlier < step and not find_damage(directory / str(earlier), item)]
        take = f"{option} {older[-1]} takes" if option and older else "delete it to take"
        offer = f"{take} the one before it" if older else "there is no intact one before it"
        raise InputError(f"checkpoint {directory / str(step)} is damaged ({damage}); {offer}")
    return step


def stored_params(directory: Path, step: int, like: Any) -> dict[str, Any] | None:
    """The parameters as arrays that are read when they are asked for, see `mod_star.runs.params_file.StoredArray`.

    None: Orbax wrote them, or they are in a bucket. Args and errors as for `restore_params`.
    """
    checkpoint = directory / str(step)
    if is_address(directory) or not (checkpoint / PARAMS_NAME).is_file():
        return None
    return open_params_file(checkpoint, like)


def restore_params(directory: Path, step: int, like: Any, mesh: Mesh | None = None) -> dict[str, Any]:
    """Loads only the parameters.

    Args:
      directory: RUN/checkpoints.
      step: which checkpoint.
      like: the parameters' shapes and types, as from `jax.eval_shape`.
      mesh: where they are to lie, wherever they were when they were saved; None: one device.

    Raises:
      InputError: the checkpoint can't be read or doesn't fit.
    """
    checkpoint = directory / str(step)
    if (checkpoint / PARAMS_NAME).is_file():
        with _here(checkpoint) as local:
            params = read_params_file(local, like)
        return params if mesh is None else place(params, shardings(mesh, like))
    from mod_star.runs.orbax_files import restore_params_of_training

    return restore_params_of_training(directory, step, like, mesh)


@contextmanager
def _here(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint of parameters alone as a directory; one in a bucket is fetched for the time being."""
    if not is_address(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        fetched = Path(folder) / PARAMS_NAME
        fetched.parent.mkdir()
        fetched.write_bytes(read_file(str(checkpoint / PARAMS_NAME)))
        yield Path(folder)
