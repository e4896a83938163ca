"""`mod-star calibrate`, and the calibration behind it."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.errors import InputError
from mod_star.inspection.calibration import (
    Calibration,
    calibrated,
    calibration_batches,
    read_calibration,
    scores,
    write_calibration,
)
from mod_star.model import Decoder
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.training.objectives.next_token import forward

EXAMPLE = Calibration(1.25, 0.5, 0.48, 3, 1000, "decider")


@pytest.fixture(scope="module")
def loaded(thinking_run: Path) -> LoadedRun:
    return load_run(thinking_run)


@pytest.fixture(scope="module")
def found(loaded: LoadedRun) -> list[np.ndarray]:
    """Entropies by batch."""
    return list(scores(loaded, calibration_batches(loaded)))


def test_the_threshold_is_a_quantile_of_the_first_half_and_checked_on_the_second() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.permutation(1000), rng.permutation(500) * 4
    values = np.concatenate([first, second, second]).astype(np.float32)
    for share in (0.01, 0.25, 0.9):
        result = calibrated(values, share, 7)
        assert np.mean(first > result.threshold) == pytest.approx(share)
        assert result.achieved_share == np.mean(second > result.threshold)
        assert (result.share, result.step, result.tokens) == (share, 7, 2000)
    everything = calibrated(np.zeros(5, np.float32), 1.0, 7)
    assert everything.threshold < 0 and everything.achieved_share == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(InputError, match=rf"^--share = {share}: must lie in \(0, 1\]$"):
        calibrated(np.ones(4, np.float32), share, 0)


def test_a_single_prediction_is_too_few() -> None:
    with pytest.raises(InputError, match=r"^held-out predictions = 1: must be at least 2$"):
        calibrated(np.ones(1, np.float32), 0.5, 0)


@pytest.mark.slow
def test_entropies_are_those_of_the_plain_model_on_the_held_out_text(
    loaded: LoadedRun, found: list[np.ndarray]
) -> None:
    batches = calibration_batches(loaded)
    assert len(batches) == loaded.config.train.eval_batches == len(found)
    assert sum(map(len, found)) == sum(int(batch["weights"].sum()) for batch in batches)
    decoder = Decoder(replace(loaded.config.model, scan=False), loaded.config.routing)

    def probabilities(tokens: Any, positions: Any, segment_ids: Any) -> jax.Array:
        output: Any = decoder.apply({"params": loaded.params}, tokens, positions, segment_ids, mode="causal")
        return jax.nn.softmax(jnp.dot(output.hidden, loaded.params["embedding"].T))

    batch = batches[0]
    p = np.asarray(jax.jit(jax.vmap(probabilities))(batch["tokens"], batch["positions"], batch["segment_ids"]))
    expected = -np.sum(p * np.log(p), -1)[batch["weights"] > 0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


def test_expected_gains_are_those_of_numpy_and_need_a_decider(loaded: LoadedRun) -> None:
    batches = calibration_batches(loaded)[:1]
    (found,) = scores(loaded, batches, "decider")
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), loaded.params["thinking"]["decider"])
    hidden = jax.jit(lambda batch: forward(loaded.decoder, loaded.params, batch, None, "causal").hidden)(batches[0])
    units = np.maximum(np.asarray(hidden)[batches[0]["weights"] > 0] @ own["hidden"] + own["bias"], 0)
    np.testing.assert_allclose(found, units @ own["output"] + own["shift"], rtol=1e-4, atol=1e-6)
    assert np.abs(own["output"]).max() > 0, "it has learned"
    without = {**loaded.params, "thinking": {"start": loaded.params["thinking"]["start"]}}
    with pytest.raises(InputError, match=r"^by = 'decider': must be 'entropy': the model has no decider"):
        next(scores(replace(loaded, params=without), batches, "decider"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    for written in (EXAMPLE, replace(EXAMPLE, step=4)):
        assert write_calibration(tmp_path, written) == tmp_path / "thinking.json"
        assert read_calibration(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["thinking.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"threshold": 1}', json.dumps({**EXAMPLE.__dict__, "share": 2})])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "thinking.json").write_text(content)
    with pytest.raises(InputError, match=r"thinking\.json: cannot be read; mod-star calibrate \S+ writes it anew$"):
        read_calibration(tmp_path)


def test_a_file_of_before_there_was_a_decider_is_of_entropies(tmp_path: Path) -> None:
    old = {name: value for name, value in EXAMPLE.__dict__.items() if name != "by"}
    (tmp_path / "thinking.json").write_text(json.dumps(old))
    assert read_calibration(tmp_path) == replace(EXAMPLE, by="entropy")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"thinking\.json: cannot be written: No such file or directory$"):
        write_calibration(tmp_path / "none", EXAMPLE)


@pytest.mark.slow
def test_the_command_writes_the_file_and_shows_quantiles(
    thinking_run: Path, tmp_path: Path, found: list[np.ndarray]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(thinking_run, run)
    done = succeed("calibrate", run, "--share", "0.1")
    assert done.err == ""
    values = np.concatenate(found)
    expected = calibrated(values, 0.1, 3)
    stored = json.loads((run / "thinking.json").read_text())
    assert stored.keys() == {"threshold", "share", "achieved_share", "step", "tokens", "by"}
    assert stored["threshold"] == pytest.approx(expected.threshold, rel=1e-5)
    assert (stored["share"], stored["step"], stored["tokens"]) == (0.1, 3, len(values))
    assert stored["achieved_share"] == pytest.approx(expected.achieved_share, abs=2 / len(values))
    assert f"Entropy of {len(values):,} predictions without a thought" in " ".join(done.out.split())
    assert re.search(rf"50% +{np.median(values):.3f}", done.out), done.out
    assert f"threshold {stored['threshold']:.4g} nats, chosen by the first half of the text: 10.0% of" in done.out
    assert done.out.endswith(f"written: {run / 'thinking.json'}\n")


def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], thinking_run: Path, trained_run: Path, tmp_path: Path
) -> None:
    for argv, message in (
        ([thinking_run, "--share", "0"], "--share = 0.0: must lie in (0, 1]"),
        ([thinking_run, "--share", "1.5"], "--share = 1.5: must lie in (0, 1]"),
        ([thinking_run, "--share", "some"], "--share"),
        ([thinking_run, "--step", "2"], "--step"),
        ([trained_run], "train.objective = 'next_token': must be quiet_star: the model has not learned to think"),
        ([tmp_path], "is not a run"),
        ([thinking_run, "--by", "chance"], "--by"),
        ([], "RUN is missing"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["calibrate", *map(str, argv)])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert message in err
    assert not (thinking_run / "thinking.json").exists()
