"""Where documents come from: each source is a fixed sequence of them with random access.

| `data.source`                | a document is                                                                    |
|------------------------------|----------------------------------------------------------------------------------|
| `python-docs`                | a topic of Python's own language reference, which every CPython carries (0.5 MB) |
| a file with records          | a record, as text by `data.template`, or as a conversation                       |
| `*.arrayrecord`              | a record: UTF-8 text, or with `data.template` a JSON object                      |
| any other file               | the file, sections of it (see `split_text`), or what `data.separator` cuts apart |
| `tfds:NAME[/CONFIG][:SPLIT]` | an example of TensorFlow Datasets by `data.template`; NAME may be a directory    |

What a file holds is told by its name, see `mod_star.data.files`. A record is a conversation where `data.template` names
a field of messages and nothing else, or where there is no template and the record has no "text", but "messages" or
"conversations"; see `mod_star.data.conversations`.

Files may be globs (`corpus/**/*.md`), sorted by name. They are read and checked at once and stay in memory, and may be
in a bucket (`gs://BUCKET/corpus/*.jsonl`). ArrayRecord and TensorFlow Datasets are read as needed, which is the way for
a corpus larger than memory; they must be on a disk or a mount.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib import error as url_error
from urllib import request

from mod_star.data.conversations import FIELDS, Conversation, conversation_of, is_conversation
from mod_star.data.files import (
    file_type,
    looks_like_json,
    missing_shards,
    parse_json,
    read_records,
    read_text,
    uncompressed_name,
)
from mod_star.data.templates import Template, unescape
from mod_star.errors import InputError
from mod_star.storage import find_files, is_address
from mod_star.tokenization.unicode_text import unicode_text

Document = str | Conversation
Tell = Callable[[str], None]
"""Takes a line about something that is read otherwise than its owner may think."""

SECTIONS = 200
"""A long text is cut into about this many sections, so that some can be held out ..."""
SECTION_CHARACTERS = (2_000, 32_000)
"""... of a length in this range: enough context to learn from, many enough to split."""
WHOLE_FILE_CHARACTERS = 16_000
"""One of several files stays one document up to this length."""


def read_sources(
    specs: Sequence[str],
    template: str | None,
    separator: str | None = None,
    tell: Tell = lambda line: None,
    marks: Sequence[str] = (),
) -> list[Sequence[Document]]:
    """The documents of every source.

    Args:
        specs: `DataConfig.source`.
        template: `DataConfig.template`.
        separator: `DataConfig.separator`.
        tell: Is told of text that looks like records, of shards that are missing, and of `marks`.
        marks: Spellings of tokens that no document should hold, such as that which ends a text.

    Returns:
        For each source the sequence of its documents, at least one, always in the same order.

    Raises:
        InputError: A missing, empty, unreadable or broken file, or one of a format that is not read, a glob without a
            match, an unknown dataset, no network, a file that two sources share (its held-out text would be trained
            on), or a template or separator that nothing uses.
    """
    compiled = Template(template)
    cut = None if separator is None else unescape(separator)
    owners: dict[str, str] = {}
    kinds = set()
    sources: list[Sequence[Document]] = []
    for spec in specs:
        say = lambda line, spec=spec: tell(f"data.source = {spec!r}: {line}")  # noqa: E731
        kind, origins, documents = _open(spec, compiled, cut, say)
        for origin in origins:
            if origin in owners:
                raise InputError(
                    f"data.source: {origin} is read by {owners[origin]!r} and {spec!r}; a document may come once only"
                )
            owners[origin] = spec
        _tell_of_marks(documents, marks, kind == "text", say)
        kinds.add(kind)
        sources.append(documents)
    if template is not None and kinds <= {"text", "python-docs"}:
        raise InputError(f"data.template = {template!r}: no source has records with fields (.jsonl, .json, ...)")
    if separator is not None and "text" not in kinds:
        raise InputError(f"data.separator = {separator!r}: no source is a text file (.txt, .md, ...)")
    return sources


def _open(
    spec: str, template: Template, separator: str | None, tell: Tell
) -> tuple[str, list[str], Sequence[Document]]:
    """Kind, identities of what is read (files), and documents of one source."""
    if spec == "python-docs":
        return "python-docs", [spec], python_docs()
    if spec.startswith("tfds:"):
        return "tfds", [spec], _tfds(spec, template)
    paths = source_paths(spec)
    kinds = {file_type(path).format for path in paths}
    if len(kinds) > 1:
        raise InputError(f"data.source = {spec!r}: matches files of different kinds ({', '.join(sorted(kinds))})")
    for line in missing_shards(paths):
        tell(line)
    kind = kinds.pop()
    documents: Sequence[Document]
    if kind == "arrayrecord":
        documents = _array_record(spec, paths, template, tell)
    elif kind == "text":
        documents = _text_documents(spec, paths, separator, tell)
    else:
        documents = _record_documents(paths, template, tell)
    names = [path if is_address(path) else os.path.realpath(path) for path in paths]
    return kind, [uncompressed_name(name) for name in names], documents


def source_paths(spec: str) -> list[str]:
    """The files that a path or glob names, sorted."""
    if is_address(spec):
        paths = find_files(spec)
        if not paths:
            raise InputError(f"data.source = {spec!r}: no such file, and no file matches it as a pattern")
        return paths
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


def python_docs() -> list[Document]:
    """The language reference inside every CPython, a document per topic. Raises InputError where it is missing."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "data.source = 'python-docs': this Python lacks pydoc_data.topics; name a file instead"
        ) from None
    return [topics[name] for name in sorted(topics)]


