"""What an evaluation asks of a model, the same for all protocols; and what a record holds.

A protocol yields a record per item as items get done:

    id, prompt, gold     the item; the prompt as text
    answer, correct      of the measure that counts most; the answer in canonical form, null if there is none
    scores               measure -> true or false, or a probability: what the results are means of
    seconds              wall time since the record before it
    ...                  what the protocol adds: text, answers, branches, log-probabilities
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mod_star.decoding.generate import Generator
from mod_star.decoding.think import NEVER, Think
from mod_star.evaluation.intervals import Estimate, accuracy, mean
from mod_star.evaluation.prompts import Prompts
from mod_star.evaluation.records import Record
from mod_star.evaluation.tasks import Item
from mod_star.loaded_model import Model


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and how it is asked."""

    model: Model
    prompts: Prompts
    think: Think = NEVER
    donate: bool = False
    """Whether the first generator takes the parameters over, see `Generator`: for a subject that is asked once."""

    def generator(self) -> Generator:
        """To generate with."""
        return Generator(self.model, donate=self.donate)


Numbered = tuple[int, Item]
"""An item with its number among all that are evaluated. What is drawn for it depends on that, in scoring on its text,
not on its batch."""


class ProtocolOf(Protocol):
    """A way to evaluate."""

    @property
    def headline(self) -> str:
        """The measure that counts most."""
        ...

    def check(self, subject: Subject, items: Sequence[Item]) -> None:
        """Raises InputError for what can't be done, before anything is compiled."""
        ...

    def records(self, subject: Subject, items: Sequence[Numbered]) -> Iterator[Record]:
        """A record per item, in any order."""
        ...


def stopwatch() -> Callable[[], float]:
    """A function that says how many seconds have passed since it was last called."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return round(last - before, 4)

    return lap


def measures(records: Sequence[Record]) -> dict[str, Estimate]:
    """Every score's mean with its 95 % interval: Wilson's for right and wrong, the bootstrap's for probabilities.

    Raises:
      InputError: there are no records.
    """
    by_name: dict[str, list[Any]] = {}
    for record in sorted(records, key=lambda record: record["id"]):  # the bootstrap depends on the order
        for name, score in record["scores"].items():
            by_name.setdefault(name, []).append(score)
    return {
        name: accuracy(scores) if all(isinstance(score, bool) for score in scores) else mean(scores)
        for name, scores in by_name.items()
    }
