"""What a text gives as its answer: announced ones, letters that are words, numbers in every notation, real answers."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from mod_star.decoding.answers import (
    EVEN_ODD,
    LETTERS,
    YES_NO,
    Finder,
    HarnessNumber,
    LastNumber,
    LastOption,
    make_finder,
)

NUMBER = LastNumber()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # LaTeX, and what separates thousands.
        (r"\boxed{8{,}000}", "8000"),
        (r"\boxed{\$1{,}234.50}", "1234.5"),
        (r"So $\boxed{\text{12 apples}}$, and not 9.", "12"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{-\dfrac{1}{3}} or so, 5", "-1/3"),
        (r"\boxed{2\frac{1}{2}}", "2.5"),
        (r"\boxed{\frac{x}{2}}", None),
        (r"\boxed{\frac12}", "0.5"),
        (r"\boxed{\frac 34}", "0.75"),
        (r"\boxed{\dfrac6{16}}", "0.375"),
        (r"\boxed{\frac{7}3}", "7/3"),
        (r"\boxed{2\frac12}", "2.5"),
        (r"\boxed{\frac{-3}{4}}", "-0.75"),
        (r"-\tfrac{−3}{4}", "0.75"),
        (r"2\frac{-1}{2}", None),
        (r"\cfrac{1}{2}", "0.5"),
        (r"5 or \frac123", None),
        (r"5 or \frac12.5", None),
        (r"5 or \frac40", None),
        (r"5 or \frac{1}{2.5}", None),
        (r"\boxed{72\text{ cm}^2}", "72"),
        (r"\boxed{72\,\mathrm{m}^{3}}", "72"),
        (r"\boxed{(3 + 4)^2}", None),
        (r"\boxed{2 \times 3 = 6}", "6"),
        (r"\boxed{x = 4}", "4"),
        (r"\boxed{3, 4}", None),
        (r"\boxed{1\,000}, 7", "1000"),
        (r"\boxed{12", "12"),
        (r"8,\!000", "8000"),
        ("1'000", "1000"),
        ("1’234’567.5", "1234567.5"),
        ("1\u2009000", "1000"),
        ("1\u202f234,56 €", "1234.56"),
        ("1\u00a0000", "1000"),
        ("1 000", "1000"),
        ("5 100", None),
        ("in 2020 100 people", "100"),
        ("1_000", "1000"),
        ("1\u200b000", None),
        ("1.000,50", "1000.5"),
        ("1.000.000", "1000000"),
        ("1.000", "1"),
        ("1,00,000", "100000"),
        ("12,34,567.5", "1234567.5"),
        ("1,000,00", None),
        ("0,500", None),
        ("12,50", None),
        ("١٬٠٠٠", "1000"),
        ("٣٫١٤", "3.14"),
        ("１，０００", "1000"),
        # Powers, fractions, units.
        ("10^3", "1000"),
        ("10^{-3}", "0.001"),
        ("10³", "1000"),
        ("2.5 × 10^3", "2500"),
        (r"2.5 \times 10^{3}", "2500"),
        ("2^10", "1024"),
        ("25 cm^2", "25"),
        ("25 m²", "25"),
        ("2x^2", None),
        (r"$90^\circ$", "90"),
        ("√16", None),
        (r"\sqrt{2}", None),
        ("2π", None),
        ("2½", "2.5"),
        ("1⁄2", "0.5"),
        ("50 %", "50"),
        ("5 million", "5000000"),
        ("5万", None),
        ("USD1,000", "1000"),
        ("x1,000", None),
        ("2h30", None),
        # What binds digits in another way.
        ("12:30", None),
        ("ratio 3:2", None),
        ("$20-$30", None),
        ("20%–30%", None),
        ("1...5", None),
        ("5'6\"", None),
        ("5-3=2", "2"),
        ("10 - 3 = 7", "7"),
        ("$-5", "-5"),
        ("negative 5", "-5"),
        # What the text calls its answer.
        ("The answer is 10 (see step 3)", "10"),
        ("The answer (see step 3) is 10. 7 are left.", "10"),
        ("The answer is 2 * 3 = 6 apples for 5 days.", "6"),
        ("The answer is 5 apples + 3 apples = 8 apples", "8"),
        ("The answer is 5 + 3", None),
        ("The answer is 20 to 30.", None),
        ("The answer is 10 since we had 5 - 3 = 2 left", "10"),
        ("The answer is the sum of 3 and 4, which is 7.", "7"),
        ("The answer is that he pays 18 dollars for 3 days", "18"),
        ("The answer is minus 5", "-5"),
        ("**Answer:** 42. See 3", "42"),
        ("**Final answer**: **42** (of 50)", "42"),
        ("Final Answer\n\n$42$\n\n7 things", "42"),
        ("Answer:\n\n42 of 50", "42"),
        ("Question 3's answer would be 12.5 km (3 miles)", "12.5"),
        ("The answer is 4. Wait, the answer is 5. Of 9.", "5"),
        ("The answer is unknown. He has 3.", "3"),
        ("The wrong answer is 5, so 7", "7"),
        ("#### 1,234\nSo 7 of them", "1234"),
        ("#### Step 2: the sum is 7", "7"),
        ("What is the answer? 5 or 6", "6"),
        # Lists and steps.
        ("1. Do it\n2. Do 7\n3. Then stop", "7"),
        ("1. one\n2. two\n", None),
        ("42. That is all", "42"),
        ("He has 7. See step 3", "7"),
    ],
)
def test_the_number_that_a_text_gives(text: str, answer: str | None) -> None:
    assert NUMBER.canonical(text) == answer
    span = NUMBER.find(text)
    if span is not None:
        found = text[span[0] : span[1]]
        assert span in NUMBER.spans(text), "a place that a continuation's answer can be aligned to"
        assert NUMBER.spell(found) == answer and NUMBER.align(text, NUMBER.spell(found)) == span
        assert NUMBER.canonical(str(answer)) == answer


def test_no_separator_cuts_a_number() -> None:
    """Whatever single character, or LaTeX, stands between groups of digits: their value, or none."""
    separators = [chr(c) for c in range(0x20, 0x3100) if not chr(c).isalnum()] + ["{,}", r"\,", r",\!", "--", "..."]
    parts_allowed = set(' =+*×÷()[]{}<>;|&"“”„«»!?#@≈≠≤≥→←⇒、。\\$€£¥₹%°^')  # these stand between two numbers
    for separator in separators:
        if separator in parts_allowed or (separator.isspace() and separator not in "\u00a0\u2009\u202f"):
            continue
        for text, value in ((f"12{separator}345", "12345"), (f"1{separator}234{separator}567", "1234567")):
            values = (None, value, "12.345" if separator in ".．٫" else "4/115" if separator in "/⁄" else value)
            assert NUMBER.canonical(f"It is {text} in all.") in values, (separator, text)
            assert NUMBER.canonical(f"The answer is {text}.") in values, (separator, text)


def test_a_continuation_gives_what_it_comes_to() -> None:
    for text, answer in ((" 2 * 3 = 6. Not 9.", "6"), (" 10 (5 + 5).", "10"), (" 12:30.", None), (" -3 °C", "-3")):
        span = NUMBER.find_first(text)
        assert (None if span is None else NUMBER.spell(text[span[0] : span[1]])) == answer


@pytest.mark.parametrize(
    ("finder", "text", "answer"),
    [
        (LETTERS, "The answer is (B). A bank is where people keep money.", "B"),
        (LETTERS, "A bank is where people keep money.", None),
        (LETTERS, "I think it's C, not D.", "C"),
        (LETTERS, "It isn't A; it is D.", "D"),
        (LETTERS, "The answer is not D.", None),
        (LETTERS, "The answer is not (D) but (C).", "C"),
        (LETTERS, "The answer is B, rather than D.", "B"),
        (LETTERS, "(A) is wrong. (B) is wrong. (C) is right. (D) can't be it.", "C"),
        (LETTERS, "The answer is (B) bank, since (A) is a shop.", "B"),
        (LETTERS, "B is the correct answer. A bank", "B"),
        (LETTERS, "The answer is A or B", None),
        (LETTERS, "Both A and B are wrong; D.", "D"),
        (LETTERS, "(A) x\n(B) y\n(C) z\n(D) u\n(E) v", None),
        (LETTERS, "A. x\nB. y\nC. z\nD. u\nE. v\nB", "B"),
        (LETTERS, "The answer is b.", "B"),
        (LETTERS, "The answer is a bank.", None),
        (LETTERS, "The answer is A bank", "A"),
        (LETTERS, "Answer: A bank is where", None),
        (LETTERS, "A is correct", "A"),
        (LETTERS, "Option A is best", "A"),
        (LETTERS, "A: B) bank\nA: shop", "B"),
        (LETTERS, "Vitamin C is good for him, says J. B. Smith", None),
        (LETTERS, r"$\boxed{\text{B}}$, not A", "B"),
        (LETTERS, r"\boxed{b}", "B"),
        (LETTERS, "#### C\nA bank", "C"),
        (LETTERS, "**B.** bank", "B"),
        (LETTERS, "The correct option is **D**, because A is a word.", "D"),
        (LETTERS, "I'd go with E.", "E"),
        (LETTERS, "The answer is clearly D.", "D"),
        (LETTERS, "I choose option c.", "C"),
        (LETTERS, "A, B, and C are all wrong, so D or E.", None),
        (LETTERS, "The answer is not (B), (C) or (D); it is (E)", "E"),
        (LETTERS, "A) is out. B) is out. So (C).", "C"),
        (LastOption(tuple("ABCDEFGHIJ")), "I think it's C. I do", "C"),
        (LastOption(tuple("ABCDEFGHIJ")), "The answer is I.", "I"),
        (YES_NO, "Yes, he is. There is no doubt.", "yes"),
        (YES_NO, "No, because yes would mean that it is heads.", "no"),
        (YES_NO, "No. It was flipped twice. So yes.", "yes"),
        (YES_NO, "No\n\nExplanation: there is no reason to say yes", "no"),
        (YES_NO, "No doubt.", None),
        (YES_NO, "No one knows.", None),
        (YES_NO, "No it is not", "no"),
        (YES_NO, "**No**, it isn't.", "no"),
        (YES_NO, "Is it yes or no? Yes", "yes"),
        (YES_NO, "The answer is yes or no", None),
        (YES_NO, "The answer is no. Yes, really.", "no"),
        (EVEN_ODD, "Whether it is even or odd: it is odd, not even", "odd"),
        (LastOption(("red", "green")), "It's red, not green", "red"),
    ],
)
def test_the_option_that_a_text_gives(finder: Finder, text: str, answer: str | None) -> None:
    assert finder.canonical(text) == answer
    span = finder.find(text)
    assert span is None or finder.spell(text[span[0] : span[1]]) == answer


REAL_LETTERS = (
    ("D) smile", "D"),
    ("Drunk.", None),
    ("(C) Classroom\n\nThe correct answer is (E) Classroom.", "E"),
    ("The habitat of the fox is a desert. The fox is found in the deserts of the world.", None),
    ("(C) glove box is the most appropriate answer. The correct answer is:\n(E) glove compartment", "E"),
    ("A comet's path is determined by the comet's orbital mechanics.", None),
    ("(C) farming areas is the correct answer.", "C"),
    ("(C)\n\nThe correct answer is (E).", "E"),
    ("A person considered a bully known for is a bull rider.", None),
    ("A) go down\n\nThe correct answer is: A.\n\nThis is a classic example of a logical fallacy.", "A"),
    ("A student must answer question.", None),
    ('A classic example of a logical fallacy, the incorrect answer is (C) "getting cold."', None),
    ("A trumpet is a musical instrument made from brass, which is a metal alloy.", None),
    ("(C) Learn new is not a correct answer.", None),
    ("A: A wall", "A"),
    ("(C) DULL\n\nThe answer is (E)\n\nThe correct answer is (E)", "E"),
    ("(C) drinking is a more precise choice. The correct answer is (E) turning inside out.", "E"),
    ("A)", "A"),
    ("A) good natured ribbing is a possible answer.", "A"),
    ("The correct answer is: D) Fotograph.", "D"),
    ("D) church\nThe correct answer is E) church", "E"),
    ("A shelf likely to be hidden behind a door is a wardrobe. A wardrobe is typically a closet.", None),
    ('A human should not use the "C" subposition.', None),
    ("(A) suburb\n\nThe answer is (C).", "C"),
    ("C) Own brain\n\nTo answer your question, the correct answer is:\nD) food", "D"),
    ("You can't have a tourist from Scotland. So, D) Scotland was the place you were from.", "D"),
    ("(E) dog house\n\nThe correct answer is: 1. A picking market is a well-known market in the UK.", "E"),
    ("E (bum)", "E"),
    ('(C) stairwell\n\nA) "A" is incorrect. The correct answer is D) deplane. This is not the correct choice', "D"),
    ("B) fraternity house\n\nA: A big town refers to a city.\n\nA: B) college may have been in a college", "B"),
    ("So, he chose A) putting together (B) working to make a match, and C)", None),
)
REAL_NUMBERS = (
    ("So, the difference between the ages of Alice and Erica is 10 years.", "10"),
    ("Original price = 19.50 - 4.125 = 14.25\n\nSo, the original price of the book was $14.25.", "14.25"),
    ("4. The total is 28 + 50 = 170.\n5. The total of all family members is: 16 + 50 = 16*2 = 36", "36"),
    ("Her earnings for this week are $14.80 * 45 hours = $62.40.", "62.4"),
    ("This is 240 liters (rainwater) + 240 liters (rainwater) = 480 liters.\n\nSo, 480 liters are in it.", "480"),
    ("The cost of 4000 kilos of coal is 4000 * 50 = 20000 kilos of coal.", "20000"),
    ("So, 14 eggs will be needed to make 1 deviled egg half.\n\n#### 14\nThe answer is 14", "14"),
    ("So, 14 eggs will be needed to make 1 deviled egg half.\n\n#### 14\nThe", "14"),
    ("So, the youngest child is 20 years old, and the age of the oldest child is 400 years old.", "400"),
    ("So, she has 320 + 48 + 25 = 720 outfits.\n#### 720\nThe answer is: 720", "720"),
    ("So, John needs to order 60 slices of pizza.", "60"),
    ("he only had 2,000 - 2,000 = 0 steps left to take.\n#### 0\nElliott took 0 steps during", "0"),
    ("So, you would pay $10 + 6 = $16 = 6 x 10 or 6 x 12 = $66.\nThe change would be $16.", "16"),
    ("Total number of unoccupied units = 120 units - 120 = 0\nTherefore, Richard lives alone.", "0"),
    ("Therefore, the amount left is 10 cents per seat.\n#### 10\nThe answer is: 10", "10"),
    ("11 * 36 = 328\n\nTherefore, a 36-minute payphone call would cost 328 dollars.", "328"),
    ("Net profit is the sales of cheese minus the cost. Cash flow from selling cheese is $3.00.", "3"),
)


def test_real_answers_as_a_human_reads_them() -> None:
    """SmolLM2-135M-Instruct's own words on CommonsenseQA and GSM8K, shortened: greedy and at temperature 0.8."""
    for finder, cases in ((LETTERS, REAL_LETTERS), (NUMBER, REAL_NUMBERS)):
        for text, answer in cases:
            assert finder.canonical(text) == answer, text


