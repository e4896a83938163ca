"""Stages of capacity and of thoughts: plan, cost, one program per stage, resuming on either side of a boundary."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from mod_star import presets
from mod_star.commands.train import _defaults
from mod_star.config import RunConfig, ThinkingConfig
from mod_star.data import train_batches
from mod_star.decoding import GenerationConfig, Generator, Think
from mod_star.errors import InputError
from mod_star.flops import training_flops, training_step_flops
from mod_star.model import Decoder
from mod_star.runs import directory as run_dir
from mod_star.runs.base_run import load_base
from mod_star.runs.checkpoints import restore_state, saved_steps
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.stages import config_at, plan_stages
from mod_star.training import lowering as compiled
from mod_star.training.extension import require_extendable
from mod_star.training.interrupt import Interrupted
from mod_star.training.objectives.next_token import make_eval_step, make_loss
from mod_star.training.objectives.quiet_star import make_examples, make_quiet_star_eval, make_quiet_star_loss
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step, objective_of
from mod_star.training.train import TrainSummary, train

STEPS, CONTEXT = 8, 16
# The stages of `make_run`: two steps of capacity 1, two of 1/2, four of 1/4.
CAPACITIES = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def make_run(**fields: Any) -> RunConfig:
    run = presets.tiny()
    model = replace(run.model, vocab_size=320, width=8, heads=1, context=CONTEXT, mlp_width=8)
    routing = replace(run.routing, predictor_width=4, capacity=0.25, stages=(1.0, 0.5), gate="tanh")
    data = replace(run.data, pack=True)
    train = {"steps": STEPS, "batch_size": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2} | fields
    return replace(run, model=model, routing=routing, data=data, train=replace(run.train, **train))


def step_flops(run: RunConfig, capacity: float) -> float:
    routing = replace(run.routing, capacity=capacity, stages=())
    return training_flops(run.model, routing, CONTEXT).total * run.train.batch_size


@pytest.mark.parametrize("stages", [(1.0,), (1.0, 0.5), (0.9, 0.7, 0.5, 0.3)])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_stages_share_the_first_part_of_the_steps(stages: tuple[float, ...], fraction: float) -> None:
    run = make_run(steps=101)
    run = replace(run, routing=replace(run.routing, stages=stages, stage_fraction=fraction))
    plan = plan_stages(run)
    assert [stage.run.routing.capacity for stage in plan.stages] == [*stages, 0.25]
    assert all(stage.run.routing.stages == () for stage in plan.stages)
    numbers = [number for stage in plan.stages for number in range(stage.first, stage.last + 1)]
    assert numbers == list(range(1, 102)) and plan.steps == 101
    lengths = [stage.last - stage.first + 1 for stage in plan.stages]
    np.testing.assert_allclose(lengths[:-1], 101 * fraction / len(stages), atol=1)
    assert lengths[-1] == pytest.approx(101 * (1 - fraction), abs=1)
    costs = [step_flops(run, plan.at(number).run.routing.capacity) for number in numbers]
    assert [plan.flops_until(step) for step in range(102)] == pytest.approx([0, *np.cumsum(costs)])
    assert plan.flops == plan.flops_until(101)
    assert plan.at(0) is plan.stages[0]


@pytest.mark.parametrize("steps", [4.0, 7.5, 40.2])
def test_a_budget_is_used_up_and_not_exceeded(steps: float) -> None:
    run = make_run()
    budget = steps * step_flops(run, 0.5)
    found = plan_stages(replace(run, train=replace(run.train, flops=budget)))

    def cost(number: int) -> float:
        return plan_stages(replace(run, train=replace(run.train, steps=number))).flops

    assert found.flops == cost(found.steps) <= budget < cost(found.steps + 1)


def test_a_run_without_stages_has_one() -> None:
    run = make_run()
    without = replace(run, routing=replace(run.routing, stages=()))
    for one in (without, presets.dense(run)):
        (stage,) = plan_stages(one).stages
        assert (stage.run, stage.first, stage.last) == (one, 1, STEPS)
        assert config_at(one, 3) is one
    assert [plan_stages(one).stages[0].capacity for one in (without, presets.dense(run))] == [0.25, None]


def test_too_few_steps_for_the_stages(tmp_path: Path) -> None:
    for fields, said in (
        (
            {"steps": 2},
            r"^train\.steps = 2: leaves no step for capacity 0\.5 of routing\.stages = \(1\.0, 0\.5\), with",
        ),
        ({"flops": 2.2 * step_flops(make_run(), 0.5)}, r"^train\.flops = \d.*: leaves no step for capacity 0\.5"),
        ({"flops": 0.5 * step_flops(make_run(), 0.25)}, r"^train\.flops = \d.*: must be at least one step's"),
    ):
        with pytest.raises(InputError, match=said):
            train(make_run(**fields), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Straight:
    """A run that nothing interrupted."""

    path: Path
    summary: TrainSummary
    traced: list[float]
    """Capacity of each training step that was traced."""
    out: str


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    traced: list[float] = []

    def counting(decoder: Decoder, run: RunConfig, total_steps: int, *others: Any) -> Any:
        step = make_train_step(decoder, run, total_steps, *others)

        def train_step(state: Any, batch: Any) -> Any:
            traced.append(decoder.routing.capacity)
            return step(state, batch)

        return train_step

    path, out = tmp_path_factory.mktemp("runs") / "straight", io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out):
        patched.setattr(compiled, "make_train_step", counting)
        summary = train(make_run(keep_checkpoints=9), path)
    return Straight(path, summary, traced, out.getvalue())


@pytest.fixture(scope="module")
def uninterrupted(straight: Straight) -> tuple[Path, TrainSummary]:
    return straight.path, straight.summary


def load_state(path: Path, step: int = STEPS) -> Any:
    """A checkpoint's state, and the batch that comes next."""
    loaded = run_dir.load_run(path, step)
    run = loaded.config
    like = jax.eval_shape(lambda: init_state(loaded.decoder, run, STEPS))
    batches = iter(train_batches(run.data, loaded.tokenizer, run.model.context, run.train.batch_size))
    state = restore_state(path / "checkpoints", step, like, batches)[0]
    return replace(state, key=jax.random.key_data(state.key)), next(batches)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(path)]


