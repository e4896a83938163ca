"""Operations of an answer of `experiments.composed`, counted by hand, and its report on made results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments.composed.report import report
from experiments.composed.run import (
    MODEL,
    ROUTINGS,
    THINKING,
    answer_flops,
    last_state,
    thought_count,
    without_knowledge,
)
from experiments.support.composition_task import PERMUTATIONS
from experiments.support.worked_lines import LENGTH, make_line
from mod_star.config import RunConfig, TrainConfig
from mod_star.decoding import Completion, Think
from mod_star.decoding.branches import Branch, Branches

D, F, V, S = 64, 256, 22, LENGTH
LINEAR = 2 * (4 * D * D + 3 * D * F)
"""Of a token in a block: four projections and three products of the feed-forward layer."""
FULL = LINEAR + 2 * 2 * S * D
HEAD = 2 * D * V
MIXING = 2 * (2 * D * D + D * D + D)
DECIDER = 2 * (D * D + D)
BY_DECIDER = Think("auto", 0.0, by="decider")


def run_of(trunk: str, thinks: bool) -> RunConfig:
    train = TrainConfig(objective="quiet_star" if thinks else "next_token")
    return RunConfig(MODEL, ROUTINGS[trunk], train=train, thinking=THINKING)


def branch(tokens: int, thoughts: int = 0, routed: tuple[float, ...] = ()) -> Branch:
    """A branch of that many symbols, before the first of which there are thoughts."""
    before: list[list[int] | None] = [[1] * THINKING.thought_length] * thoughts + [None] * (tokens - thoughts)
    completion = Completion(
        "Q0abcdab=", "#" * tokens, [10] * tokens, [0.0] * tokens, "end", list(routed), 0, thoughts=before
    )
    return Branch(completion, "#", None, None, None, 0.0, 0.0)


def test_a_dense_model_computes_every_token_of_the_prompt_once_and_of_every_branch() -> None:
    result = Branches("Q0abcdab=", [branch(2), branch(13)])
    assert answer_flops(run_of("dense", False), Think(), result) == pytest.approx((10 + 15) * (2 * FULL + HEAD))
    assert answer_flops(run_of("dense", False), Think(), result.first(1)) == pytest.approx((10 + 2) * (2 * FULL + HEAD))


def test_thoughts_cost_their_tokens_the_mixing_and_the_decision() -> None:
    result, run = Branches("Q0abcdab=", [branch(2, 1), branch(3, 2)]), run_of("dense", True)
    text, thoughts = 10 + 5, 3
    passes = text + thoughts * 12  # <start>, ten symbols, <end>
    without_decision = passes * (2 * FULL + HEAD) + thoughts * MIXING
    assert answer_flops(run, Think("auto", 1.0), result) == pytest.approx(without_decision)
    assert answer_flops(run, BY_DECIDER, result) == pytest.approx(without_decision + text * DECIDER)


def test_a_routed_block_computes_its_share_of_the_text_and_its_slots_of_a_thought() -> None:
    run = run_of("MoD", True)
    predictor_width = ROUTINGS["MoD"].predictor_width
    every = FULL + HEAD + 2 * D + 2 * (D * predictor_width + predictor_width)  # and the router and the predictor
    quarter, result = S // 4, Branches("Q0abcdab=", [branch(2, 1, (0.25,))])
    text = 12 * (every + quarter / S * (LINEAR + 2 * 2 * quarter * D))
    slots = math.ceil(1.5 * 7)  # half of 13: a thought of ten, <end> and two symbols after it
    computed = math.floor(slots / 12 * S + 0.5)
    thought = 12 * (every + computed / S * (LINEAR + 2 * 2 * computed * D)) + MIXING
    assert answer_flops(run, BY_DECIDER, result) == pytest.approx(text + thought + 12 * DECIDER)


def test_a_model_that_always_thinks_does_so_before_the_end_symbol() -> None:
    result = Branches("Q0abcdab=", [branch(2, 2)])
    assert (thought_count(BY_DECIDER, result), thought_count(Think("always"), result)) == (2, 3)


def test_a_decider_of_random_weights_leaves_the_rest() -> None:
    decider = {"hidden": np.zeros((D, 4)), "shift": np.zeros(())}
    params = {"embedding": 1, "thinking": {"start": 2, "decider": decider}}
    drawn = without_knowledge(params, 0)
    assert (drawn["embedding"], drawn["thinking"]["start"]) == (1, 2)
    assert drawn["thinking"]["decider"]["hidden"].shape == (D, 4) and drawn["thinking"]["decider"]["hidden"].any()
    assert not decider["hidden"].any()


def test_the_answer_is_the_last_state() -> None:
    assert last_state("(1,0,1,0,1,)2") == (12, 13) and last_state("#4") == (1, 2) and last_state("abQ=") is None


def test_lines_may_open_with_two_symbols() -> None:
    line = make_line(np.random.default_rng(0), {"#(": 1.0})
    states = [int(symbol) for symbol in re.findall(r"\d", line)]
    operations = ["abcd".index(symbol) for symbol in line[2:8]]
    assert line[9:11] == "#(" and len(states) == 7, line
    assert states[1:] == [PERMUTATIONS[operation, state] for operation, state in zip(operations, states, strict=False)]


def way(greedy: float, best: float, flops: float, routed: float | None) -> dict[str, Any]:
    """Results of one way to think, k = 1 to 10."""
    curve = [greedy] + [best] * 9
    return {
        "right": {"delta max": curve, "delta aggregated": curve[:5] + [greedy] * 5, "any branch": curve},
        "flops": [flops * k for k in range(1, 11)], "thoughts": [0.5 * k for k in range(1, 11)], "routed": routed,
        "openings": {
            "#": {"branches": 1.0, "dropped": 0.0, "right": greedy, "delta": 0.1, "normalised_log_prob": -1.0},
            "a": {"branches": 3.0, "dropped": 0.5, "right": 0.2, "delta": 0.4, "normalised_log_prob": -2.0},
            "b": {"branches": 0.5, "dropped": 0.0, "right": 0.8, "delta": 0.8, "normalised_log_prob": -4.0},
            "Q": {"branches": 1.0, "dropped": 1.0},
        },
    }  # fmt: skip


def test_report(tmp_path: Path) -> None:
    for seed in (0, 1):
        for trunk, routed in (("dense", None), ("MoD", 0.5)):
            shift = 0.1 * seed
            ways = {"none": way(0.2 + shift, 0.8 + shift, 4e6, routed)}
            taught = {"budget": way(0.7 + shift, 0.9, 8e6, routed), "always": way(0.75, 0.9, 8e7, routed)}
            for thinks, each in (("none", ways), ("thoughts", taught)):
                if (seed, trunk, thinks) == (1, "MoD", "thoughts"):
                    continue  # not there yet
                found = {"trunk": trunk, "seed": seed, "questions": 50, "ways": each}
                (tmp_path / f"{trunk}-{thinks}-{seed}.json").write_text(json.dumps(found))
    report(tmp_path, Console(width=200, record=True))
    table = (tmp_path / "results.md").read_text()
    assert "| dense, no thoughts, greedy | 25.0% ± 7.1% | 25.0% ± 7.1% | 4.0 | 0.50 |" in table, table
    assert "| dense, no thoughts, CoT, k = 10 | 85.0% ± 7.1% | 25.0% ± 7.1% | 40.0 | 5.00 |" in table, table
    assert "| MoD, on budget (seeds: 1), greedy | 70.0% | 70.0% | 8.0 | 0.50 |" in table, table
    assert "| dense, before every symbol | 75.0% | 0.50 | 80.0 | 90.0% | 90.0% | – |" in table, table
    others = (1.5 * 0.2 + 0.5 * 0.8) / 2
    assert f"| dense, no thoughts, others | 4.50 | {others:.0%} | 0.500 | -2.50 |" in table, table
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_nothing_to_report(tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    report(tmp_path, console)
    assert "nothing to report yet" in console.export_text() and not list(tmp_path.iterdir())
