"""Whether a checkpoint's files are what was written: checksums as `sha256sum -c` reads them.

Orbax itself doesn't notice a flipped bit in an array. In a bucket there are no checksums of ours, nor in a copy of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mod_star.runs.params_file import PARAMS_NAME
from mod_star.storage import is_address

SUMS_FILE = "SHA256SUMS"
PARAMS_ITEM = "params"
"""What of a checkpoint sampling reads; a folder of its own, which shares no file with the rest."""
# Orbax rewrites these two after our checksums are made: its time stamps, and an empty marker.
COMMIT_FILE = "commit_success.txt"
ORBAX_FILES = ("_CHECKPOINT_METADATA", COMMIT_FILE)


def params_digest(directory: Path, step: int) -> str | None:
    """What identifies a checkpoint's parameters wherever the run stands, from their checksums; None: it has none."""
    sums = directory / str(step) / SUMS_FILE
    if is_address(directory) or not sums.is_file():
        return None
    lines = [line for line in sums.read_text().splitlines() if line.partition("  ")[2].startswith("params")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def has_checksums(checkpoint: Path) -> bool:
    """Whether `find_damage` can compare contents: not in a bucket, nor in a copy of one."""
    return not is_address(checkpoint) and (checkpoint / SUMS_FILE).exists()


def find_damage(checkpoint: Path, item: str | None = None) -> str | None:
    """The first of `damages`, or None."""
    return next(damages(checkpoint, item), None)


def damages(
    checkpoint: Path, item: str | None = None, read: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """What is wrong with a checkpoint's files, one after the other. Reads all of them, but for those in a bucket.

    Args:
      checkpoint: RUN/checkpoints/STEP.
      item: the folder to look at, such as `PARAMS_ITEM`; None: all of them.
      read: called with numbers of bytes that have been read.
    """
    try:
        by_orbax = not (checkpoint / PARAMS_NAME).is_file()
        for name in ORBAX_FILES if by_orbax else ():
            if not (checkpoint / name).is_file():
                yield f"{name} is missing"
        if is_address(checkpoint) or (by_orbax and not (checkpoint / SUMS_FILE).exists()):
            return
        lines = (checkpoint / SUMS_FILE).read_text().split("\n")
        sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines[:-1])}
        if lines[-1] or not sums:
            yield f"{SUMS_FILE} is cut off"
            return
        sums = {name: expected for name, expected in sums.items() if item is None or name.startswith(f"{item}/")}
        present = _files(checkpoint, item)
        for name in sorted(sums.keys() ^ set(present)):
            yield f"{name} is missing" if name in sums else f"{name} is not in {SUMS_FILE}"
        for name in present:
            if name in sums and _sha256(checkpoint / name, read) != sums[name]:
                yield f"{name} has changed since it was written"
    except FileNotFoundError:
        yield f"{SUMS_FILE} is missing"
    except (OSError, UnicodeDecodeError) as error:
        yield str(error)


def checkpoint_bytes(checkpoint: Path) -> int:
    """Size of the files that have checksums."""
    return sum((checkpoint / name).stat().st_size for name in _files(checkpoint))


def _files(checkpoint: Path, item: str | None = None) -> list[str]:
    """Paths of the files that have checksums, relative and sorted. Hidden ones belong to others."""
    folder = checkpoint if item is None else checkpoint / item
    files = [path.relative_to(checkpoint) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        str(path) for path in files if str(path) not in (*ORBAX_FILES, SUMS_FILE) and not path.name.startswith(".")
    )


def write_sums(checkpoint: Path) -> None:
    """Writes the checksums of all files of a checkpoint beside them."""
    lines = [f"{_sha256(checkpoint / name)}  {name}\n" for name in _files(checkpoint)]
    (checkpoint / SUMS_FILE).write_text("".join(lines))


def _sha256(path: Path, read: Callable[[int], object] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()
