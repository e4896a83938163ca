"""Headers of GGUF files: what the package writes is read back, and whatever else is in a file is one clear line."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf, write_model

from mod_star.errors import InputError
from mod_star.pretrained import gguf_header
from mod_star.pretrained.gguf_header import read_gguf
from mod_star.pretrained.gguf_source import open_gguf

HUGE = 2**60


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    data: int = 256,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors) + b"\0" * data


def test_what_the_package_writes_is_read_back(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "a.text": "é\n",
        "a.flag": True,
        "a.whole": 7,
        "a.real": 0.5,
        "a.strings": ["x", "", "日本"],
        "a.numbers": [1, -2, 3],
        "general.alignment": 64,
    }
    tensors: dict[str, np.ndarray] = {
        "one": np.arange(6, dtype=np.float32).reshape(2, 3),
        "two": np.arange(64, dtype=np.float32).reshape(2, 32),
        "three": np.ones((1, 2, 2), np.float16),
    }
    writer_kinds = {"two": gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "a.gguf", metadata, tensors, writer_kinds)
    file = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    for key, value in metadata.items():
        found = file.metadata[key]
        assert found.tolist() == value if isinstance(found, np.ndarray) else found == value
        assert type(found) in (type(value), np.ndarray)
    assert file.metadata["general.architecture"] == "llama"
    assert list(file.tensors) == [each.name for each in theirs.tensors]
    for each in theirs.tensors:
        ours = file.tensors[each.name]
        assert (ours.start, ours.size, ours.kind) == (each.data_offset, each.n_bytes, each.tensor_type)
        assert ours.shape == tuple(int(size) for size in reversed(each.shape))
        np.testing.assert_array_equal(
            file.data[ours.start : ours.start + ours.size], each.data.view(np.uint8).reshape(-1)
        )


NESTED = struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1) + b"\0" * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file (it begins with b''"),
        (b"GG", "is not a GGUF file"),
        (header(magic=b"GGJT"), "is not a GGUF file (it begins with b'GGJT', not b'GGUF')"),
        (b"GGUF\3\0", "the version at byte 4 takes 4 bytes, and the file ends after 6"),
        (header(version=1), "is of GGUF version 1, which is not supported"),
        (header(version=3 << 24), "is a big-endian GGUF file, which is not supported"),
        (header(tensor_count=HUGE), f"says that it has {HUGE} tensors, too many for its 280 bytes"),
        (header(entry_count=HUGE), f"says that it has {HUGE} metadata entries, too many for its 280 bytes"),
        (header((string(b"k", HUGE),)), f"a metadata key at byte 32 takes {HUGE} bytes, and the file ends after 289"),
        (header((entry(b"k", 8, string(b"v", HUGE)),)), f"metadata 'k' at byte 45 takes {HUGE} bytes"),
        (header((entry(b"k", 8, string(b"v", 2**64 - 1)),)), f"metadata 'k' at byte 45 takes {2**64 - 1} bytes"),
        (header((entry(b"k", 9, struct.pack("<IQ", 4, HUGE)),)), f"metadata 'k' at byte 49 takes {4 * HUGE} bytes"),
        (header((entry(b"k", 9, struct.pack("<IQ", 8, HUGE)),)), f"says that it has {HUGE} strings in metadata 'k'"),
        (header((entry(b"k", 9, struct.pack("<IQQ", 8, 2, HUGE)),)), f"metadata 'k'[0] at byte 57 takes {HUGE} bytes"),
        (header((entry(b"k", 9, NESTED),)), "metadata 'k' is an array of arrays"),
        (header((entry(b"k", 99, b""),)), "metadata 'k' has the unknown type 99"),
        (header((entry(b"k", 9, struct.pack("<IQ", 77, 1)),)), "metadata 'k' is an array of the unknown type 77"),
        (header((entry(b"k", 7, b"\2"),)), "metadata 'k' has a byte that is not a bool"),
        (header((entry(b"\xff", 7, b"\1"),)), "a metadata key before byte 33 is not UTF-8: b'\\xff'"),
        (header((entry(b"k", 9, struct.pack("<IQ", 8, 1) + string(b"\xff")),)), "metadata 'k'[0] is not UTF-8"),
        (header((entry(b"k\n", 7, b"\1"),) * 2), "metadata key 'k\\n' is there twice"),
        (
            header((entry(b"general.alignment", 4, struct.pack("<I", 0)),)),
            "general.alignment = 0: must be a power of 2",
        ),
        (header((entry(b"general.alignment", 4, struct.pack("<I", 48)),)), "general.alignment = 48: must be a power"),
        (header((entry(b"general.alignment", 8, string(b"x")),)), "general.alignment = 'x': must be a power of 2"),
        (header((), (tensor(b"t", (4,)), tensor(b"t", (4,), offset=32))), "tensor 't' is there twice"),
        (header((), (tensor(b"t", (4,)), tensor(b"u", (4,)))), "tensors 't' and 'u' overlap"),
        (header((), (tensor(b"t", (4,), kind=1000),)), "tensor 't' has the unknown type 1000"),
        (header((), (tensor(b"t", (1,) * 5),)), "tensor 't' has 5 dimensions (allowed: 1 to 4)"),
        (header((), (tensor(b"t", (4, 0)),)), "tensor 't' has shape (0, 4), which F32 cannot have"),
        (
            header((), (tensor(b"t", (33,), kind=8),)),
            "tensor 't' has shape (33,), which Q8_0 cannot have (its blocks are",
        ),
        (header((), (tensor(b"t", (4,), offset=8),)), "tensor 't' begins at offset 8, which is not a multiple of 32"),
        (header((), (tensor(b"t", (4,), offset=HUGE),)), "tensor 't' (shape (4,), F32) takes bytes "),
        # Their product is 0 in 64 bits.
        (header((), (tensor(b"t", (2**32, 2**32)),)), f"tensor 't' (shape ({2**32}, {2**32}), F32) takes bytes "),
        (header((), (tensor(b"t", (2**63,) * 4),)), "and the file ends after "),
        (header((), (tensor(b"t", (64,)),), data=31), "and the file ends after "),
    ],
)
def test_damaged_headers_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            (
                header((), (tensor(b"t", (64,), kind=number),)),
                f"tensor 't' has type {name} ({number}), which llama.cpp has removed: convert the model's original",
            )
            for number, name in {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4"}.items()
        ),
        (header((), (tensor(b"t", (64,), kind=1000),)), "tensor 't' has the unknown type 1000: the package gguf knows"),
        (header((entry(b"k", 99, b""),)), "metadata 'k' has the unknown type 99: the file is of a newer format, or"),
        (header((entry(b"k", 9, NESTED),)), "metadata 'k' is an array of arrays, which is not supported"),
        (b"tjgg" + struct.pack("<II", 3, 0), "is a GGJT file, from before GGUF: convert the model's original anew"),
    ],
)
def test_what_was_given_up_or_is_newer_is_not_called_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_type_is_removed_or_known() -> None:
    """No number is both; a gap among the package's types is one that was removed."""
    known = {kind.value for kind in gguf.GGMLQuantizationType}
    assert not known & gguf_header._REMOVED.keys()
    assert set(range(max(known))) - known <= gguf_header._REMOVED.keys()