@pytest.mark.slow
def test_every_step_is_computed_at_its_capacity(uninterrupted: tuple[Path, TrainSummary]) -> None:
    path, summary = uninterrupted
    run = make_run()
    records = [r for r in read_metrics(path) if "loss" in r]
    assert [r["capacity"] for r in records] == CAPACITIES
    # Text without padding: top-k routing takes exactly its share.
    assert [r["routed_fraction"] for r in records] == [[capacity] for capacity in CAPACITIES]
    costs = np.cumsum([step_flops(run, capacity) for capacity in CAPACITIES])
    assert [r["train_flops"] for r in records] == pytest.approx(costs)
    assert summary.flops == records[-1]["train_flops"]
    # A held-out evaluation is of the model as it was trained up to there.
    evaluations = [r for r in read_metrics(path) if "eval_loss" in r]
    assert [(r["step"], r["capacity"]) for r in evaluations] == [(2, 1.0), (4, 0.5), (6, 0.25), (8, 0.25)]
    assert summary.evaluation["capacity"] == 0.25
    # And so is a model that is loaded.
    for step, capacity in ((2, 1.0), (4, 0.5), (6, 0.25), (8, 0.25)):
        loaded = run_dir.load_run(path, step)
        assert loaded.decoder.routing == loaded.config.routing
        assert loaded.config.routing == replace(run.routing, capacity=capacity, stages=())


@pytest.mark.slow
def test_one_program_per_stage_and_a_line_about_it(straight: Straight, tmp_path: Path) -> None:
    assert straight.traced == [1.0, 0.5, 0.25]
    said = re.findall(r"^steps (\d) to (\d) at capacity (\S+): compiled in \d+\.\d s$", straight.out, re.MULTILINE)
    assert said == [("1", "2", "1"), ("3", "4", "0.5"), ("5", "8", "0.25")]
    path = tmp_path / "run"
    summary = train(make_run(log_every=100, eval_every=0, checkpoint_every=0), path, quiet=True)
    # The last step of a stage is recorded, so that all steps between two records cost the same.
    assert [r["step"] for r in read_metrics(path) if "loss" in r] == [2, 4, 8]
    assert summary.steps == STEPS and summary.evaluation["capacity"] == 0.25


@pytest.mark.slow
def test_a_step_made_by_hand_is_of_one_stage(random_state: Any, make_batch: Any) -> None:
    """All of the run's would be trained at the last capacity, without a word."""
    run = make_run()
    decoder = Decoder(run.model, run.routing)
    for make in (make_loss, make_eval_step, objective_of, make_quiet_star_loss, make_quiet_star_eval, make_examples):
        with pytest.raises(
            InputError, match=r"^routing\.stages = \(1\.0, 0\.5\): a step or a loss is of one capacity; make"
        ):
            make(decoder, run)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"^routing\.stages = .*plan_stages\(run\)\.stages"):
        make_train_step(decoder, run, STEPS)
    # What the message says works.
    batch, plan = make_batch([[16], [9]], CONTEXT, 29), plan_stages(run)
    params = random_state(plan.stages[0].run).params
    for stage, routed in ((plan.stages[0], 25), (plan.stages[-1], 4 + 2)):
        own = Decoder(stage.run.model, stage.run.routing)
        assert callable(make_train_step(own, stage.run, plan.steps))
        loss = jax.jit(make_loss(own, stage.run))
        assert loss(params, batch, jax.random.key(0), 25.0, 25.0)[1]["routed"].tolist() == [routed]
    dense = replace(run, routing=replace(run.routing, every=0))  # which has no capacities
    make_train_step(Decoder(dense.model, dense.routing), dense, STEPS)


