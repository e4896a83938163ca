"""Records of questions that are small enough for a repository: a list per branch, and texts of few questions.

A record holds `id`, `task`, `prompt`, `gold`, `seconds`, and for each of its branches and samples a list of what `ROW`
names. An answer is right if it equals `gold`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mod_star.decoding.confidence import PathConfidence
from mod_star.evaluation.branch_records import branches_of
from mod_star.evaluation.records import Record

CONFIDENCE = tuple(field.name for field in fields(PathConfidence))
ROW = (
    "first_token",
    "answer",
    "delta",
    "log_prob",
    "normalised_log_prob",
    "dropped",
    "finished",
    "tokens",
    *CONFIDENCE,
)
"""What the list of a branch or sample holds, in this order; the last five are null if the path has no token."""
LEFT_OUT = {"span": None, "continuation": None, "text": ""}
"""Entries of a branch that reports do not need."""


def small(record: Record, keep_texts: bool) -> Record:
    """The small form of a record of `experiments.support.paths`.

    Args:
      record: with a dict for each branch, its confidence measured.
      keep_texts: if greedy decoding and CoT-decoding (Δ, best path) answer differently, keep the question and the texts
        of these two branches under `texts`.
    """
    rows = {kind: [_row(row) for row in record[kind]] for kind in ("branches", "samples")}
    kept = {name: record[name] for name in ("id", "task", "prompt", "gold", "seconds")} | rows
    best = branches_of(record["branches"]).max_path()
    greedy = record["branches"][0]
    if keep_texts and best is not None and record["branches"][best]["answer"] != greedy["answer"]:
        chosen = {"greedy": greedy["text"], "CoT-decoding": record["branches"][best]["text"]}
        kept["texts"] = {"question": record["question"], **chosen}
    return kept


def with_texts(record: Record) -> bool:
    """Whether a small record holds texts."""
    return "texts" in record


def whole(record: Record) -> Record:
    """A record with a dict for each branch again, as `branches_of` takes it; one that is whole already stays."""
    return record | {
        kind: [row if isinstance(row, dict) else _entries(row) for row in record[kind]]
        for kind in ("branches", "samples")
    }


def _row(row: dict[str, Any]) -> list[Any]:
    values = row | row.get("confidence", {})
    return [values.get(name) for name in ROW]


def _entries(row: list[Any]) -> dict[str, Any]:
    values = dict(zip(ROW, row, strict=True))
    confidence = {name: values.pop(name) for name in CONFIDENCE}
    measured = {} if confidence["mean"] is None else {"confidence": confidence}
    return values | measured | LEFT_OUT
