"""Tensors of safetensors files, one file or several with an index, checked before anything is read."""

from __future__ import annotations

import json
import re
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
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_NARROW = re.compile(r"[A-Z]+[468](_|$)")  # types of at most 8 bits
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def require_no_adapter(directory: Path) -> None:
    """Raises InputError if a directory holds an adapter, whose model transformers would take from somewhere else."""
    for name in (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file():
            raise InputError(
                f"{directory / name}: is a LoRA adapter, which is not supported; merge it into its base model first "
                "(merge_and_unload of peft), and import the result"
            )


def open_safetensors(directory: Path) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors of a directory's model.safetensors or, without one, of the shards that its index names.

    That is the order of transformers. Files of weights that are not read are told.

    The files' headers are checked by the `safetensors` package: lengths, offsets, overlaps, the file's size. A file is
    mapped only while one of its tensors is read, so that it does not add to the memory in use.

    Returns:
      The tensors by their names, and notes for the user.

    Raises:
      InputError: there are none (a pickle is never loaded), a file is damaged or missing, or index and files differ.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    if SINGLE_NAME in names:
        read = {SINGLE_NAME}
        tensors = _tensors(directory / SINGLE_NAME)
    elif INDEX_NAME in names:
        tensors, shards = _sharded(directory / INDEX_NAME)
        read = {INDEX_NAME, *shards}
    else:
        name = _only_file(directory, names)
        read = {name}
        tensors = _tensors(directory / name)
    ignored = [name for name in names if _holds_weights(name) and name not in read]
    if not ignored:
        return tensors, ()
    more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
    source = next((name for name in (SINGLE_NAME, INDEX_NAME) if name in read), min(read))
    return tensors, (f"weights are read from {source}; ignored: {', '.join(ignored[:3])}{more}",)


def _holds_weights(name: str) -> bool:
    """Whether a file is one of a model's weights, or an index of such. Trainers leave other pickles beside them."""
    pickle = name.endswith(_PICKLES) and name.startswith(("pytorch_model", "consolidated", "model"))
    return pickle or name.endswith((".safetensors", ".gguf", ".bin.index.json", ".safetensors.index.json"))


def _only_file(directory: Path, names: list[str]) -> str:
    """The name of the one file of weights in a directory without the usual ones."""
    others = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if original := [name for name in others if name.startswith("consolidated")]:
        raise InputError(
            f"{directory / original[0]}: has the names of Mistral's own format, which is not supported; take the "
            f"repository's {SINGLE_NAME} or {INDEX_NAME}"
        )
    if len(others) == 1 and not _SHARD.search(others[0]):
        return others[0]
    if pickles and not others:
        raise InputError(
            f"{directory / pickles[0]}: is a pickle, which can run any code and is never loaded; convert it to "
            f"{SINGLE_NAME} (save_pretrained of transformers does)"
        )
    has = f"it has {', '.join(others[:3])} and no {INDEX_NAME}" if others else "it has no .safetensors file"
    if not others and (gguf := [name for name in names if name.endswith(".gguf")]):
        has += f"; name {gguf[0]} itself"
    raise InputError(f"{directory}: has no weights that can be read ({has})")


def _sharded(index: Path) -> tuple[dict[str, SourceTensor], set[str]]:
    """The tensors of all shards, and the shards' names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(file) for file in places.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: is not an index of shards: {type(error).__name__}: {error}") from error
    by_name: dict[str, SourceTensor] = {}
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
            if tensor in places:
                raise InputError(f"{shard}: has the tensor {tensor}, which {index.name} says {places[tensor]} has")
            raise InputError(f"{shard}: has the tensor {tensor}, of which {index.name} knows nothing")
        by_name |= tensors
    return by_name, names


def _tensors(path: Path) -> dict[str, SourceTensor]:
    tensors = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                piece = file.get_slice(name)
                tensors[name] = SourceTensor(
                    tuple(piece.get_shape()), piece.get_dtype(), partial(_load, path, name, tuple(piece.get_shape()))
                )
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    for name, tensor in tensors.items():
        if tensor.stored not in TYPES:
            hint = "; quantised checkpoints are not supported" if _NARROW.match(tensor.stored) else ""
            allowed = f"must be one of {', '.join(TYPES)}{hint}"
            raise InputError(f"{path}: tensor {name} is of type {tensor.stored}: {allowed}")
    return tensors


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
