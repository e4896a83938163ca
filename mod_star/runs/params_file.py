"""Checkpoints that hold parameters only, of imported or upcycled models: one safetensors file.

    RUN/checkpoints/0/params/params.safetensors   parameters, by their paths in the tree: "groups/full_0/block/query"
                      SHA256SUMS                  see `mod_star.runs.checkpoints`

Orbax, which writes the checkpoints of training, copies all arrays before it writes them and compresses them: twice the
memory, and four times the time to load a model of 135M parameters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mod_star.errors import InputError

PARAMS_NAME = "params/params.safetensors"
STORED_TYPE = "F32"
"""Of every array, by safetensors' name."""
ALIGNMENT = 64
"""Bytes; XLA takes over memory that begins at a multiple of this."""


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


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array of a parameters' file. It is read when it is asked for: as a whole, or a slice of its first axis.

    What is read lies in memory that a device may take over without a copy.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Of what is read; in the file it is float32."""
    offset: int
    """In bytes from the file's beginning."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The whole array; always a new one."""
        del copy
        return self._read(self.offset, self.shape).astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """One slice of the first axis."""
        shape = self.shape[1:]
        offset = self.offset + range(self.shape[0])[index] * math.prod(shape) * np.dtype(np.float32).itemsize
        return self._read(offset, shape).astype(self.dtype, copy=False)

    def _read(self, offset: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        size = math.prod(shape) * np.dtype(np.float32).itemsize
        memory = np.empty(size + ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                filled = 0
                while filled < size:  # the kernel reads at most 2 GiB at a time
                    count = file.readinto(memory.data[filled:])
                    if not count:
                        raise OSError("the file has become shorter")
                    filled += count
        except OSError as error:
            raise _not_loaded(self.path.parent.parent, error) from error
        return memory.view(np.float32).reshape(shape)


def open_params_file(checkpoint: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a checkpoint's directory as `StoredArray`s. Only the file's header is read.

    Args:
      checkpoint: RUN/checkpoints/STEP.
      like: their shapes and types, from `jax.eval_shape`.

    Raises:
      InputError: the file can't be read, or holds other parameters.
    """
    path = checkpoint / PARAMS_NAME
    try:
        with safe_open(path, "np") as file:  # which checks the header
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise _not_loaded(checkpoint, error) from error
    leaves = flatten_dict(like, sep="/")
    expected = {name: leaf.shape for name, leaf in leaves.items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise InputError(
                f"checkpoint {checkpoint} cannot be loaded: {name} has shape {stored.get(name)}, expected "
                f"{expected.get(name)}"
            )
    arrays = {}
    for name, leaf in leaves.items():
        if (stored_type := entries[name]["dtype"]) != STORED_TYPE:
            raise InputError(
                f"checkpoint {checkpoint} cannot be loaded: {name} is of type {stored_type}, must be {STORED_TYPE}"
            )
        offset = 8 + length + entries[name]["data_offsets"][0]
        arrays[name] = StoredArray(path, leaf.shape, np.dtype(leaf.dtype), offset)
    return dict(unflatten_dict(arrays, sep="/"))


def read_params_file(checkpoint: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a checkpoint's directory, on the default device. Args and errors as for `open_params_file`."""
    stored = open_params_file(checkpoint, like)
    return dict(jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), may_alias=True), stored))


def _not_loaded(checkpoint: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {reason}")
