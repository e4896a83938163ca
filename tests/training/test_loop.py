"""`train` from the start, from the middle, and to a bad end; in this process, with a model of a few hundred weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from PIL import Image
from quick_pictures import really_drawn

from mod_star import presets
from mod_star.config import RunConfig
from mod_star.data import train_batches
from mod_star.errors import InputError
from mod_star.flops import training_step_flops
from mod_star.runs import directory as run_dir
from mod_star.runs.checkpoints import restore_state, saved_steps
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.training.interrupt import Interrupted, stop_signals
from mod_star.training.state import init_state
from mod_star.training.train import TrainingError, TrainSummary, train

STEPS = 8


def make_run(**fields: Any) -> RunConfig:
    run = presets.tiny()
    model = replace(run.model, width=8, heads=1, context=16, mlp_width=8)
    # Stochastic routing draws random numbers, in training and in evaluation.
    routing = replace(run.routing, selection="stochastic", predictor_width=4)
    train = {"steps": STEPS, "batch_size": 2, "log_every": 1, "eval_every": 3, "checkpoint_every": 4} | fields
    return replace(run, model=model, routing=routing, train=replace(run.train, **train))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    path = tmp_path_factory.mktemp("runs") / "straight"
    with really_drawn():
        return path, train(make_run(), path, quiet=True)


def load_state(path: Path) -> Any:
    """The newest checkpoint's state, and the batch that comes next."""
    loaded = run_dir.load_run(path)
    run = loaded.config
    like = jax.eval_shape(lambda: init_state(loaded.decoder, run, STEPS))
    batches = iter(train_batches(run.data, loaded.tokenizer, run.model.context, run.train.batch_size))
    state = restore_state(path / "checkpoints", loaded.step, like, batches)[0]
    return replace(state, key=jax.random.key_data(state.key)), next(batches)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(path)]


