"""`mod-star verify`, and what other commands compare themselves: to sample the parameters, to train everything."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fork_server import shared_server, succeed

from mod_star.errors import InputError
from mod_star.runs import integrity
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.integrity import checkpoint_bytes, damages
from mod_star.training.train import train


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy to damage, with checkpoints 6 and 12."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def damage(checkpoint: Path, item: str) -> Path:
    """Flips a bit of the item's largest file; returns its path in the checkpoint."""
    largest = max((path for path in (checkpoint / item).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest.relative_to(checkpoint)


@pytest.mark.slow
def test_a_whole_run(run: Path) -> None:
    finished = succeed("verify", run)
    assert finished.err == ""
    assert re.findall(r"^ +(\d+) +[\d.]+kB +whole *$", finished.out, re.M) == ["6", "12"]


@pytest.mark.nightly
def test_the_optimizers_state_matters_to_training_alone(run: Path) -> None:
    checkpoint = run / "checkpoints" / "12"
    path = damage(checkpoint, "training")
    sampled = succeed("sample", run, "--prompt", "a", "--new-tokens", "1", "--json")
    assert sampled.out.startswith("{")
    finished = shared_server().run("verify", run)
    assert finished.code == 2
    assert finished.err == f"error: {run}: checkpoint 12 of 2 is damaged\n"
    assert re.search(r"^ +6 .* whole *$", finished.out, re.M)
    assert re.search(r"^ +12 .* damaged *$", finished.out, re.M)
    assert finished.out.endswith(f"\ncheckpoint 12: {path} has changed since it was written\n")
    (run / "summary.json").unlink()  # as if it had been interrupted
    with pytest.raises(InputError, match=r"checkpoints/12 is damaged \(training/.* has changed since"):
        train(read_config(run), run, quiet=True)


@pytest.mark.slow
def test_damaged_parameters_matter_to_all(run: Path) -> None:
    for step in (6, 12):
        damage(run / "checkpoints" / str(step), "params")
        damage(run / "checkpoints" / str(step), "progress")
    for words, message in (
        (("sample", run, "--prompt", "a"), r"checkpoints/12 is damaged \(params/\S+ has changed .* no intact one"),
        (("verify", run), "checkpoints 6, 12 of 2 are damaged"),
    ):
        finished = shared_server().run(*words)
        assert finished.code == 2 and re.fullmatch(rf"error: .*{message}.*\n", finished.err), finished.err
    found = [line.split("/")[0] for line in finished.out.splitlines() if line.startswith("checkpoint ")]
    assert found == [f"checkpoint {step}: {item}" for step in (6, 12) for item in ("params", "progress")]
    (run / "checkpoints" / "12" / "SHA256SUMS").unlink()  # as in a copy of a bucket's
    assert "12" in re.findall(r"^ +(\d+) .* not read, no checksums", shared_server().run("verify", run).out, re.M)


@pytest.mark.slow
def test_what_cannot_be_verified_is_refused(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained_run, tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    for name, message in (("empty", "is not a run"), ("new", "has no checkpoint yet")):
        finished = shared_server().run("verify", tmp_path / name)
        assert finished.code == 2 and re.match(rf"error: .*{message}", finished.err), finished.err


def test_loading_to_sample_reads_the_parameters_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_run(run).params
    checkpoint = run / "checkpoints" / "12"
    hashed: list[str] = []
    real: Any = integrity._sha256

    def counted(path: Path, *rest: Any) -> str:
        hashed.append(str(path.relative_to(checkpoint)))
        return str(real(path, *rest))

    monkeypatch.setattr(integrity, "_sha256", counted)
    load_run(run)
    assert hashed and all(name.startswith("params/") for name in hashed)
    read: list[int] = []
    assert list(damages(checkpoint, read=read.append)) == []
    assert sum(read) == checkpoint_bytes(checkpoint)
    of_params: list[int] = []
    assert list(damages(checkpoint, "params", of_params.append)) == []
    assert sum(of_params) < 0.5 * sum(read), "the optimizer's state is twice as large as the parameters"
    for item in ("training", "data", "progress"):
        shutil.rmtree(checkpoint / item)
    found = load_run(run).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
