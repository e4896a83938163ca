"""The benchmark against PyTorch: how it talks with the peer. What it measures needs torch and a quiet machine."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks.peers import Torch
from mod_star.errors import InputError


def fake_python(path: Path, answer: str) -> str:
    """An "interpreter" that answers every request in one way, and writes the requests down."""
    path.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line" >> {path}.requests; {answer}; done\n')
    path.chmod(0o755)
    return str(path)


def test_the_peer_is_asked_for_one_step_of_one_model_at_a_time(tmp_path: Path) -> None:
    with Torch(fake_python(tmp_path / "python", "echo '{\"seconds\": 0.25}'")) as torch:
        assert [torch.step(False, 256, 8), torch.step(True, 1024, 4)] == [0.25, 0.25]
    requests = [json.loads(line) for line in (tmp_path / "python.requests").read_text().splitlines()]
    assert requests == [
        {"routed": False, "context": 256, "batch": 8},
        {"routed": True, "context": 1024, "batch": 4},
    ]


def test_an_interpreter_without_torch_or_none_at_all_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with (
        Torch(fake_python(tmp_path / "python", "exit 1")) as torch,
        pytest.raises(InputError, match=r"--torch-python = .*: must be a Python that can import torch"),
    ):
        torch.step(False, 256, 8)
    with pytest.raises(InputError, match=r"--torch-python = .*nowhere.*: cannot be run: No such file"):
        Torch(str(tmp_path / "nowhere"))
