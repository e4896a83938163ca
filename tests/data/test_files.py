"""Files: a name that says what it is is read so or refused, and nothing is decided in silence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from mod_star.data.conversations import Conversation
from mod_star.data.files import file_type, missing_shards, read_records
from mod_star.data.sources import read_sources
from mod_star.errors import InputError

RECORDS = [{"text": f"é {number}", "n": number} for number in range(3)]
TEXTS = [record["text"] for record in RECORDS]
CSV = "text,n\né 0,0\né 1,1\né 2,2\n".encode()


def gzipped(content: bytes) -> bytes:
    """Without the time: contents name the tests, whose names must be the same in all of pytest-xdist's workers."""
    return gzip.compress(content, mtime=0)


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def columns(records: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def read(spec: Path | str, template: str | None = None, separator: str | None = None) -> tuple[list[Any], list[str]]:
    """The documents of a source, and what is told of them."""
    told: list[str] = []
    (documents,) = read_sources([str(spec)], template, separator, told.append)
    return [documents[index] for index in range(len(documents))], told


def fails(spec: Path | str, template: str | None = None, separator: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        read(spec, template, separator)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES), ("a.ndjson", LINES), ("A.JSONL", LINES), ("a.jsonl-00000-of-00001", LINES),
        ("a.ndjson-00000-of-00001.gz", gzipped(LINES)), ("a.jsonl.1", LINES), ("a-00000-of-00001.jsonl", LINES),
        ("a.jsonl.gz", gzipped(LINES)), ("a.jsonl.gz", gzipped(LINES[:20]) + gzipped(LINES[20:])),
        ("a.jsonl.zst", zstd(LINES)), ("a.NDJSON.ZST", zstd(LINES[:20]) + zstd(LINES[20:])),
        ("a.jsonl.bz2", bz2.compress(LINES)), ("a.json", json.dumps(RECORDS).encode()), ("a.json", LINES),
        ("c4-train.00000-of-00001.json.gz", gzipped(LINES)),
        ("a.json.zst", zstd(json.dumps({"r": RECORDS}).encode())), ("a.csv", CSV), ("a.csv.zst", zstd(CSV)),
        ("a.tsv.gz", gzipped(CSV.replace(b",", b"\t"))),
        ("a.parquet", columns(RECORDS)), ("train-00000-of-00001-a1b2.parquet", columns(RECORDS)),
    ],
)  # fmt: skip
def test_records_by_their_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == (TEXTS, [])
    assert read(tmp_path / name, "{n}: {text}") == ([f"{n}: {text}" for n, text in enumerate(TEXTS)], [])


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt.gz", gzip.compress), ("a.md.zst", zstd), ("a.bz2", bz2.compress), ("a.text", bytes)]
)
def test_text_by_its_name(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack("\ufeffEine Zeile\r\nund é\n".encode()))
    assert read(tmp_path / name) == (["Eine Zeile\nund é\n"], [])


@pytest.mark.parametrize(
    "name",
    [
        "a.xz", "a.jsonl.xz", "a.tar", "a.tar.gz", "a.tgz", "a.zip", "a.jsonl.zip", "a.PDF", "a.html", "a.arrow",
        "a.docx", "a.tfrecord-00000-of-00001", "a.tfrecord", "a.feather", "a.pkl", "a.npy", "a.jsonl.lz4",
        "a.ipynb", "a.sqlite",
    ],
)  # fmt: skip
def test_names_of_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)  # whatever it holds
    message = fails(tmp_path / name)
    assert " files are not read (allowed: .txt, " in message and ".parquet" in message and ".gz" in message
    with pytest.raises(InputError, match="files are not read"):
        read_records(str(tmp_path / name))


