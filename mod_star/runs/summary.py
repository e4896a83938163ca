"""The result of a complete run: what it holds, how it is stored, and how it reads in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mod_star.errors import InputError
from mod_star.runs.stored_config import SUMMARY_FILE, write_json
from mod_star.units import duration, short_number

__all__ = ["SUMMARY_FILE", "TrainSummary", "describe", "read_summary", "write_summary"]


@dataclass(frozen=True)
class TrainSummary:
    """The result of a complete run; also RUN/summary.json."""

    directory: str
    steps: int
    parameters: int
    """Number of parameters."""
    trained_parameters: int
    """Of these, how many are trained; the others are frozen (`train.trainable`)."""
    flops: float
    """Floating-point operations spent on training steps."""
    tokens: int
    """Tokens trained on, padding included."""
    seconds: float
    """Time in training steps over all sessions: without compilation, evaluation, and waiting for checkpoints."""
    tokens_per_second: float
    """tokens / seconds."""
    compile_seconds: float
    """Compilation of the training and evaluation steps in the last session."""
    skipped: int
    """Steps whose update was left out because loss or gradient was not finite."""
    evaluation: dict[str, Any]
    """Held-out metrics after the last step, see `mod_star.training.step.summarise_eval`."""


def describe(summary: TrainSummary) -> str:
    """The result in one line."""
    evaluation = summary.evaluation
    losses = f"held-out loss {evaluation['eval_loss']:.4f}"
    if "eval_loss_causal" in evaluation:
        losses += f" ({evaluation['eval_loss_causal']:.4f} under causal routing)"
    if "eval_talk_loss" in evaluation:
        losses += (
            f" ({evaluation['eval_base_loss']:.4f} without thoughts, {evaluation['eval_talk_loss']:.4f} with one each)"
        )
    skipped = f", {summary.skipped} of them skipped" if summary.skipped else ""
    return (
        f"{losses} after {summary.steps} steps{skipped}: {short_number(summary.tokens)} tokens, "
        f"{short_number(summary.flops)} FLOP, {duration(summary.seconds)}, "
        f"{short_number(summary.tokens_per_second)} tokens/s"
    )


def write_summary(path: Path, summary: TrainSummary) -> None:
    """Writes RUN/summary.json, which says that the run is complete."""
    write_json(path / SUMMARY_FILE, asdict(summary))


def read_summary(path: Path) -> TrainSummary:
    """The result of the complete run in this directory. Raises InputError if it can't be read."""
    try:
        stored = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
        # It may have been moved. Versions that froze nothing did not count what is trained.
        return TrainSummary(**{"trained_parameters": stored["parameters"]} | stored | {"directory": str(path)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path / SUMMARY_FILE}: cannot be read: {error}; delete it to make it again") from error
