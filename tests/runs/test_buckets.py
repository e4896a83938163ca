"""Runs and data in a bucket: the same as in a directory, on whatever machine they go on."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chex
import numpy as np
import pyarrow
import pytest
from bucket_server import Bucket, bucket_server
from etils import epath
from fault_runs import options
from fork_server import succeed
from pyarrow import parquet

from mod_star import storage
from mod_star.cli import main
from mod_star.data import read_sources
from mod_star.errors import InputError
from mod_star.evaluation.tasks import load_task
from mod_star.runs import buckets, checkpoints
from mod_star.runs.buckets import bring_back, working_copy
from mod_star.runs.directory import load_run
from mod_star.storage import address_of, is_address

RUN = "gs://bucket/runs/mine"
OPTIONS = (
    "--preset", "tiny", "--train.steps", "6", "--train.checkpoint-every", "2", "--train.log-every", "1",
    "--train.eval-every", "3", "--train.eval-batches", "1",
)  # fmt: skip


def command(*argv: str, machine: Path, environment: dict[str, str]) -> str:
    """What `mod-star` prints on a machine, which is what its cache directory stands for."""
    return succeed(*argv, environment=environment | {"XDG_CACHE_HOME": str(machine)}).out


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Bucket, dict[str, str]]]:
    with bucket_server() as (bucket, environment):
        yield bucket, environment


@pytest.fixture
def here(served: tuple[Bucket, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket, within reach of this process, whose working copies are in `tmp_path`."""
    bucket, environment = served
    for name, value in (environment | {"XDG_CACHE_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    return bucket


def files_of(bucket: Bucket, prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(prefix): bucket.objects[name][1] for name in bucket.names() if name.startswith(prefix)}


def without_speed(metrics: bytes) -> str:
    return re.sub(r', "tokens_per_second": [^,}]+', "", metrics.decode())


def train_here_and_there(served: tuple[Bucket, dict[str, str]], tmp_path: Path) -> tuple[tuple[str, ...], str, Path]:
    """A run in the bucket, trained by another machine: the command's words, what it printed; and one of a directory."""
    bucket, environment = served
    bucket.objects = {}
    texts = {f"{name}.txt": f"It was the {name} of times.\n" * 300 for name in ("best", "worst", "age")}
    (tmp_path / "data").mkdir()
    for name, text in texts.items():
        (tmp_path / "data" / name).write_text(text)
        bucket.write(f"data/{name}", text.encode())
    local = tmp_path / "run"
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(local), *OPTIONS, "--data.source", f"{tmp_path}/data/*.txt"])
    there = ("train", RUN, *OPTIONS, "--data.source", "gs://bucket/data/*.txt")
    return there, command(*there, machine=tmp_path / "a", environment=environment), local


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_run_in_a_bucket_is_the_run_of_a_directory(
    served: tuple[Bucket, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = served[0]
    _, out, local = train_here_and_there(served, tmp_path)
    assert f"{RUN} starts" in out and f"curves: {RUN}/curves.png" in out
    found = files_of(bucket, "runs/mine/")
    assert {"config.json", "metrics.jsonl", "summary.json", "curves.png"} <= found.keys()
    assert any(name.startswith("tensorboard/") for name in found)
    assert found["metrics.jsonl"].decode().count('"eval_loss":') == 2
    assert without_speed(found["metrics.jsonl"]) == without_speed((local / "metrics.jsonl").read_bytes())
    expected, arrived = load_run(local), load_run(RUN)
    assert arrived.step == 6
    chex.assert_trees_all_equal(arrived.params, expected.params)

    # A save that was killed is no checkpoint.
    ended = dict(bucket.objects)
    del bucket.objects["runs/mine/checkpoints/6/commit_success.txt"]
    assert load_run(RUN).step == 4
    bucket.objects = ended

    # What lies in the bucket is a run of a directory, too.
    copy = tmp_path / "copy"
    for name, data in files_of(bucket, "runs/mine/").items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    chex.assert_trees_all_equal(load_run(copy).params, expected.params)

    # A bucket that can't be reached any more: one line.
    bucket.broken = True
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        main(["sample", RUN, "--prompt", "It"])
    bucket.broken = False
    assert re.fullmatch(rf"error: {RUN}: [^\n]*no access[^\n]*\n", err := capsys.readouterr().err), err


@pytest.mark.nightly
@pytest.mark.usefixtures("here")
def test_a_run_in_a_bucket_goes_back_and_on_by_another_machine(
    served: tuple[Bucket, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, environment = served
    train_there, _, local = train_here_and_there(served, tmp_path)
    found, expected = files_of(bucket, "runs/mine/"), load_run(local)

    # It goes back a few steps, and comes to the same end.
    out = command(*train_there, "--resume-from", "2", machine=tmp_path / "b", environment=environment)
    assert f"{RUN} goes on from step 2" in out
    again = files_of(bucket, "runs/mine/")
    assert without_speed(again["metrics.jsonl"]) == without_speed(found["metrics.jsonl"])
    chex.assert_trees_all_equal(load_run(RUN).params, expected.params)

    # Killed when it had only begun to go back, it isn't complete any more.
    ended = dict(bucket.objects)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "delete_after", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([*train_there, "--resume-from", "2"])
    assert "runs/mine/summary.json" in ended and "runs/mine/summary.json" not in bucket.objects
    bucket.objects = ended

    # What a command writes beside a run is brought back.
    with pytest.raises(SystemExit, match="0"):
        main(["routes", RUN, "--text", "It was"])
    assert files_of(bucket, "runs/mine/")["routes.png"].startswith(b"\x89PNG")


def test_a_working_copy_is_what_the_bucket_holds(here: Bucket, tmp_path: Path) -> None:
    bucket = here
    bucket.write("runs/x/config.json", b"{}")
    bucket.write("runs/x/tokenizer/a.json", b"1")
    bucket.write("runs/x/checkpoints/2/large", b"2")
    bucket.write("runs/x/../../../evil.json", b"4")
    copy = working_copy("gs://bucket/runs/x")
    assert copy.name == "x" and buckets.copied_from(copy) == "gs://bucket/runs/x"
    assert sorted(path.name for path in copy.rglob("*.json")) == ["a.json", "config.json", "working_copy.json"]
    assert not (copy / "checkpoints").exists() and not list(tmp_path.rglob("evil.json"))
    # Changes go back, and no others.
    before = dict(bucket.objects)
    bring_back(copy)
    assert bucket.objects == before
    (copy / "metrics.jsonl").write_text("3\n")
    (copy / "tokenizer" / "a.json").unlink()
    bring_back(copy)
    assert bucket.objects["runs/x/metrics.jsonl"][1] == b"3\n" and "runs/x/tokenizer/a.json" not in bucket.objects
    assert bucket.objects["runs/x/config.json"] == before["runs/x/config.json"]
    # Renewed, it loses what isn't there; while a training holds it, it is left alone.
    del bucket.objects["runs/x/metrics.jsonl"]
    with (copy / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (working_copy("gs://bucket/runs/x") / "metrics.jsonl").exists()
    assert not (working_copy("gs://bucket/runs/x") / "metrics.jsonl").exists()
    # Nothing there: nothing here.
    bucket.objects = {name: value for name, value in bucket.objects.items() if not name.startswith("runs/x/")}
    assert not (working_copy("gs://bucket/runs/x") / "config.json").exists()


def test_what_was_not_brought_back_yet_is_kept(here: Bucket) -> None:
    bucket, address = here, "gs://bucket/runs/kept"
    bucket.write("runs/kept/config.json", b"{}")
    bucket.write("runs/kept/metrics.jsonl", b"1\n")
    copy = working_copy(address)
    # A command that writes, and was killed, or still runs.
    (copy / "evaluations").mkdir()
    (copy / "evaluations" / "records.jsonl").write_text("a\n")
    (copy / "evaluations" / "results.json.new").write_text("half")
    (copy / "metrics.jsonl").write_text("1\n2\n")
    config = (copy / "config.json").stat()
    assert working_copy(address) == copy
    assert (copy / "evaluations" / "records.jsonl").read_text() == "a\n"
    assert (copy / "metrics.jsonl").read_text() == "1\n2\n"
    assert (copy / "config.json").stat() == config, "what is the same there isn't written again"
    bring_back(copy)
    assert bucket.objects["runs/kept/evaluations/records.jsonl"][1] == b"a\n"
    assert bucket.objects["runs/kept/metrics.jsonl"][1] == b"1\n2\n"
    assert not any(name.endswith(".new") for name in bucket.names())
    # What has changed there since counts more than what has changed here.
    (copy / "metrics.jsonl").write_text("1\n2\n3\n")
    bucket.write("runs/kept/metrics.jsonl", b"1\n")
    working_copy(address)
    assert (copy / "metrics.jsonl").read_text() == "1\n"
    # If writing there fails halfway, the rest is still to be written.
    for name in ("a", "b"):
        (copy / f"{name}.txt").write_text(name)
    bucket.broken = True
    with pytest.raises(OSError, match="no access"):
        bring_back(copy)
    bucket.broken = False
    working_copy(address)
    bring_back(copy)
    assert [bucket.objects[f"runs/kept/{name}.txt"][1] for name in ("a", "b")] == [b"a", b"b"]
    # Another run at the same address: nothing of the first one is kept.
    bucket.objects = {name: value for name, value in bucket.objects.items() if not name.startswith("runs/kept/")}
    bucket.write("runs/kept/config.json", b"{ }")
    (copy / "c.txt").write_text("c")
    working_copy(address)
    assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == [
        ".fetching", "config.json", "working_copy.json"
    ]  # fmt: skip


READS_AND_WRITES = """
import sys
from mod_star.runs.buckets import bring_back, working_copy
for number in range(8):
    copy = working_copy("gs://bucket/runs/shared")
    assert (copy / "config.json").read_text() == "{}"
    (copy / f"{sys.argv[1]}.txt").write_text(str(number))
    bring_back(copy)
"""


@pytest.mark.slow
def test_processes_of_one_machine_do_not_disturb_one_another(
    served: tuple[Bucket, dict[str, str]], here: Bucket, tmp_path: Path
) -> None:
    here.write("runs/shared/config.json", b"{}")
    environment = os.environ | served[1] | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", READS_AND_WRITES]
    processes = [
        subprocess.Popen([*command, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    for process in processes:
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 0, err
    assert [here.objects[f"runs/shared/{number}.txt"][1] for number in range(4)] == [b"7"] * 4


def test_compressed_files_and_parquet_are_read_from_a_bucket(here: Bucket) -> None:
    lines = "".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(3)).encode()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines.splitlines()]), buffer)
    packed = gzip.compress(lines)
    contents = {"jsonl.gz": packed, "json.zst": pyarrow.Codec("zstd").compress(lines, asbytes=True)}
    contents |= {"parquet": buffer.getvalue()}
    for ending, content in contents.items():
        here.write(f"data/a.{ending}", content)
        (documents,) = read_sources([f"gs://bucket/data/*.{ending}"], "{question} {answer}")
        assert list(documents) == [f"{n}? #### {n}" for n in range(3)]
        task = load_task("gsm8k", Path(f"gs://bucket/data/a.{ending}"))
        assert [item.gold for item in task.items] == ["0", "1", "2"]
        assert task.sha256 == hashlib.sha256(content).hexdigest()
    here.write("data/cut.jsonl.gz", packed[:-4])
    with pytest.raises(InputError, match=r"^gs://bucket/data/cut\.jsonl\.gz: is cut off, or no \.gz file"):
        read_sources(["gs://bucket/data/cut.jsonl.gz"], "{question}")


def test_folders_of_a_console_are_no_files(here: Bucket) -> None:
    for name in ("runs/empty/", "runs/full/", "runs/full/tokenizer/", "texts/", "texts/sub/"):
        here.write(name, b"")
    here.write("runs/full/config.json", b"{}")
    here.write("texts/a.txt", b"a")
    here.write("texts/sub/b.txt", b"b")
    assert not (working_copy("gs://bucket/runs/empty") / "config.json").exists()
    assert (working_copy("gs://bucket/runs/full") / "config.json").read_text() == "{}"
    assert storage.find_files("gs://bucket/texts/*") == ["gs://bucket/texts/a.txt"]
    assert storage.find_files("gs://bucket/texts/sub/b.txt") == ["gs://bucket/texts/sub/b.txt"]
    assert storage.find_files("gs://bucket/texts/**") == ["gs://bucket/texts/a.txt", "gs://bucket/texts/sub/b.txt"]


@pytest.mark.slow
def test_a_start_that_was_killed_on_its_way_there_is_made_again(
    here: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text("from mod_star.parts import Parts\nparts = Parts()\n")
    given = [*options(steps=1), "--parts", f"{tmp_path}/own.py:parts"]
    here.write("runs/started/parts.py", b"of another start")
    here.write("runs/started/tokenizer/of_another_start.json", b"")
    with pytest.raises(SystemExit, match="0"):
        main(["train", "gs://bucket/runs/started", *given])
    found = files_of(here, "runs/started/")
    assert found["parts.py"] == (tmp_path / "own.py").read_bytes()
    assert "summary.json" in found and "tokenizer/of_another_start.json" not in found
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["train", "gs://bucket/runs/started", *given])
    assert "gs://bucket/runs/started: is complete already" in capsys.readouterr().out


def test_config_arrives_last(here: Bucket) -> None:
    copy = working_copy("gs://bucket/runs/new")
    (copy / "tokenizer").mkdir()
    for name in ("config.json", "tokenizer/t.json", "a.txt", "z.txt"):
        (copy / name).write_text("{}")
    bring_back(copy)
    written = {name: generation for name, (generation, _) in here.objects.items() if name.startswith("runs/new/")}
    assert len(written) == 4 and max(written, key=lambda name: written[name]) == "runs/new/config.json"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "gs://bucket/texts"], "gs://bucket/texts: is neither empty nor a run"),
        (["train", "gs://bucket"], "gs://bucket: must be a directory, or gs://BUCKET/NAME"),
        (["train", "s3://bucket/runs"], "s3://bucket/runs: must be a directory, or gs://BUCKET/NAME"),
        (["train", "RUN", "--data.source", "gs://bucket/texts/*.md"], "no such file, and no file matches"),
        (["train", "RUN", "--data.source", "gs://bucket/texts/a.arrayrecord"], "is read from disks only"),
        (["sample", "gs://bucket/runs/none"], "gs://bucket/runs/none: is not a run"),
        (["train", "gs://bucket/runs/none", "--resume-from", "2"], "= 2: gs://bucket/runs/none is not a run yet"),
        (["import", "MODEL", "gs://bucket/runs/other"], "must be a directory; only mod-star train makes runs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(
    argv: list[str], message: str, here: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.write("texts/a.arrayrecord", b"a")
    (tmp_path / "model.gguf").write_bytes(b"")
    places = {"RUN": str(tmp_path / "run"), "MODEL": str(tmp_path / "model.gguf")}
    before = dict(here.objects)
    with pytest.raises(SystemExit) as left:
        main([places.get(word, word) for word in argv])
    err = capsys.readouterr().err
    assert left.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and message in err, err
    assert here.objects == before and not (tmp_path / "run").exists()


def test_addresses() -> None:
    assert is_address("gs://b/x") and is_address(Path("gs://b/x")) and not is_address("runs/x") and not is_address("C:")
    assert not any(map(is_address, ("c:/runs/x", "C:/runs/x", "./gs://b/x"))), "a drive letter is no scheme"
    assert address_of(Path("gs://b/x//y/")) == "gs://b/x/y"


def test_without_gcsfs_it_is_said_what_to_install(here: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    sys.modules["fsspec.registry"]._registry.pop("gs", None)
    with pytest.raises(InputError, match=r"gs://bucket/runs/x: needs the package gcsfs: pip install"):
        working_copy("gs://bucket/runs/x")


def test_an_imported_model_is_read_from_a_bucket(here: Bucket, tmp_path: Path) -> None:
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    (tmp_path / "checkpoints").mkdir()
    checkpoints.save_params(tmp_path / "checkpoints", params)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            here.write(f"runs/imported/{path.relative_to(tmp_path)}", path.read_bytes())
    shutil.rmtree(tmp_path / "checkpoints")
    place = epath.Path("gs://bucket/runs/imported/checkpoints")
    found = checkpoints.restore_params(place, checkpoints.saved_steps(place)[0], params)  # type: ignore[arg-type]
    chex.assert_trees_all_equal(found, params)
