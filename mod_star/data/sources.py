"""Where text comes from: each source is a fixed sequence of documents with random access.

| `data.source`                | a document is                                                                     |
|------------------------------|-----------------------------------------------------------------------------------|
| `python-docs`                | a topic of Python's own language reference, which every CPython carries (0.5 MB)  |
| `*.jsonl`, `*.json`          | a record, as text by `data.template`; .json: a list, or an object with one inside |
| `*.arrayrecord`              | a record: UTF-8 text, or with `data.template` a JSON object                       |
| any other file               | the file, or sections of it (see `split_text`)                                    |
| `tfds:NAME[/CONFIG][:SPLIT]` | an example of TensorFlow Datasets by `data.template`; NAME may be a directory     |

Files may be globs (`corpus/**/*.md`), sorted by name. Text and JSON are read and checked at once and stay in memory;
they may be in a bucket (`gs://BUCKET/corpus/*.jsonl`). ArrayRecord and TensorFlow Datasets are read as needed, which is
the way for a corpus larger than memory; they must be on a disk or a mount.
"""

from __future__ import annotations

import codecs
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import error as url_error
from urllib import request

from mod_star.buckets import find_files, is_address, read_file
from mod_star.data.templates import Template, unicode_text
from mod_star.errors import InputError

SECTIONS = 200
"""A long text is cut into about this many sections, so that some can be held out ..."""
SECTION_CHARACTERS = (2_000, 32_000)
"""... of a length in this range: enough context to learn from, many enough to split."""
WHOLE_FILE_CHARACTERS = 16_000
"""One of several files stays one document up to this length."""


def read_sources(specs: Sequence[str], template: str | None) -> list[Sequence[str]]:
    """The documents of every source.

    Args:
        specs: `DataConfig.source`.
        template: `DataConfig.template`.

    Returns:
        For each source the sequence of its documents, at least one, always in the same order.

    Raises:
        InputError: A missing, empty, unreadable or broken file, a glob without a match, an unknown dataset, no network,
            a file that two sources share (its held-out text would be trained on), or a template that nothing uses.
    """
    compiled = Template(template)
    owners: dict[str, str] = {}
    kinds = set()
    sources = []
    for spec in specs:
        kind, origins, documents = _open(spec, compiled, raw=template is None)
        for origin in origins:
            if origin in owners:
                raise InputError(
                    f"data.source: {origin} is read by {owners[origin]!r} and {spec!r}; a document may come once only"
                )
            owners[origin] = spec
        kinds.add(kind)
        sources.append(documents)
    if template is not None and kinds <= {"text", "python-docs"}:
        raise InputError(f"data.template = {template!r}: no source has records with fields (.jsonl, .json, ...)")
    return sources


def _open(spec: str, template: Template, raw: bool) -> tuple[str, list[str], Sequence[str]]:
    """Kind, identities of what is read (files), and documents of one source; `raw`: ArrayRecord holds plain text."""
    if spec == "python-docs":
        return "python-docs", [spec], _python_docs()
    if spec.startswith("tfds:"):
        return "tfds", [spec], _tfds(spec, template)
    paths = _paths(spec)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise InputError(f"data.source = {spec!r}: matches files of different kinds ({', '.join(sorted(kinds))})")
    kind = kinds.pop()
    documents: Sequence[str]
    if kind == "arrayrecord":
        documents = _array_record(spec, paths, template, raw)
    elif kind == "text":
        documents = [text for path in paths for text in _text_documents(path, alone=len(paths) == 1)]
    else:
        records = _jsonl_records if kind == "jsonl" else _json_records
        documents = [template.render(record, where) for path in paths for record, where in records(path)]
    return kind, [path if is_address(path) else os.path.realpath(path) for path in paths], documents


