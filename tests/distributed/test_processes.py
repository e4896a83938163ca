"""Several real processes train one run: killed, stopped, and gone on with by another number of them."""

from __future__ import annotations

import json
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import Process, shared_server

from mod_star.config import ProcessesConfig, RunConfig
from mod_star.errors import InputError
from mod_star.presets import dense, tiny
from mod_star.runs.directory import load_run
from mod_star.runs.metrics import read_metrics
from mod_star.training.train import train

STEPS = 60


def make_run() -> RunConfig:
    run = dense(tiny())
    return replace(
        run,
        model=replace(run.model, width=16),
        # A small rate and no routing: rounding, which differs between meshes, must not grow into what other data do.
        optimizer=replace(run.optimizer, learning_rate=1e-4),
        train=replace(run.train, steps=STEPS, checkpoint_every=5, eval_every=0, log_every=1),
    )


def start(path: Path, count: int = 2) -> list[Process]:
    """`mod-star train` in several processes with a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--preset", "tiny", "--model.width", "16", "--routing.every", "0",
        "--optimizer.learning-rate", "1e-4", "--train.steps", str(STEPS), "--train.checkpoint-every", "5",
        "--train.eval-every", "0", "--train.log-every", "1", "--processes.coordinator", f"127.0.0.1:{port}",
        "--processes.count", str(count),
    ]  # fmt: skip
    return [shared_server().start("train", path, *options, "--processes.index", str(index)) for index in range(count)]


def output_of(process: Process) -> tuple[int, str]:
    """Exit code, and all that a process has said by its end."""
    finished = process.wait()
    return finished.code, finished.out + finished.err


def wait_for(path: Path, processes: list[Process]) -> None:
    """Waits for a checkpoint."""
    limit = time.monotonic() + 200
    while not path.is_dir():
        if not all(process.running() for process in processes) or time.monotonic() > limit:
            for process in processes:
                process.send(signal.SIGKILL)
            pytest.fail("\n".join(output_of(process)[1] for process in processes))
        time.sleep(0.02)


def saved_data(path: Path) -> Any:
    """State of the data iterator in the last checkpoint."""
    files = (path / "checkpoints" / str(STEPS) / "data").iterdir()
    (state,) = [text for text in (file.read_text() for file in files) if text.startswith("{")]
    return json.loads(state)


@pytest.mark.nightly
def test_when_one_process_is_killed_the_other_ends_with_an_error_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, second = start(path)
    wait_for(path / "checkpoints" / "10", [first, second])
    second.send(signal.SIGKILL)
    began = time.monotonic()
    code, out = output_of(first)
    assert time.monotonic() - began < 60
    # JAX's own watch over its processes may be faster than the failing step; then it aborts with its own message.
    assert code in (1, -signal.SIGABRT), out
    assert "rror" in out
    if code == 1:
        assert "error: another process is gone (" in out and "; the last good checkpoint is " in out, out
        assert "Traceback" not in out
    second.wait()
    saved = max(int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdecimal())
    goes_on_by_two_and_by_one(path, tmp_path / "reference", f"{path} goes on from step {saved}", saved)


@pytest.mark.slow
def test_stopped_and_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    goes_on_by_two_and_by_one(path, tmp_path / "reference", f"{path} starts", 0)


def goes_on_by_two_and_by_one(path: Path, reference: Path, said: str, saved: int) -> None:
    """Two processes say so and take the run up after step `saved`, until they are told to stop; one, with one device,
    comes to the end."""
    train(make_run(), reference, quiet=True)
    first, second = start(path)
    wait_for(path / "checkpoints" / str(saved + 10), [first, second])
    second.send(signal.SIGTERM)
    codes, outs = zip(*(output_of(process) for process in (first, second)), strict=True)
    assert codes == (143, 143), outs
    (step,) = {out.partition("SIGTERM: stopped after step ")[2].split(" ")[0] for out in outs}
    assert saved + 10 <= int(step) < STEPS
    assert said in outs[0] and "goes on" not in outs[1].partition("SIGTERM")[0]
    assert load_run(path).step == int(step)

    summary = train(make_run(), path, quiet=True)
    assert summary.steps == STEPS
    found, expected = ([r for r in read_metrics(run) if "loss" in r] for run in (path, reference))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    losses = [np.array([record["loss"] for record in records]) for records in (found, expected)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    assert np.abs(np.diff(losses[1])).min() < 0.1 < np.abs(np.diff(losses[1])).max(), "another batch would be noticed"
    assert saved_data(path) == saved_data(reference)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host:1"}, r"processes = .*: coordinator, count and index must be given together"),
        ({"coordinator": "host", "count": 2, "index": 0}, r"processes\.coordinator = 'host': must be HOST:PORT"),
        ({"coordinator": "host:1", "count": 2, "index": 2}, r"processes\.index = 2: must lie in \[0, 2\)"),
    ],
)
def test_processes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProcessesConfig(**fields)
