import io
import json
import math
import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from mod_star.errors import InputError
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.views.progress import TrainingProgress


def tensorboard_events(run_dir: Path) -> list[Event]:
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_values_of_every_kind_come_back_as_plain_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        given = writer.write(
            1,
            {
                "loss": jnp.float32(2.5),
                "half": jnp.asarray(0.75, jnp.bfloat16),
                "skipped": np.int64(3),
                "finite": jnp.asarray(True),
                "routed_fraction": jnp.asarray([0.125, 0.25]),
                "halves": jnp.asarray([0.5, 1.5], jnp.bfloat16),
                "plain": [1, 2.5],
            },
        )
    expected: dict[str, object] = {"step": 1, "loss": 2.5, "half": 0.75, "skipped": 3, "finite": True}
    expected |= {"routed_fraction": [0.125, 0.25], "halves": [0.5, 1.5], "plain": [1.0, 2.5]}
    assert given == expected
    assert read_metrics(tmp_path) == [expected]


def test_a_record_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.nan, "grad_norm": np.inf, "gate_mean": [-np.inf, 1.0]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["gate_mean"] == [-math.inf, 1.0]


@pytest.mark.parametrize("value", ["text", None, [[1.0]], np.zeros((2, 2)), 1j])
def test_what_is_no_number_or_list_of_numbers_is_refused_and_not_written(tmp_path: Path, value: object) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="metric 'odd'"):
            writer.write(1, {"odd": value})
        writer.write(2, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [2]


def test_an_interrupted_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with MetricsWriter(whole) as writer:
        for step in range(1, 9):
            writer.write(step, {"loss": 1 / step, "gate_mean": [step, math.nan]})
    with MetricsWriter(resumed) as writer:
        for step in range(1, 7):  # gets to 6, with a checkpoint at 4
            writer.write(step, {"loss": 1 / step, "gate_mean": [step, math.nan]})
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    assert [record["step"] for record in read_metrics(resumed)] == [1, 2, 3, 4, 5, 6]
    with MetricsWriter(resumed, resume_step=4) as writer:
        assert [record["step"] for record in read_metrics(resumed)] == [1, 2, 3, 4]
        for step in range(5, 9):
            writer.write(step, {"loss": 1 / step, "gate_mean": [step, math.nan]})
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in sorted(resumed.iterdir())] == ["metrics.jsonl", "tensorboard"]


def test_no_record_is_lost_when_dropping_the_later_ones_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1 / step})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path, resume_step=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(0, {"eval_loss": 5.0})
            writer.write(1, {"loss": 4.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_tensorboard_gets_scalars_lists_by_layer_and_the_purge_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 2.0, "gate_mean": [0.25, 0.5]})
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 1.0})
    events = tensorboard_events(tmp_path)
    scalars = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert scalars == {
        ("loss", 3): 2.0,
        ("gate_mean/layer_0", 3): 0.25,
        ("gate_mean/layer_1", 3): 0.5,
        ("loss", 4): 1.0,
    }
    assert [event.step for event in events if event.HasField("session_log")] == [0, 4]


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"loss": 1.0}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + line + "\n" + '{"step": 3, "loss": 1.0}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a metrics record"):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3, "a refused file stays as it is"


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the directory of a run \(it has no metrics\.jsonl\)"):
        read_metrics(tmp_path)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def progress_on(stream: io.StringIO, clock: Clock, *, terminal: bool, steps: int = 100) -> TrainingProgress:
    console = Console(file=stream, force_terminal=terminal, width=100)
    return TrainingProgress(steps, 1000, console=console, label="dense", seconds_between_lines=20, clock=clock)


def test_outside_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress_on(stream, clock, terminal=False) as progress:
        for step in range(1, 101):
            clock.seconds += 0.25
            progress.update(step, 100 / step)
        progress.say("held out: [1.5]")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "dense  step   1/100  loss 100.0000"
    assert lines[1] == "dense  step  81/100  loss 1.2346  4.00k tokens/s  5 s left"
    assert lines[-2:] == ["held out: [1.5]", "dense  step 100/100  loss 1.0000  4.00k tokens/s"]
    assert len(lines) == 4
    assert "\x1b" not in stream.getvalue()


def test_a_last_line_that_was_printed_already_is_not_repeated() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress_on(stream, clock, terminal=False, steps=1) as progress:
        progress.update(1, 2.0)
    assert stream.getvalue().count("step") == 1


def test_tokens_per_second_leaves_out_compilation_and_pauses_and_follows_the_present_rate() -> None:
    clock = Clock()
    progress = progress_on(io.StringIO(), clock, terminal=False, steps=1000)
    assert progress.tokens_per_second is None
    assert progress.seconds_left is None
    clock.seconds += 60  # compilation
    progress.update(1, 3.0)
    assert progress.tokens_per_second is None
    for step in range(2, 6):
        clock.seconds += 0.5
        progress.update(step, 3.0)
    with progress.pause("evaluating"):
        clock.seconds += 30
    clock.seconds += 0.5
    progress.update(6, 3.0)
    assert progress.tokens_per_second == pytest.approx(2000)
    assert progress.seconds_left == pytest.approx(994 / 2)
    for step in range(7, 207):  # twice as fast for 50 s
        clock.seconds += 0.25
        progress.update(step, 3.0)
    assert progress.tokens_per_second == pytest.approx(4000, rel=0.01)


def test_a_resumed_run_counts_from_its_checkpoint() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=False)
    with TrainingProgress(100, 10, start=50, console=console, clock=clock, seconds_between_lines=0) as progress:
        for step in (51, 52):
            clock.seconds += 1
            progress.update(step, 1.0)
    assert "step  52/100  loss 1.0000  10 tokens/s  48 s left" in stream.getvalue()


def test_in_a_terminal_progress_is_a_bar_with_loss_rate_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress_on(stream, clock, terminal=True) as progress:
        for step in range(1, 51):
            clock.seconds += 0.5
            progress.update(step, 1.25)
    shown = stream.getvalue()
    for part in ("dense", "━", "50/100", "loss 1.2500", "2.00k tokens/s", "25 s left"):
        assert part in shown
