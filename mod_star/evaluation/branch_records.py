"""Branches as records: what JSON keeps of them, and what every decoding over them answers.

One generation of k branches serves greedy decoding (branch 0) and CoT-decoding with every ranking, maximum and
aggregated; one of n samples serves sampling (sample 0) and self-consistency.
"""

from __future__ import annotations

import math
from typing import Any

from mod_star.decoding.branches import Branch, Branches
from mod_star.decoding.rankings import DELTA, LOG_PROB, NORMALISED_LOG_PROB, Ranking
from mod_star.decoding.text import Completion

COUNTED: dict[str, Ranking] = {"Δ": DELTA, "log-prob": LOG_PROB, "log-prob per token": NORMALISED_LOG_PROB}
"""The rankings that are counted, by what records and tables call them."""
DIGITS = 6  # of what is kept of deltas and log-probabilities


def branch_record(branch: Branch) -> dict[str, Any]:
    """A branch as JSON keeps it; what isn't there (None) is null."""
    return {
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
            )
        )
    return Branches(prompt, branches)


def cot_answers(branches: Branches) -> dict[str, str | None]:
    """What CoT-decoding answers: by each ranking the aggregated answer and that of the best path, Δ first.

    Greedy decoding answers what branch 0 says, even where it was cut by the limit of new tokens.
    """
    answers: dict[str, str | None] = {}
    for name, ranking in COUNTED.items():
        answers[f"CoT aggregated, {name}"] = branches.answer(ranking, aggregate=True)
        answers[f"CoT max, {name}"] = branches.answer(ranking)
    answers["greedy (branch 0)"] = branches.branches[0].answer
    return answers


def sample_answers(samples: Branches) -> dict[str, str | None]:
    """What self-consistency answers, and the first sample alone, even where it was cut by the limit of new tokens."""
    return {"self-consistency": samples.majority_answer(), "one sample": samples.branches[0].answer}


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None
