"""The run directory, without training: what creates it, what refuses it, what loads from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import chex
import grain
import jax
import pytest

from mod_star import presets
from mod_star.config import RunConfig, from_dict, to_dict
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.runs import directory as run_dir
from mod_star.runs.checkpoints import CheckpointWriter
from mod_star.runs.resuming import resumed_config
from mod_star.tokenization import load_tokenizer
from mod_star.training.state import init_state

BYTES = load_tokenizer("bytes")
PARTS = "from mod_star.parts import Part, Parts\nmine = Parts()\n"


def make_run() -> RunConfig:
    run = presets.tiny()
    model = replace(run.model, vocab_size=320, width=16, context=16)
    return replace(run, model=model, routing=replace(run.routing, predictor_width=4))


def create(path: Path, run: RunConfig) -> None:
    with run_dir.created(path, run, BYTES):
        pass


def test_config_survives_and_names_its_versions(tmp_path: Path) -> None:
    run = make_run()
    create(tmp_path / "deep" / "run", run)
    assert run_dir.read_config(tmp_path / "deep" / "run") == run
    stored = json.loads((tmp_path / "deep" / "run" / "config.json").read_text())
    assert stored.keys() == {"mod_star", "jax", "python", "config"}
    assert from_dict(stored["config"]) == run


def test_every_difference_is_shown(tmp_path: Path) -> None:
    run = make_run()
    create(tmp_path / "run", run)
    assert resumed_config(tmp_path / "run", run) == run
    from_tokenizer = replace(run, model=replace(run.model, vocab_size=0))
    assert resumed_config(tmp_path / "run", from_tokenizer) == run
    other = replace(
        presets.dense(run), train=replace(run.train, steps=30), data=replace(run.data, source=("a.txt", "b.txt"))
    )
    expected = (
        r"another configuration: routing.every: 2 → 0; data.source: \('python-docs',\) → \('a.txt', 'b.txt'\); "
        r"train.steps: 20 → 30$"
    )
    with pytest.raises(InputError, match=expected):
        resumed_config(tmp_path / "run", other)


def test_a_run_has_its_own_copy_of_the_users_parts(tmp_path: Path) -> None:
    mine = tmp_path / "my.py"
    mine.write_text(PARTS)
    run = replace(make_run(), parts=f"{mine}:mine")
    path = tmp_path / "run"
    create(path, run)
    shutil.move(path, tmp_path / "moved")  # nothing in it depends on where it is
    path = tmp_path / "moved"
    stored = resumed_config(path, run)
    assert stored.parts == f"{path}/parts.py:mine"
    assert (path / "parts.py").read_text() == PARTS
    with pytest.raises(InputError, match=r"parts: .*parts.py:mine → .*my.py:other"):
        resumed_config(path, replace(run, parts=f"{mine}:other"))
    mine.write_text(PARTS + "# changed\n")
    with pytest.raises(InputError, match=r"parts: .*parts.py:mine → .*my.py:mine"):
        resumed_config(path, run)
    mine.unlink()
    assert resumed_config(path, run) == stored


def test_refuses_what_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("42")
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "full", "neither empty nor a run"),
        (tmp_path / "file", "must be a directory, and is a file"),
        (tmp_path / "file" / "run", "is not a directory"),
        (Path("/proc/run"), "/proc/run: "),  # not writable, even to root
    ):
        with pytest.raises(InputError, match=message):
            create(path, make_run())
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_refuses_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs:/bucket/run: must be a directory; only mod-star train"):
        create(Path("gs://bucket/run"), make_run())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_refuses_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    create(tmp_path / "run", make_run())
    (tmp_path / "run" / ".lock").chmod(0o400)
    (tmp_path / "run").chmod(0o500)
    with pytest.raises(InputError, match="not writable"), run_dir.locked(tmp_path / "run"):
        pass
    with pytest.raises(InputError, match="not writable"):
        create(tmp_path / "run" / "new", make_run())


def test_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match="No space left"):
        create(tmp_path / "run", make_run())
    assert list(tmp_path.iterdir()) == []


def test_of_two_starts_at_once_the_slower_one_leaves_the_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, locked = tmp_path / "run", make_run(), run_dir.locked
    faster = replace(run, train=replace(run.train, seed=7))

    @contextmanager
    def after_another(path: Path) -> Iterator[None]:
        monkeypatch.setattr(run_dir, "locked", locked)
        create(path, faster)
        with locked(path):
            yield

    monkeypatch.setattr(run_dir, "locked", after_another)
    made = r"run: another process has made a run here in the meantime; the same command goes on with it$"
    with pytest.raises(InputError, match=made):
        create(path, run)
    assert run_dir.read_config(path) == faster
    with pytest.raises(InputError, match=made):  # it is there, and nobody trains it any more
        create(path, run)
    with locked(path), pytest.raises(InputError, match=r"run: another process is training here$"):
        create(path, run)
    assert run_dir.read_config(path) == faster


def test_one_process_at_a_time(tmp_path: Path) -> None:
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); sys.stdin.read()"
    )
    words = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training here"), run_dir.locked(tmp_path):
            pass
        other.communicate("")
    with run_dir.locked(tmp_path):
        pass


@pytest.mark.slow
def test_load_run(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "run"
    with pytest.raises(InputError, match=r"is not a run .there is no such directory"):
        run_dir.load_run(path)
    path.mkdir()
    with pytest.raises(InputError, match=r"is not a run .it has no config.json"):
        run_dir.load_run(path)
    create(path, run)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        run_dir.load_run(path)

    state = jax.jit(lambda: init_state(Decoder(run.model, run.routing), run, 20))()
    writer = CheckpointWriter(path / "checkpoints", 3)
    batches = iter(grain.MapDataset.range(9).to_iter_dataset())
    for step in (4, 5):
        writer.save(replace(state, step=state.step + step), batches, {"seconds": 0.0})
    writer.close()
    loaded = run_dir.load_run(path)
    assert (loaded.step, loaded.config, loaded.tokenizer.fingerprint) == (5, run, "bytes")
    chex.assert_trees_all_equal(loaded.params, state.params)

    array = max((path / "checkpoints" / "5" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"checkpoints/5 is damaged .*--step 4 takes the one before it"):
        run_dir.load_run(path)
    assert run_dir.load_run(path, step=4).step == 4

    small = replace(run, model=replace(run.model, vocab_size=64))
    config = path / "config.json"
    config.write_text(json.dumps({"config": to_dict(small)}))
    with pytest.raises(InputError, match=r"model.vocab_size = 64: the tokenizer has 258 ids"):
        run_dir.load_run(path, step=4)
    config.write_text("{")
    with pytest.raises(InputError, match=r"config.json: cannot be read"):
        run_dir.load_run(path)
