import io
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType
from rich.style import Style

from mod_star.views.terminal import visible
from mod_star.views.thoughts import (
    LEAST_SCALE,
    TextThoughts,
    gain_style,
    robust_scale,
    shown,
    summary,
    thoughts_html,
    thoughts_text,
)

ATTACK = "</script><script>alert(1)</script>"
NASTY = ["<|bos|>", ATTACK, "\"'&amp;<b>", "\x00\x1b[31m\x7f", "a\r\n\tb", "é東😀שלום", "\u202e\u2028", "", "{{data}}"]
NASTY += ["<!--", "]]>", "\ud800", " ", "\n"]


def example() -> TextThoughts:
    return TextThoughts(
        tokens=["<|bos|>", "One", " and", " one", " is", " two", "."],
        base_log_probs=[None, -3.0, -1.0, -2.0, -0.5, -4.0, -0.1],
        talk_log_probs=[None, None, -0.5, -2.2, -0.5, -2.0, -1.1],
        thoughts=["", "", "more to come", "twins", "so what", "1 + 1", "it ends\nhere"],
        thought_tokens=[[], [], ["more", " to", " come"], ["twins"], ["so", " what"], ["1", " +", " 1"], ["it ends\n"]],
        weights=np.ma.array([0, 0, 0.5, 0.1, 0.0, 1.2, -0.3], np.float32, mask=[True, True, *[False] * 5]),
        entropies=[None, 5.0, 2.0, 2.5, 1.0, 3.0, 0.5],
    )


def nasty() -> TextThoughts:
    N = len(NASTY)
    thoughts = ["", *NASTY[1:]]
    numbers = np.ma.array([0, *np.linspace(-4, -1, N - 1)], mask=np.arange(N) == 0)
    pieces = [[thought] if thought else [] for thought in thoughts]
    return TextThoughts(NASTY, numbers, numbers * 1.1, thoughts, pieces, -numbers, -numbers)


class Page(HTMLParser):
    """Collects what the tests ask a page for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs))
        self.tags.append(element)
        if tag not in ("meta", "input"):
            self._open.append(element)
        if "data-n" in element[1]:
            assert element[1]["data-n"] == str(len(self.tokens))
            self.tokens.append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if "data-n" in attributes:
            self.tokens[-1] += data
        elif tag == "script":
            self.scripts[-1] += data
        elif tag in ("title", "h1"):
            self.headings.append(data)

    @property
    def data(self) -> dict[str, Any]:
        def reject(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.scripts[0], parse_constant=reject)


def printed(renderable: RenderableType, width: int = 120) -> str:
    console = Console(width=width, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def paper(style: Style) -> tuple[int, ...]:
    assert style.bgcolor is not None and style.bgcolor.triplet is not None
    return tuple(style.bgcolor.triplet)


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """As the Web Content Accessibility Guidelines define it."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour))
        return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_gain_is_positive_where_the_thought_helped() -> None:
    assert example().gains.tolist() == [None, None, *map(pytest.approx, [0.5, -0.2, 0.0, 2.0, -1.0])]


@pytest.mark.parametrize("name", ["base_log_probs", "talk_log_probs", "weights", "entropies"])
def test_numbers_must_fit_the_tokens(name: str) -> None:
    changes: list[Any] = [[0.0] * 6, np.zeros((7, 1)), 0.0]
    for values in changes:
        with pytest.raises(ValueError, match=f"{name} has shape"):
            replace(example(), **{name: values})
    for number in (-math.inf, math.nan):
        changed: dict[str, Any] = {name: [number] * 7}
        with pytest.raises(ValueError, match=f"{name} holds a number that is not finite; None stands for none"):
            replace(example(), **changed)


def test_thoughts_must_fit_the_tokens() -> None:
    with pytest.raises(ValueError, match="thoughts has 1 entries, but there are 7 tokens"):
        replace(example(), thoughts=["one"])
    with pytest.raises(ValueError, match="thought_tokens has 0 entries"):
        replace(example(), thought_tokens=[])
    with pytest.raises(ValueError, match="tokens is empty"):
        TextThoughts([], [], [], [], [], [], [])
    with pytest.raises(ValueError, match="limit = -1"):
        thoughts_text(example(), limit=-1)


def test_the_sign_of_a_gain_is_its_hue_and_its_size_the_strength() -> None:
    for sign in (-1, 1):
        colours = [paper(gain_style(sign * share)) for share in np.linspace(0.11, 1, 30)]
        strengths = [sign * (blue - red) for red, _, blue in colours]
        assert strengths[0] > 0
        assert all(a <= b for a, b in itertools.pairwise(strengths)) and strengths[-1] > 3 * strengths[0]
        assert all(contrast((255, 255, 255), colour) >= 4.5 for colour in colours)
        assert gain_style(sign * 7.0) == gain_style(sign * 1.0)


def test_no_gain_has_no_colour_and_no_thought_is_dim() -> None:
    assert gain_style(0.0) == gain_style(0.05) == gain_style(-0.05) == Style()
    assert gain_style(None) == Style(dim=True)


def test_the_scale_leaves_outliers_and_missing_values_out() -> None:
    values = np.full(1000, 0.5)
    values[:10] = -80.0
    assert robust_scale(values) == pytest.approx(0.5)
    assert robust_scale([None, -0.25]) == pytest.approx(0.25)
    assert robust_scale([1e-9, None]) == robust_scale([None]) == LEAST_SCALE


