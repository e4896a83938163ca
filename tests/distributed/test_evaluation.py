"""`mod-star evaluate` and the harness's adapter say on eight devices what they say on one; each does its share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluate_on_eight import NIGHTLY
from on_eight import run_on_eight


@pytest.fixture(scope="module")
def eight(thinking_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory with what `evaluate_on_eight.py` found, and what it said."""
    out = tmp_path_factory.mktemp("eight")
    return out, run_on_eight("evaluate_on_eight.py", thinking_run, out, "quick")


@pytest.fixture(scope="module")
def eight_nightly(thinking_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what takes longest: thoughts, branches, beams, the harness's adapter, and what programs take."""
    out = tmp_path_factory.mktemp("eight-nightly")
    run_on_eight("evaluate_on_eight.py", thinking_run, out, "nightly")
    return out


def records_of(path: Path) -> dict[str, Any]:
    """By id; without the time that they took."""
    lines = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    return {line["id"]: {name: value for name, value in line.items() if name != "seconds"} for line in lines}


def assert_same(found: Any, expected: Any) -> None:
    """The same but for rounding of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), [expected[name] for name in found]
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        # Records are rounded to six digits behind the point.
        assert found == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.slow
def test_records_equal_one_device(eight: tuple[Path, str]) -> None:
    check_records(eight[0], "choice")


@pytest.mark.parametrize("way", NIGHTLY)
@pytest.mark.nightly
def test_records_of_every_decoding_equal_one_device(eight_nightly: Path, way: str) -> None:
    check_records(eight_nightly, way)


def check_records(eight: Path, way: str) -> None:
    one, many = (records_of(eight / f"{way}-{mesh}") for mesh in ("1x1x1", "2x2x2"))
    assert len(one) == 10
    assert_same(many, one)
    told = [json.dumps([record.get(name) for name in ("log_likelihoods", "log_probs", "branches")])
            for record in one.values()]  # fmt: skip
    assert len(set(told)) == 10, "another question's row would be noticed"


@pytest.mark.slow
def test_results_do_not_depend_on_the_mesh(eight: tuple[Path, str]) -> None:
    one, many = (json.loads((eight[0] / f"choice-{mesh}" / "results.json").read_text()) for mesh in ("1x1x1", "2x2x2"))
    assert many["config"] == one["config"] and "--mesh" not in one["config"]
    assert many["measures"] == one["measures"]
    assert "10 of 10 questions are done already" in eight[1], "an evaluation goes on with another mesh"


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_refused(eight: tuple[Path, str]) -> None:
    errors = [line for line in eight[1].splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --batch-size = 8: must be a multiple of mesh.data x mesh.fsdp = 3 x 1 = 3",
        "error: --mesh = data 1 x fsdp 16 x tensor 1: must multiply to the number of devices, 8",
        "error: mesh.tensor = 4: must divide model.heads = 2",
        "error: batch_size = 6: must be a multiple of mesh.data x mesh.fsdp = 2 x 2 = 4",
    ]
    assert not list(eight[0].glob("bad-*")), "nothing was written"


@pytest.mark.nightly
def test_the_adapter_says_the_same(eight_nightly: Path) -> None:
    one, many = (json.loads((eight_nightly / f"harness-{name}.json").read_text()) for name in ("one", "mixed"))
    assert_same(many, one)
    assert all(value < -1 for value, _ in one["loglikelihood"]) and any(one["texts"])


def shares(eight: Path, way: str) -> dict[str, dict[str, float]]:
    """What the program of a batch of texts takes on each device of each mesh, as shares of a single device's."""
    found = json.loads((eight / "programs.json").read_text())[way]
    return {mesh: {name: of[name] / found["one"][name] for name in of} for mesh, of in found.items()}


@pytest.mark.nightly
def test_every_device_does_its_share(eight_nightly: Path) -> None:
    share = shares(eight_nightly, "plain")
    for mesh in ("fsdp", "mixed"):  # an eighth, and what can't be shared
        assert share[mesh]["flops"] < 0.16 and share[mesh]["temp_bytes"] < 0.25
    assert share["tensor"]["flops"] < 0.25 and share["tensor"]["temp_bytes"] < 0.25
    assert share["mixed"]["argument_bytes"] < 0.35  # parameters
    assert share["fsdp"]["argument_bytes"] < 0.25


@pytest.mark.nightly
def test_every_device_does_its_share_of_thoughts(eight_nightly: Path) -> None:
    share = shares(eight_nightly, "thinking")["mixed"]
    assert share["flops"] < 0.2 and share["temp_bytes"] < 0.35 and share["argument_bytes"] < 0.35
