"""Branches as records: what JSON keeps of them, and what every decoding over them answers.

One generation of k branches serves greedy decoding (branch 0) and CoT-decoding with every ranking, maximum and
aggregated; one of n samples serves sampling (sample 0) and self-consistency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mod_star.decoding.branches import Branch, Branches
from mod_star.decoding.confidence import ConfidenceConfig, PathConfidence
from mod_star.decoding.rankings import (
    DELTA,
    LOG_PROB,
    MEASURED,
    NORMALISED_LOG_PROB,
    P_TRUE,
    Ranking,
    softmax_weighted,
)
from mod_star.decoding.text import Completion
from mod_star.decodings import Cot, SelfConsistency

COUNTED: dict[str, Ranking] = {"Δ": DELTA, "log-prob": LOG_PROB, "log-prob per token": NORMALISED_LOG_PROB}
"""The rankings that are always counted, by what records and tables call them."""
OF_CONFIDENCE: dict[str, Ranking] = {
    "mean confidence": MEASURED["mean_confidence"],
    "lowest group": MEASURED["lowest_group"],
    "bottom 10 % of groups": MEASURED["bottom_groups"],
    "tail": MEASURED["tail_confidence"],
    "self-certainty": MEASURED["self_certainty"],
}
"""Those that are counted if confidence was measured."""
OF_P_TRUE: dict[str, Ranking] = {"P(True)": P_TRUE}
"""Those that are counted if the model was asked."""
EVERY_RANKING = COUNTED | OF_CONFIDENCE | OF_P_TRUE
COT = Cot()
DIGITS = 6  # of what is kept of deltas and log-probabilities


def rankings_of(confidence: ConfidenceConfig | None) -> dict[str, Ranking]:
    """The rankings that are counted, given what is measured."""
    if confidence is None:
        return COUNTED
    return COUNTED | OF_CONFIDENCE | (OF_P_TRUE if confidence.p_true is not None else {})


def branch_record(branch: Branch) -> dict[str, Any]:
    """A branch as JSON keeps it; what isn't there (None) is null, or no entry at all if it was not asked for."""
    measured: dict[str, Any] = {}
    if branch.confidence is not None:
        measured["confidence"] = {name: _rounded(value) for name, value in asdict(branch.confidence).items()}
    if branch.p_true is not None:
        measured["p_true"] = _rounded(branch.p_true)
    return measured | {
        "first_token": branch.first_token,
        "answer": branch.answer,
        "delta": None if branch.delta is None else _rounded(branch.delta),
        "log_prob": _rounded(branch.log_prob),
        "normalised_log_prob": _rounded(branch.normalised_log_prob),
        "dropped": branch.dropped,
        "finished": branch.completion.finished,
        "tokens": len(branch.completion.tokens),
        "span": None if branch.span is None else list(branch.span),
        "continuation": branch.continuation,
        "text": branch.completion.text,
    }


def branches_of(records: list[dict[str, Any]], prompt: str = "") -> Branches:
    """The branches again, with all that rankings and answers depend on; tokens and their numbers are not kept."""
    branches = []
    for record in records:
        completion = Completion(
            prompt=prompt, text=record["text"], tokens=[], log_probs=[], finished=record["finished"],
            routed_fraction=[], overflow=0,
        )  # fmt: skip
        # Null is kept of a log-probability that is not finite: a path that the model holds impossible.
        log_prob, normalised = (
            -math.inf if record[name] is None else record[name] for name in ("log_prob", "normalised_log_prob")
        )
        span = None if record["span"] is None else (record["span"][0], record["span"][1])
        branches.append(
            Branch(
                completion,
                record["first_token"],
                span,
                record["answer"],
                record["delta"],
                log_prob,
                normalised,
                record["dropped"],
                record["continuation"],
                PathConfidence(**record["confidence"]) if "confidence" in record else None,
                record.get("p_true"),
            )
        )
    return Branches(prompt, branches)


def cot_answers(
    branches: Branches, rankings: Mapping[str, Ranking] = COUNTED, vote: Cot | SelfConsistency = COT
) -> dict[str, str | None]:
    """What CoT-decoding answers: by each ranking the aggregated answer and that of the best path, Δ first.

    Greedy decoding answers what branch 0 says, even where it was cut by the limit of new tokens.

    Args:
      branches: of one question.
      rankings: by the names that they have in records and tables.
      vote: how many branches are kept and how they are weighed where answers are aggregated.
    """
    answers: dict[str, str | None] = {}
    for name, ranking in rankings.items():
        answers[f"CoT aggregated, {name}"] = weighed_answer(branches, ranking, vote)
        answers[f"CoT max, {name}"] = branches.answer(ranking)
    answers["greedy (branch 0)"] = branches.branches[0].answer
    return answers


def sample_answers(
    samples: Branches, rankings: Mapping[str, Ranking], vote: Cot | SelfConsistency
) -> dict[str, str | None]:
    """What self-consistency answers, by equal votes and by votes that each of the rankings weighs; and the first sample
    alone, even where it was cut by the limit of new tokens."""
    answers = {"self-consistency": samples.majority_answer()}
    answers |= {f"self-consistency, {name}": weighed_answer(samples, each, vote) for name, each in rankings.items()}
    return answers | {"one sample": samples.branches[0].answer}


def weighed_answer(branches: Branches, ranking: Ranking, vote: Cot | SelfConsistency) -> str | None:
    """The answer that the branches have together, of the highest ranked ones and with weights as `vote` says."""
    weights = ranking if vote.vote_temperature is None else softmax_weighted(ranking, vote.vote_temperature)
    return branches.keep(vote.keep, ranking).answer(weights, aggregate=True)


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None
