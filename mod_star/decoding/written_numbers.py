"""Every number that is written in a text, and one spelling for all ways to write the same number.

    written_numbers("$1,234.50 or 1'000")    [Written(1, 9, "1234.5"), Written(13, 18, "1000")]
    written_numbers("at 12:30, 1,2345")      [Written(3, 8, None), Written(10, 16, None)]

Digits that something binds to each other are one number or none: they are never cut into parts. Where their value is
not certain (a time, a range, a version, "1,2345", "√16"), it is None.
"""

from __future__ import annotations

import bisect
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """A number in a text, at characters [start, end)."""

    start: int
    end: int
    value: str | None
    """Its canonical form; None: digits that can't be read with certainty."""


_THIN = "\u00a0\u2000-\u200a\u202f\u205f"  # blanks that don't break a line, or that are narrow
# What may stand between two numbers without binding them. Any other single character between digits makes them one.
_LOOSE = r"\w\s=+*×÷()\[\]{}<>;|&\"“”„«»!?#@≈≠≤≥→←⇒、。\\$€£¥₹%°^"
_DASH = "-−‐‑–—"
_CURRENCY = "$€£¥₹"
_BOUND = (
    r"(?:\{[,.'’]\}|,\\!|\\[,!;:]"  # LaTeX: 8{,}000, 8,\!000, 8\,000
    rf"|%?[{_DASH}]{{1,3}}\\?[{_CURRENCY}]?|\.\.\.?"  # ranges
    r"|(?<!\d{4})[ ](?=\d{3}(?!\d))"  # perhaps 1 000, perhaps two numbers
    rf"|[^{_LOOSE}]|[{_THIN}_])"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPER = "[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"
_VULGAR = "[¼½¾⅐-⅞]"
_POWER = rf"(?:(?:\^|\*\*)(?:\{{[-−+]?\d{{1,9}}\}}|[-−+]?\d{{1,9}}(?!\d))|{_SUPER})"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CODES = "USD|EUR|GBP|INR|CAD|AUD|Rs|RM"
_CURRENCY_CODES = "".join(rf"|(?<=\b{code})" for code in _CODES.split("|"))
# A hyphen is a sign unless it binds what stands before it: "(4)-2" is 4 and 2, "covid-19" is 19.
_SIGN = rf"(?<![\w)\]%}}])[-+−–‑]\\?[{_CURRENCY}]?|(?i:\bnegative )\\?[{_CURRENCY}]?|(?i:(?:^|(?<=\bis ))minus )"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?"
    rf"(?:(?P<letters>(?<![^\W\d_])(?<!\\)(?!(?:{_CODES})\d)[A-Za-z][A-Za-z_]*)(?=\d)"
    rf"|(?<![A-Za-z\d])(?<![^\W_]_){_CURRENCY_CODES})"
    r"(?:"
    r"(?P<whole>\d{1,99}[ ]?)?\\[cdt]?frac\s?(?:\{\s*(?P<top>[-−]?\d{1,99})\s*\}|(?P<top_digit>\d))"
    r"\s?(?:\{\s*(?P<bottom>\d{1,99})\s*\}|(?P<bottom_digit>\d)(?!\d|[.,]\d))"  # \frac12 is \frac{1}{2}
    rf"|(?P<mixed>\d{{1,99}})[ ]?(?P<part>{_VULGAR})|(?P<vulgar>{_VULGAR})"
    rf"|(?P<digits>(?:\d+|(?<![\w.])\.\d+)(?:{_BOUND}\d+)*)"
    r"(?:(?P<exponent>[eE][-+−]?\d+(?!\w))"
    rf"|[ ]?(?:×|[xX]|\*|·|⋅|\\times|\\cdot)[ ]?10(?P<ten>{_POWER})|(?P<power>{_POWER}))?"
    rf"(?P<attached>[A-Za-z]+\d\w*)?(?:[ ](?P<scale>{'|'.join(_SCALES)})\b)?"
    r")"
    r"|(?P<odd>\\[cdt]?frac\s?(?:\d(?:[.,]?\d){2,}|(?:\{[^{}]*\}|\d)\s?(?:\{[^{}]*\}|\d+)))"
)
_MIXED = re.compile(r"(\d{1,99})[ ](\d{1,99})[/⁄](\d{1,99})(?![\d/]|\.\d)")
_ROOT_BEFORE = re.compile(r"(?:√|\\sqrt(?:\[[^\]]*\])?\s?\{?)\s*$")
_UNKNOWN_AFTER = re.compile(
    r"\s?(?:π|\\pi|√|\\sqrt|\\[cdt]?frac|[万萬億亿千百十])|\^(?!\{?\\circ)|\*\*[a-z]\b|[xyzn](?:\^|[²³])"
)
_EXPONENT_BEFORE = re.compile(r"([\w)\]}])(?:\^|\*\*|_)\{?[-−+]?$")
_UNIT_BEFORE = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s?\{[^{}\d]*\}\^\{?$")  # "\text{ cm}^2"
_LABEL_BEFORE = re.compile(r"\b(?:step|question|problem|example|equation|figure|table)s?\s+#?$", re.IGNORECASE)
_MARKER = re.compile(r"^[ \t>*_#-]*(\d{1,3})[.)](?=[*_]*[ \t]+\S)", re.MULTILINE)
_LARGEST_EXPONENT = 40  # beyond it a number stays in powers of ten, which keeps "1e999999999" short


def written_numbers(text: str) -> list[Written]:
    """Every number in `text`, in order; they don't overlap.

    Left out: digits in words ("H2O"), exponents of something else ("cm^2"), numbers of steps ("step 3", the marks of a
    list that is numbered 1., 2., ...).
    """
    markers = _list_markers(text)
    numbers = []
    place = 0
    while match := _NUMBER.search(text, place):
        written = _read_match(text, match)
        place = match.end() if written is None else max(written.end, match.start() + 1)
        if written is not None and not _is_label(text, match, markers):
            numbers.append(written)
    return numbers


def spell_number(number: str) -> str:
    """Canonical form of the text of one number that has a value: decimal digits, or a fraction in lowest terms.

    Raises:
      ValueError: it has none.
    """
    values = [written.value for written in written_numbers(number)]
    if len(values) != 1 or values[0] is None:
        raise ValueError(f"{number!r} is not one number")
    return values[0]


def _read_match(text: str, match: re.Match[str]) -> Written | None:
    """The number of a match; None: these digits are no number."""
    start, end = match.span()
    if match["odd"]:
        return Written(start, end, None)
    if match["letters"]:  # "H2O" is no number; what "x1,000" is, nobody knows
        joined = re.fullmatch(r"\d+", match["digits"] or "") is None
        return Written(start, end, None) if joined else None
    body = start + len(match["sign"] or "")
    if _UNIT_BEFORE.search(text[max(0, body - 60) : body]):
        return None
    if exponent := _EXPONENT_BEFORE.search(text[max(0, body - 6) : body]):
        return None if exponent[1].isalnum() else Written(start, end, None)
    mixed = _MIXED.match(text, body)
    if mixed and match["digits"] is not None:
        whole, top, bottom = (int(part) for part in mixed.groups())
        if bottom > 0 and top < bottom:
            value: str | None = _spell_fraction(top + whole * bottom, bottom)
            end = mixed.end()
        else:  # "6 12/4" is two numbers
            value, end = _spell_decimal(_ascii(mixed[1]), "0"), mixed.end(1)
    else:
        value = _value(match)
    if _ROOT_BEFORE.search(text[max(0, start - 40) : body]) or _UNKNOWN_AFTER.match(text, end):
        value = None
    negative = ((match["sign"] or "+")[0] in "-−–‑nNmM") != ((match["top"] or "+")[0] in "-−")
    if value is not None and negative and value != "0":
        value = f"-{value}"
    return Written(start, end, value)


def _value(match: re.Match[str]) -> str | None:
    """The value without sign."""
    if top_digits := match["top"] or match["top_digit"]:
        top, whole = int(top_digits.lstrip("-−")), int(match["whole"] or 0)
        bottom = int(match["bottom"] or match["bottom_digit"])
        certain = bottom > 0 and (not whole or top_digits.isdecimal())
        return _spell_fraction(top + whole * bottom, bottom) if certain else None
    if vulgar := match["part"] or match["vulgar"]:
        over, _, under = unicodedata.normalize("NFKC", vulgar).partition("⁄")
        return _spell_fraction(int(over) + int(match["mixed"] or 0) * int(under), int(under))
    value = None if match["attached"] else _read_digits(match["digits"])
    if value is None or "/" in value:
        return value if not (match["exponent"] or match["ten"] or match["power"]) else None
    if match["exponent"]:
        return _spell_decimal(value, _ascii(match["exponent"][1:]))
    if match["ten"]:
        return _spell_decimal(value, _power_of(match["ten"]))
    if match["power"]:
        return _raise(value, _power_of(match["power"]))
    if match["scale"]:
        return _spell_decimal(value, str(_SCALES[match["scale"]]))
    return value


_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_LAKHS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?")
_APART = re.compile(r"[1-9]\d{0,2}(?:'\d{3})+(?:\.\d+|,(?!\d{3}$)\d+)?")
_POINTS = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")


def _read_digits(digits: str) -> str | None:
    """The value of digits and what binds them; None where it isn't certain."""
    plain = re.sub(r"\\[,!;:]", "'", re.sub(r"\{([,.'’])\}|(,)\\!", lambda m: m[1] or m[2], _ascii(digits)))
    plain = re.sub(rf"[{_THIN}'’‘ʼ´`_٬]", "'", plain.replace("，", ",").replace("．", ".").replace("٫", "."))
    if " " in plain:  # two numbers, unless a group begins with 0
        if not re.search(r" 0\d\d", plain):
            return None
        plain = plain.replace(" ", "'")
    if parts := re.fullmatch(r"([^/⁄]{1,99})[/⁄]([^/⁄]{1,99})", plain):
        top, bottom = (_read_digits(part) for part in parts.groups())
        whole = top is not None and bottom is not None and top.isdecimal() and bottom.isdecimal() and bottom != "0"
        return _spell_fraction(int(top or ""), int(bottom or "")) if whole else None
    if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", plain):
        return _spell_decimal(plain, "0")
    if _THOUSANDS.fullmatch(plain) or _LAKHS.fullmatch(plain):
        return _spell_decimal(plain.replace(",", ""), "0")
    if _APART.fullmatch(plain):
        return _spell_decimal(plain.replace("'", "").replace(",", "."), "0")
    if _POINTS.fullmatch(plain):
        return _spell_decimal(plain.replace(".", "").replace(",", "."), "0")
    return None


def _ascii(digits: str) -> str:
    """Digits of any script as 0 to 9, − as -."""
    return "".join(str(int(c)) if c.isdecimal() else c for c in digits).replace("−", "-")


def _power_of(written: str) -> str:
    return _ascii(written.translate(_SUPERSCRIPTS)).strip("^*{}").lstrip("+")


def _raise(base: str, exponent: str) -> str | None:
    """`base` to the power; None unless it is a whole number of at most a few hundred digits."""
    if re.fullmatch(r"10*", base):
        return _spell_decimal("1", str(int(exponent) * (len(base) - 1)))
    if not base.isdecimal() or len(base) * abs(int(exponent)) > 300:
        return None
    value = int(base) ** abs(int(exponent))
    if int(exponent) >= 0:
        return _spell_decimal(str(value), "0")
    return _spell_fraction(1, value) if value else None


def _list_markers(text: str) -> set[int]:
    """Where the numbers of numbered lists stand: lines that begin with 1., 2., ... in this order."""
    lines = [(match.start(1), int(match[1])) for match in _MARKER.finditer(text)]
    marks: set[int] = set()
    open_lists: dict[int, int] = {}  # the number that comes next -> where the one before it stands
    for place, number in lines:
        if number in open_lists:
            marks |= {open_lists.pop(number), place}
            open_lists[number + 1] = place
        elif number == 1:
            open_lists[2] = place
    return marks


def _is_label(text: str, match: re.Match[str], markers: set[int]) -> bool:
    return match.start() in markers or bool(_LABEL_BEFORE.search(text[max(0, match.start() - 24) : match.start()]))


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


# From a number to the next: an operation, what it comes to, or something else.
_UNIT = r"(?:[ ]?[%°]|[ ]?\\?[%$]|(?:[ -](?!(?:plus|minus|times|divided|multiplied|equals|is|to)\b)[A-Za-z]+){0,2})"
_OPERATION = re.compile(
    rf"[)\]]*{_UNIT}[)\]]*\s*(?:[-+*/×÷·⋅xX−–—]|\\(?:times|div|cdot)|times|plus|minus|divided by|multiplied by"
    rf"|to|through)\s*[({_CURRENCY}\\]*"
)
_COMES_TO = re.compile(
    rf"[)\]]*{_UNIT}[)\]]*\s*(?:=|≈|\\approx|equals|is equal to|gives|makes)"
    rf"(?:\s|about|approximately|[({_CURRENCY}\\*<])*"
)


def result_of(text: str, numbers: list[Written], first: int, end: int) -> Written:
    """The number that an expression beginning with `numbers[first]` comes to: "2 * 3 = 6" to 6, "10 (5 + 5)" to 10.

    An operation that comes to nothing before `end`, and a range, have no value.
    """
    result, open_operation = numbers[first], False
    for number in numbers[first + 1 :]:
        between = text[result.end : number.start]
        if number.end > end:
            break
        if _COMES_TO.fullmatch(between):
            open_operation = False
        elif _OPERATION.fullmatch(between):
            open_operation = True
        else:
            break
        result = number
    return Written(result.start, result.end, None) if open_operation else result


def within(numbers: list[Written], start: int, end: int) -> Iterator[int]:
    """Indices of the numbers that lie in [start, end) of the text."""
    first = bisect.bisect_left([number.start for number in numbers], start)
    for index in range(first, len(numbers)):
        if numbers[index].end > end:
            return
        yield index