def _text_documents(spec: str, paths: Sequence[str], separator: str | None, tell: Tell) -> list[Document]:
    documents: list[Document] = []
    noted = separated = False
    for path in paths:
        text = read_text(path)
        if not noted and looks_like_json(text):
            noted = True
            tell(f"{path} looks like JSON, and is read as text, braces included; records need a name such as .jsonl")
        if separator is not None:
            separated |= separator in text
            documents += separate(text, separator)
        else:
            alone = len(paths) == 1 or len(text) > WHOLE_FILE_CHARACTERS
            documents += split_text(text) if alone else [text]
    if separator is not None and not separated:
        raise InputError(f"data.separator = {separator!r}: does not occur in data.source = {spec!r}")
    return documents


def separate(text: str, separator: str) -> list[str]:
    """The texts between separators, without line breaks around them; those with nothing in them are left out."""
    return [piece.strip("\n") for piece in text.split(separator) if piece.strip()]


def _record_documents(paths: Sequence[str], template: Template, tell: Tell) -> list[Document]:
    documents: list[Document] = []
    fields = () if template.is_one_field else template.fields  # of a conversation, others count
    for path in paths:
        for record, where in read_records(path, fields):
            if not documents:
                _tell_of_both(record, template, tell)
            documents.append(_document(template, record, where))
    return documents


def _document(template: Template, record: Any, where: str) -> Document:
    """A record as a document."""
    if isinstance(record, Mapping):
        values = [template.value(record)] if template.is_one_field else []
        if not template.fields and "text" not in record:
            values = [record.get(name) for name in FIELDS]
        for value in values:
            if is_conversation(value):
                return conversation_of(record, value, where)
    return template.render(record, where)


def _tell_of_both(record: Any, template: Template, tell: Tell) -> None:
    """Tells that records have text and messages, where no template says what counts."""
    if not template.fields and isinstance(record, Mapping) and "text" in record:
        for name in FIELDS:
            if is_conversation(record.get(name)):
                tell(f"records have 'text' and {name!r}, 'text' is read; data.template = '{{{name}}}' reads {name}")


def _tell_of_marks(documents: Sequence[Document], marks: Sequence[str], is_text: bool, tell: Tell) -> None:
    """Tells of marks inside documents that are in memory."""
    if not isinstance(documents, list):
        return
    for mark in marks:
        count = sum(any(mark in text for text in _texts(document)) for document in documents)
        if count:
            hint = f"; data.separator = {mark!r} cuts the files there" if is_text else ""
            tell(f"{count} of {len(documents)} documents have {mark!r} inside, and keep it{hint}")


def _texts(document: Document) -> Iterable[str]:
    return [document] if isinstance(document, str) else [message["content"] for message in document.messages]


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


@dataclass(frozen=True)
class _Lazy(Sequence[Document]):
    """Documents made from records when they are asked for."""

    name: str
    records: Sequence[Any]
    render: Callable[[Any, str], Document]

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


def _array_record(spec: str, paths: list[str], template: Template, tell: Tell) -> Sequence[Document]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def render(record: bytes, where: str) -> Document:
        text = unicode_text(record, where)
        return _document(template, parse_json(text, where), where) if template.fields else text

    for path in paths:
        if re.fullmatch(r".*\[\d+:\d+\]", path, re.DOTALL):  # which the reader takes for a range of records
            raise InputError(f"{path}: an ArrayRecord file must not have a name that ends with [NUMBER:NUMBER]")
        if is_address(path):
            raise InputError(f"{path}: ArrayRecord is read from disks only; mount the bucket (docs/how-to/buckets.md)")
        if not os.path.getsize(path):
            raise InputError(f"{path}: is empty")
    try:
        documents = _Lazy(spec, ArrayRecordDataSource(paths), render)
    except (RuntimeError, OSError) as error:
        raise InputError(f"data.source = {spec!r}: not an ArrayRecord file ({_first_line(error)})") from None
    if not template.fields and looks_like_json(documents[0]):
        tell("its records look like JSON, and are read as text, braces included; data.template names a field of them")
    return documents


def _tfds(spec: str, template: Template) -> Sequence[Document]:
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
            builder = tfds_builder(tfds, name)
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
    return _Lazy(spec, records, functools.partial(_document, template))


def tfds_builder(tfds: Any, name: str) -> Any:
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
