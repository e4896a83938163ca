"""Checkpoints that hold parameters only, of imported or upcycled models: one safetensors file.

    RUN/checkpoints/0/params/params.safetensors   parameters, by their paths in the tree: "groups/full_0/block/query"
                      SHA256SUMS                  see `mod_star.runs.checkpoints`

Orbax, which writes the checkpoints of training, copies all arrays before it writes them and compresses them: twice the
memory, and four times the time to load a model of 135M parameters.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mod_star.errors import InputError

PARAMS_NAME = "params/params.safetensors"


def write_params_file(checkpoint: Path, params: dict[str, Any]) -> None:
    """Writes the file into a checkpoint's directory. Arrays in host memory are not copied.

    Raises:
      OSError: it can't be written.
    """
    file = checkpoint / PARAMS_NAME
    file.parent.mkdir(parents=True)
    leaves = flatten_dict(params, sep="/")
    try:
        save_file({name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    shutil.copymode(file.parent, file)  # `save_file` leaves it to its owner alone
    os.chmod(file, file.stat().st_mode & 0o666)
    _require_holds(file, {name: tuple(leaf.shape) for name, leaf in leaves.items()})


def _require_holds(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises OSError unless a file that was just written can be opened, and holds arrays of these shapes."""
    try:
        with safe_open(file, "np") as opened:
            written = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(5, f"cannot be opened after it was written ({error})", str(file)) from error
    if written != shapes:
        raise OSError(5, "does not hold what was written", str(file))


def read_params_file(checkpoint: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a checkpoint's directory, on the default device.

    Args:
      checkpoint: RUN/checkpoints/STEP.
      like: their shapes and types, from `jax.eval_shape`.

    Raises:
      InputError: the file can't be read, or holds other parameters.
    """
    path = checkpoint / PARAMS_NAME
    try:
        with safe_open(path, "np") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        leaves = flatten_dict(like, sep="/")
        expected = {name: leaf.shape for name, leaf in leaves.items()}
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                raise InputError(
                    f"checkpoint {checkpoint} cannot be loaded: {name} has shape {stored.get(name)}, expected "
                    f"{expected.get(name)}"
                )
        return unflatten_dict({name: _read(path, leaf, name) for name, leaf in leaves.items()}, sep="/")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {reason}") from error


def _read(path: Path, like: Any, name: str) -> jax.Array:
    # Mapped anew for each array: what was read is out of memory again.
    with safe_open(path, "np") as file:
        array = file.get_tensor(name).astype(like.dtype, copy=False)
    return jax.device_put(array, may_alias=True)
