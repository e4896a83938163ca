"""The finder of one answer among given ones: yes or no, letters, words."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

from mod_star.decoding.answer_marks import marks
from mod_star.decoding.finder import Finder, Span
from mod_star.errors import require


@dataclass(frozen=True)
class _Place:
    """An option in a text."""

    start: int
    end: int
    option: str
    plain: bool
    """As "(B)" or "B)"; of yes and no, where a sentence begins: one of these counts before all others."""
    alone: bool
    """No word of the sentence, as in "A bank", "I think", "no doubt", "Vitamin C"."""
    denied: bool
    """As in "not D", "(D) is wrong"."""


_QUOTES = r"\"'“”‘’*_$`"
_NOT = r"(?:\bnot|n['’]t|\bcannot|\bnever|\bneither|\bnor|\brather than|\binstead of|\bexcept|\bother than)"
_DENIED_BEFORE = re.compile(
    rf"{_NOT}(?:\s+(?:be|is|the|an?|option|answer|choice|letter|really|necessarily|likely|it|either|just|simply))*"
    rf"\s*[({_QUOTES}]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    rf"[)\]{_QUOTES}]*(?:\s+(?!and\b|or\b|but\b)[\w'’-]+[{_QUOTES}]*){{0,5}}?\s+(?:(?:is|was|are|would\s+be|seems)\s+"
    r"(?:(?:clearly|also|definitely|therefore|the|an?)\s+)*(?:not|incorrect|wrong|false|unlikely)\b"
    r"|(?:isn|wasn|aren|can|couldn|wouldn)['’]?t\b|cannot\b|can not\b)",
    re.IGNORECASE,
)
# What may stand before a letter that is an answer: nothing, a mark, or one of these words.
_LEADS = re.compile(
    rf"(?:^|[\n.!?:;,=→>#(\[{{—–-]|\b(?:is|it['’]?s|be|was|option|choice|answer|letter|choose|chose|pick|select|say|with"
    r"|so|therefore|thus|hence|for|think|believe|guess|are|means|but|go|perhaps|maybe|indeed|\w+ly))"
    rf"[\s{_QUOTES}]*$",
    re.IGNORECASE,
)
_BEGINS = re.compile(rf"(?:^|[\n.!?:;])[\s{_QUOTES}]*$")
_CONCLUDES = re.compile(rf"\b(?:so|therefore|thus|hence|is|choose|pick)[,:]?[\s({_QUOTES}]*$", re.IGNORECASE)
_NAMES_OPTION = re.compile(rf"\b(?:option|choice|answer|letter)[\s{_QUOTES}]*$", re.IGNORECASE)
_WORD_AFTER = re.compile(r"[ \t]+(['\w’]+)")
_AFTER_LETTER = re.compile(
    "is|isn't|was|are|because|since|as|and|or|but|seems|would|will|can|has|for|which|that|in|not|rather", re.IGNORECASE
)
"""What follows a letter at the beginning of a sentence, and never the article "A"."""
_AFTER_NO = re.compile("it|he|she|they|we|you|i|that|this|the|there|because|since|as", re.IGNORECASE)
"""What follows a "No" that is an answer, where nothing separates them: "No it isn't"."""


@dataclass(frozen=True)
class LastOption(Finder):
    """One of the allowed options, as a whole word, in upper or lower case.

    The answer that a text gives is the first option after the last "answer is", "\\boxed{" or "####" (or before "is the
    answer") that has one; or else the last "(B)", or else the last option that stands alone. "not D" and "D is wrong"
    deny an option; of "A or B" neither is the answer, and a list of all options gives none.

    "noon" and "no-one" don't hold "no", and in "no doubt" it is a word of the sentence, as letters are in "A bank" and
    "Vitamin C". Of options of one letter, a small one counts only with a bracket after it ("(b)", "b)") or where the
    answer was announced: "a" is a word. The canonical form is the option as it is given here.

    Raises:
      InputError: fewer than two options, an empty one, or two that differ in case only.
    """

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        names = tuple(self.options)
        require(len(names) > 1, "options", names, "must be at least two")
        require(all(name and name == name.strip() for name in names), "options", names, "must be words")
        require(len({name.casefold() for name in names}) == len(names), "options", names, "must differ")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        ways = []
        for name in sorted(self.options, key=len, reverse=True):  # of two that begin alike, the longer
            if len(name) == 1 and name.isalpha():
                small = rf"{name.lower()}(?=[)\].,;:!}}{_QUOTES}]|\s*(?:\n|$))"
                ways.append(rf"{name.upper()}|{small}")
            else:
                ways.append(rf"(?i:{re.escape(name)})")
        # An apostrophe or hyphen between letters makes one word: "I'd", "no-one".
        return re.compile(rf"(?<!\w)(?<!\w['’-])(?:{'|'.join(ways)})(?!\w|['’-]\w)")

    def spans(self, text: str) -> list[Span]:
        """Every option in `text` that is no word of the sentence."""
        return [(place.start, place.end) for place in self._places(text) if place.alone]

    def find(self, text: str) -> Span | None:
        """The answer that a text gives, see above."""
        places = self._places(text)
        possible = [place for place in _without_lists(places, text, self.options) if not place.denied]
        announced = marks(text, options=True)
        for mark in announced:
            if mark.denied:
                possible = [place for place in possible if not mark.start <= place.start < mark.end]
        for mark in reversed(announced):
            here = [place for place in possible if mark.start <= place.start and place.end <= mark.end]
            begun = [place for place in here if _is_begun(text, mark.start, place)]
            if mark.kind == "before":
                chosen = [place for place in here if place.alone][-1:]
            else:
                chosen = begun[:1] or [place for place in here if place.alone][:1]
            if chosen:
                return chosen[0].start, chosen[0].end
        counted = [place for place in possible if place.alone]
        counted = [place for place in counted if place.plain] or counted
        return (counted[-1].start, counted[-1].end) if counted else None

    def find_first(self, text: str) -> Span | None:
        """The answer that follows "So the answer is": the first option that isn't denied."""
        start = len(text) - len(text.lstrip())
        for place in _without_lists(self._places(text), text, self.options):
            if not place.denied and (place.alone or _is_begun(text, start, place)):
                return place.start, place.end
        return None

    def spell(self, answer: str) -> str:
        """The option that it is."""
        same = [name for name in self.options if name.casefold() == answer.casefold()]
        # The pattern takes ı and i for one letter too, as İ and I.
        return (same or [name for name in self.options if re.fullmatch(re.escape(name), answer, re.IGNORECASE)])[0]

    def _places(self, text: str) -> list[_Place]:
        places = []
        for match in self._pattern.finditer(text):
            start, end = match.span()
            before, after = text[max(0, start - 80) : start], text[end : end + 120]
            denied = _DENIED_BEFORE.search(before) is not None
            denied |= match[0].casefold() not in ("yes", "no") and _DENIED_AFTER.match(after) is not None
            plain, alone = False, True
            if len(match[0]) == 1 and match[0].isalpha():
                plain = after[:1] in (")", "]")
                capital = match[0].isupper() and _letter_stands_alone(match[0], before, after)
                alone = plain or capital or (match[0].islower() and _NAMES_OPTION.search(before) is not None)
            elif match[0].casefold() in ("yes", "no"):
                plain = (_BEGINS.search(before) or _CONCLUDES.search(before)) is not None
                alone = match[0].casefold() == "yes" or _no_stands_alone(before, after)
            places.append(_Place(start, end, self.spell(match[0]), plain, alone, denied))
        return places


def _letter_stands_alone(letter: str, before: str, after: str) -> bool:
    """Whether a capital letter is no word of the sentence and no part of a name."""
    word = _WORD_AFTER.match(after)
    if _LEADS.search(before) is None:
        return False
    if word is None:  # an initial begins a name: "J. R. R. Tolkien"
        return not re.match(r"\.[ ]?[A-Z]\.", after) and not re.search(r"(?<![^\W])[A-Z]\.\s?$", before)
    if letter not in "AIO" or _NAMES_OPTION.search(before):
        return True
    begins = _BEGINS.search(before) is not None
    if letter == "A" and not begins:
        return True
    return _AFTER_LETTER.fullmatch(word[1].replace("’", "'")) is not None


def _no_stands_alone(before: str, after: str) -> bool:
    word = _WORD_AFTER.match(after)
    if word is None:
        return True
    return _BEGINS.search(before) is not None and _AFTER_NO.fullmatch(re.split("['’]", word[1])[0]) is not None


def _is_begun(text: str, start: int, place: _Place) -> bool:
    """Whether what is announced begins with the option, so that a small letter is one: "The answer is b."."""
    if not place.alone and text[place.start].isupper():
        return False
    between = re.sub(r"\\(?:text|mathrm|mathbf|textbf|boxed)\b", "", text[start : place.start])
    return re.fullmatch(rf"[\s({{\[{_QUOTES}:]*(?:(?:option|choice|letter)\s+)?[({{\[{_QUOTES}]*", between) is not None


def _without_lists(places: list[_Place], text: str, options: tuple[str, ...]) -> list[_Place]:
    """Without options that only are mentioned together: "A or B", and a list of all of them in their order."""
    mentioned: set[int] = set()
    possible = [index for index, place in enumerate(places) if not place.denied]
    for one, other in itertools.pairwise(possible):
        between = text[places[one].end : places[other].start]
        comma = "|," if len(places[one].option) == len(places[other].option) == 1 else ""
        joining = rf"[)\]{_QUOTES}]*,?\s*(?:\bor\b|\band\b|/|&{comma})\s*[(\[{_QUOTES}]*"
        joined = re.fullmatch(joining, between) is not None
        if joined and places[one].option != places[other].option:
            mentioned |= {one, other}
    listed: list[int] = []
    for index in [*(index for index in possible if places[index].alone), None]:
        expected = options[len(listed)] if len(listed) < len(options) else None
        concluded = index is not None and _CONCLUDES.search(
            text[max(0, places[index].start - 20) : places[index].start]
        )
        if index is not None and places[index].option == expected and not (listed and concluded):
            listed.append(index)
            continue
        if len(listed) >= 3:
            mentioned |= set(listed)
        listed = [index] if index is not None and places[index].option == options[0] else []
    return [place for index, place in enumerate(places) if index not in mentioned]