def test_a_header_has_a_longest_length(tmp_path: Path) -> None:
    path = tmp_path / "zeros.gguf"
    path.write_bytes(header((entry(b"k", 9, struct.pack("<IQ", 8, 2**33)),)))
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse: an endless array of empty strings
    with pytest.raises(InputError, match=r"says that it has \d+ strings in metadata 'k', too many"):
        read_gguf(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: cannot be read"):
            read_gguf(path)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from mod_star.errors import InputError
from mod_star.pretrained.gguf_source import open_gguf
original, target = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
random = np.random.default_rng(int(sys.argv[4]))
interesting = [0, 1, 0x7F, 0x80, 0xFF]
refused = opened = 0
for _ in range(int(sys.argv[3])):
    content = bytearray(original)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, 3000) if random.random() < 0.7 else random.integers(0, len(content))) % len(content)
        choice = random.integers(0, 5)
        if choice == 0:
            content[at] = random.integers(0, 256)
        elif choice == 1:
            content[at : at + 8] = bytes(random.choice(interesting, 8).tolist())
        elif choice == 2:
            del content[at:]
        elif choice == 3:
            del content[at : at + int(random.integers(1, 20))]
        else:
            content[at:at] = bytes(random.integers(0, 256, random.integers(1, 20)).tolist())
        if not content:
            break
    target.write_bytes(content)
    try:
        source = open_gguf(target)
        for tensor in source.tensors.values():
            assert tensor.load().shape == tensor.shape
        opened += 1
    except InputError as error:
        assert "\\n" not in str(error), str(error)
        assert str(target) in str(error), str(error)
        refused += 1
print(refused, opened)
"""


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    limit = 4 * 2**30  # of address space: no mutation makes it take more
    found = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), str(tmp_path / "bad.gguf"), "150", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    refused, opened = map(int, found.stdout.split())
    assert refused > 50
    assert opened > 5


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    whole = path.read_bytes()
    assert len(open_gguf(path).tensors) == 21
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole) - 1, len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_gguf(cut)
