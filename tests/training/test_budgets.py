"""Several budgets in one model: what steps draw, what they cost, one predictor output each, and use at any of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star import presets
from mod_star.cli import main
from mod_star.config import RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.flops import training_flops
from mod_star.model.routing import predict, predictor_init
from mod_star.runs.directory import load_run
from mod_star.runs.metrics import read_metrics
from mod_star.stages import at_capacity, config_at, plan_stages
from mod_star.training.train import train

BUDGETS, TWO = (1.0, 0.5, 0.25), (0.5, 0.25)


def make_run(budgets: tuple[float, ...] = BUDGETS, **fields: Any) -> RunConfig:
    run = presets.tiny()
    model = replace(run.model, vocab_size=320, width=8, layers=1, heads=1, kv_heads=1, context=16, mlp_width=8)
    routing = RoutingConfig(every=1, predictor_width=4, capacity=0.25, budgets=budgets)
    optimizer = replace(run.optimizer, schedule="constant", warmup_steps=0)
    settings = {"steps": 3, "batch_size": 2, "log_every": 1, "eval_every": 3, "checkpoint_every": 3} | fields
    return replace(run, model=model, routing=routing, optimizer=optimizer, train=replace(run.train, **settings))


def step_flops(run: RunConfig, capacity: float) -> float:
    routing = replace(run.routing, capacity=capacity)
    return training_flops(run.model, routing, run.model.context).total * run.train.batch_size


def test_every_budget_is_drawn_equally_often_and_whatever_the_number_of_steps() -> None:
    plan = plan_stages(make_run(steps=300))
    drawn = [plan.at(step).run.routing.capacity for step in range(1, 301)]
    assert Counter(drawn) == dict.fromkeys(BUDGETS, 100)
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 300, 3)}) == 6, "in every order"
    fewer = plan_stages(make_run(steps=100))
    assert [fewer.at(step).run.routing.capacity for step in range(1, 101)] == drawn[:100]
    another = plan_stages(make_run(steps=300, seed=1))
    assert [another.at(step).run.routing.capacity for step in range(1, 301)] != drawn
    assert plan.at(0) is plan.at(1)
    assert config_at(make_run(), 2) == make_run()


def test_operations_are_those_of_the_capacities_that_were_drawn() -> None:
    run = make_run(steps=20)
    plan = plan_stages(run)
    costs = [step_flops(run, plan.at(step).run.routing.capacity) for step in range(1, 21)]
    assert [plan.flops_until(step) for step in range(21)] == pytest.approx([0, *np.cumsum(costs)])
    for budget in (sum(costs[:7]), sum(costs[:7]) * 1.001, sum(costs[:8]) * 0.999):
        found = plan_stages(make_run(flops=budget))
        assert found.steps == 7 and found.flops == pytest.approx(sum(costs[:7]))
    with pytest.raises(InputError, match=r"^train\.flops = .*: must be at least the first step's"):
        plan_stages(make_run(flops=costs[0] / 2))


def test_the_predictor_has_an_output_of_its_own_for_each_budget() -> None:
    run = make_run()
    params = predictor_init(jax.random.key(0), run.model, run.routing)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    unit = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + 1e-6)
    hidden = np.maximum(unit @ np.asarray(params["hidden"], np.float64) + params["bias"], 0)
    for budget in range(3):
        expected = hidden @ np.asarray(params["output"], np.float64)[:, budget] + params["shift"][budget]
        np.testing.assert_allclose(predict(params, jnp.asarray(x), budget), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "budgets"
    train(make_run(TWO, steps=6), path, quiet=True)
    return path


@pytest.mark.slow
def test_steps_are_computed_at_what_they_draw_and_evaluated_at_all(trained: Path, tmp_path: Path) -> None:
    plan = plan_stages(make_run(TWO, steps=6))
    records = read_metrics(trained)
    steps = [record for record in records if "loss" in record]
    drawn = [plan.at(step).run.routing.capacity for step in range(1, 7)]
    assert [record["capacity"] for record in steps] == drawn
    assert [record["routed_fraction"] for record in steps] == [[capacity] for capacity in drawn]
    for record in (record for record in records if "eval_loss" in record):
        assert record["capacity"] == 0.25
        losses = [record[name] for name in ("eval_loss", "eval_loss_at_0.5", "eval_loss_causal_at_0.5")]
        assert np.isfinite(losses).all() and losses[0] != losses[1]
    # Three steps, and three more in another session: the same bits as without the interruption.
    train(make_run(TWO, steps=3), tmp_path / "run", quiet=True)
    train(make_run(TWO, steps=6), tmp_path / "run", quiet=True)
    chex.assert_trees_all_equal(load_run(tmp_path / "run").params, load_run(trained).params)


@pytest.mark.nightly
def test_a_single_budget_is_a_capacity(tmp_path: Path) -> None:
    with_budget = train(make_run((0.25,)), tmp_path / "budget", quiet=True).evaluation
    without = train(make_run(()), tmp_path / "capacity", quiet=True).evaluation
    assert with_budget == without
    params, others = (load_run(tmp_path / name).params["groups"]["routed"] for name in ("budget", "capacity"))
    chex.assert_trees_all_equal(params["block"], others["block"])
    np.testing.assert_array_equal(params["predictor"]["output"][..., 0], others["predictor"]["output"])


@pytest.mark.slow
def test_a_model_is_used_at_any_of_its_budgets(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for capacity in TWO:
        loaded = load_run(trained, capacity=capacity)
        assert loaded.decoder.routing == replace(make_run(TWO).routing, capacity=capacity)
    assert load_run(trained).decoder.routing.capacity == 0.25
    for chosen, said in (("0.5", "50.0%   4 of 8 tokens"), ("0.25", "25.0%   2 of 8 tokens")):
        with pytest.raises(SystemExit):
            main(["routes", str(trained), "--text", "abcdefg", "--mode", "top_k", "--capacity", chosen])
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sample", str(trained), "--prompt", "a", "--capacity", "0.3"])
    said = "--capacity = 0.3: must be one that the model was trained for (routing.budgets): 0.5, 0.25"
    assert said in capsys.readouterr().err


def test_what_has_no_budgets_is_refused() -> None:
    run = make_run(())
    assert at_capacity(run, 0.25, "--capacity") == run
    for routing, said in (
        (replace(run.routing, every=0), "the model is dense"),
        (replace(run.routing, capacity_tokens=3), r"routing\.capacity_tokens is set"),
        (run.routing, r"trained for \(routing\.budgets\): 0\.25$"),
    ):
        with pytest.raises(InputError, match=rf"^--capacity = 0\.5: must .*{said}"):
            at_capacity(replace(run, routing=routing), 0.5, "--capacity")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"budgets": (0.5, 0.25), "capacity": 0.3}, r"routing\.budgets = \(0\.5, 0\.25\): must fall, and contain"),
        ({"budgets": (0.25, 0.5), "capacity": 0.5}, r"routing\.budgets = .* must fall"),
        ({"budgets": (0.5,), "capacity": 0.5, "stages": (1.0,)}, r"routing\.stages = .* must be empty"),
        ({"budgets": (0.5,), "capacity": 0.5, "capacity_tokens": 4}, r"routing\.capacity_tokens = 4: must be None"),
        ({"budgets": (0.5,), "capacity": 0.5, "causal_rule": "router"}, r"routing\.causal_rule = 'router': must be"),
    )
    for fields, said in refused:
        with pytest.raises(InputError, match=said):
            RoutingConfig(**fields)
