"""Files as text or records: what a file's name says, and the one reader that training, tasks and prompts share.

| format        | names                                                                                      |
|---------------|--------------------------------------------------------------------------------------------|
| `text`        | .txt .text .md .markdown .rst, and any other ending that is not known                        |
| `jsonl`       | .jsonl .ndjson .jsonlines: a JSON value per line                                           |
| `json`        | .json: a list of records, an object with one list inside, or JSON Lines, as its content is |
| `csv`, `tsv`  | .csv .tsv: the first row names the fields                                                  |
| `parquet`     | .parquet                                                                                   |
| `arrayrecord` | .arrayrecord .array_record                                                                 |

The number of a shard may stand in a name (`a.jsonl-00000-of-00002`, `a-00000-of-00002.parquet`, `a.jsonl.1`), and all
but Parquet and ArrayRecord may be compressed (.gz .bz2 .zst). Endings of other formats are refused, as is content that
is no UTF-8 text. Files may be in a bucket.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mod_star.data.parquet import parquet_records
from mod_star.errors import InputError
from mod_star.storage import address_of, is_address, read_file

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrayrecord"]
Records = Iterator[tuple[Any, str]]
"""Records, and where each stands ("FILE, line 7"), as errors are to say it."""

FORMATS: dict[str, Format] = {
    **dict.fromkeys(("txt", "text", "md", "markdown", "rst"), "text"),
    **dict.fromkeys(("jsonl", "ndjson", "jsonlines"), "jsonl"),
    "json": "json", "csv": "csv", "tsv": "tsv", "parquet": "parquet",
    **dict.fromkeys(("arrayrecord", "array_record"), "arrayrecord"),
}  # fmt: skip
COMPRESSIONS = {"gz": "gzip", "gzip": "gzip", "bz2": "bz2", "zst": "zstd", "zstd": "zstd"}
"""pyarrow's name of a compression, by the ending that says it."""
REFUSED = {
    *("zip", "tar", "tgz", "tbz", "tbz2", "txz", "7z", "rar", "xz", "lzma", "lz4", "lzo", "br", "z", "sz", "snappy"),
    *("tfrecord", "tfrecords", "riegeli", "bagz", "mds", "arrow", "feather", "ipc", "avro", "orc", "json5", "jsonc"),
    *(
        "pickle",
        "pkl",
        "h5",
        "hdf5",
        "db",
        "sqlite",
        "sqlite3",
        "npy",
        "npz",
        "pt",
        "pth",
        "safetensors",
        "gguf",
        "bin",
    ),
    *("pdf", "html", "htm", "xhtml", "xml", "epub", "doc", "docx", "odt", "rtf", "ppt", "pptx", "xls", "xlsx", "ipynb"),
}
"""Endings of formats that are not read, though a few of them would pass for text."""
RECORD_NAMES = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet"
_COMPRESSED_NAMES = "all but .parquet and .arrayrecord also with .gz, .bz2 or .zst"