def _paths(spec: str) -> list[str]:
    """The files that a path or glob names, sorted."""
    if is_address(spec):
        found = find_files(spec)
        if not found:
            raise InputError(f"data.source = {spec!r}: no such file, and no file matches it as a pattern")
        return found
    pattern = os.path.expanduser(spec)
    # A file whose name looks like a glob is meant literally, and so is a directory that the glob is in.
    paths = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(_with_literal_start(pattern), recursive=True))
    if not paths and glob.has_magic(pattern):
        raise InputError(f"data.source = {spec!r}: no file matches this pattern")
    if not paths:
        raise InputError(f"data.source = {spec!r}: no such file (allowed: python-docs, a file or glob, tfds:NAME)")
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        raise InputError(
            f"data.source = {spec!r}: is a directory; name its files, such as {os.path.join(spec, '*.txt')!r}"
        )
    return files


def _with_literal_start(pattern: str) -> str:
    """The pattern with the longest start of it that is a directory by that very name taken literally."""
    start, rest = os.path.split(pattern)
    while start and start != os.path.dirname(start) and not os.path.isdir(start):
        start, name = os.path.split(start)
        rest = os.path.join(name, rest)
    return os.path.join(glob.escape(start), rest)


def _kind(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json"):
        return suffix[1:]
    # TensorFlow Datasets writes shards as NAME.array_record-00000-of-00001.
    return "arrayrecord" if suffix.startswith((".arrayrecord", ".array_record")) else "text"


def _python_docs() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "data.source = 'python-docs': this Python lacks pydoc_data.topics; name a file instead"
        ) from None
    return [topics[name] for name in sorted(topics)]


def read_text(path: str) -> str:
    """A file as text with "\\n" line ends; errors name the file, and the line of a byte that is not UTF-8."""
    try:
        data = read_file(path) if is_address(path) else Path(path).read_bytes()
        data = data.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not valid UTF-8 (byte 0x{data[error.start]:02x} at {error.start})"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text.replace("\r\n", "\n")


def _text_documents(path: str, alone: bool) -> list[str]:
    text = read_text(path)
    return split_text(text) if alone or len(text) > WHOLE_FILE_CHARACTERS else [text]