def test_the_summary_counts_tokens_with_a_thought_only() -> None:
    line = summary(example())
    assert line.startswith("Mean gain +0.26 nats/token · 40% of 5 tokens helped")
    assert line.endswith("1.520 nats/token without thoughts, 1.260 with")
    none = replace(example(), talk_log_probs=[None] * 7)
    assert summary(none) == "No thought before any of the 7 tokens"


def test_the_terminal_shows_text_legend_summary_and_extremes() -> None:
    out = printed(thoughts_text(example(), limit=2))
    lines = out.splitlines()
    assert lines[0].rstrip() == "<|bos|>One and one is two."
    assert (
        "−1.92" in out and "+0.96" in out and "98th percentile" in " ".join(out.split()) and summary(example()) in out
    )
    rows = [line.split("  ") for line in lines if "→" in line]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["␣two", "1 + 1", "1.8% → 13.5%", "+2.000", "1.200", "3.00"],
        ["␣and", "more to come", "36.8% → 60.7%", "+0.500", "0.500", "2.00"],
        ["␣one", "twins", "13.5% → 11.1%", "−0.200", "0.100", "2.50"],
        [".", "it ends↵here", "90.5% → 33.3%", "−1.000", "−0.300", "0.50"],
    ]
    assert "→" not in printed(thoughts_text(example(), limit=0))


def test_a_text_without_thoughts_is_shown_too() -> None:
    none = replace(example(), talk_log_probs=[None] * 7, weights=[None] * 7, entropies=[None] * 7)
    assert "No thought before any" in printed(thoughts_text(none))
    assert Page(thoughts_html(none, "none")).data["talk"] == [None] * 7


def test_nothing_gets_through_to_the_terminal() -> None:
    out = printed(thoughts_text(nasty(), limit=20))
    assert not set(out) & set("\x00\x1b\x7f\r\t\u202e\u2028\ud800")
    assert "a↵↵\n→b" in out and ATTACK in out


def test_the_page_holds_the_text_whatever_it_is() -> None:
    page = Page(thoughts_html(nasty(), f"{ATTACK} \"&'\x00\n\ud800"))
    assert page.tokens == [shown(token) for token in NASTY]
    assert [token.replace("\n", "") for token in page.tokens] == [visible(token) or "∅" for token in NASTY]
    assert page.headings == [visible(f"{ATTACK} \"&'\x00\n\ud800")] * 2
    assert page.data["thoughts"] == [[visible(token)] if token else [] for token in ["", *NASTY[1:]]]
    assert len(page.scripts) == 2 and "alert" not in page.scripts[1]
    thoughts_html(nasty(), "\ud800").encode()


def test_the_data_in_the_page_are_the_numbers_with_null_for_none() -> None:
    view = example()
    data = Page(thoughts_html(view, "example")).data
    pairs = {"base": view.base_log_probs, "talk": view.talk_log_probs, "weight": view.weights}
    for name, values in (pairs | {"entropy": view.entropies}).items():
        plain = values.tolist() if isinstance(values, np.ndarray) else values
        assert data[name] == [None if value is None else pytest.approx(value, abs=1e-6) for value in plain]
    assert data["thoughts"][2] == ["more", " to", " come"] and data["thoughts"][6] == ["it ends↵"]
    assert data["scales"]["gain"] == pytest.approx(robust_scale(view.gains))


def test_a_thought_without_its_tokens_is_one_piece() -> None:
    data = Page(thoughts_html(replace(example(), thought_tokens=[[]] * 7), "example")).data
    assert data["thoughts"][5] == ["1 + 1"] and data["thoughts"][0] == []


def test_every_token_can_be_reached_and_the_page_needs_nothing_else() -> None:
    written = thoughts_html(example(), "example")
    page = Page(written)
    tokens = [attributes for _, attributes in page.tags if "data-n" in attributes]
    assert [token["tabindex"] for token in tokens] == ["0"] + ["-1"] * 6
    assert all(token["role"] == "button" for token in tokens)
    assert "://" not in written and "url(" not in written and "@import" not in written
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    asked = set(re.findall(r'element\("([\w-]+)"\)', page.scripts[1]))
    assert len(ids) == len(set(ids)) and asked <= set(ids)


def test_weights_below_zero_get_a_scale_with_two_sides() -> None:
    def legend(view: TextThoughts) -> str | None:
        tags = Page(thoughts_html(view, "example")).tags
        return next(a["class"] for tag, a in tags if tag == "div" and a.get("data-by") == "weight")

    assert legend(example()) == "legend both"
    assert legend(replace(example(), weights=[None] + [0.5] * 6)) == "legend one"


def test_ink_is_readable_on_every_colour_of_the_page() -> None:
    template = resources.files("mod_star.views").joinpath("thoughts_view.html").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    assert len(schemes) == 2  # light and dark
    for scheme in schemes:
        hexes = {n: tuple(bytes.fromhex(c)) for n, c in re.findall(r"--(\w+): #(\w{6})", scheme)}
        full = [tuple(map(int, channels.split())) for channels in re.findall(r": (\d+ \d+ \d+);", scheme)]
        assert len(full) == 4
        # In between, where page and colour are mixed, every channel lies between the two.
        assert all(contrast(hexes["ink"], colour) >= 4.5 for colour in [*full, hexes["page"], hexes["card"]])
        assert contrast(hexes["muted"], hexes["page"]) >= 4.5 and contrast(hexes["muted"], hexes["card"]) >= 4.5
