"""Going on with data that has changed, with more steps, and from another place."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from mod_star.cli import main
from mod_star.config import DataConfig, OptimizerConfig, RunConfig
from mod_star.data import identity
from mod_star.data.identity import changes, fingerprint, identify
from mod_star.errors import InputError
from mod_star.presets import tiny
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.metrics import read_metrics
from mod_star.runs.stored_config import read_data
from mod_star.training.extension import require_extendable
from mod_star.training.train import _changed_since, train


def short(source: Path | None = None, **changed: int) -> RunConfig:
    """A dense run of 4 steps with a constant rate, quick to compile."""
    run = tiny()
    values: dict[str, Any] = {
        "steps": 4,
        "batch_size": 2,
        "eval_batches": 1,
        "eval_every": 0,
        "checkpoint_every": 2,
    } | changed
    return replace(
        run,
        model=replace(run.model, width=16, layers=1, heads=2, mlp_width=24, context=32),
        routing=replace(run.routing, every=0),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=2),
        data=run.data if source is None else DataConfig(source=(str(source),), held_out=0.2),
        train=replace(run.train, **values),
    )


def write_texts(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"text": f"The {n}th text says {n * n}. " * 4}) + "\n" for n in range(count)))


@pytest.fixture(scope="module")
def texts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN beside texts.jsonl: a complete run of 4 steps, checkpoints 2 and 4. Tests copy both."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "texts.jsonl", 20)
    train(short(folder / "texts.jsonl"), folder / "run", quiet=True)
    return folder


def interrupted(folder: Path, to: Path) -> Path:
    """A copy of the folder, moved to another place, whose run has checkpoint 2 only."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "run" / "checkpoints" / "4")
    (to / "run" / "summary.json").unlink()
    return to


@pytest.mark.slow
def test_changed_data_is_told_and_refused_unless_accepted(texts_run: Path, tmp_path: Path) -> None:
    here = interrupted(texts_run, tmp_path / "here")
    data, run = here / "texts.jsonl", here / "run"
    shutil.copytree(run, tmp_path / "before")
    write_texts(data, 21)
    told = r"/run has changed \(texts.jsonl: [\d,]+ → [\d,]+ bytes; 20 → 21 documents\)"
    moved = short(data)
    with pytest.raises(InputError, match=r"holds a run of another configuration: data\.source"):
        train(moved, run, quiet=True)  # a file of another path must be the same
    config = run / "config.json"
    config.write_text(config.read_text().replace(str(texts_run), str(here)))
    with pytest.raises(InputError, match=told):
        train(moved, run, quiet=True)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2"}
    old = read_data(run)
    assert train(moved, run, quiet=True, data_changed="accept").steps == 4
    stored = json.loads((run / "data.json").read_text())
    assert stored["changes"] == [{"after_step": 2, "sources": old}] and stored["sources"][0]["documents"] == 21
    # From here on it is the run's data.
    assert train(moved, run, quiet=True).steps == 4
    # A run of an older version says nothing, and is told nothing.
    shutil.copytree(tmp_path / "before", tmp_path / "older")
    (tmp_path / "older" / "data.json").unlink()
    config = tmp_path / "older" / "config.json"
    config.write_text(config.read_text().replace(str(texts_run), str(here)))
    assert train(moved, tmp_path / "older", quiet=True).steps == 4
    assert read_data(tmp_path / "older") == stored["sources"]


@pytest.mark.nightly
def test_the_command_refuses_and_goes_on_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts.jsonl", 20)
    few = "--preset tiny --model.width 16 --model.layers 1 --model.heads 2 --model.mlp-width 24 --model.context 32"
    few += (
        " --routing.every 0 --train.batch-size 2 --train.eval-batches 1 --train.eval-every 0 --optimizer.warmup-steps 1"
    )
    words = ["train", f"{tmp_path}/run", *few.split(), "--data.source", f"{tmp_path}/*.jsonl", "--train.steps"]

    def trained(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*words, *more])
        return int(str(left.value.code or 0)), *capsys.readouterr()

    assert trained("4")[0] == 0
    write_texts(tmp_path / "more.jsonl", 3)
    assert "is complete already" in trained("4")[1]
    code, out, err = trained("8")
    assert (code, out) == (2, "") and re.fullmatch(r"error: train.steps = 8: [^\n]* 'cosine' needs their [^\n]*\n", err)
    code, out, err = trained("8", "--redraw-schedule")
    assert (code, out) == (2, "") and re.fullmatch(r"error: data.source: [^\n]+\n", err), err
    assert "(more.jsonl is new; 20 → 23 documents)" in err and "--data-changed accept" in err
    assert (tmp_path / "run" / "summary.json").is_file()
    code, out, err = trained("8", "--redraw-schedule", "--data-changed", "accept")
    assert (code, err) == (0, "") and "goes on with other data from step 4 on (more.jsonl is new; 20 → 23 docu" in out
    assert "is complete already" in trained("8")[1]
    assert read_config(tmp_path / "run").train.steps == 8


@pytest.mark.slow
def test_a_run_and_its_data_may_be_moved(texts_run: Path, tmp_path: Path) -> None:
    here = interrupted(texts_run, tmp_path / "there")
    (here / "texts.jsonl").rename(here / "other-name.jsonl")
    train(short(here / "other-name.jsonl"), here / "run", quiet=True)
    chex.assert_trees_all_equal(load_run(here / "run").params, load_run(texts_run / "run").params)
    assert read_config(here / "run").data.source == (f"{here}/other-name.jsonl",)


