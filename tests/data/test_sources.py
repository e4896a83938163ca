"""Sources: what a document is, and one clear line for everything that can be wrong with a file."""

from __future__ import annotations

import json
import socket
import sys
import types
from pathlib import Path
from typing import Any
from urllib import error as url_error

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mod_star.data import sources
from mod_star.data.sources import read_sources, split_text
from mod_star.errors import InputError

QA = r"Q: {question}\nA: {answer}"


def read(spec: Path | str, template: str | None = None) -> list[Any]:
    (documents,) = read_sources([str(spec)], template)
    return [documents[index] for index in range(len(documents))]


def fails(spec: Path | str, template: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        read(spec, template)
    message = str(error.value)
    assert "\n" not in message
    return message


def write_array_record(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_python_docs() -> None:
    documents = read("python-docs")
    assert len(documents) > 50
    assert 300_000 < sum(map(len, documents)) < 900_000
    assert documents == read("python-docs")


def test_python_without_its_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert (
        fails("python-docs") == "data.source = 'python-docs': this Python lacks pydoc_data.topics; name a file instead"
    )


def test_small_files_are_documents_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in [
        ("b.md", "second\r\nline"),
        ("a.md", "\ufefffirst é"),
        ("sub/c.md", "third"),
        ("d.rst", "other"),
    ]:
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / "**" / "*.md") == ["first é", "second\nline", "third"]


def test_a_name_that_looks_like_a_glob_is_meant_literally(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("text")
    assert read(tmp_path / "[a].txt") == ["text"]


def test_long_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {n}: " + "words " * (n % 40) + "\n\n" for n in range(400))
    path = tmp_path / "long.txt"
    path.write_text(text)
    documents = read(path)
    assert "".join(documents) == text
    assert all(2_000 <= len(document) < 2_500 for document in documents[:-1])
    assert all(document.endswith("\n\n") and document.startswith("Paragraph") for document in documents)


@pytest.mark.parametrize(("mark", "end"), [("\n", "line\n"), (" ", "line "), ("", "")])
def test_without_blank_lines_sections_end_at_lines_then_words(mark: str, end: str) -> None:
    text = f"line{mark}" * 3_000
    parts = split_text(text)
    assert "".join(parts) == text
    assert len(parts) >= 3
    assert all(2_000 <= len(part) <= 4_000 and part.endswith(end) for part in parts[:-1])


def test_sections_grow_with_the_text() -> None:
    parts = split_text("some words here\n\n" * 200_000)
    assert 190 <= len(parts) <= 200
    assert split_text("short") == ["short"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        '{"question": "1+1?", "answer": 2}\r\n\n{"question": "é\u2028?", "answer": "x"}\n', encoding="utf-8"
    )
    assert read(path, QA) == ["Q: 1+1?\nA: 2", "Q: é\u2028?\nA: x"]


def test_json_list_and_object_with_one_list(tmp_path: Path) -> None:
    records = [{"sQuestion": "How many?", "lSolutions": [56.0]}]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "object.json").write_text(json.dumps({"canary": "x", "examples": records}))
    for name in ("list.json", "object.json"):
        assert read(tmp_path / name, "{sQuestion} {lSolutions[0]:g}") == ["How many? 56"]
    (tmp_path / "strings.json").write_text('["a", "b"]')
    assert read(tmp_path / "strings.json") == ["a", "b"]


def test_array_record(tmp_path: Path) -> None:
    assert read(write_array_record(tmp_path / "text.arrayrecord", ["a é".encode(), b"b"])) == ["a é", "b"]
    records = [json.dumps({"question": n, "answer": "y"}).encode() for n in range(3)]
    path = write_array_record(tmp_path / "qa.array_record-00000-of-00001", records)
    assert read(path, QA) == [f"Q: {n}\nA: y" for n in range(3)]


def test_missing_and_empty(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert fails(missing).startswith(f"data.source = {str(missing)!r}: no such file (allowed: python-docs, ")
    assert fails(tmp_path / "*.txt") == f"data.source = {str(tmp_path / '*.txt')!r}: no file matches this pattern"
    assert fails(tmp_path).startswith(f"data.source = {str(tmp_path)!r}: is a directory; name its files, such as ")
    for suffix in ("txt", "jsonl", "json", "arrayrecord"):
        path = tmp_path / f"empty.{suffix}"
        path.write_bytes(b"")
        assert fails(path) == f"{path}: is empty"
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    assert fails(blank) == f"{blank}: is empty"
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    assert fails(nothing) == f"{nothing}: holds no records"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "dangling.txt"
    path.symlink_to(tmp_path / "nowhere")
    assert fails(path) == f"{path}: cannot be read (No such file or directory)"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_invalid_utf8_names_line_and_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    assert fails(path) == f"{path}, line 2: not valid UTF-8 (byte 0xe9 at 28)"


def test_broken_records_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "ok"}\n\n{"text": "cut\n')
    assert fails(path).startswith(f"{path}, line 3: not valid JSON (")
    path.write_text('{"text": "ok"}\n{"question": "x"}\n')
    expected = "data.template is not set, so the field is 'text', the record has fields question"
    assert fails(path) == f"{path}, line 2: {expected}"
    assert fails(path, "{text} {nope}") == f"{path}, line 1: data.template names 'nope', the record has fields text"
    path = tmp_path / "broken.json"
    path.write_text('[{"text": "ok"},\n{"text": 1,}]')
    assert fails(path).startswith(f"{path}, line 2: not valid JSON (")
    path.write_text('[{"text": "ok"}, {"a": 1}]')
    assert fails(path).startswith(f"{path}, record 2: ")
    path.write_text('{"a": [1], "b": [2]}')
    assert fails(path) == f"{path}: must be a list of records, or an object with exactly one list in it"
    path.write_text("[" * 100_000)
    assert fails(path).startswith(f"{path}: not valid JSON (")


def test_bad_array_records(tmp_path: Path) -> None:
    path = tmp_path / "fake.arrayrecord"
    path.write_text("not one")
    assert fails(path).startswith(f"data.source = {str(path)!r}: not an ArrayRecord file (")
    path = write_array_record(tmp_path / "text.arrayrecord", [b"no json"])
    assert fails(path, QA).startswith(f"{path}, record 1: not valid JSON (")
    path = write_array_record(tmp_path / "latin.arrayrecord", [b"ok", b"\xff"])
    assert fails(path) == f"{path}, record 2: not valid UTF-8 (byte 0xff at 0)"


def test_sources_may_not_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a.txt is read by .*a.txt' and .*\*.txt'; a document may come once only"):
        read_sources([str(tmp_path / "a.txt"), str(tmp_path / "*.txt")], None)


def test_a_glob_over_different_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert fails(tmp_path / "a.*").endswith("matches files of different kinds (jsonl, text)")


def test_a_template_that_nothing_uses() -> None:
    assert fails("python-docs", "{text}").startswith("data.template = '{text}': no source has records with fields")


@pytest.fixture(scope="module")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of TensorFlow Datasets, prepared on disk as ArrayRecord; returns its data directory."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class ModStarTiny(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"question": tfds.features.Text(), "choices": tfds.features.Sequence(tfds.features.Text())}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for number in range(10):
                yield number, {"question": f"é {number}?", "choices": ["yes", "no"]}

    directory = tmp_path_factory.mktemp("tfds")
    try:
        ModStarTiny(data_dir=directory, file_format="array_record").download_and_prepare()
    except ModuleNotFoundError as error:
        pytest.skip(f"TensorFlow Datasets lacks {error.name}")
    return directory


def test_tfds_prepared_on_disk(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [f"é {n}? no" for n in range(10)]
    template = "{question} {choices[1]}"
    directory = f"tfds:{tiny_dataset}/mod_star_tiny/1.0.0"
    assert sorted(read(directory, template)) == expected
    assert len(read(f"{directory}:train[:40%]", template)) == 4
    assert fails(f"{directory}:test", template).endswith("Unknown split 'test'. Should be one of ['train'].")
    assert "the record has fields choices, question" in fails(directory)
    # By name, without its code, from the data directory.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tiny_dataset))
    assert len(read("tfds:mod_star_tiny", template)) == 10


def test_unknown_tfds_name() -> None:
    pytest.importorskip("tensorflow_datasets")
    assert "knows no such dataset, and none is prepared" in fails("tfds:no_such_dataset_at_all:train")
    assert fails("tfds:a/b/c/d").startswith("data.source = 'tfds:a/b/c/d': ")


def test_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    builder = types.SimpleNamespace(is_prepared=lambda: False, url_infos={"https://example.org/data.zip": None})
    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: builder)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    message = "is not prepared on disk, and there is no network to fetch it ([Errno -2] Name or service not known)"
    assert fails("tfds:some_dataset") == f"data.source = 'tfds:some_dataset': {message}"


def test_a_server_that_answers_with_an_error_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise url_error.HTTPError("https://example.org", 403, "Forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    sources._require_reachable(["https://example.org/data.zip"])


def test_tfds_that_needs_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    monkeypatch.setattr(tfds, "builder", missing)
    assert fails("tfds:some") == "data.source = 'tfds:some': preparing it needs the Python package x"
