"""The command for a borrowed accelerator: its checks can fail, its results are kept, it goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import accelerator_checks as checks
from experiments.benchmarks import accelerator_speed, on_accelerator
from experiments.benchmarks.on_accelerator import Options, run
from experiments.benchmarks.thoughts import make_batch
from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.model.attention import attend


@pytest.mark.parametrize("fault", [None, "documents", "window"])
@pytest.mark.slow
def test_attention_is_compared_with_what_may_be_seen(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(query: Any, positions: Any, ids: Any, key_values: Any, *, window: int | None) -> Any:
        if fault == "documents":
            ids, key_values = ids > 0, [replace(own, segment_ids_M=own.segment_ids_M > 0) for own in key_values]
        return attend(query, positions, ids, key_values, window=None if fault == "window" else window)

    monkeypatch.setattr(checks, "attend", faulty)
    check = checks.attention_equals_numpy(checks.ATTENTION_CASES["windowed"], "float32", checks.TINY)
    assert check.passed == (fault is None) and (fault is None or check.error > 0.1)
    assert checks.documents_do_not_see_each_other("float32", checks.TINY).passed == (fault != "documents")


def test_what_is_not_finite_does_not_pass() -> None:
    assert not checks.Check(float("nan"), 1.0).passed and checks.Check(1.0, 1.0).passed


def test_results_are_kept_and_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def good() -> dict[str, Any]:
        calls.append("good")
        return {"passed": True, "error": 0.0, "allowed": 0.0}

    def too_large() -> dict[str, Any]:
        calls.append("too large")
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand many more lines")

    every = {"a check": good, "a step": too_large}
    monkeypatch.setattr(on_accelerator, "tasks", lambda tiny: every)
    monkeypatch.setattr(accelerator_speed, "measurements", lambda tiny: {"a step": too_large})
    out = tmp_path / "results"
    assert run(Options(out, tiny=True)), "a step that does not fit is a result"
    kept = json.loads((out / "results.json").read_text())["results"]
    assert kept["a step"]["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: no memory"
    assert "a check" in (out / "table.txt").read_text() and "passed" in capsys.readouterr().out

    every["a check that is wrong"] = lambda: {"passed": False, "error": 1.0, "allowed": 0.1}
    assert not run(Options(out, tiny=True))
    assert calls == ["good", "too large"], "what is done is not done again"
    with pytest.raises(InputError, match=r"results\.json: machine = .*; take another --out"):
        run(Options(out))
    with pytest.raises(InputError, match="--minutes = 0: must be above 0"):
        run(Options(out, minutes=0))


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [("TPU v5 lite", "tpu", "TPU v5e"), ("NVIDIA H100 80GB HBM3", "gpu", "H100 SXM"), ("cpu", "cpu", None)],
)
def test_a_share_of_the_peak_needs_a_chip_that_is_known(kind: str, platform: str, name: str | None) -> None:
    class Device:
        device_kind = kind

    Device.platform = platform  # type: ignore[attr-defined]
    chip: Any = accelerator_speed.chip_of(Device())  # type: ignore[arg-type]
    assert (chip and chip.name) == name


def test_a_step_of_every_arm_has_as_many_tokens_as_it_says() -> None:
    model = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, context=32)
    for arm in ("dense", "mod", "quiet"):
        run = accelerator_speed.StepCase("tiny", model, arm, 128).run()
        assert np.prod(make_batch(run)["tokens"].shape) == 128
        assert (run.routing.every > 0) == (arm == "mod") and run.thinks == (arm == "quiet")


def test_models_that_are_measured_have_a_vocabulary_of_their_own() -> None:
    for tiny in (False, True):
        assert all(model.vocab_size > 0 for model in accelerator_speed.shapes(tiny).values())
