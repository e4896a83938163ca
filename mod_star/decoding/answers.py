"""Where in a text its answer stands, and one spelling for all ways to write the same answer.

A finder knows one kind of answer: `LastNumber`, `LastOption` (yes or no, even or odd, letters) or `Phrase` (any words,
for a text that was continued with "So the answer is"). All are pure text: no model, no tokens.

    LastNumber().find("That makes $1,234.50.")        (12, 20), the last number
    LastNumber().canonical("$1,234.50 a year")        "1234.5", for gold answers too
    tokens_of_span(completion.starts, (12, 20), 23)   the tokens whose text overlaps it
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mod_star.errors import InputError, require

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Finder(ABC):
    """Finds answers of one kind, and spells them in one way."""

    @abstractmethod
    def spans(self, text: str) -> list[Span]:
        """Every answer in `text`, in order; they don't overlap."""

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
        """The last place in `text` where the canonical `answer` stands."""
        same = [(start, end) for start, end in self.spans(text) if self.spell(text[start:end]) == answer]
        return same[-1] if same else None

    def canonical(self, text: str) -> str | None:
        """The answer that a text gives, in canonical form; None if there is none."""
        span = self.find(text)
        return None if span is None else self.spell(text[span[0] : span[1]])


# An unsigned decimal in English notation, with an exponent. A point without digits after it is a full stop; a point
# before all digits counts unless something stands right before it ("Rs.500", "1.5.2").
_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_DECIMAL = rf"(?:(?:{_GROUPED})(?:\.\d+)?|(?<![\w.])\.\d+)"
_FRACTION = r"(?:\d+ )?\d+/\d+(?![\d/]|\.\d)"
# A hyphen is a sign unless it binds what stands before it: "3-2" is 3 and 2, "covid-19" is 19. Digits that go on a word
# ("H2O") are no number.
_SIGN = r"(?<![\w)\]%])[-+−–]"
_NUMBER = re.compile(
    rf"(?:{_SIGN}[$€£¥]?)?(?<![A-Za-z_\d])(?:(?<![\d/])(?P<fraction>{_FRACTION})|{_DECIMAL}(?:[eE][-+−]?\d+(?!\w))?)"
)
_LARGEST_EXPONENT = 40  # beyond it a number stays in powers of ten, which keeps "1e999999999" short


@dataclass(frozen=True)
class LastNumber(Finder):
    """The last number: integers, decimals, fractions.

    Notation is English: commas between groups of three digits are left out ("1,000" is 1000), other commas separate
    ("2,3" is 2 and 3). A sign counts if nothing is bound to it on its left ("3-2" is 3 and 2); − and – are minus signs.
    Currency signs, % and units don't count: "$5", "5%", "5 apples" and "5am" are all 5. a/b with nothing else attached
    is a fraction, after a whole number and a blank a mixed one; a date as 1/2/2024 is three numbers. Digits inside a
    word ("H2O") are none. Digits of any script count.

    Two ways to write one number have one canonical form: decimal digits without trailing zeros or needless sign
    (".50" is 0.5, "1e3" is 1000, "3/4" is 0.75), a fraction in lowest terms where decimals don't end ("2/6" is 1/3).
    """

    def spans(self, text: str) -> list[Span]:
        """Every number in `text`, its sign included, currency and units not."""
        found = []
        place = 0
        while match := _NUMBER.search(text, place):
            start, end = match.span()
            if match["fraction"]:
                start, end = _fraction_span(text, match)
            found.append((start, end))
            place = end
        return found

    def spell(self, found: str) -> str:
        """Canonical form of one number."""
        negative = found[0] in "-−–"
        digits = "".join(str(int(c)) if c.isdecimal() else c for c in found.lstrip("-+−–$€£¥"))
        if "/" in digits:
            whole, _, fraction = digits.rpartition(" ")
            top, bottom = (int(part) for part in fraction.split("/"))
            plain = _spell_fraction(top + int(whole or 0) * bottom, bottom)
        else:
            mantissa, _, exponent = digits.replace("−", "-").lower().partition("e")
            plain = _spell_decimal(mantissa.replace(",", ""), exponent or "0")
        return f"-{plain}" if negative and plain != "0" else plain


def _fraction_span(text: str, match: re.Match[str]) -> Span:
    """The span of what looks like a fraction: all of it, or only its first number where it can't be one."""
    start, end = match.span()
    whole, _, fraction = match["fraction"].rpartition(" ")
    top, bottom = fraction.split("/")
    if max(len(top), len(bottom), len(whole)) > 100 or int(bottom) == 0:
        return start, start + len(text[start:end].split("/")[0].split(" ")[0])
    if whole and int(top) >= int(bottom):  # "6 12/4": two numbers, the fraction will be found next
        return start, start + len(text[start:end].split(" ")[0])
    return start, end


