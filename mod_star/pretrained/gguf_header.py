"""The header of a GGUF file, checked as it is read: metadata, and where each tensor lies.

The reader of the package `gguf` takes every length in a file at its word: a damaged one makes it allocate without bound
or fail anywhere. Here each length is held against what is left of the file before anything is read or allocated. What
the numbers of a tensor mean (block types and their sizes) is the package's business.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mod_star.errors import InputError
from mod_star.home import expanded

LONGEST_HEADER = 64 * 2**20
"""Bytes. Vocabularies of 256k tokens with their merges take about 12 MiB; more than this is damage."""
_MAGIC = b"GGUF"
_OLDER = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}
"""First bytes of the formats before GGUF, which no longer are written."""
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip
"""Types that files once had: llama.cpp gave them up, and nothing reads them any more."""
_MAX_DIMENSIONS = 4
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes that an entry, a tensor's description take at least


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as NumPy has it (the file has it the other way round)."""
    kind: GGMLQuantizationType
    start: int
    """First byte in the file."""
    size: int
    """Bytes; they all lie inside the file."""


@dataclass(frozen=True)
class GgufFile:
    """An opened file. Nothing of the tensors has been read."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers and bool as Python's, strings, lists of strings, or NumPy arrays of numbers."""
    tensors: Mapping[str, GgufTensor]
    data: np.ndarray
    """The whole file, mapped: uint8, read-only."""


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file and reads its header.

    Raises:
      InputError: there is no such file; it is no GGUF file; a type in it was given up or isn't known yet; or it is
        damaged: cut short, or a count, length, offset or name that can't be. Takes little more memory than the header
        has bytes, whatever it says.
    """
    path = expanded(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    cursor = _Cursor(path, data, size)
    _check_magic(cursor)
    tensor_count, entry_count = cursor.number("<u8"), cursor.number("<u8")
    cursor.check_count(tensor_count, _LEAST_TENSOR, "tensors")
    cursor.check_count(entry_count, _LEAST_ENTRY, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {_short(key)} is there twice")
        metadata[key] = cursor.value(key)
    described = [_describe(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not (type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0):
        raise cursor.fail(f"general.alignment = {_short(alignment)}: must be a power of 2")
    start = -(-cursor.at // alignment) * alignment
    tensors = _place(cursor, described, start, alignment)
    return GgufFile(path, metadata, tensors, np.frombuffer(data, np.uint8))


class _Cursor:
    """Reads little-endian values one after the other; every read is checked against the end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, size: int) -> None:
        self._path, self._data, self.size, self.at = path, data, size, 0
        self._end = min(size, LONGEST_HEADER)

    def fail(self, reason: str) -> InputError:
        return InputError(f"{self._path}: damaged GGUF file: {reason}")

    def refuse(self, reason: str) -> InputError:
        """For what may be right and can't be read here."""
        return InputError(f"{self._path}: {reason}")

    def check(self, count: int, what: str) -> None:
        """Raises InputError unless `count` more bytes are there."""
        if count <= self._end - self.at:
            return
        if self._end < self.size:
            raise self.fail(f"{what} at byte {self.at} takes {count} bytes, past the longest header ({LONGEST_HEADER})")
        raise self.fail(f"{what} at byte {self.at} takes {count} bytes, and the file ends after {self.size}")

    def check_count(self, count: int, least: int, what: str) -> None:
        """Raises InputError if so many things, each of `least` bytes or more, can't be there."""
        if count * least > self._end - self.at:
            raise self.fail(f"says that it has {count} {what}, too many for its {self.size} bytes")

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, kind: str, what: str = "a number") -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def string(self, what: str) -> str:
        raw = self.take(self.number("<u8", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} before byte {self.at} is not UTF-8: {_short(raw)}") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; as `string`, but a vocabulary has 100 000 of them."""
        self.check_count(count, 8, f"strings in {what}")
        data, at, end = self._data, self.at, self._end
        strings: list[str] = []
        unpack = struct.Struct("<Q").unpack_from
        for index in range(count):
            if at + 8 > end or (stop := at + 8 + unpack(data, at)[0]) > end:
                self.at = at
                return [*strings, self.string(f"{what}[{index}]")]  # raises
            try:
                strings.append(data[at + 8 : stop].decode("utf-8"))
            except UnicodeDecodeError:
                raise self.fail(f"{what}[{index}] is not UTF-8: {_short(data[at + 8 : stop])}") from None
            at = stop
        self.at = at
        return strings

    def value(self, key: str) -> Any:
        what = f"metadata {_short(key)}"
        kind = self.number("<u4", what)
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self._numbers(kind, 1, what)[0].item()
        if kind != _ARRAY:
            raise self.refuse(f"{what} has the unknown type {kind}: the file is of a newer format, or damaged")
        kind, count = self.number("<u4", what), self.number("<u8", what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind in _SCALARS:
            return self._numbers(kind, count, what)
        if kind == _ARRAY:
            raise self.refuse(f"{what} is an array of arrays, which is not supported")
        raise self.refuse(f"{what} is an array of the unknown type {kind}: the file is of a newer format, or damaged")

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize, what)
        if dtype == np.bool_ and raw.translate(None, b"\x00\x01"):
            raise self.fail(f"{what} has a byte that is not a bool")
        return np.frombuffer(raw, dtype)


def _check_magic(cursor: _Cursor) -> None:
    magic = cursor.take(min(4, cursor.size), "the magic number")
    if magic != _MAGIC:
        if magic in _OLDER:
            raise cursor.refuse(f"is a {_OLDER[magic]} file, from before GGUF: convert the model's original anew")
        raise cursor.refuse(f"is not a GGUF file (it begins with {magic!r}, not {_MAGIC!r})")
    version = cursor.number("<u4", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.refuse("is a big-endian GGUF file, which is not supported (little-endian is)")
    if version not in (2, 3):
        raise cursor.refuse(f"is of GGUF version {version}, which is not supported (2 and 3 are)")


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape as the file has it, type and offset of the next tensor."""
    name = cursor.string("a tensor's name")
    what = f"tensor {_short(name)}"
    dimensions = cursor.number("<u4", what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(f"{what} has {dimensions} dimensions (allowed: 1 to {_MAX_DIMENSIONS})")
    shape = tuple(cursor.number("<u8", what) for _ in range(dimensions))
    return name, shape, cursor.number("<u4", what), cursor.number("<u8", what)


def _place(
    cursor: _Cursor, described: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors, each checked to lie inside the file; `start` is where the first one begins."""
    tensors: dict[str, GgufTensor] = {}
    for name, reversed_shape, kind_number, offset in described:
        what, shape = f"tensor {_short(name)}", reversed_shape[::-1]
        if name in tensors:
            raise cursor.fail(f"{what} is there twice")
        try:
            kind = GGMLQuantizationType(kind_number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise cursor.refuse(_unknown_type(what, kind_number)) from None
        if 0 in shape or shape[-1] % block:
            raise cursor.fail(f"{what} has shape {shape}, which {kind.name} cannot have (its blocks are of {block})")
        size = math.prod(shape) // block * block_bytes  # Python's numbers do not overflow
        if offset % alignment:
            raise cursor.fail(f"{what} begins at offset {offset}, which is not a multiple of {alignment}")
        if start + offset + size > cursor.size:
            raise cursor.fail(
                f"{what} (shape {shape}, {kind.name}) takes bytes {start + offset} to {start + offset + size}, "
                f"and the file ends after {cursor.size}"
            )
        tensors[name] = GgufTensor(name, shape, kind, start + offset, size)
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.size > after.start:
            raise cursor.fail(f"tensors {_short(before.name)} and {_short(after.name)} overlap")
    return tensors


def _unknown_type(what: str, number: int) -> str:
    if name := _REMOVED.get(number):
        return f"{what} has type {name} ({number}), which llama.cpp has removed: convert the model's original anew"
    known = max(GGMLQuantizationType)
    newest = f"the package gguf knows types up to {known.value} ({known.name})"
    return f"{what} has the unknown type {number}: {newest}; the file is of a newer format, or damaged"


def _short(value: object) -> str:
    """For messages: on one line, and not the whole of a damaged string."""
    text = repr(value if not isinstance(value, str | bytes) else value[:80])
    return text if len(text) <= 90 else text[:89] + "…"
