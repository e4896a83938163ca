"""Where in a text its answer stands, and one spelling for all ways to write the same answer.

A finder knows one kind of answer: `LastNumber`, `LastOption` (yes or no, even or odd, letters), `Phrase` (any words,
for a text that was continued with "So the answer is"), or `HarnessNumber`, numbers by the rules of
lm-evaluation-harness. All are pure text: no model, no tokens. A kind of your own is a subclass of `Finder`, or a
function (text) -> (start, end) | None, which goes wherever a finder goes.

    LastNumber().find("That makes $1,234.50.")        (12, 20), the last number
    LastNumber().find("The answer is 10 (step 3).")   (14, 16), what the text calls its answer
    LastNumber().canonical("$1,234.50 a year")        "1234.5", for gold answers too
    tokens_of_span(completion.starts, (12, 20), 23)   the tokens whose text overlaps it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mod_star.decoding.answer_marks import Mark, marks
from mod_star.decoding.answer_options import LastOption
from mod_star.decoding.finder import Finder, FoundBy, Span, as_finder
from mod_star.decoding.written_numbers import Written, result_of, spell_number, within, written_numbers
from mod_star.errors import InputError
from mod_star.user_code import load_from_file

__all__ = [
    "EVEN_ODD", "KINDS", "LETTERS", "YES_NO", "Finder", "FoundBy", "HarnessNumber", "LastNumber", "LastOption",
    "Phrase", "Span", "as_finder", "make_finder", "tokens_of_span",
]  # fmt: skip


@dataclass(frozen=True)
class LastNumber(Finder):
    """The number that a text gives as its answer: integers, decimals, fractions.

    It is the number after the last "answer is", "answer:", "\\boxed{" or "####" that has one, in the same sentence, and
    what it comes to ("2 * 3 = 6" is 6); or else the last number of the text. Steps ("step 3", "2." in a numbered list)
    don't count.

    Notation is English, and other notations where they leave no doubt: 1,000 = 1'000 = 1 000 (with a thin blank) =
    8{,}000's kind = 1,00,000's kind = 1.000,50's kind. A sign counts if nothing is bound to it on its left ("(4)-2" is
    4 and 2); − and – are minus signs. Currency signs, % and units don't count: "$5", "5%", "5 apples" and "5am" are all
    5; "5 million" is 5000000, 10^3 and 2.5 × 10^3 are powers. a/b with nothing else attached is a fraction, after a
    whole number and a blank a mixed one. Digits inside a word ("H2O") are none. Digits of any script count.

    A number that can't be read with certainty is never cut into parts: "1,2345", "12:30", "3-5", "1.5.2", "2,5", "√16"
    or an operation without a result. Where such a thing stands for the answer, there is none.

    Two ways to write one number have one canonical form: decimal digits without trailing zeros or needless sign
    (".50" is 0.5, "1e3" is 1000, "3/4" is 0.75), a fraction in lowest terms where decimals don't end ("2/6" is 1/3).
    """

    def spans(self, text: str) -> list[Span]:
        """Every number in `text` that can be read, its sign included, currency and units not."""
        return [(number.start, number.end) for number in written_numbers(text) if number.value is not None]

    def find(self, text: str) -> Span | None:
        """The answer that a text gives, see above."""
        numbers = written_numbers(text)
        for mark in reversed(marks(text, options=False)):
            number = None if mark.denied else _announced(text, numbers, mark)
            if number is not None:
                return _span(number)
        return _span(numbers[-1]) if numbers else None

    def find_first(self, text: str) -> Span | None:
        """The answer that follows "So the answer is": the first number, or what it comes to."""
        numbers = written_numbers(text)
        return _span(result_of(text, numbers, 0, len(text))) if numbers else None

    def spell(self, answer: str) -> str:
        """Canonical form of one number."""
        return spell_number(answer)


def _span(number: Written) -> Span | None:
    return None if number.value is None else (number.start, number.end)


_NO_WORDS = re.compile(
    r"(?:\\(?:boxed|text|mathrm|mathbf|textbf|d?frac)\b|\b(?:about|approximately|exactly|roughly|only|just|simply|now|then"
    r"|therefore|\w(?=\s*=)|USD|Rs)\b|[^\w]|_)*"
)
_AT_LAST = re.compile(r"(?:=|≈|\bwhich (?:is|equals|gives|makes)|\bequals|\bthat is,?)\W*$")


def _announced(text: str, numbers: list[Written], mark: Mark) -> Written | None:
    """The number that a mark announces; None: there is none after it."""
    here = list(within(numbers, mark.start, mark.end))
    if not here:
        return None
    if mark.kind == "boxed":
        last = max(text.rfind(sign, mark.start, mark.end) for sign in "=≈")
        here = [index for index in here if numbers[index].start > last] or here
        only = numbers[here[0]]
        return only if len(here) == 1 else Written(only.start, only.end, None)
    direct = _NO_WORDS.fullmatch(text, mark.start, numbers[here[0]].start) is not None
    if mark.kind == "hashes" and not direct:
        return None  # a heading
    first = here[0]
    if not direct:
        results = [index for index in here if _AT_LAST.search(text[mark.start : numbers[index].start])]
        first = (results or here)[-1 if results else 0]
    return result_of(text, numbers, first, mark.end)


@dataclass(frozen=True)
class HarnessNumber(Finder):
    """Numbers of GSM8K by the published rules of lm-evaluation-harness (`gsm8k.yaml`), to compare figures with its own.

    strict takes the first "#### 18", flexible the last thing that looks like a number; the answer is right if it is the
    gold one letter by letter, after commas, dollar signs and a full stop at the end are left out: "18.00" is not "18".
    """

    rule: Literal["strict", "flexible"]

    def spans(self, text: str) -> list[Span]:
        """Every match of the rule's regular expression."""
        if self.rule == "strict":
            return [match.span(1) for match in _STRICT.finditer(text)]
        return [match.span() for match in _FLEXIBLE.finditer(text)]

    def find(self, text: str) -> Span | None:
        """The first match of the strict rule, the last of the flexible one."""
        return self.find_first(text) if self.rule == "strict" else super().find(text)

    def spell(self, answer: str) -> str:
        """As the harness compares it."""
        return re.sub(r"\.$", "", answer.replace(",", "").replace("$", "")).lower()


_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")

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

    needs_continuation: ClassVar[bool] = True

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

    def spell(self, answer: str) -> str:
        """In lower case, with single blanks."""
        return " ".join(answer.casefold().split())

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
    "gsm8k-strict": HarnessNumber("strict"),
    "gsm8k-flexible": HarnessNumber("flexible"),
}


def make_finder(kind: str, option: str = "answer") -> Finder:
    """The finder that `kind` names.

    Args:
      kind: one of `KINDS`, options with commas between them ("red,green,blue"), or FILE.py:NAME of a `Finder` or of a
        function (text) -> (start, end) | None.
      option: what the user calls it, for error messages.

    Raises:
      InputError: it is none of these, or the file fails.
    """
    if kind in KINDS:
        return KINDS[kind]
    if ".py:" in kind:
        finder = load_from_file(kind, option, "a Finder or a function from a text to the characters of its answer")
        if not isinstance(finder, Finder) and (not callable(finder) or isinstance(finder, type)):
            allowed = "must be a Finder, or a function from a text to the characters of its answer"
            raise InputError(f"{option} = {kind!r}: {allowed}, not {type(finder).__name__}")
        return as_finder(finder)
    if "," not in kind:
        allowed = f"{', '.join(KINDS)}, options with commas between them, or FILE.py:NAME"
        raise InputError(f"{option} = {kind!r}: must be {allowed}")
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