_SHARD = re.compile(r"[-_.](\d+)-of-(\d+)")
_SHARD_OF_SET = re.compile(r"[-_.](\d{5})-of-(\d{5})")  # as everybody numbers them; "1-of-3" may mean anything
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"BZh91AY&SY", "bzip2-compressed data"),
    (b"\xfd7zXZ\x00", "xz-compressed data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF-", "a PDF"),
    (b"ARROW1\x00", "Arrow data"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_START = 8_000
"""Bytes in which no text has a zero."""
_LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit is 131,072 characters


@dataclass(frozen=True)
class FileType:
    """What a file's name says of it."""

    format: Format
    compression: str | None
    """An ending of `COMPRESSIONS`; None: as it is."""


def file_type(path: str) -> FileType:
    """What the name of a file says. Raises InputError for the ending of a format that is not read."""
    name = _SHARD.sub("", path.rpartition("/")[2].lower())
    stem, dot, ending = name.rpartition(".")
    compression = ending if dot and ending in COMPRESSIONS else None
    name = stem if compression else name
    numbered = re.sub(r"[-_.]\d+$", "", name)  # "a.jsonl.1", "a.jsonl-00001"
    endings = [Path(each).suffix[1:] for each in (name, numbered)]
    ending = next((each for each in endings if each in FORMATS or each in REFUSED), "")
    if ending in REFUSED:
        raise InputError(f"{path}: .{ending} files are not read (allowed: {_allowed()})")
    form = FORMATS.get(ending, "text")
    if compression and form in ("parquet", "arrayrecord"):
        raise InputError(f"{path}: .{ending} files are read without .{compression} only (allowed: {_allowed()})")
    return FileType(form, compression)


def holds_records(path: str) -> bool:
    """Whether a name says that a file holds records, not text. Errors as for `file_type`."""
    return file_type(path).format != "text"


def uncompressed_name(path: str) -> str:
    """A path without the ending of its compression: equal for a file and its compressed copy."""
    stem, dot, ending = path.rpartition(".")
    return stem if dot and ending.lower() in COMPRESSIONS else path


def missing_shards(paths: Sequence[str]) -> list[str]:
    """A line for each set of shards (`-00000-of-00004`) of which `paths` lack some."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        directory, slash, base = path.rpartition("/")
        match = _SHARD_OF_SET.search(base)
        if match:
            name = directory + slash + base[: match.start()]
            sets.setdefault((name, int(match[2])), set()).add(int(match[1]))
    said = []
    for (name, total), numbers in sorted(sets.items()):
        missing = [number for number in range(total) if number not in numbers][:4] if total > len(numbers) else []
        if missing:
            shown = ", ".join(map(str, missing)) + (", ..." if total - len(numbers) > len(missing) else "")
            said.append(f"{name}: {len(numbers)} of {total} shards are read, not number {shown}")
    return said


def read_text(path: str) -> str:
    """A text file with "\\n" line ends.

    Raises:
        InputError: The name says that it holds something else, or the file can't be read, is empty or no UTF-8; the
            message names the file, and the line of a byte that is not UTF-8.
    """
    if holds_records(path):
        raise InputError(f"{path}: holds records, its name says; must be a text file, such as .txt or .md")
    return _read_utf8(path)


def read_records(path: str, fields: Collection[str] = ()) -> Records:
    """The records of a file.

    Args:
        path: The file.
        fields: The only fields that are needed of a Parquet file, if it has all of them; empty: all.

    Raises:
        InputError: The name is of no format with records; the file can't be read, is empty or broken.
    """
    form = file_type(path).format
    if form == "parquet":
        return parquet_records(path, read_bytes(path) if is_address(path) else None, fields)
    readers: dict[str, Callable[[str], Records]] = {
        "jsonl": _jsonl_records, "json": _json_records, "csv": _csv_records, "tsv": _csv_records
    }  # fmt: skip
    if form not in readers:
        raise InputError(f"{path}: must be a .jsonl or .json file, or another with records ({RECORD_NAMES})")
    return readers[form](path)


def parse_json(text: str, where: str, one_line: bool = True) -> Any:
    """The value that `text` holds; errors say where, and the line too unless `where` has it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if one_line else f", line {error.lineno}"
        raise InputError(f"{where}{line}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def looks_like_json(text: str) -> bool:
    """Whether a text's first line is a JSON object, or all of it is a JSON object or a list of objects."""
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return False
    for candidate in (text.partition("\n")[0], text):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value[0] if isinstance(value, list) and value else value, dict):
            return True
    return False


def _allowed() -> str:
    return f"{', '.join(f'.{ending}' for ending in FORMATS)}; {_COMPRESSED_NAMES}"


def read_bytes(path: str) -> bytes:
    """A file as it lies there. Raises InputError if it can't be read."""
    try:
        return read_file(address_of(path)) if is_address(path) else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_utf8(path: str) -> str:
    data, compression = read_bytes(path), file_type(path).compression
    if compression is not None:
        data = _decompress(data, compression, path)
    for magic, what in _MAGIC:
        if data.startswith(magic):
            raise InputError(f"{path}: holds {what}, must be UTF-8 text")
    zero = data.find(b"\0", 0, _START)
    if zero >= 0:
        raise InputError(f"{path}: holds binary data (byte 0x00 at {zero}), must be UTF-8 text")
    data = data.removeprefix(codecs.BOM_UTF8)
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


def _decompress(data: bytes, ending: str, path: str) -> bytes:
    """All members of compressed data, one after the other."""
    import pyarrow

    try:
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), COMPRESSIONS[ending]).read()
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is cut off, or no .{ending} file as its name says ({reason})") from None


def _jsonl_records(path: str) -> Records:
    return _records_of_lines(_read_utf8(path), path)


def _records_of_lines(text: str, path: str) -> Records:
    """The values of JSON Lines. Blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield parse_json(line, where), where


def _json_records(path: str) -> Records:
    """The records of a JSON file: a list, the only list in an object, or JSON Lines."""
    text = _read_utf8(path)
    if _is_json_lines(text):
        yield from _records_of_lines(text, path)
        return
    content = parse_json(text, path, one_line=False)
    lists = [content]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise InputError(f"{path}: must be a list of records, or an object with exactly one list in it")
    if not lists[0]:
        raise InputError(f"{path}: holds no records")
    for number, record in enumerate(lists[0], start=1):
        yield record, f"{path}, record {number}"


def _is_json_lines(text: str) -> bool:
    """Whether the first line with something in it is a JSON value by itself, and more lines follow."""
    first, _, rest = text.strip().partition("\n")
    if not rest:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _csv_records(path: str) -> Records:
    """The rows of a CSV or TSV file by the names in its first row; all values are strings."""
    delimiter = "\t" if file_type(path).format == "tsv" else ","
    reader = csv.reader(io.StringIO(_read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = [(row, reader.line_num) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    (names, end), *rows = rows
    if len(set(names)) < len(names):
        raise InputError(f"{path}, line 1: must name the fields, each once, has {', '.join(names)}")
    if not any(row for row, _ in rows):
        raise InputError(f"{path}: holds no records")
    for row, last in rows:
        where, end = f"{path}, line {end + 1}", last
        if row:
            if len(row) != len(names):
                raise InputError(f"{where}: has {len(row)} fields, line 1 names {len(names)}")
            yield dict(zip(names, row, strict=True)), where