def test_formats_with_compression_of_their_own(tmp_path: Path) -> None:
    for name in ("a.parquet.gz", "a.arrayrecord.zst"):
        (tmp_path / name).write_bytes(b"x")
        assert " files are read without ." in fails(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", gzipped(b"text"), "gzip-compressed data"), ("a.jsonl", zstd(LINES), "zstd-compressed data"),
        ("a.txt", lzma.compress(b"text"), "xz-compressed data"),
        ("a.json", bz2.compress(LINES), "bzip2-compressed data"),
        ("a.unknown", b"%PDF-1.7\n%\xe2", "a PDF"), ("a", b"PK\x03\x04\x14", "a zip archive"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"), ("a.jsonl", b"\xfe\xff\x00{", "UTF-16"),
        ("a.csv", "text".encode("utf-32"), "UTF-32"), ("a.txt", b"ELF\0\1\2", "binary data (byte 0x00 at 3)"),
        ("a.txt.gz", gzipped(b"ELF\0\1\2"), "binary data (byte 0x00 at 3)"),
        ("a.gz", gzipped(gzipped(b"text")), "gzip-compressed data"),
        ("a.txt", "text".encode("utf-16-le"), "binary data (byte 0x00 at 1)"),
    ],
)  # fmt: skip
def test_content_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fails(tmp_path / name) == f"{tmp_path / name}: holds {what}, must be UTF-8 text"


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd), ("bz2", bz2.compress)])
def test_compressed_files_that_are_cut_off_or_something_else(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path, whole = tmp_path / f"a.jsonl.{ending}", pack(LINES * 100)
    broken = whole[: len(whole) // 2] + bytes(4) + whole[len(whole) // 2 + 4 :]
    contents = [whole[:-1], whole[:-9], whole[:3], LINES, whole + b"rest"]
    for content in contents if ending == "zst" else [*contents, broken]:  # this zstd writes no checksum
        path.write_bytes(content)
        assert fails(path).startswith(f"{path}: is cut off, or no .{ending} file as its name says (")
    for content in (b"", pack(b""), pack(b" \n")):
        path.write_bytes(content)
        assert fails(path) == f"{path}: is empty"
    path.write_bytes(pack(b'{"text": "ok"}\n{"text": "caf\xe9"}\n'))
    assert fails(path) == f"{path}, line 2: not valid UTF-8 (byte 0xe9 at 28)"
    path.write_bytes(pack(b'{"text": "ok"}\n{"text": \n'))
    assert fails(path).startswith(f"{path}, line 2: not valid JSON (")


def test_json_lines_named_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\n" + LINES + b'{"text": "x", \n')
    assert fails(path).startswith(f"{path}, line 5: not valid JSON (")
    path.write_text('"one"\n\n"two"\n')
    assert read(path)[0] == ["one", "two"]
    # Not by line: a value over several lines, then another.
    path.write_text('{\n"text": "x"}\n{\n"text": "x"}\n')
    assert fails(path).startswith(f"{path}, line 3: not valid JSON (Extra data ")


def test_text_that_looks_like_records_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl.bak", "a", "a.gz"):
        content = {"a.gz": gzipped(LINES)}.get(name, LINES)
        (tmp_path / name).write_bytes(content)
        documents, (line,) = read(tmp_path / name)
        assert documents == [LINES.decode()]
        assert f"{tmp_path / name} looks like JSON, and is read as text" in line
    for text, looks in (
        ('[{"text": "x"},\n {"text": "y"}]', True), ('{"data":\n [1]}', True), ("{\\bf x} and more", False),
        ("[1] A reference", False), ("[1]\n[2]", False), ("A {text}", False), ("{", False), ("{}{}", False),
    ):  # fmt: skip
        (tmp_path / "b.txt").write_text(text)
        assert bool(read(tmp_path / "b.txt")[1]) == looks, text


def test_array_records_that_look_like_records_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()
    documents, (line,) = read(path)
    assert json.loads(documents[0]) == RECORDS[0] and "look like JSON" in line
    assert read(path, "{text}") == (TEXTS, [])


def test_missing_shards_are_told(tmp_path: Path) -> None:
    for number in (0, 2):
        (tmp_path / f"a.jsonl-{number:05d}-of-00003").write_bytes(LINES)
    documents, (line,) = read(tmp_path / "a.jsonl*")
    assert documents == TEXTS * 2
    assert line.endswith("a.jsonl: 2 of 3 shards are read, not number 1")
    assert "1 of 3 shards are read, not number 1, 2" in read(tmp_path / "a.jsonl-00000-of-00003")[1][0]
    (tmp_path / "a.jsonl-00001-of-00003").write_bytes(LINES)
    assert read(tmp_path / "a.jsonl*") == (TEXTS * 3, [])
    (tmp_path / "top-10-of-2023.txt").write_text("Not a shard.")
    assert read(tmp_path / "top-10-of-2023.txt") == (["Not a shard."], [])
    names = [f"gs://b/{name}-{n:05d}-of-00200.parquet" for name in "cd" for n in range(3)]
    assert [line[:40] for line in missing_shards(names)] == [
        f"gs://b/{n}: 3 of 200 shards are read, not num"[:40] for n in "cd"
    ]


def test_a_file_and_its_compressed_copy_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzipped(LINES))
    assert "a document may come once only" in fails(tmp_path / "a.jsonl*")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["q", "a"], ["two\nlines, é", 'a "word"'], [], ["x" * 200_000, "y"]])
    assert read(path, "{q}|{a}")[0] == ['two\nlines, é|a "word"', "x" * 200_000 + "|y"]
    assert csv.field_size_limit() == 131_072
    for content, message in (
        ("q,a\n", "holds no records"), ("q,q\n1,2\n", ", line 1: must name the fields, each once, has q, q"),
        ('q,a\n"1\n2",3\n4\n', ", line 4: has 1 fields, line 1 names 2"), ('q,a\n1,"2', ", line 2: not valid CSV ("),
    ):  # fmt: skip
        path.write_text(content)
        assert message in fails(path, "{q}")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    choices = {"label": ["A", "B"], "text": ["bank", "é"]}
    path.write_bytes(columns([{"q": f"{n}?", "choices": choices, "b": b"\xff"} for n in range(2_500)]))
    documents, _ = read(path, "{q} {choices[text][1]}")
    assert documents == [f"{n}? é" for n in range(2_500)]
    assert fails(path, "{q} {nope}").endswith("row 1: data.template names 'nope', the record has fields q, choices, b")
    assert fails(path, "{q} {b}").endswith("row 1: not valid UTF-8 (byte 0xff at 0)")
    path.write_bytes(columns([{"text": "x"}] * 1_200 + [{"text": None}]))
    assert fails(path) == f"{path}, row 1201: 'text' is null (nothing inside), not text or a number"
    path.write_bytes(columns([{"text": "x"}])[:-5])
    assert fails(path).startswith(f"{path}: cannot be read as Parquet (")
    path.write_bytes(b"")
    assert fails(path).startswith(f"{path}: cannot be read as Parquet (")
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    parquet.write_table(table, path)
    assert fails(path) == f"{path}: holds no records"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    assert fails(path).startswith(f"{path}: cannot be read as Parquet (")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert fails(path) == f"{path}: cannot be read as Parquet (No such file or directory)"


