"""Templates: what they render, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mod_star.data.templates import Template
from mod_star.errors import InputError

RECORD: dict[str, Any] = {
    "text": "plain",
    "question": {"stem": "Why?", "choices": [{"label": "A", "text": "so"}, {"label": "B", "text": "é"}]},
    "lSolutions": [56.0],
    "bytes": "é".encode(),
    "count": np.int32(7),
    "array": np.array([b"x", b"y"], dtype=object),
    "nothing": None,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "plain"),
        ("Q: {question[stem]}\nA: {text}", "Q: Why?\nA: plain"),
        (r"{text}\n\t{{x}}\\n", "plain\n\t{x}\\n"),  # as typed on a command line
        ("{question[choices][1][text]}", "é"),
        ("{lSolutions[0]} {lSolutions[0]:g}", "56.0 56"),
        ("{bytes}{count}{array[1]}", "é7y"),
    ],
)
def test_renders(template: str | None, text: str) -> None:
    assert Template(template).render(RECORD, "here") == text


def test_a_plain_string_is_its_own_text() -> None:
    assert Template(None).render("just this", "here") == "just this"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{question", "expected '}'"),
        ("question}", "single '}'"),
        ("{}", "not a field name"),
        ("{text.__class__}", "not a field name"),
        ("{text[0].real}", "not a field name"),
        ("{text!r}", "no conversion"),
        ("{text:{count}}", "no nested field"),
        ("no field", "names no field"),
    ],
)
def test_malformed_templates_name_themselves(template: str, reason: str) -> None:
    with pytest.raises(InputError) as error:
        Template(template)
    message = str(error.value)
    assert message.startswith(f"data.template = {template!r}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (None, {"q": 1, "a": 2}, "here: data.template is not set, so the field is 'text', the record has fields q, a"),
        ("{nope}", {"q": 1}, "here: data.template names 'nope', the record has fields q"),
        ("{q[stem]}", {"q": {"b": 1}}, "here: data.template names 'q[stem]', the record has fields b"),
        ("{q[3]}", {"q": [1, 2]}, "here: data.template names 'q[3]', the record has 2 entries"),
        ("{q[__class__]}", {"q": "s"}, "here: data.template names 'q[__class__]', the record has nothing inside"),
        ("{question}", RECORD, "here: 'question' is an object (fields stem, choices), not text or a number"),
        ("{lSolutions}", RECORD, "here: 'lSolutions' is a list (1 entries), not text or a number"),
        ("{nothing}", RECORD, "here: 'nothing' is null (nothing inside), not text or a number"),
        ("{text:d}", RECORD, "here: data.template formats 'text' with 'd': "),
        ("{text}", [1], "here: a record must be an object with fields, not a list"),
        ("{text}", {"text": "\ud800"}, "here: character 0 is an unpaired surrogate, which no text can hold"),
        ("{text}", {"text": b"ab\xff"}, "here: not valid UTF-8 (byte 0xff at 2)"),
    ],
)
def test_records_that_do_not_fit(template: str | None, record: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Template(template).render(record, "here")
    assert str(error.value).startswith(message)
