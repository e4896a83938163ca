"""A finder made of a function, which goes wherever the built-in ones go."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mod_star.decoding import Completion
from mod_star.decoding.answers import KINDS, FoundBy, LastNumber, as_finder
from mod_star.decoding.branches import read_branch
from mod_star.errors import InputError


def in_stars(text: str) -> tuple[int, int] | None:
    """What stands between stars."""
    match = re.search(r"\*(.+?)\*", text)
    return None if match is None else match.span(1)


def test_a_function_is_a_finder() -> None:
    finder = as_finder(in_stars)
    assert finder.find("so *a  b* it is") == finder.find_first("so *a  b* it is") == (4, 8)
    assert finder.canonical("so *a  b* it is") == "a b"
    assert finder.find("none") is None and finder.spans("none") == []
    assert finder.align("so *a  b*", "a b") == (4, 8) and finder.align("so *c*", "a b") is None
    assert as_finder(LastNumber()) == LastNumber() and as_finder(finder) is finder
    assert not finder.needs_continuation
    assert [name for name, each in KINDS.items() if each.needs_continuation] == ["text"]


def test_delta_is_of_the_tokens_that_a_function_points_at() -> None:
    text = "so *yes*"
    gaps = [0.1 * place for place in range(len(text))]
    completion = Completion(
        prompt="", text=text, tokens=[ord(c) for c in text], log_probs=[-0.1] * len(text), finished="end",
        routed_fraction=[], overflow=0, gaps=gaps, starts=list(range(len(text))), end_log_prob=-0.1, end_gap=0.5,
    )  # fmt: skip
    branch = read_branch(completion, "s", as_finder(in_stars))
    assert (branch.answer, branch.span, branch.dropped) == ("yes", (4, 7), None)
    assert branch.delta == pytest.approx((0.4 + 0.5 + 0.6) / 3)


@pytest.mark.parametrize("span", [(2, 2), (0, 9), (-1, 2), "ab", (0, 1, 2), 3])
def test_spans_that_cannot_be_are_refused(span: Any) -> None:
    with pytest.raises(InputError, match=r"answer finder wrong = .*must be None or \(start, end\)"):
        FoundBy(named("wrong", span)).find("four")


def named(name: str, span: Any) -> Any:
    def function(text: str) -> Any:
        return span

    function.__name__ = name
    return function