@pytest.mark.slow
def test_a_longer_run_is_the_one_that_it_would_have_been(texts_run: Path, tmp_path: Path) -> None:
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    run = short(texts_run / "texts.jsonl", steps=8)
    train(run, straight, quiet=True)
    shutil.copytree(texts_run / "run", longer)
    summary = train(run, longer, quiet=True)
    assert (summary.steps, summary.tokens) == (8, 8 * 2 * 32)
    chex.assert_trees_all_equal(load_run(longer).params, load_run(straight).params)
    chex.assert_trees_all_equal(load_run(longer, 6).params, load_run(straight, 6).params)
    records = [[r for r in read_metrics(path) if "eval_loss" in r][-1] for path in (longer, straight)]
    assert records[0] == records[1]
    assert read_config(longer) == read_config(straight)
    assert json.loads((longer / "config.json").read_text())["changes"] == [
        {"after_step": 4, "before": {"train.steps": 4}}
    ]
    # Fewer than are done are no run; from an earlier checkpoint they are.
    fewer = replace(run, train=replace(run.train, steps=5))
    with pytest.raises(InputError, match=r"train.steps = 5: the run has done 8 already; --resume-from goes on from"):
        train(fewer, longer, quiet=True)
    assert (longer / "summary.json").is_file() and read_config(longer) == run_with_vocab(run, longer)


def run_with_vocab(run: RunConfig, path: Path) -> RunConfig:
    return replace(run, model=replace(run.model, vocab_size=read_config(path).model.vocab_size))


@pytest.mark.parametrize(
    ("optimizer", "done", "needs"),
    [
        (OptimizerConfig(schedule="constant", warmup_steps=5), 100, None),
        (OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.5), 55, None),
        (OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.5), 60, r"'wsd' .*steps? 57 to 60"),
        (OptimizerConfig(schedule="cosine", warmup_steps=10), 9, None),
        (OptimizerConfig(schedule="cosine", warmup_steps=10), 20, r"'cosine' .*steps? 12 to 20"),
        (OptimizerConfig(schedule="constant", warmup_steps=70), 3, r"warmup_steps = 70 .*steps? 1 to 3"),
        (OptimizerConfig(schedule="constant", warmup_steps=70), 0, None),
    ],
)
def test_the_schedule_that_needs_the_number_of_steps_says_so(
    optimizer: OptimizerConfig, done: int, needs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run_of_vocabulary(), optimizer=optimizer)
    old, new = (replace(run, train=replace(run.train, steps=steps)) for steps in (100, 200))
    if needs is None:
        require_extendable(old, new, done, redraw=False)
    else:
        with pytest.raises(InputError, match=needs) as error:
            require_extendable(old, new, done, redraw=False)
        assert "\n" not in str(error.value) and "--redraw-schedule" in str(error.value)
    require_extendable(old, new, done, redraw=True)


def run_of_vocabulary() -> RunConfig:
    run = short()
    return replace(run, model=replace(run.model, vocab_size=320))


def test_stages_need_the_number_of_steps() -> None:
    run = run_of_vocabulary()
    run = replace(run, routing=replace(tiny().routing, every=1, capacity=0.25, stages=(1.0, 0.5)))
    old, new = (replace(run, train=replace(run.train, steps=steps)) for steps in (100, 200))
    require_extendable(old, new, 25, redraw=False)
    for redraw in (False, True):
        with pytest.raises(InputError, match=r"routing.stages = \(1.0, 0.5\) needs their number"):
            require_extendable(old, new, 26, redraw=redraw)


@pytest.mark.slow
def test_what_an_earlier_version_trained_otherwise_is_told_once(texts_run: Path, tmp_path: Path) -> None:
    run = replace(tiny(), data=DataConfig(pack=False))
    thinks = replace(run, train=replace(run.train, objective="quiet_star"))
    shutil.copytree(texts_run / "run", tmp_path / "run")
    assert _changed_since(tmp_path / "run", thinks) == []
    (tmp_path / "run/data.json").unlink()  # as version 0.1 left it
    told = _changed_since(tmp_path / "run", thinks)
    assert [line.split()[0] for line in told] == ["REINFORCE", "capacity"] and "1/4" in told[0]
    assert len(_changed_since(tmp_path / "run", run)) == 1
    assert _changed_since(tmp_path / "run", replace(run, routing=replace(run.routing, every=0))) == []


def test_what_identifies_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(text)
    config = DataConfig(source=(str(tmp_path / "*.txt"), "python-docs"))
    first = identify(config, [2, 70])
    assert changes(first, identify(config, [2, 70])) == []
    (tmp_path / "a.txt").write_text("One")  # of the same size, and of the same time
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "b.txt").unlink()
    found = changes(first, identify(config, [2, 71]))
    assert found == ["a.txt has other content", "b.txt is gone", "c.txt is new", "70 → 71 documents"]
    assert fingerprint(first) != fingerprint(identify(config, [2, 70]))

    # A large file: its ends, and blocks between them.
    monkeypatch.setattr(identity, "IN_MEMORY", (1000, 16))
    monkeypatch.setattr(identity, "BLOCK", 10)
    large = tmp_path / "large.txt"
    config = DataConfig(source=(str(large),))
    content = np.random.default_rng(0).integers(97, 122, 5000, np.uint8)
    large.write_bytes(content.tobytes())
    first = identify(config, [9])
    assert first[0]["files"][0]["digest"].startswith("sha256 of 16 blocks:")
    for place in (0, 4999, (5000 - 10) * 7 // 15):
        other = content.copy()
        other[place] += 1
        large.write_bytes(other.tobytes())
        assert changes(first, identify(config, [9])) == ["large.txt has other content"]
    large.write_bytes(content.tobytes() + b"x")
    assert changes(first, identify(config, [9])) == ["large.txt: 5,000 → 5,001 bytes"]
