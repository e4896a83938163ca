"""Fetches the data sets and models that experiments use, and checks every byte of them.

    python -m experiments.get_data                                # everything, into data/
    python -m experiments.get_data --names gsm8k_test.jsonl       # one file
    python -m experiments.get_data --source DIR                   # from a directory that has them: no network

A file that is there already and has the right checksum is kept. Files come from where their authors publish them; a
file whose SHA-256 differs is refused and not kept.
"""

from __future__ import annotations

import hashlib
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress

from mod_star.atomic_files import write_atomically
from mod_star.commands import parse_options
from mod_star.errors import InputError

BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file as it is published."""

    url: str
    sha256: str
    licence: str


_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
_CSQA = "https://s3.amazonaws.com/commonsensqa"
_ZERO_SHOT_COT = "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset"
FILES = {
    "gsm8k_train.jsonl": Published(
        f"{_GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "MIT"
    ),
    "gsm8k_test.jsonl": Published(
        f"{_GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", "MIT"
    ),
    "csqa_train.jsonl": Published(
        f"{_CSQA}/train_rand_split.jsonl", "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb", "MIT"
    ),
    "csqa_dev.jsonl": Published(
        f"{_CSQA}/dev_rand_split.jsonl", "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a", "MIT"
    ),
    "multiarith.json": Published(
        f"{_ZERO_SHOT_COT}/MultiArith/MultiArith.json",
        "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
        "research use",
    ),
    "coin_flip.json": Published(
        f"{_ZERO_SHOT_COT}/coin_flip/coin_flip.json",
        "68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a",
        "as published",
    ),
    "tinyshakespeare.txt": Published(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "public domain text",
    ),
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": Published(
        "https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/main/"
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
}
"""What there is, by the name that experiments know it by."""


@dataclass(frozen=True)
class Options:
    """Fetches the data sets and models that experiments use, and checks every byte of them."""

    directory: Path = Path("data")
    """Where the files go."""
    names: tuple[str, ...] = ()
    """Files to fetch; none given: all data sets, without the models (.gguf)."""
    source: Path | None = None
    """A directory that has them, instead of the network."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(name: str, published: Published, source: Path | None) -> Iterator[tuple[IO[bytes], int | None]]:
    """The file to read from, and its size if that is known."""
    try:
        if source is not None:
            with (source / name).open("rb") as file:
                yield file, (source / name).stat().st_size
            return
        with urllib.request.urlopen(published.url, timeout=60) as answer:
            size = answer.headers.get("Content-Length")
            yield answer, None if size is None else int(size)
    except OSError as error:
        where = published.url if source is None else source / name
        raise InputError(f"{where}: cannot be read: {error}") from error


def fetch(name: str, directory: Path, source: Path | None = None, bar: Any = None) -> Path:
    """Fetches one file, unless it is there, and gives its path.

    Args:
      name: one of `FILES`.
      directory: where it goes; made if absent.
      source: a directory that has it; None: the network.
      bar: a `rich.progress.Progress` to show progress in; None: none.

    Raises:
      InputError: it cannot be read, or its checksum is not that of the published file. Nothing is kept then.
    """
    published, path = FILES[name], directory / name
    if path.is_file() and sha256_of(path) == published.sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)

    def download(beside: Path) -> None:
        with _opened(name, published, source) as (file, size), beside.open("wb") as out:
            task = None if bar is None else bar.add_task(name, total=size)
            while block := file.read(BLOCK):
                out.write(block)
                if task is not None:
                    bar.advance(task, len(block))
        digest = sha256_of(beside)
        if digest != published.sha256:
            where = published.url if source is None else source / name
            raise InputError(f"{where}: sha256 = {digest}: must be {published.sha256}, that of the published file")

    write_atomically(path, download)
    return path


def main() -> None:
    """Fetches what the command line names."""
    options = parse_options(Options, sys.argv[1:], "python -m experiments.get_data")
    if unknown := [name for name in options.names if name not in FILES]:
        raise InputError(f"--names = {unknown[0]!r}: must be one of {', '.join(FILES)}")
    names = options.names or tuple(name for name in FILES if not name.endswith(".gguf"))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for name in names:
            path = fetch(name, options.directory, options.source, bar)
            print(f"{path}  {path.stat().st_size:,} bytes  {FILES[name].licence}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
