"""Paths that other libraries take for patterns; and that nothing is called saved that was never opened."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import chex
import pytest
from fault_runs import options
from fork_server import SAME_STEPS, Finished, shared_server, succeed

from mod_star.data.sources import read_sources
from mod_star.errors import InputError
from mod_star.pretrained.params_run import write_params_run
from mod_star.runs.buckets import working_copy
from mod_star.runs.directory import load_run
from mod_star.runs.plain_paths import plain_path

OPTIONS = options(steps=4)
TERM_AT_2 = f"""{SAME_STEPS}import signal
from mod_star.training import loop
record = loop.TrainingLoop._record
def recorded(self, unread):
    record(self, unread)
    if unread is not None and unread.step == 1 and self.start == 0:
        os.kill(os.getpid(), signal.SIGTERM)
loop.TrainingLoop._record = recorded
"""


def stopped_at_2(run: Path, before: str = "") -> Finished:
    return shared_server().run("train", str(run), *OPTIONS, before=TERM_AT_2 + before)


@pytest.mark.nightly
def test_a_run_whose_path_is_a_pattern_goes_all_the_way(tmp_path: Path) -> None:
    plain, odd = tmp_path / "plain", tmp_path / "a[1] *?" / "b\\c"
    for run in (plain, odd):
        done = stopped_at_2(run)
        assert done.code == 128 + signal.SIGTERM and "after step 2 of 4, all of it saved" in done.err, done.err
        assert load_run(run).step == 2
        assert f"{run} goes on from step 2" in succeed("train", str(run), *OPTIONS).out
    assert os.listdir(tmp_path / "a[1] *?") == ["b\\c"]
    chex.assert_trees_all_equal(load_run(odd).params, load_run(plain).params)
    succeed("train", str(odd), *OPTIONS, "--resume-from", "2")
    assert sorted(path.name for path in (odd / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_a_path_without_a_plain_name_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shown in (("a\nb", "U+000A"), ("a\x1b[31m", "U+001B"), (os.fsdecode(b"\xff"), "U+DCFF")):
        done = shared_server().run("train", str(tmp_path / name), *OPTIONS)
        assert done.code == 2 and re.fullmatch(r"error: '[^\n]+\n", done.err), done.err
        assert shown in done.err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no[1]"))
    run = tmp_path / "b[1]" / "checkpoints"
    with pytest.raises(InputError, match=r"b\[1\]/checkpoints: has \[ in its path.* cannot be made"):
        plain_path(run)
    (tmp_path / "no[1]").mkdir()
    with pytest.raises(InputError, match=r"has \[ in its path.*; so has the directory of temporary files"):
        plain_path(run)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError, match=r"has \[ in its path.*; several processes need a directory without"):
        plain_path(run)
    assert plain_path(tmp_path / "a b'{c}~") == tmp_path / "a b'{c}~"


def test_addresses_that_are_patterns_or_climb_are_refused() -> None:
    for address in ("gs://bucket/a[1]", "gs://bucket/a*", "gs://bucket/a?b", "gs://bucket/a\nb"):
        with pytest.raises(InputError, match="stand for a pattern there; choose another name"):
            working_copy(address)
    for address in ("gs://bucket/..", "gs://bucket/x/../y", "gs://bucket/./x"):
        with pytest.raises(InputError, match=re.escape(f"{address}: '.' and '..' are not names in a bucket")):
            working_copy(address)


def test_saved_is_not_said_of_what_cannot_be_opened(tmp_path: Path) -> None:
    """The link that gives Orbax a plain path is taken away: it then writes what nobody can read."""
    run = tmp_path / "a[1]"
    done = stopped_at_2(run, "from mod_star.runs import orbax_files; orbax_files.plain_path = lambda path: path\n")
    name = re.escape(f"{run}/checkpoints/2")
    said = rf"error: checkpoint {name} cannot be loaded: [^\n]+, right after it was written; there is no other"
    assert done.code == 1 and re.fullmatch(said, done.err.splitlines()[-1]), done.err
    assert "all of it saved" not in done.err


def test_a_made_model_is_opened_before_it_is_said_to_be_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(trained_run)
    monkeypatch.setattr("mod_star.runs.params_file.save_file", lambda arrays, path: path.write_bytes(b"\0" * 99))
    with pytest.raises(InputError, match="cannot be written: cannot be opened after it was written"):
        write_params_run(tmp_path / "made", loaded.config, loaded.tokenizer, loaded.params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 250, "link"])
def test_a_made_model_may_stand_anywhere(
    name: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, target = load_run(trained_run), tmp_path / "deep" / name
    (tmp_path / "deep" / "target").mkdir(parents=True)
    if name == "link":
        target.symlink_to("target")
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "deep" / "target")
        with pytest.raises(InputError, match="is the working directory, which cannot be replaced"):
            write_params_run(Path(), loaded.config, loaded.tokenizer, loaded.params)
    write_params_run(target, loaded.config, loaded.tokenizer, loaded.params)
    found = load_run(tmp_path / "deep" / name)
    chex.assert_trees_all_equal(found.params, loaded.params)
    assert not list((tmp_path / "deep").glob(".*"))
    shutil.rmtree((tmp_path / "deep" / name).resolve())


def test_a_directory_with_brackets_is_the_one_whose_files_are_read(tmp_path: Path) -> None:
    for folder, text in (("d[1]", "right"), ("d1", "wrong")):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "a.txt").write_text(text)
        (tmp_path / folder / "b[1].txt").write_text(text)
    for spec in ("d[1]/*/*.txt", "d[1]/**/a.txt", "d[1]/sub/?.txt", "d[1]/b[1].txt", "d[1]/*[[]1].txt"):
        assert [list(source) for source in read_sources([f"{tmp_path}/{spec}"], None)] == [["right"]], spec
