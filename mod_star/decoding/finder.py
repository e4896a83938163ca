"""What all kinds of finders of answers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Finder(ABC):
    """Finds answers of one kind, and spells them in one way."""

    @abstractmethod
    def spans(self, text: str) -> list[Span]:
        """Everything in `text` that could be an answer, in order; the spans don't overlap."""

    @abstractmethod
    def spell(self, found: str) -> str:
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
        given = self.find(text)
        if given is not None and self.spell(text[given[0] : given[1]]) == answer:
            return given
        same = [(start, end) for start, end in self.spans(text) if self.spell(text[start:end]) == answer]
        return same[-1] if same else None

    def canonical(self, text: str) -> str | None:
        """The answer that a text gives, in canonical form; None if there is none."""
        span = self.find(text)
        return None if span is None else self.spell(text[span[0] : span[1]])
