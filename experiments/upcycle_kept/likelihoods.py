"""What a model thinks of the right answers of CommonsenseQA and GSM8K: nothing is generated."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from mod_star.errors import InputError
from mod_star.evaluation.intervals import mean
from mod_star.evaluation.likelihood import ChoiceLikelihood, ExpectedProbability
from mod_star.evaluation.prompts import Prompts, subset
from mod_star.evaluation.protocols import ProtocolOf, Subject, measures
from mod_star.evaluation.tasks import Item, load_task
from mod_star.loaded_model import Model

FILES = {"csqa": "csqa_dev.jsonl", "gsm8k": "gsm8k_test.jsonl"}


def likelihoods(model: Model, data: Path, questions: int) -> dict[str, Any]:
    """Measures one model on both tasks, with the prompt "Q: ...\\nA:" and no examples.

    Args:
      model: the model.
      data: directory with the files of `FILES`.
      questions: of each task, drawn by seed 0; those that do not fit the model's context are left out.

    Returns:
      Each with its 95 % interval and the number of questions: "csqa", the share of questions whose right choice has the
      largest log-likelihood per character; "gsm8k", minus the log-probability of the right number and a newline, in
      nats.
    """
    subject = Subject(model, Prompts(model.tokenizer))
    choices = _records(subject, ChoiceLikelihood(texts=True), "csqa", data, questions)
    numbers = _records(subject, ExpectedProbability(), "gsm8k", data, questions)
    nats = [-math.fsum(record["log_probs"]) for record in numbers]
    estimates = {"csqa": measures(choices)["log-likelihood per character"], "gsm8k": mean(nats)}
    return {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}


def _records(subject: Subject, protocol: ProtocolOf, task: str, data: Path, questions: int) -> list[Any]:
    """In the order of the questions."""
    items = [
        item
        for item in subset(load_task(task, data / FILES[task]).items, questions, seed=0)
        if _fits(subject, protocol, item)
    ]
    records = protocol.records(subject, list(enumerate(items)))
    return sorted(records, key=lambda record: str(record["id"]))


def _fits(subject: Subject, protocol: ProtocolOf, item: Item) -> bool:
    try:
        protocol.check(subject, [item])
    except InputError:
        return False
    return True
