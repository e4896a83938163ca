"""Staged and integrated MoDE through the command line: train, go on, sample; what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.runs.directory import load_run
from mod_star.runs.metrics import read_metrics

SMALL = (
    "--preset", "tiny", "--model.width", "16", "--model.layers", "1", "--model.context", "32",
    "--train.batch-size", "2", "--train.loss-chunk", "16", "--train.log-every", "2", "--train.checkpoint-every", "2",
    "--optimizer.schedule", "constant", "--optimizer.warmup-steps", "1",
)  # fmt: skip
STAGED = ("--routing.every", "1", "--model.experts", "3")
INTEGRATED = (
    "--routing.every", "0", "--model.experts", "3", "--model.experts-null", "2", "--model.experts-balance", "bias"
)  # fmt: skip


@pytest.mark.nightly
def test_integrated_trains_goes_on_and_samples(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train", run, *SMALL, *INTEGRATED, "--train.eval-every", "4")
    succeed(*command, "--train.steps", "2")
    succeed(*command, "--train.steps", "4")  # at a rate that does not depend on how many steps follow
    records = read_metrics(run)
    logged = [record for record in records if "expert_load_max" in record]
    assert [record["step"] for record in logged] == [2, 4]
    assert all(1 <= record["expert_load_max"][0] <= 3 and 0 < record["null_share"][0] < 1 for record in logged)
    held_out = next(record for record in records if "eval_loss" in record)
    assert len(held_out["eval_expert_load_min"]) == len(held_out["eval_null_share"]) == 1
    done = succeed("sample", run, "--prompt", "def ", "--new-tokens", "3", "--json")
    assert len(json.loads(done.out)["tokens"]) == 3
    (biases,) = load_run(run).params["groups"]["full_0"]["block"]["feed_forward"]["balance_bias"]
    assert np.abs(biases).max() > 1e-5, "Adam has moved them"
    assert biases[3] == biases[4]  # null experts count with their mean share


@pytest.mark.nightly
def test_staged_trains(tmp_path: Path) -> None:
    succeed("train", tmp_path / "run", *SMALL, *STAGED, "--train.eval-every", "0", "--train.steps", "2")
    logged = next(record for record in read_metrics(tmp_path / "run") if "loss" in record)
    assert len(logged["expert_load_max"]) == 1 and "null_share" not in logged and logged["routed_fraction"] == [0.25]
    # Sampling of a staged model: tests/decoding/test_experts_decoding.py.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.experts", "1"), "model.experts_active = 2: must be at most model.experts + model.experts_null = 1"),
        (("--model.experts-null", "2"), "model.experts_null = 2: must be 0 without model.experts"),
        (("--model.experts", "3", "--model.experts-weight", "-1"), "model.experts_weight = -1.0: must be at least 0"),
    ],
)
def test_errors(words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "run"), "--preset", "tiny", *words])
    assert capsys.readouterr().err == f"error: {message}; see mod-star train --help\n"
