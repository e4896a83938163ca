"""Thresholds of router scores per budget: how they are chosen, what decides by them, and the commands."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.config import RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.inspection.routing_calibration import (
    BELOW_EVERYTHING,
    BudgetThresholds,
    RoutingCalibration,
    budget_thresholds,
    calibrated_routing,
    read_routing,
    with_causal_rule,
    write_routing,
)
from mod_star.model import Decoder
from mod_star.model.parts import Part, Parts
from mod_star.model.routing import causal_slots
from mod_star.model.threshold import THRESHOLD_RULE, threshold_init, with_thresholds
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.tokenization import load_tokenizer

EXAMPLE = RoutingCalibration(3, 71, (BudgetThresholds(0.25, (0.5, -1.0), (0.24, 0.26), (0.0, 0.01)),))


@pytest.fixture(scope="module")
def loaded(tiny_run: RunConfig, random_params: Any) -> LoadedRun:
    """Two routed blocks with random weights, three budgets."""
    routing = replace(tiny_run.routing, budgets=(1.0, 0.5, 0.25), headroom=1.0)
    run = replace(tiny_run, routing=routing)
    decoder = Decoder(run.model, routing)
    return LoadedRun(run, load_tokenizer("bytes"), decoder, random_params(run.model, routing), 3)


def in_numpy(loaded: LoadedRun, batch: Any, capacity: float, thresholds: list[float]) -> tuple[np.ndarray, ...]:
    """Scores and decisions of all tokens that are no padding, [N, 2], by the decoder in float64 NumPy."""
    routing = replace(loaded.config.routing, capacity=capacity)
    scores, selected = [], []
    for row in range(len(batch["tokens"])):
        tokens, positions, ids = (batch[name][row] for name in ("tokens", "positions", "segment_ids"))
        _, traces = numpy_decoder.decode(
            loaded.params, (tokens, positions, ids), loaded.config.model, routing, mode="causal",
            most=causal_slots(routing, 24), thresholds=np.array(thresholds),
        )  # fmt: skip
        valid = ids > 0
        scores.append(np.stack([trace["scores"][valid] for trace in traces], 1))
        selected.append(np.stack([trace["selected"][valid] for trace in traces], 1))
    return np.concatenate(scores), np.concatenate(selected)


@pytest.mark.slow
def test_thresholds_are_quantiles_block_by_block_and_decide_as_in_numpy(
    loaded: LoadedRun, tiny_batch: dict[str, jax.Array]
) -> None:
    batch = jax.device_get(tiny_batch)
    halves = [{name: array[rows] for name, array in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    found = {each.capacity: each for each in calibrated_routing(loaded, halves).budgets}
    assert list(found) == [1.0, 0.5, 0.25]
    assert found[1.0] == BudgetThresholds(1.0, (float(np.float32(BELOW_EVERYTHING)),) * 2, (1.0, 1.0), (0.0, 0.0))
    for capacity in (0.5, 0.25):
        first, second = 36, slice(36, 71)
        expected: list[float] = [0.0, 0.0]
        for block in range(2):
            scores_Nx2, _ = in_numpy(loaded, batch, capacity, expected)
            expected[block] = float(np.quantile(scores_Nx2[:first, block], 1 - capacity))
        np.testing.assert_allclose(found[capacity].thresholds, expected, rtol=1e-3, atol=1e-3)
        scores_Nx2, selected_Nx2 = in_numpy(loaded, batch, capacity, expected)
        np.testing.assert_allclose(found[capacity].achieved_shares, selected_Nx2[second].mean(0), atol=1e-6)
        wanted_Nx2 = scores_Nx2 > np.array(expected)
        np.testing.assert_allclose(found[capacity].overflow, (wanted_Nx2 & ~selected_Nx2)[second].mean(0), atol=1e-6)
    assert max(found[0.25].overflow) > 0, "no block was ever full: the test shows less than it should"
    single = budget_thresholds(replace(loaded, decoder=loaded.decoder.clone()), 0.25, halves)
    assert single == found[0.25], "whatever budgets are calibrated besides"


def test_the_parameters_of_the_trained_rule_are_replaced_and_the_others_shared(loaded: LoadedRun) -> None:
    thresholds = jnp.array([0.5, -1.0])
    decoder, params = with_thresholds(loaded.decoder, loaded.params, thresholds)
    assert decoder.parts.causal_rule is THRESHOLD_RULE and decoder.routing == loaded.decoder.routing
    assert params["groups"]["routed"]["predictor"] == {"threshold": thresholds}
    assert params["groups"]["routed"]["block"] is loaded.params["groups"]["routed"]["block"]
    assert "hidden" in loaded.params["groups"]["routed"]["predictor"], "the model that was given stays as it is"
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros(24, jnp.int32)))["params"]
    assert str(jax.tree.structure(shapes)) == str(jax.tree.structure(params))
    assert threshold_init(jax.random.key(0), loaded.config.model, loaded.config.routing)["threshold"] == 0
    with pytest.raises(InputError, match=r"^thresholds = \(3,\): must be as many as routed blocks, \(2,\)$"):
        with_thresholds(loaded.decoder, loaded.params, jnp.zeros(3))


def test_what_is_written_is_read_again_and_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    assert read_routing(tmp_path) is None
    assert write_routing(tmp_path, EXAMPLE) == tmp_path / "routing.json"
    assert read_routing(tmp_path) == EXAMPLE
    whole = dataclasses.asdict(EXAMPLE)
    for content in ("", "[]", "{}", json.dumps(whole | {"budgets": [{"capacity": 1}]}), json.dumps({"step": 3})):
        (tmp_path / "routing.json").write_text(content)
        with pytest.raises(InputError, match=r"routing\.json: cannot be read; mod-star calibrate \S+ --what routing "):
            read_routing(tmp_path)
    with pytest.raises(InputError, match=r"routing\.json: cannot be written: No such file or directory$"):
        write_routing(tmp_path / "none", EXAMPLE)


def test_a_model_gets_the_thresholds_of_its_capacity_or_it_is_said_why_not(loaded: LoadedRun, tmp_path: Path) -> None:
    notes: list[str] = []

    def asked(run: LoadedRun, rule: str | None = "threshold") -> LoadedRun:
        return with_causal_rule(run, tmp_path, rule, "--causal-rule", notes.append)

    assert asked(loaded, None) is loaded
    with pytest.raises(InputError, match=r"^--causal-rule = 'chance': must be one of threshold$"):
        asked(loaded, "chance")
    with pytest.raises(InputError, match=r"^--causal-rule = 'threshold': needs thresholds; run mod-star calibrate "):
        asked(loaded)
    write_routing(tmp_path, EXAMPLE)
    params = asked(loaded).params["groups"]["routed"]["predictor"]
    np.testing.assert_array_equal(params["threshold"], [0.5, -1.0])
    assert notes == []
    asked(replace(loaded, step=4))
    assert re.fullmatch(r"the thresholds were calibrated at step 3, this is step 4: mod-star .* renews them", notes[0])
    other = replace(loaded, config=replace(loaded.config, routing=replace(loaded.config.routing, capacity=0.5)))
    with pytest.raises(InputError, match=r"routing\.json: has no thresholds of capacity 0\.5; run mod-star calibrate "):
        asked(other)
    own = Part(lambda key, config, routing: {}, lambda params, x, scores, noise, routing, context: scores)
    for routing, parts, said in (
        (RoutingConfig(every=0), Parts(), "the model is dense"),
        (RoutingConfig(selection="stochastic"), Parts(), "routing.selection is stochastic"),
        (loaded.config.routing, Parts(causal_rule=own), r"the run has a causal_rule of its own"),
    ):
        config = replace(loaded.config, routing=routing)
        run = replace(loaded, config=config, decoder=Decoder(config.model, routing, parts))
        with pytest.raises(InputError, match=rf"^--causal-rule = 'threshold': must be left out: {said}"):
            asked(run)


@pytest.mark.nightly
def test_the_commands_choose_thresholds_and_decide_by_them(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    done = succeed("calibrate", run, "--what", "routing")
    assert done.err == "" and done.out.endswith(f"written: {run / 'routing.json'}\n")
    calibration = read_routing(run)
    assert calibration is not None and calibration.step == 12
    assert [each.capacity for each in calibration.budgets] == [0.25]
    done = succeed("sample", run, "--prompt", "Once", "--new-tokens", "4", "--causal-rule", "threshold", "--json")
    assert done.err == "" and len(json.loads(done.out)["tokens"]) == 4
    # A threshold above every score, and one below: no token is computed, and as many as there are slots.
    text, slots = "abcdefg", causal_slots(load_run(run).config.routing, load_run(run).config.model.context)
    for threshold, computed in ((1e9, 0), (-1e9, min(8, slots))):
        budget = replace(calibration.budgets[0], thresholds=(threshold,))
        write_routing(run, replace(calibration, budgets=(budget,)))
        png = str(tmp_path / "routes.png")
        done = succeed("routes", run, "--text", text, "--causal-rule", "threshold", "--png", png)
        assert f"{computed} of 8 tokens" in done.out


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], trained_run: Path) -> None:
    for argv, message in (
        (["calibrate", trained_run, "--what", "routing", "--share", "0.5"], "--share = 0.5: cannot be combined with"),
        (["calibrate", trained_run, "--what", "routing", "--by", "entropy"], "--by = 'entropy': cannot be combined"),
        (["calibrate", trained_run, "--what", "chance"], "--what"),
        (["sample", trained_run, "--causal-rule", "threshold"], "--causal-rule = 'threshold': needs thresholds; run"),
        (
            ["routes", trained_run, "--text", "a", "--mode", "top_k", "--causal-rule", "threshold"],
            "--causal-rule = 'threshold': needs --mode causal",
        ),
    ):
        with pytest.raises(SystemExit) as left:
            main([str(each) for each in argv])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert message in err
    assert not (trained_run / "routing.json").exists()
