"""Tensors of safetensors files, one file or several with an index, checked before anything is read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from mod_star.errors import InputError
from mod_star.pretrained.source import SourceTensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_safetensors(directory: Path) -> dict[str, SourceTensor]:
    """The tensors of a directory's model.safetensors, or of the shards that its index names.

    The files' headers are checked by the `safetensors` package: lengths, offsets, overlaps, the file's size. A file is
    mapped only while one of its tensors is read, so that it does not add to the memory in use.

    Raises:
      InputError: there are none (a pickle is never loaded), a file is damaged or missing, or index and files differ.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if index.is_file():
        return _sharded(index)
    if single.is_file():
        return _tensors(single)
    others = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if len(others) == 1:
        return _tensors(directory / others[0])
    if pickles:
        raise InputError(
            f"{directory / pickles[0]}: is a pickle, which can run any code and is never loaded; convert it to "
            f"{SINGLE_NAME} (save_pretrained of transformers does)"
        )
    has = f"it has {', '.join(others[:3])} and no {INDEX_NAME}" if others else "it has no .safetensors file"
    raise InputError(f"{directory}: has no weights that can be read ({has})")


def _sharded(index: Path) -> dict[str, SourceTensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(file) for file in places.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: is not an index of shards: {type(error).__name__}: {error}") from error
    found: dict[str, SourceTensor] = {}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: names the shard {name!r}: must be a .safetensors file of the same directory")
        shard = index.parent / name
        if not shard.is_file():
            raise InputError(f"{shard}: is missing; {index.name} names it")
        tensors = _tensors(shard)
        expected = {tensor for tensor, file in places.items() if file == name}
        for tensor in sorted(expected - tensors.keys()):
            raise InputError(f"{shard}: has no tensor {tensor}, which {index.name} says it has")
        for tensor in sorted(tensors.keys() - expected):
            raise InputError(f"{shard}: has the tensor {tensor}, of which {index.name} knows nothing")
        found |= tensors
    return found


def _tensors(path: Path) -> dict[str, SourceTensor]:
    found = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                piece = file.get_slice(name)
                found[name] = SourceTensor(
                    tuple(piece.get_shape()), piece.get_dtype(), partial(_load, path, name, tuple(piece.get_shape()))
                )
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    for name, tensor in found.items():
        if tensor.stored not in TYPES:
            raise InputError(f"{path}: tensor {name} is of type {tensor.stored}: must be one of {', '.join(TYPES)}")
    return found


def _load(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with safe_open(path, "np") as file:
            array: np.ndarray = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if array.shape != shape:
        raise InputError(f"{path}: has changed while it was being read")
    return array


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: is not a whole safetensors file: {' '.join(str(error).split())[:200]}")
