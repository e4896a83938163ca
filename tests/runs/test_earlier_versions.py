"""Runs, checkpoints and imported models of an earlier version load as ever, bit for bit: see data/README.md."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fork_server import succeed
from some_nightly import some_nightly

from mod_star.errors import InputError
from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.integrity import find_damage
from mod_star.runs.metrics import read_metrics
from mod_star.training.train import train

DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())


def digest(params: Any) -> str:
    """That of make_runs.py: of paths, types, shapes and bytes of all parameters."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        name = "/".join(entry.key for entry in path)
        lines.append(f"{name} {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def unpacked(name: str, directory: Path) -> Path:
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory / name


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_parameters_are_the_same_bits_and_sample_the_same_text(name: str, tmp_path: Path) -> None:
    run, expected = unpacked(name, tmp_path), EXPECTED[name]
    loaded = load_run(run)
    assert (loaded.step, digest(loaded.params)) == (expected["step"], expected["params"])
    assert find_damage(run / "checkpoints" / str(loaded.step)) is None
    said = succeed("sample", run, "--prompt", "1 and 2", "--new-tokens", "6", "--decoding", "greedy", "--json").out
    assert json.loads(said)["tokens"] == expected["sample"]["tokens"]
    # Which machine made them decides the last bits.
    np.testing.assert_allclose(json.loads(said)["log_probs"], expected["sample"]["log_probs"], rtol=1e-4)


@pytest.mark.parametrize("name", some_nightly(["routed", "thinking"], "thinking"))
@pytest.mark.slow
def test_training_goes_on_to_where_it_came_then(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unpacked(name, tmp_path)
    texts = [f"{a} and {b} are {a + b}." for a in range(40) for b in range(3)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    summary = train(read_config(run), run, quiet=True)
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == [1, 2, 3]
    assert saved_steps(run / "checkpoints") == [3]
    assert summary.evaluation["eval_loss"] == pytest.approx(EXPECTED[name]["eval_loss"], rel=1e-4)


def test_an_imported_model_is_no_training_to_go_on_with(tmp_path: Path) -> None:
    run = unpacked("imported", tmp_path)
    with pytest.raises(InputError, match="holds a model without the state of a training"):
        train(read_config(run), run, quiet=True)
