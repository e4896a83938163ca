"""What all answer finders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from mod_star.errors import InputError

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Finder(ABC):
    """Finds answers of one kind, and spells them in one way. A kind of your own is a subclass, or a function: see
    `as_finder`."""

    needs_continuation: ClassVar[bool] = False
    """Whether answers can only be found where the model was asked for them with words such as "So the answer is"."""

    @abstractmethod
    def spans(self, text: str) -> list[Span]:
        """Everything in `text` that could be an answer, in order; the spans don't overlap."""

    @abstractmethod
    def spell(self, answer: str) -> str:
        """The canonical form of the text of one of `spans`."""

    def find(self, text: str) -> Span | None:
        """The answer that a text gives: the last one in it."""
        spans = self.spans(text)
        return spans[-1] if spans else None

    def find_first(self, text: str) -> Span | None:
        """The answer that follows "So the answer is": the first one."""
        spans = self.spans(text)
        return spans[0] if spans else None

    def align(self, text: str, answer: str) -> Span | None:
        """Where `text` gives the canonical `answer`, or else the last place where it stands."""
        span = self.find(text)
        if span is not None and self.spell(text[span[0] : span[1]]) == answer:
            return span
        same = [(start, end) for start, end in self.spans(text) if self.spell(text[start:end]) == answer]
        return same[-1] if same else None

    def canonical(self, text: str) -> str | None:
        """The answer that a text gives, in canonical form; None if there is none."""
        span = self.find(text)
        return None if span is None else self.spell(text[span[0] : span[1]])


FindAnswer = Callable[[str], Span | None]
"""A function from a text to the characters of its answer, or None if it gives none."""


@dataclass(frozen=True)
class FoundBy(Finder):
    """The finder that a function makes: what it returns is the answer, spelt with single blanks."""

    function: FindAnswer

    def spans(self, text: str) -> list[Span]:
        """What the function returns.

        Raises:
          InputError: it returns anything else than None or the start and end of at least one character of the text.
        """
        span = self.function(text)
        if span is None:
            return []
        fine = isinstance(span, tuple) and len(span) == 2 and all(isinstance(place, int) for place in span)
        if not fine or not 0 <= span[0] < span[1] <= len(text):
            name = getattr(self.function, "__name__", repr(self.function))
            allowed = f"must be None or (start, end) of characters in a text of {len(text)}"
            raise InputError(f"answer finder {name} = {span!r}: {allowed}")
        return [span]

    def spell(self, answer: str) -> str:
        """As it stands, with single blanks."""
        return " ".join(answer.split())


def as_finder(finder: Finder | FindAnswer) -> Finder:
    """A finder, or the finder that a function (text) -> (start, end) | None makes."""
    return finder if isinstance(finder, Finder) else FoundBy(finder)