def split_text(text: str) -> list[str]:
    """Cuts a text into sections at blank lines: a single file, too, must give training and held-out documents.

    Sections have at least `len(text) / SECTIONS` characters, kept between 2,000 and 32,000, and end after the next
    blank line; where none comes for as long again, after a line or else a word, or else right there. Joined they are
    `text`; only the last may be shorter.
    """
    least = min(max(len(text) // SECTIONS, SECTION_CHARACTERS[0]), SECTION_CHARACTERS[1])
    sections, start = [], 0
    while len(text) - start > least:
        earliest, latest = start + least, start + 2 * least
        # The separator belongs to the section that it ends.
        ends = (text.find(mark, earliest - len(mark), latest) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end >= earliest), latest)
        while text[end : end + 1] == "\n":
            end += 1
        sections.append(text[start:end])
        start = end
    rest = text[start:]
    if rest.strip() or not sections:
        sections.append(rest)
    else:
        sections[-1] += rest
    return sections


def read_records(path: str) -> list[tuple[Any, str]]:
    """The records of a .jsonl or .json file, and where each stands ("FILE, line 7"), as errors are to say it.

    Raises:
        InputError: The file can't be read, is empty, or is not JSON; a name that ends in neither.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".jsonl", ".json"):
        raise InputError(f"{path}: must be a .jsonl or .json file")
    return list((_jsonl_records if kind == ".jsonl" else _json_records)(path))


def _parse_json(text: str, where: str, one_line: bool = True) -> Any:
    """The value that `text` holds; errors say where, and the line too unless `where` has it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if one_line else f", line {error.lineno}"
        raise InputError(f"{where}{line}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def _jsonl_records(path: str) -> Iterator[tuple[Any, str]]:
    """The records of a JSON Lines file, and where each stands. Blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse_json(line, where), where


def _json_records(path: str) -> Iterator[tuple[Any, str]]:
    """The records of a JSON file: a list, or the only list in an object."""
    content = _parse_json(read_text(path), path, one_line=False)
    lists = [content]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise InputError(f"{path}: must be a list of records, or an object with exactly one list in it")
    if not lists[0]:
        raise InputError(f"{path}: holds no records")
    for number, record in enumerate(lists[0], start=1):
        yield record, f"{path}, record {number}"


@dataclass(frozen=True)
class _Lazy(Sequence[str]):
    """Documents made from records when they are asked for."""

    name: str
    records: Sequence[Any]
    render: Callable[[Any, str], str]

    def __post_init__(self) -> None:
        if not len(self.records):
            raise InputError(f"{self.name}: holds no records")
        self[0]  # So that a wrong template is an error now, not in the first training step.

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.render(self.records[index], f"{self.name}, record {index + 1}")


def _array_record(spec: str, paths: list[str], template: Template, raw: bool) -> Sequence[str]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def render(record: bytes, where: str) -> str:
        text = unicode_text(record, where)
        return text if raw else template.render(_parse_json(text, where), where)

    for path in paths:
        if re.fullmatch(r".*\[\d+:\d+\]", path, re.DOTALL):  # which the reader takes for a range of records
            raise InputError(f"{path}: an ArrayRecord file must not have a name that ends with [NUMBER:NUMBER]")
        if is_address(path):
            raise InputError(f"{path}: ArrayRecord is read from disks only; mount the bucket, see the README")
        if not os.path.getsize(path):
            raise InputError(f"{path}: is empty")
    try:
        return _Lazy(spec, ArrayRecordDataSource(paths), render)
    except (RuntimeError, OSError) as error:
        raise InputError(f"data.source = {spec!r}: not an ArrayRecord file ({_first_line(error)})") from None


def _tfds(spec: str, template: Template) -> Sequence[str]:
    """A dataset of TensorFlow Datasets: prepared on disk, or downloaded and prepared now. TensorFlow is not needed."""

    def failed(reason: object) -> InputError:
        return InputError(f"data.source = {spec!r}: {reason}")

    name, _, split = spec.removeprefix("tfds:").partition(":")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise failed(f"tensorflow_datasets cannot be imported ({_first_line(error)})") from None
    with _quiet_absl():
        try:
            builder = _tfds_builder(tfds, name)
            if not builder.is_prepared():
                _require_reachable(builder.url_infos or {})
                builder.download_and_prepare()
            records = builder.as_data_source(split or "train")
        except tfds.core.registered.DatasetNotFoundError:
            raise failed(
                f"TensorFlow Datasets {tfds.__version__} knows no such dataset, and none is prepared"
            ) from None
        except ModuleNotFoundError as error:
            raise failed(f"preparing it needs the Python package {error.name}") from None
        except url_error.URLError as error:
            raise failed(f"is not prepared on disk, and there is no network to fetch it ({error.reason})") from None
        except Exception as error:  # What a dataset's own preparation raises is not ours to list.
            raise failed(_first_line(error)) from error
    return _Lazy(spec, records, template.render)


def _tfds_builder(tfds: Any, name: str) -> Any:
    """The builder: of a directory; of files prepared under the data directory; or of code, set to write ArrayRecord."""
    directory = os.path.expanduser(name)
    if os.path.isdir(directory):
        return tfds.builder_from_directory(directory)
    builder = tfds.builder(name)
    return builder if builder.is_prepared() else tfds.builder(name, file_format="array_record")


def _require_reachable(urls: Iterable[str]) -> None:
    """Raises URLError if the first download has no server; TensorFlow Datasets itself retries for minutes."""
    for url in list(urls)[:1]:
        try:
            request.urlopen(request.Request(url, method="HEAD"), timeout=10).close()
        except url_error.HTTPError:
            pass  # A server answered: leave the judgement to the real download.
        except (ValueError, HTTPException):
            pass  # No plain address: likewise.
        except TimeoutError as error:
            raise url_error.URLError(error) from None


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """TensorFlow Datasets warns of every directory that it doesn't find; ours is the one line that counts."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