def test_separator(tmp_path: Path) -> None:
    mark = "<|endoftext|>"
    text = f"One.\n\nStill one.\n{mark}\n\nTwo.\n{mark}\n{mark}\n  Three\n{mark}"
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "c.txt").write_text("No mark.\n")
    assert read(tmp_path / "a.txt", separator=mark) == (["One.\n\nStill one.", "Two.", "  Three"], [])
    assert len(read(tmp_path / "*.txt", separator=mark)[0]) == 7
    assert read(tmp_path / "a.txt", separator=r"\n\n")[0][0] == "One."
    message = f"data.separator = {mark!r}: does not occur in data.source = {str(tmp_path / 'c.txt')!r}"
    assert fails(tmp_path / "c.txt", separator=mark) == message
    assert (
        fails("python-docs", separator=mark) == f"data.separator = {mark!r}: no source is a text file (.txt, .md, ...)"
    )


def test_marks_inside_documents_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.<|endoftext|>Two.</s>")
    told: list[str] = []
    read_sources([str(path)], None, None, told.append, ["<|endoftext|>", "</s>", "<|im_end|>"])
    first, second = told
    assert first.endswith(
        "1 of 1 documents have '<|endoftext|>' inside, and keep it; "
        "data.separator = '<|endoftext|>' cuts the files there"
    )
    assert "'</s>' inside" in second
    told.clear()
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "x"}]
    path.write_text(json.dumps({"text": "x</s>"}) + "\n" + json.dumps({"messages": messages}) + '\n{"text": "y"}')
    read_sources([str(path)], None, None, told.append, ["</s>"])
    (line,) = told
    assert line.endswith("2 of 3 documents have '</s>' inside, and keep it")


@pytest.mark.parametrize("suffix", ["jsonl.gz", "parquet", "arrayrecord"])
def test_records_of_messages(tmp_path: Path, suffix: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / f"a.{suffix}"
    records = [{"messages": turns, "source": "x"}] * 2

    def write(records: list[dict[str, Any]]) -> None:
        if suffix == "arrayrecord":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(json.dumps(record).encode())
            writer.close()
        else:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            path.write_bytes(columns(records) if suffix == "parquet" else gzipped(lines.encode()))

    write(records)
    documents, told = read(path, "{messages}")
    assert not told and len(documents) == 2
    assert all(isinstance(each, Conversation) and list(each.messages) == turns for each in documents)
    if suffix == "arrayrecord":
        return  # without a template its records are text
    assert read(path)[0] == documents
    write([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    assert [each.messages for each in read(path)[0]] == [tuple(turns)]
    assert read(path, "{conversations[1][value]}")[0] == ["a"]
    write([{"text": "t", "messages": turns}])
    documents, (line,) = read(path)
    assert documents == ["t"] and "records have 'text' and 'messages', 'text' is read; data.template" in line
    assert isinstance(read(path, "{messages}")[0][0], Conversation)
    write([{"messages": turns, "tools": [{"name": "f"}]}])
    assert fails(path, "{messages}").endswith(" 1: field 'tools' is not read with messages, it must be empty")
    write([{"messages": turns[:1]}])
    assert fails(path).endswith(" 1: has no message of the assistant to learn")


def test_what_a_name_says() -> None:
    for name, said in (
        ("gs://b/a.b/x.jsonl", "jsonl"), ("x.array_record-00000-of-00004", "arrayrecord"), ("Makefile", "text"),
        ("notes.2024-of-my.life", "text"), ("a.json_001", "json"), ("x.py", "text"), ("part-00000-of-00002", "text"),
        ("a.snappy.parquet", "parquet"),
    ):  # fmt: skip
        assert file_type(name).format == said, name
