"""The demo, on a budget of a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import demo
from experiments.demo import main, mod_run, verdict
from mod_star.config import RunConfig
from mod_star.runs.directory import load_run
from mod_star.training.train import TrainSummary


def summary(steps: int, **evaluation: float) -> TrainSummary:
    return TrainSummary("", steps, 1, 1, 1.0, 1, 1.0, 1.0, 1.0, 0, evaluation)


@pytest.mark.slow
def test_both_models_the_result_and_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")

    def small(flops: float) -> RunConfig:
        run = mod_run(flops)
        model = replace(run.model, width=16, layers=4, heads=1, context=64)
        return replace(run, model=model, train=replace(run.train, eval_batches=1, loss_chunk=64))

    monkeypatch.setattr(demo, "mod_run", small)
    monkeypatch.setattr(demo, "room", lambda *_: 32)  # tokens of each text
    argv = ["--directory", str(tmp_path / "demo"), "--flops", "5e7"]
    main(argv)
    first = capsys.readouterr().out
    main(argv)
    again = capsys.readouterr().out
    for shown in (first, again):
        assert "\x1b" not in shown, "plain text where it goes to a file"
        lines = [line.strip() for line in shown.splitlines()]
        for start in (
            "parameters  ",
            "held-out loss, nats per byte  ",
            "the same under causal routing  ",
            "decoded tokens/s, one text  ",
            "When a function is called,",
            "computed by  0   1   2  of 2 routed blocks",
            "block 4  ",
        ):
            assert any(line.startswith(start) for line in lines), start
    assert "steps," in first and "is complete already" not in first
    assert again.count("is complete already") == 2, "nothing is trained twice"
    assert {path.name for path in (tmp_path / "demo").glob("*.png")} == {"curves.png", "routes.png"}
    dense, mod = (load_run(tmp_path / "demo" / name) for name in ("dense", "mod"))
    assert 1 <= dense.step < mod.step, "equal FLOPs are more steps of the cheaper model"

    with pytest.raises(SystemExit) as left:
        main([*argv[:-1], "6.5e7"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: train.flops = 6.5e+07: the run was begun with 3 steps, and ")


def test_the_verdict_says_which_is_worse() -> None:
    dense = summary(100, eval_loss=2.0)
    said = verdict({"dense": dense, "MoD": summary(150, eval_loss=1.9, eval_loss_causal=2.25)})
    assert "1.50 times as many steps" in said
    assert "0.100 nats per byte lower" in said and "0.250 nats per byte higher" in said