def _spell_fraction(top: int, bottom: int) -> str:
    """In decimals if they end, else in lowest terms."""
    top, bottom = top // (shared := math.gcd(top, bottom)), bottom // shared
    twos = (bottom & -bottom).bit_length() - 1
    fives, rest = 0, bottom >> twos
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    if rest > 1:
        return f"{top}/{bottom}"
    places = max(twos, fives)
    digits = str(top * 10**places // bottom).rjust(places + 1, "0")
    return _spell_decimal(f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}", "0")


def _spell_decimal(mantissa: str, exponent: str) -> str:
    """ASCII digits with at most one point, times ten to `exponent`. Text only: a number may have any length."""
    whole, _, rest = mantissa.partition(".")
    digits = (whole + rest).lstrip("0")
    if not digits:
        return "0"
    point = len(whole) - (len(whole + rest) - len(digits))  # the value is 0.digits times ten to `point`
    digits = digits.rstrip("0")
    if len(exponent) > 5 or abs(int(exponent)) > _LARGEST_EXPONENT:
        shift = point - 1 + int(exponent[:1000])
        return f"{digits[0]}.{digits[1:]}".rstrip(".") + f"e{shift}"
    point += int(exponent)
    if point <= 0:
        return f"0.{'0' * -point}{digits}"
    return f"{digits[:point]:0<{point}}" + (f".{digits[point:]}" if len(digits) > point else "")


@dataclass(frozen=True)
class LastOption(Finder):
    """The last of the allowed options, as a whole word, in upper or lower case.

    "noon" and "no-one" don't hold "no". Of options of one letter, a small one counts only with a bracket behind it
    ("(b)", "b)"): "a" is a word. The canonical form is the option as it is given here.

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
                ways.append(rf"{name.upper()}|{name.lower()}(?=\))")
            else:
                ways.append(rf"(?i:{re.escape(name)})")
        # An apostrophe or hyphen between letters makes one word: "I'd", "no-one".
        return re.compile(rf"(?<!\w)(?<!\w['’-])(?:{'|'.join(ways)})(?!\w|['’-]\w)")

    def spans(self, text: str) -> list[Span]:
        """Every option in `text`."""
        return [match.span() for match in self._pattern.finditer(text)]

    def spell(self, found: str) -> str:
        """The option that it is."""
        same = [name for name in self.options if name.casefold() == found.casefold()]
        # The pattern takes ı and i for one letter too, as İ and I.
        return (same or [name for name in self.options if re.fullmatch(re.escape(name), found, re.IGNORECASE)])[0]


YES_NO = LastOption(("yes", "no"))
EVEN_ODD = LastOption(("even", "odd"))
LETTERS = LastOption(tuple("ABCDE"))


# Up to the end of a sentence, of a line or of the text; a title's full stop ("St. Louis", "Dr. No") or an initial's
# ("J. R. R. Tolkien", "U.S. Steel") ends no sentence.
_TITLES = ("St|Mt|Ft|Mr|Ms|Dr|Lt", "Mrs|Gen|Col|Rev|Gov|Sen|Sgt", "Prof|Capt", "[A-Z]")  # by length
_STOP = "".join(rf"(?<!\b(?:{titles})(?=\.))" for titles in _TITLES) + r"[.!?](?:\s|$)"
_SENTENCE = re.compile(rf"[^\n]*?(?={_STOP}|\n|$)")


@dataclass(frozen=True)
class Phrase(Finder):
    """Any words: what stands up to the end of the first sentence or line, for a text continued as "So the answer is".

    The full stop of an initial or of a title such as "St." or "Dr." ends no sentence. The canonical form is in lower
    case with single blanks, without quotes, brackets and punctuation around it.
    """

    def spans(self, text: str) -> list[Span]:
        """The first sentence, without what surrounds it; at most one."""
        begin = len(text) - len(text.lstrip())
        sentence = _SENTENCE.match(text, begin)
        assert sentence is not None
        start, end = sentence.span()
        while start < end and not (text[start].isalnum() or text[start] in "-−$€£"):
            start += 1
        while end > start and not (text[end - 1].isalnum() or text[end - 1] in "%"):
            end -= 1
        return [(start, end)] if end > start else []

    def spell(self, found: str) -> str:
        """In lower case, with single blanks."""
        return " ".join(found.casefold().split())

    def align(self, text: str, answer: str) -> Span | None:
        """The last place where these words stand, in upper or lower case and with any white space between them."""
        words = r"\s+".join(re.escape(word) for word in answer.split())
        places = [place for place, character in enumerate(text) for _ in character.casefold()]  # ß becomes ss
        matches = list(re.finditer(rf"(?<!\w)(?:{words})(?!\w)", text.casefold(), re.IGNORECASE))
        return (places[matches[-1].start()], places[matches[-1].end() - 1] + 1) if matches else None


KINDS: dict[str, Finder] = {
    "number": LastNumber(),
    "yes-no": YES_NO,
    "even-odd": EVEN_ODD,
    "letters": LETTERS,
    "text": Phrase(),
}


def make_finder(kind: str, option: str = "answer") -> Finder:
    """The finder that `kind` names: one of `KINDS`, or options with commas between them ("red,green,blue").

    Raises:
      InputError: it is neither; the message calls it `option`.
    """
    if kind in KINDS:
        return KINDS[kind]
    if "," not in kind:
        raise InputError(f"{option} = {kind!r}: must be {', '.join(KINDS)}, or options with commas between them")
    try:
        return LastOption(tuple(name.strip() for name in kind.split(",")))
    except InputError as error:
        raise InputError(f"{option} = {kind!r}: {error}") from None


def tokens_of_span(starts: Sequence[int], span: Span, length: int) -> list[int]:
    """The tokens whose text overlaps a span.

    A token that shows nothing of its own, because its bytes are only part of a character, belongs to that character.

    Args:
      starts: index in the text at which each token begins, never falling: `Completion.starts`.
      span: characters of the text, at least one.
      length: of the text.

    Returns:
      Indices into `starts`, in order.
    """
    start, end = span
    chosen = []
    following = length
    for index in reversed(range(len(starts))):
        if index + 1 < len(starts) and starts[index + 1] > starts[index]:
            following = starts[index + 1]
        if starts[index] < end and following > start:
            chosen.append(index)
    return chosen[::-1]
