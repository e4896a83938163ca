"""The experiment by its command line, on a few steps, and the tables that come of it."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
from fork_server import shared_server

from experiments.mod_vs_dense.report import report
from experiments.mod_vs_dense.run import Options, config
from experiments.support.workers import train_one

# The runs' processes are forks, too, which have imported JAX and not begun with it; and their models are small.
AS_A_FORK = """
import multiprocessing, sys
from dataclasses import replace
from experiments.mod_vs_dense import run

def small(*arguments):
    found = full_size(*arguments)
    model = replace(found.model, width=32, heads=2, context=64)
    return replace(found, model=model, train=replace(found.train, batch_size=2, loss_chunk=64, eval_batches=2))

full_size, run.config = run.config, small
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method: get_context("fork")
sys.argv = {argv}
run.main()
raise SystemExit
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As much like ../shared/data as matters: enough for a tokenizer and for one sequence held out."""
    draw = random.Random(0)
    directory = tmp_path / "data"
    directory.mkdir()
    problems = []
    for _ in range(300):
        a, b = draw.randrange(1000), draw.randrange(1000)
        question = f"A farmer has {a} hens and buys {b} more at the market in town. How many hens are there?"
        problems.append({"question": question, "answer": f"{a} + {b} = {a + b} hens.\n#### {a + b}"})
    (directory / "gsm8k_train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    scene = "".join(f"FIRST CITIZEN:\nThou hast {draw.randrange(10**6)} ducats, sir.\n\n" for _ in range(400))
    (directory / "tinyshakespeare.txt").write_text(scene)
    return directory


@pytest.mark.nightly
def test_three_arms_and_their_tables(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["mod_vs_dense", "--data", str(data), "--out", str(out), "--flops", "4e8", "--seeds", "1"]
    done = shared_server().run(before=AS_A_FORK.format(argv=argv), environment={"COLUMNS": "100"})
    assert done.code == 0, done.err
    task = (train_one, config(Options(data, out), "mod", 0), out)
    assert pickle.loads(pickle.dumps(task)) == task, "it can be spawned"
    assert "\x1b" not in done.out
    assert "not complete" not in done.out
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert set(runs) == {"dense-0", "mod-0", "stochastic-0"}
    assert runs["mod-0"]["steps"] > runs["dense-0"]["steps"] >= 1
    assert runs["mod-0"]["gap"] == pytest.approx(runs["mod-0"]["loss_causal"] - runs["mod-0"]["loss"])
    assert "accuracy" not in runs["stochastic-0"], "there is nothing to predict"
    assert (out / "curves.png").stat().st_size > 10_000

    # A second seed, made up: dense 0.5 worse, MoD the same.
    for arm, more in (("dense", 0.5), ("mod", 0.0)):
        shutil.copytree(out / f"{arm}-0", out / f"{arm}-1")
        path = out / f"{arm}-1" / "summary.json"
        summary = json.loads(path.read_text())
        summary["evaluation"]["eval_loss"] += more
        path.write_text(json.dumps(summary))
    report(out, ["dense", "mod", "stochastic"], 2)
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out of the tables: stochastic-1 (not begun)" in shown
    difference = runs["mod-0"]["loss"] - runs["dense-0"]["loss"]
    row = f"| MoD, as trained | {difference:+.4f} | {difference - 0.5:+.4f} | {difference - 0.25:+.4f} ± 0.3536 |"
    assert row in (out / "results.md").read_text()


def test_a_report_on_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path, ["dense"], 1)
    assert capsys.readouterr().out.startswith("not complete, left out of the tables: dense-0 (not begun)")
    assert list(tmp_path.iterdir()) == []