def test_a_step_is_made_with_the_decoder_that_the_run_describes(tmp_path: Path) -> None:
    run = make_run()
    run = replace(run, routing=replace(run.routing, stages=()))
    for model, routing, said in (
        (
            run.model,
            replace(run.routing, capacity=0.5),
            r"^decoder's routing\.capacity = 0\.5: must be the run's, 0\.25",
        ),
        (replace(run.model, remat="full"), run.routing, r"^decoder's model\.remat = 'full': must be the run's, 'none'"),
    ):
        with pytest.raises(InputError, match=said):
            make_train_step(Decoder(model, routing), run, STEPS)
    decoder = Decoder(run.model, run.routing)
    make_train_step(decoder, replace(run, model=replace(run.model, vocab_size=0)), STEPS)  # the tokenizer's, then
    with pytest.raises(InputError, match=r"^parts = 'own\.py:parts': must be None, or the decoder's"):
        make_train_step(decoder, replace(run, parts="own.py:parts"), STEPS)
    with pytest.raises(InputError, match=r"^thinking\.n_true = 16: must be below model\.context = 16"):
        make_quiet_star_loss(decoder, replace(run, thinking=ThinkingConfig(n_true=16)))
    by_chance = replace(run, routing=replace(run.routing, selection="stochastic"))
    with pytest.raises(InputError, match=r"^routing\.selection = 'stochastic': must be learned"):
        make_quiet_star_loss(Decoder(by_chance.model, by_chance.routing), by_chance)


def stopping(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, Any], bool]) -> None:
    """Sends this process SIGTERM when a record is written that `when` picks."""
    write = MetricsWriter.write

    def writing(self: MetricsWriter, step: int, values: Any) -> Any:
        if when(step, values):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, step, values)

    monkeypatch.setattr(MetricsWriter, "write", writing)


