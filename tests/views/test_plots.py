import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType

from mod_star.errors import InputError
from mod_star.runs.metrics import MetricsWriter
from mod_star.units import duration, short_number
from mod_star.views.plots import plot_curves, plot_routes
from mod_star.views.terminal import result_table, routes_text, visible

BLUE = np.array([0x00, 0x72, 0xB2])


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A missing glyph or an empty legend would be a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def records(predictor: bool, flops: float = 1e9) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(10, 201, 10):
        made.append({"step": step, "loss": 2.1 + 20 / step, "lm_loss": 2.0 + 20 / step, "train_flops": flops * step})
        if predictor:
            made[-1] |= {"predictor_accuracy": 0.9, "routed_fraction": [0.125, 0.125]}
        if step % 50 == 0:
            made.append({"step": step, "eval_loss": 2.2 + 20 / step})
            if predictor:
                made[-1] |= {"eval_loss_causal": 2.3 + 20 / step, "eval_predictor_accuracy": 0.88}
    return made


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def blue_pixels(path: Path) -> int:
    return int(np.all(pixels(path) == BLUE, axis=-1).sum())


def rendered(*things: RenderableType, colours: bool = False) -> str:
    console = Console(width=80, force_terminal=colours, color_system="truecolor" if colours else None)
    with console.capture() as capture:
        for thing in things:
            console.print(thing)
    return capture.get()


@pytest.mark.parametrize("against", ["step", "train_flops"])
def test_curves_of_several_runs_and_from_a_directory(tmp_path: Path, against: Any) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        for record in records(predictor=True):
            writer.write(record["step"], {name: value for name, value in record.items() if name != "step"})
    path = tmp_path / "made" / "curves.png"
    plot_curves({"dense": records(predictor=False), "MoD": tmp_path / "run"}, path, against=against, title="$5 and $6")
    height, width, _ = pixels(path).shape
    assert height > 900, "a second panel for the predictor"
    assert width > 1000
    plot_curves({"dense": records(predictor=False)}, tmp_path / "dense.png", against=against)
    assert pixels(tmp_path / "dense.png").shape[0] < height
    assert blue_pixels(tmp_path / "dense.png") > 500


def test_curves_of_a_run_without_evaluation_with_gaps_or_of_one_record(tmp_path: Path) -> None:
    training = [record for record in records(predictor=True) if "eval_loss" not in record]
    training[3]["lm_loss"] = np.nan
    training[4]["lm_loss"] = np.inf
    plot_curves({"run": training}, tmp_path / "gaps.png")
    plot_curves({"run": training[:1]}, tmp_path / "one.png", against="train_flops")
    plot_curves({"run": [{"step": 0, "eval_loss": 5.0}]}, tmp_path / "start.png")


def test_curves_need_a_run_with_a_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        plot_curves({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="records of 'empty' hold no loss"):
        plot_curves({"empty": []}, tmp_path / "x.png")
    with pytest.raises(InputError, match="not the directory of a run"):
        plot_curves({"none": tmp_path}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_routes_fill_one_cell_per_computed_token(tmp_path: Path) -> None:
    tokens = list("abcdefgh")
    filled = {}
    for count in (0, 1, 2, 8):
        routed = np.zeros((2, 8), bool)
        routed[1, :count] = True
        plot_routes(tmp_path / "routes.png", tokens, routed, ["block 1", "block 3"])
        filled[count] = blue_pixels(tmp_path / "routes.png")
    legend, cell = filled[0], filled[1] - filled[0]
    assert cell > 50
    assert filled[2] - legend == pytest.approx(2 * cell, rel=0.2)
    assert filled[8] - legend == pytest.approx(8 * cell, rel=0.2)


def test_routes_wrap_long_texts_and_show_every_character(tmp_path: Path) -> None:
    short, long = tmp_path / "short.png", tmp_path / "long.png"
    tokens = ["$a", " $b", "\n", "\x1b", "", "日本", "x" * 200]
    plot_routes(short, tokens[:3], np.ones((1, 3), bool), ["block 1"])
    plot_routes(long, tokens * 4, np.ones((1, 28), bool), ["block 1"])
    assert pixels(long).shape[0] > 2 * pixels(short).shape[0]
    assert pixels(long).shape[1] > pixels(short).shape[1]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2,), (2, 3, 1)])
def test_routes_that_fit_neither_tokens_nor_blocks_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"routed has shape .*\(blocks, tokens\) = \(3, 3\)"):
        plot_routes(tmp_path / "x.png", list("abc"), np.zeros(shape), ["1", "3", "5"])
    with pytest.raises(ValueError, match="routed has shape"):
        routes_text(list("abc"), np.zeros(shape), ["1", "3", "5"])


def test_routes_in_a_terminal_keep_the_text_and_tell_the_shares() -> None:
    routed = np.array([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], bool)
    shown = rendered(routes_text(["One", " two", "\n", "three", "[b]"], routed, ["block 1", "block 13"]))
    lines = [line.rstrip() for line in shown.splitlines()]
    assert lines[:2] == ["One two↵", "three[b]"]
    assert any(line.split() == ["computed", "by", "0", "1", "2", "of", "2", "routed", "blocks"] for line in lines)
    assert lines[-2].startswith("block 1   ████████████░")
    assert lines[-2].endswith("40.0%   2 of 5 tokens")
    assert lines[-1].startswith("block 13  ████████████░")


def test_routes_in_a_terminal_colour_by_the_number_of_blocks() -> None:
    routed = np.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], bool)
    shown = rendered(routes_text(list("abcd"), routed, ["1", "3", "5"]), colours=True)
    first = shown.splitlines()[0]
    assert "\x1b[2ma" in first, "computed by no block: dim, no colour"
    paper = [part.split("m")[0] for part in first.split("48;2;")[1:]]
    assert len(paper) == len(set(paper)) == 3
    assert sum(map(int, paper[0].split(";"))) < sum(map(int, paper[2].split(";"))), "more blocks, brighter"


def test_control_characters_of_a_text_never_reach_the_terminal() -> None:
    assert visible("a\tb\n\x1b[2J\x07é日") == "a→b↵·[2J·é日"
    assert "\x1b" not in rendered(routes_text(["\x1b[2J"], np.ones((1, 1)), ["1"]))


def test_result_table_formats_and_aligns() -> None:
    table = result_table(
        "Equal FLOPs [a]",
        ["", "dense", "MoD"],
        [["parameters", 1234567, 89], ["loss", 1.23456, None], ["x", "y", 2e-5]],
    )
    lines = [line.rstrip() for line in rendered(table).splitlines() if line.strip()]
    assert lines[0] == "Equal FLOPs [a]"
    assert lines[1].split() == ["dense", "MoD"]
    assert [line.split() for line in lines[3:]] == [
        ["parameters", "1,234,567", "89"],
        ["loss", "1.235", "–"],
        ["x", "y", "2e-05"],
    ]
    assert len({len(line) for line in lines[3:]}) == 1, "numbers end in the same column"
    with pytest.raises(ValueError, match="2 cells, but there are 3 columns"):
        result_table("", ["a", "b", "c"], [[1, 2]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (123_456, "123k"),
        (999_900_000, "1.00G"),
        (2.5e12, "2.50T"),
        (3.1e16, "3.10e+16"),
        (-1500, "-1.50k"),
    ],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (8.4, "8 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (100_800, "1 d 04 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
