"""Where a text says that its answer comes: "The answer is", "Answer:", \\boxed{...}, ####, "... is the answer"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mark:
    """Says that an answer stands in [start, end) of the text."""

    kind: Literal["said", "boxed", "hashes", "before"]
    """said: after "answer is"; before: what "is the answer" stands after."""
    start: int
    end: int
    denied: bool = False
    """"The wrong answer is": what stands there is none."""


_HEDGE = r"(?:must|should|would|will|has\s+to|can\s+only|could|may|might)\s+be"
_COPULA = rf"(?:[:：=→]|['’]s\b|\b(?:is|was|are|were|be|becomes|equals)\b|\b{_HEDGE}\b)"
_ASIDE = (
    r"(?:\s*\([^()\n]{0,80}\)"
    r"|,?\s{1,40}(?:to|for|of|in|here|then|therefore|thus|hence|now|choice|option)\b[^.!?\n:=]{0,100}?)?"
)
_ALONE = r"^[#*_ \t]*(?:the[ \t]+)?(?:final[ \t]+)?answer[*_ \t]*$"
_SHORT = r"^[ \t]*A:(?=[ \t]*\S)"  # as in "Q: ...\nA: ..."; if nothing follows it may be the letter
_BEFORE = re.compile(
    r"\b(?:is|was|would be|must be|seems to be)\s+(?:(?:the|a|my|an)\s+)?(?:[\w-]+\s+){0,3}?(?:answer|choice|option)\b",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_STOP = re.compile(r"[.!?](?=[\s\"'”’*)\]]|$)|\n")


def _said(words: str) -> re.Pattern[str]:
    """Ends where the answer begins."""
    said = (
        rf"(?P<wrong>\b(?:incorrect|wrong|false)\s+)?\b(?:{words})(?:s|\(s\))?\b[*_\"'”)]{{0,3}}{_ASIDE},?"
        rf"(?:[\s*_]{{0,40}}{_COPULA}[*_]*)+"
    )
    return re.compile(rf"{said}|{_ALONE}|{_SHORT}", re.IGNORECASE | re.MULTILINE)


_PATTERNS = {False: _said("answer|solution"), True: _said("answer|solution|choice|option")}


def marks(text: str, options: bool) -> list[Mark]:
    """All marks, by where their answer stands.

    Args:
      text: any.
      options: whether "choice is" and "option is" say an answer, too, and what stands before "is the answer" is one.
    """
    all_marks = [
        Mark("said", *sentence_after(text, match.end()), match["wrong"] is not None)
        for match in _PATTERNS[options].finditer(text)
    ]
    all_marks += [Mark("hashes", match.end(), _line_end(text, match.end())) for match in _HASHES.finditer(text)]
    all_marks += [Mark("boxed", match.end(), _closing_brace(text, match.end())) for match in _BOXED.finditer(text)]
    if options:
        for match in _BEFORE.finditer(text):
            stops = [stop.end() for stop in _STOP.finditer(text, max(0, match.start() - 300), match.start())]
            # "(B) is correct" may begin a line: the full stop of "B." ends no sentence.
            stops = [stop for stop in stops if not re.search(r"(?:^|\n)\W*\w\.$", text[:stop])]
            denied = re.search(r"\b(?:not|incorrect|wrong|false)\b", match[0], re.IGNORECASE) is not None
            all_marks.append(Mark("before", stops[-1] if stops else max(0, match.start() - 300), match.start(), denied))
    return sorted(all_marks, key=lambda mark: mark.start)


def sentence_after(text: str, place: int) -> tuple[int, int]:
    """From `place`, or the next line if nothing is left of this one, to the end of the sentence or line."""
    start = place + len(text[place:]) - len(text[place:].lstrip(" \t\r\n*_:"))
    stop = _STOP.search(text, start)
    return start, len(text) if stop is None else stop.start()


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _closing_brace(text: str, place: int) -> int:
    """Where the braces that were opened before `place` close; the end of the text if they don't."""
    depth = 1
    for index in range(place, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0) if text[index - 1] != "\\" else 0
        if depth == 0:
            return index
    return len(text)