@pytest.mark.slow
def test_interrupted_around_boundaries_equals_uninterrupted(
    uninterrupted: tuple[Path, TrainSummary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = tmp_path / "stops", make_run(keep_checkpoints=9)
    stops = (
        (2, "loss", 2, "steps 1 to 2 at capacity 1:"),  # after the first stage, whose evaluation is still owed
        (4, "eval_loss", 4, "steps 1 to 2 at capacity 1:"),  # after the second, evaluated; it owed and began the next
        (5, "loss", 6, "steps 5 to 8 at capacity 0.25:"),  # within the last
    )
    for step, value, stops_after, begins in stops:
        with monkeypatch.context() as patched:
            stopping(patched, lambda at, values, step=step, value=value: at == step and value in values)  # type: ignore[misc]
            with pytest.raises(Interrupted, match=f"stopped after step {stops_after} of {STEPS}"):
                train(run, path)
        assert re.search(r"^steps .*:", capsys.readouterr().out, re.MULTILINE)[0].startswith(begins)  # type: ignore[index]
        assert saved_steps(path / "checkpoints")[-1] == stops_after
    summary = train(run, path, quiet=True)
    straight_path, straight = uninterrupted
    assert summary.evaluation == straight.evaluation
    assert timeless(path) == timeless(straight_path)
    chex.assert_trees_all_equal(load_state(path), load_state(straight_path))
    # Back to an older checkpoint, of the stage before.
    train(run, path, resume_from=4, quiet=True)
    assert timeless(path) == timeless(straight_path)
    chex.assert_trees_all_equal(load_state(path), load_state(straight_path))


@pytest.mark.slow
def test_a_complete_run_has_its_stages_behind_it(uninterrupted: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    path, _ = uninterrupted
    run = replace(run_dir.read_config(path), init_from=str(path))
    assert run.routing.stages == (1.0, 0.5)
    found = _defaults(["new", "--init-from", str(path)])
    assert found == replace(run, routing=replace(run.routing, stages=()))
    base = load_base(run)
    assert base is not None and base.config == replace(found, init_from=None)
    # So the same command is the same run later on.
    with run_dir.created(tmp_path / "new", found, base.tokenizer, base.config):
        pass
    (path / "summary.json").rename(tmp_path / "summary.json")
    try:
        assert _defaults([str(tmp_path / "new"), "--init-from", str(path)]) == found
        assert _defaults(["other", "--init-from", str(path)]) == run
    finally:
        (tmp_path / "summary.json").rename(path / "summary.json")


def make_curriculum(**fields: Any) -> RunConfig:
    """Two steps with thoughts of two tokens, then two without thoughts."""
    run = make_run(**{"steps": 4, "objective": "quiet_star", "checkpoint_every": 1} | fields)
    thinking = replace(run.thinking, thought_length=0, stages=(2,), n_true=2, think_fraction=0.25)
    return replace(run, routing=replace(run.routing, every=0, stages=()), thinking=thinking)


def test_thoughts_get_shorter_stage_by_stage() -> None:
    run = make_curriculum(steps=100)
    run = replace(run, thinking=replace(run.thinking, thought_length=1, stages=(8, 4, 2), stage_fraction=0.75))
    plan = plan_stages(run)
    assert [(s.thought_length, s.first, s.last) for s in plan.stages] == [
        (8, 1, 25),
        (4, 26, 50),
        (2, 51, 75),
        (1, 76, 100),
    ]
    assert plan.setting_of(plan.at(51)) == {"thought_length": 2}
    costs = [
        training_step_flops(replace(run, thinking=replace(run.thinking, thought_length=t, stages=())))
        for t in (8, 4, 2, 1)
    ]
    assert plan.flops == pytest.approx(25 * sum(costs))
    budget = replace(run, train=replace(run.train, flops=plan.flops))
    assert plan_stages(budget).steps == 100
    assert training_step_flops(make_curriculum()) == training_flops(run.model, run.routing, CONTEXT).total * 2
    # Where nobody thinks, the lengths mean nothing.
    idle = replace(run, train=replace(run.train, objective="next_token"))
    assert [stage.run for stage in plan_stages(idle).stages] == [idle]
    with pytest.raises(
        InputError, match=r"^thinking\.stages = \(8, 4, 2\): must be empty with routing\.stages = \(1\.0, 0"
    ):
        replace(run, routing=make_run().routing)
    few = replace(run, train=replace(run.train, steps=2))
    with pytest.raises(
        InputError, match=r"leaves no step for thought_length 4 of thinking\.stages = \(8, 4, 2\), with"
    ):
        plan_stages(few)
    with pytest.raises(InputError, match=r"^thinking\.stages = \(8, 4, 2\): a step or a loss is of one length"):
        make_train_step(Decoder(run.model, run.routing), run, 100)
    more = replace(run, train=replace(run.train, steps=200))
    require_extendable(run, more, 25, redraw=True)
    with pytest.raises(
        InputError, match=r"thinking\.stages = \(8, 4, 2\) needs their number: it has set the thought_l"
    ):
        require_extendable(run, more, 26, redraw=True)


@pytest.mark.nightly
def test_a_curriculum_down_to_no_thoughts_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, straight, path = make_curriculum(), tmp_path / "straight", tmp_path / "stops"
    summary = train(run, straight)
    said = re.findall(r"^steps (\d) to (\d) at (\S+ \S+): compiled", capsys.readouterr().out, re.MULTILINE)
    assert said == [("1", "2", "thought_length 2"), ("3", "4", "thought_length 0")]
    records = [r for r in read_metrics(straight) if "loss" in r]
    assert [r["thought_length"] for r in records] == [2, 2, 0, 0]
    assert ["talk_nll" in r for r in records] == [True, True, False, False]
    assert [r["train_flops"] for r in records] == pytest.approx([plan_stages(run).flops_until(n) for n in range(1, 5)])
    evaluations = [r for r in read_metrics(straight) if "eval_loss" in r]
    assert [("eval_talk_loss" in r, r["thought_length"]) for r in evaluations] == [(True, 2), (False, 0)]
    assert summary.evaluation["thought_length"] == 0
    loaded = run_dir.load_run(straight)
    assert loaded.config.thinking == replace(run.thinking, stages=()) and "thinking" in loaded.params
    with pytest.raises(InputError, match=r"^thinking\.thought_length = 0: must be at least 1 to think"):
        Generator(loaded.model).generate([[1]], GenerationConfig(1, think=Think("always")))
    with monkeypatch.context() as patched:
        stopping(patched, lambda at, values: at == 2 and "loss" in values)  # the stage's evaluation is still owed
        with pytest.raises(Interrupted):
            train(run, path, quiet=True)
    assert train(run, path, quiet=True).evaluation == summary.evaluation
    assert timeless(path) == timeless(straight)
    first, second = (run_dir.load_run(each).params for each in (straight, path))
    chex.assert_trees_all_equal(first, second)
    base = replace(run, init_from=str(straight))
    assert _defaults(["new", "--init-from", str(straight)]) == replace(base, thinking=replace(run.thinking, stages=()))