def published(text: str, rule: str) -> str:
    """The filters and the comparison of lm-evaluation-harness' gsm8k.yaml, as their documentation gives them."""
    if rule == "strict":
        matches = re.findall("#### (\\-?[0-9\\.\\,]+)", text)
        found = matches[0] if matches else "[invalid]"
    else:
        groups = re.findall("(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
        found = next(group for group in groups[-1] if group) if groups else "[invalid]"
    return normalised(found.strip())


def normalised(text: str) -> str:
    for pattern in (",", "\\$", "(?s).*#### ", "\\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def test_the_rules_of_lm_evaluation_harness() -> None:
    texts = [text for text, _ in REAL_NUMBERS]
    texts += ["#### 18", "####18", "#### $18", "#### -1,234.", "so #### 5\n#### 6", "It costs $1,234.50.", "no", ""]
    texts += ["5, 6, ...", "7 (3-2)", "-5", "a-5", "$", "18.00", "9.", "1 - 2", "10 %", "4.5.6", "３ and 12，5"]
    rng = np.random.default_rng(0)
    texts += ["#### " + "".join(rng.choice(list("#### 0123456789.,-$\na "), 12)) for _ in range(500)]
    for rule in ("strict", "flexible"):
        finder = make_finder(f"gsm8k-{rule}")
        assert finder == HarnessNumber(rule)  # type: ignore[arg-type]
        answers = [finder.canonical(text) for text in texts]
        assert [each if each is not None else "[invalid]" for each in answers] == [published(t, rule) for t in texts]
        assert len(set(answers)) > 10
        for text in texts:
            span = finder.find(text)
            assert span is None or finder.spell(text[span[0] : span[1]]) == finder.canonical(text)
    assert HarnessNumber("flexible").canonical("18.00") == "18.00", "letter by letter"


def test_long_texts_take_no_time() -> None:
    began = time.process_time()
    for text in ("answer is " * 500, "answer" + " " * 5000, "1 " * 3000, "1. x\n" * 999, r"\boxed{" * 300):
        for finder in (NUMBER, LETTERS, YES_NO):
            finder.canonical(text)
    assert time.process_time() - began < 30