@pytest.mark.slow
def test_a_run_from_start_to_end(
    uninterrupted: tuple[Path, TrainSummary], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, summary = uninterrupted
    run = make_run()
    assert (summary.steps, summary.tokens, summary.skipped) == (STEPS, STEPS * 2 * 16, 0)
    assert summary.seconds > 0 and summary.compile_seconds > 0
    records = read_metrics(path)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    evaluations = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [3, 6, 8]
    assert summary.evaluation == {name: value for name, value in evaluations[-1].items() if name != "step"}
    stored = run_dir.read_config(path)
    assert stored.model.vocab_size == 320  # 258 ids, in whole 64s
    assert summary.flops == STEPS * training_step_flops(stored) == records[-2]["train_flops"]
    assert saved_steps(path / "checkpoints") == [4, 8]
    assert Image.open(path / "curves.png").width > 1000
    assert list((path / "tensorboard").iterdir())

    # Complete: it is said, nothing is done again.
    monkeypatch.setattr("mod_star.training.train.load_inputs", lambda *_: pytest.fail("trains again"))
    assert train(run, path) == summary
    said = capsys.readouterr().out
    assert "is complete already" in said and f"{summary.evaluation['eval_loss']:.4f}" in said


def interrupting(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, Any], bool], number: int) -> None:
    """Sends this process a signal when a record is written that `when` picks."""
    write = MetricsWriter.write

    def writing(self: MetricsWriter, step: int, values: Any) -> Any:
        if when(step, values):
            os.kill(os.getpid(), number)
        return write(self, step, values)

    monkeypatch.setattr(MetricsWriter, "write", writing)


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(
    uninterrupted: tuple[Path, TrainSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stops"
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    # (the record of which step, signal, step that the run stops after); numbers of a step are read during the next.
    for step, number, stops in ((1, signal.SIGTERM, 2), (3, signal.SIGINT, 3), (8, signal.SIGTERM, 8)):
        with monkeypatch.context() as patched:
            interrupting(patched, lambda at, values, step=step: at == step and "loss" in values, number)  # type: ignore[misc]
            with pytest.raises(Interrupted, match=f"stopped after step {stops} of {STEPS}, all of it") as stopped:
                train(make_run(), path, quiet=True)
        assert (stopped.value.step, stopped.value.signal) == (stops, number)
        assert saved_steps(path / "checkpoints")[-1] == stops
        # Steps 3 and 8 are evaluated; the signal came before, so the next session does it.
        assert not [r for r in read_metrics(path) if r["step"] == stops and "eval_loss" in r]
        assert not (path / "summary.json").exists()
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    summary = train(make_run(), path, quiet=True)
    straight_path, straight = uninterrupted
    assert summary.evaluation == straight.evaluation
    assert timeless(path) == timeless(straight_path)
    chex.assert_trees_all_equal(load_state(path), load_state(straight_path))


@pytest.mark.slow
def test_damaged_checkpoint_is_left_only_when_told_to(uninterrupted: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = make_run(eval_every=0)
    with pytest.raises(InputError, match=r"--resume-from = 4: .* is not a run yet"):
        train(run, path, resume_from=4, quiet=True)
    assert not path.exists()
    train(run, path, quiet=True)
    (path / "summary.json").unlink()  # as if killed just before the end
    sums = path / "checkpoints" / "8" / "SHA256SUMS"
    sums.write_text(sums.read_text()[:-9])
    with pytest.raises(InputError, match=r"checkpoints/8 is damaged .*--resume-from 4 takes the one before it"):
        train(run, path, quiet=True)
    assert saved_steps(path / "checkpoints") == [4, 8]
    train(run, path, resume_from=4, quiet=True)
    chex.assert_trees_all_equal(load_state(path), load_state(uninterrupted[0]))
    # That run was evaluated in between and this one wasn't: evaluations leave no trace in training.
    assert timeless(path) == [r for r in timeless(uninterrupted[0]) if "loss" in r or r["step"] == STEPS]


def test_second_ctrl_c_aborts(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_signals() as stop:
        assert stop() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT
        assert "Ctrl-C again aborts" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_diverging_run_stops(tmp_path: Path) -> None:
    run = make_run(steps=50, max_skipped=3, checkpoint_every=1, keep_checkpoints=50)
    run = presets.dense(replace(run, optimizer=replace(run.optimizer, learning_rate=1e38, warmup_steps=0)))
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row, ") as stopped:
        train(run, tmp_path / "run", quiet=True)
    last = saved_steps(tmp_path / "run" / "checkpoints")[-1]
    first_bad = int(str(stopped.value).split("in a row, ")[1].split(" to ")[0])
    assert last == first_bad - 1
    assert f"last good checkpoint is {tmp_path}/run/checkpoints/{last}." in str(stopped.value)


@pytest.mark.nightly
def test_profile_of_some_steps(uninterrupted: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(make_run(), path, profile=range(3, 5), quiet=True)
    assert timeless(path) == timeless(uninterrupted[0])
    (trace,) = (path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


@pytest.mark.slow
def test_profile_beyond_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    message = rf"--profile = '9:12': must begin with one of the run's {STEPS} steps"
    with pytest.raises(InputError, match=message):
        train(make_run(), path, profile=range(9, 13), quiet=True)
    assert not path.exists()
    with monkeypatch.context() as unchecked:  # the loop itself does without
        unchecked.setattr("mod_star.training.train._require_profile", lambda *_: None)
        train(make_run(), path, profile=range(9, 13), quiet=True)
    with pytest.raises(InputError, match=message):
        train(make_run(), path, resume_from=4, profile=range(9, 13), quiet=True)
    train(make_run(), path, resume_from=4, profile=range(3, 5), quiet=True)  # these steps are done
    assert not (path / "profile").exists()


@pytest.mark.slow
def test_budget_in_flops(tmp_path: Path) -> None:
    run = make_run(log_every=100)
    run = presets.dense(replace(run, model=replace(run.model, vocab_size=320)))
    per_step = training_step_flops(run)
    with pytest.raises(InputError, match=r"train.flops = .*: must be at least one step's"):
        train(replace(run, train=replace(run.train, flops=0.9 * per_step)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    summary = train(replace(run, train=replace(run.train, flops=3.5 * per_step)), tmp_path / "run", quiet=True)
    assert (summary.steps, summary.flops) == (3, 3 * per_step)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [3]


def test_checks_everything_before_writing(tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "empty.txt").write_text("")
    for bad, message in (
        (replace(run, data=replace(run.data, source=(str(tmp_path / "none.txt"),))), "none.txt"),
        (replace(run, data=replace(run.data, source=(str(tmp_path / "empty.txt"),))), "empty.txt"),
        (replace(run, data=replace(run.data, tokenizer="none.json")), "none.json"),
        (replace(run, model=replace(run.model, vocab_size=200)), "model.vocab_size = 200: the tokenizer has 258 ids"),
        (replace(run, model=replace(run.model, context=10**6)), "context"),
        (replace(run, parts="none.py:mine"), "there is no file none.py"),
    ):
        with pytest.raises(InputError, match=message):
            train(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()
