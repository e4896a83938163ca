"""Where answers stand in nasty texts, how they are spelt, and which tokens they are."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mod_star.decoding.answers import (
    EVEN_ODD,
    LETTERS,
    YES_NO,
    Finder,
    LastNumber,
    LastOption,
    Phrase,
    make_finder,
    tokens_of_span,
)
from mod_star.errors import InputError

NUMBER = LastNumber()


def found(finder: Finder, text: str) -> str | None:
    span = finder.find(text)
    return None if span is None else text[span[0] : span[1]]


@pytest.mark.parametrize(
    ("text", "span", "canonical"),
    [
        ("It costs $1,234.50.", "1,234.50", "1234.5"),
        ("12.", "12", "12"),
        ("so .5 of it", ".5", "0.5"),
        ("1,000,000 people", "1,000,000", "1000000"),
        ("1,234,", "1,234", "1234"),
        ("18.00", "18.00", "18"),
        ("007", "007", "7"),
        ("-3", "-3", "-3"),
        ("it is −3 °C", "−3", "-3"),
        ("a loss of -$1,000.00", "-$1,000.00", "-1000"),
        ("+5", "+5", "5"),
        ("-0.00", "-0.00", "0"),
        ("3-2", None, None),
        ("pages 3–5", None, None),
        ("(4)-2", "2", "2"),
        ("20-$3", None, None),
        ("5 - 3 = 2", "2", "2"),
        ("covid-19", "19", "19"),
        ("5%", "5", "5"),
        ("10am", "10", "10"),
        ("5kg of it", "5", "5"),
        ("the 3rd", "3", "3"),
        ("2,3", None, None),
        ("1,2345", None, None),
        ("1e5", "1e5", "100000"),
        ("2.5e-3", "2.5e-3", "0.0025"),
        ("1e999999999", "1e999999999", "1e999999999"),
        ("3e", "3", "3"),
        ("3/4", "3/4", "0.75"),
        ("2/6", "2/6", "1/3"),
        ("-10/2", "-10/2", "-5"),
        ("2 1/2 hours", "2 1/2", "2.5"),
        ("step 6 12/4", "12/4", "3"),
        ("3/0", None, None),
        ("on 1/2/2024", None, None),
        ("Rs.500", "500", "500"),
        ("version 1.5.2", None, None),
        ("3.14.", "3.14", "3.14"),
        ("First 7, then 8. No, 9! (not ten)", "9", "9"),
        ("3 liters of H2O and x22", "3", "3"),
        ("答案是5。", "5", "5"),
        ("１，٣٤", None, None),
        ("١٬٢٣٤", "١٬٢٣٤", "1234"),
        ("９.５", "９.５", "9.5"),
        ("x²", None, None),
        ("none at all, no.", None, None),
        ("", None, None),
        ("$ . , - / %", None, None),
    ],
)
def test_the_last_number(text: str, span: str | None, canonical: str | None) -> None:
    assert found(NUMBER, text) == span
    assert NUMBER.canonical(text) == canonical


def test_numbers_are_spelt_by_their_value() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        digits = "".join(rng.choice(list("0123456789"), rng.integers(1, 9)))
        point = int(rng.integers(0, len(digits) + 1))
        exponent = f"e{rng.integers(-12, 13)}" if rng.random() < 0.5 else ""
        fraction = "." + digits[point:] if point < len(digits) else ""
        text = rng.choice(["", "-"]) + digits[:point] + fraction + exponent
        canonical = NUMBER.canonical(text)
        assert canonical is not None and Fraction(canonical) == Fraction(text), text
        assert NUMBER.canonical(canonical) == canonical, "spelling is idempotent"
        assert "e" not in canonical and canonical.startswith("-") == (Fraction(text) < 0)
        assert "." not in canonical or canonical[-1] not in ".0"
    for top in range(1, 60):
        for bottom in range(1, 60):
            canonical = NUMBER.canonical(f"{top}/{bottom}")
            assert canonical is not None and Fraction(canonical) == Fraction(top, bottom)
            assert canonical == NUMBER.canonical(f"{3 * top}/{3 * bottom}")


def test_very_long_numbers_are_numbers() -> None:
    assert NUMBER.canonical("9" * 10_000) == "9" * 10_000, "Python's own conversion would refuse it"
    assert NUMBER.canonical("1e" + "9" * 10_000) is not None
    assert NUMBER.canonical("9" * 10_000 + "/3") is None, "too long for a fraction"
    assert NUMBER.canonical("1," * 10_000 + "1") is None


@pytest.mark.parametrize(
    ("finder", "text", "answer"),
    [
        (YES_NO, "Yes", "yes"),
        (YES_NO, "No, wait: YES!", "yes"),
        (YES_NO, "yes. It can't be no.", "yes"),
        (YES_NO, "Yesterday at noon, nobody knows", None),
        (YES_NO, "no-one, yes-man", None),
        (YES_NO, "'no'", "no"),
        (YES_NO, "**Yes**", "yes"),
        (EVEN_ODD, "It is odd, oddly; evenly", "odd"),
        (EVEN_ODD, "eleven", None),
        (LETTERS, "(A)", "A"),
        (LETTERS, "A.", "A"),
        (LETTERS, "The answer is (b) a bird", "B"),
        (LETTERS, "c) is it", "C"),
        (LETTERS, "I'd say a cat has e", None),
        (LETTERS, "B, not the AC or the DEA", "B"),
        (LETTERS, "F", None),
        (LastOption(("red", "red wine", "white")), "Red Wine.", "red wine"),
        (LastOption(("red", "red wine", "white")), "wine red", "red"),
        (LastOption(("C++", "C")), "not C but c++ it is", "C++"),
        (LastOption(("evet", "hayır")), "Cevap: HAYIR", "hayır"),
        (LastOption(("hayır", "hayir")), "hayir", "hayir"),
        (LastOption(("Straße", "Weg")), "Die STRASSE, die straße", "Straße"),
    ],
)
def test_the_last_option(finder: Finder, text: str, answer: str | None) -> None:
    assert finder.canonical(text) == answer


@pytest.mark.parametrize(
    ("text", "phrase", "canonical"),
    [
        (" 12 apples. Q: 5", "12 apples", "12 apples"),
        (" 3.5 miles.", "3.5 miles", "3.5 miles"),
        (' "New  York"!\nAnd', "New  York", "new york"),
        (" -3", "-3", "-3"),
        (" 50%.", "50%", "50%"),
        ("\n\nParis\nLondon", "Paris", "paris"),
        (" St. Louis. Not St. Paul.", "St. Louis", "st. louis"),
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien", "j. r. r. tolkien"),
        (" the U.S. Navy.\n", "the U.S. Navy", "the u.s. navy"),
        (" Prof. Moriarty!", "Prof. Moriarty", "prof. moriarty"),
        (" Yes. It is.", "Yes", "yes"),
        (" in Brest. There", "in Brest", "in brest"),
        (" by plan B? No", "by plan B", "by plan b"),
        (" ...", None, None),
        ("", None, None),
    ],
)
def test_a_phrase_ends_with_the_sentence(text: str, phrase: str | None, canonical: str | None) -> None:
    assert found(Phrase(), text) == phrase
    assert Phrase().canonical(text) == canonical


def test_an_answer_is_aligned_to_its_last_place() -> None:
    text = "1,000 and 5: 1000.0 or 10001"
    assert NUMBER.align(text, "1000") == (13, 19), "by its value, not as part of another"
    assert NUMBER.align(text, "7") is None
    text = "The answer is 10. I have counted 10 twice, and 9 once."
    assert NUMBER.align(text, "10") == (14, 16), "where the text gives it, whatever follows"
    assert NUMBER.align(text, "9") == (47, 48)
    assert YES_NO.align("Yes, no, yes? no", "yes") == (9, 12)
    text = "New\nYork, new york, new yorkers"
    assert Phrase().align(text, "new york") == (10, 18)
    assert Phrase().align(text, "york?") is None
    text = "Es ist die Lange Straße, STRASSE 5."
    assert Phrase().align(text, Phrase().spell("Straße")) == (25, 32)
    assert Phrase().align(text[:24], Phrase().spell("lange  Straße")) == (11, 23)
    assert Phrase().align("HAYIR, hayır", "hayır") == (7, 12)
    assert NUMBER.find_first("4 or 5") == (0, 1)
    assert NUMBER.find_first("four") is None


def test_tokens_of_a_span() -> None:
    # "is", " 1", "2", ".", and an é of two tokens: the first of them has nothing to show yet.
    starts, text = [0, 2, 4, 5, 6, 6], "is 12.é"
    assert tokens_of_span(starts, (3, 5), len(text)) == [1, 2]
    assert tokens_of_span(starts, (4, 5), len(text)) == [2]
    assert tokens_of_span(starts, (0, 7), len(text)) == [0, 1, 2, 3, 4, 5]
    assert tokens_of_span(starts, (6, 7), len(text)) == [4, 5]
    assert tokens_of_span(starts, (5, 6), len(text)) == [3]
    # A token cut by a stop string begins beyond the text's end.
    assert tokens_of_span([0, 1, 9], (0, 3), 3) == [0, 1]


def test_kinds_of_answers() -> None:
    assert make_finder("number") == LastNumber()
    assert make_finder("letters").canonical("(E)") == "E"
    assert make_finder("red, green") == LastOption(("red", "green"))
    for kind, message in (
        ("colour", "--answer = 'colour': must be number, yes-no, even-odd, letters, text, gsm8k-strict, gsm8k-flex"),
        ("red,", "--answer = 'red,': options = ('red', ''): must be words"),
        ("red,Red", "--answer = 'red,Red': options = ('red', 'Red'): must differ"),
    ):
        with pytest.raises(InputError) as raised:
            make_finder(kind, "--answer")
        assert str(raised.value).startswith(message)
    with pytest.raises(InputError, match="must be at least two"):
        LastOption(("red",))
