"""The report of `experiments.quiet_star_gsm8k`, on summaries made by hand."""

import json
from pathlib import Path

from rich.console import Console

from experiments.quiet_star_gsm8k.report import directory, report
from experiments.support.tables import read_tables


def test_the_table_has_what_arms_measured(tmp_path: Path) -> None:
    plain = {"eval_loss": 3.25}
    thinks = {"eval_base_loss": 3.25, "eval_talk_loss": 3.0, "eval_loss": 3.125, "eval_gain": 0.25}
    thinks |= {"eval_gain_by_decile": [0.5, *[0.25] * 8, -0.5], "eval_mixing_weight": 0.125}  # type: ignore[dict-item]
    for arm, evaluation in (("trained on", plain), ("quiet-star", thinks)):
        folder = directory(tmp_path, arm, 0)
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"evaluation": evaluation}))
    report(tmp_path, ("trained on", "quiet-star", "pause"), (0, 1), Console(quiet=True))
    (table,) = read_tables((tmp_path / "results.md").read_text(encoding="utf-8"))
    assert table["trained on"] == {"no thought": {"value": 3.25}, "on budget": {"value": 3.25}}
    assert table["quiet-star"] == {
        "no thought": {"value": 3.25},
        "a thought": {"value": 3.0},
        "on budget": {"value": 3.125},
        "gain": {"value": 0.25},
        "hardest 10 %": {"value": -0.5},
        "w": {"value": 0.125},
    }
    assert "pause" not in table
