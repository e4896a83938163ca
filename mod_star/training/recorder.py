"""What a training session reports: records, thoughts to read, progress on the screen, and the time it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console

from mod_star.distributed.processes import decide_first, is_first
from mod_star.runs.buckets import bring_back
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.stages import Stage
from mod_star.training.inputs import Inputs
from mod_star.training.objectives import Metrics
from mod_star.training.objectives.thoughts_log import ThoughtsLog
from mod_star.views.progress import TrainingProgress


class Recorder:
    """Writes a session's records, and shows how far it is; a context manager.

    All processes have one; the first alone writes and prints.

    Args:
      inputs: what the run is made from.
      path: directory of the run.
      resume_step: step of the checkpoint that the session goes on from; None: it starts from the beginning.
      earlier_seconds: time in training steps of the sessions before this one.
      console: where progress is shown.
    """

    def __init__(
        self, inputs: Inputs, path: Path, resume_step: int | None, earlier_seconds: float, console: Console
    ) -> None:
        self._inputs, self._run, self._path, self._resume_step = inputs, inputs.run, path, resume_step
        self._earlier_seconds = earlier_seconds
        self._began = self._paused = 0.0
        self._metrics: MetricsWriter | None = None
        self._thoughts: ThoughtsLog | None = None
        tokens = self._run.train.batch_size * self._run.model.context
        self._progress = TrainingProgress(
            inputs.plan.steps, tokens, start=resume_step or 0, label=path.name, console=console
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if is_first():
                stack.callback(bring_back, self._path)  # when all records are written
                self._metrics = stack.enter_context(MetricsWriter(self._path, self._resume_step))
            if self._run.thinks:
                log = ThoughtsLog(self._path, self._resume_step, self._inputs.tokenizer, writes=is_first())
                self._thoughts = stack.enter_context(log)
            stack.enter_context(self._progress)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def start_clock(self) -> None:
        """Lets the time in training steps begin, without what is paused from here on."""
        self._began, self._paused = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Time in training steps up to now, over all sessions."""
        return self._earlier_seconds + time.perf_counter() - self._began - self._paused

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Shows `what` is being done, and leaves its time out of the run's."""
        began = time.perf_counter()
        with self._progress.pause(what):
            yield
        self._paused += time.perf_counter() - began

    def say(self, message: str) -> None:
        """Prints a line of its own."""
        self._progress.say(message)

    def begin_stage(self, stage: Stage, examples: Callable[..., Any] | None) -> None:
        """Takes note of what computes the steps from here on.

        Args:
          stage: they are of.
          examples: (params, batch, key) -> `quiet_star.Examples`; None: its objective has none.
        """
        if self._thoughts is not None:
            self._thoughts.compute_with(examples, stage.run.thinking.n_true)

    def read(self, step: int, metrics: Metrics) -> tuple[Any, int]:
        """Reads a step's numbers (waiting for it, if need be), shows them, and writes them where they are due.

        Returns:
          Its metric "stop", see `mod_star.distributed.processes.SharedStop`, None if it has none; and how many steps in
          a row, up to this one, were not finite.

        Raises:
          OSError: they can't be written.
        """
        # The last of a stage too: between two records, all steps cost the same.
        due = step % self._run.train.log_every == 0 or step == self._inputs.plan.at(step).last
        left_out = {"finite"} if due else metrics.keys() - {"loss", "streak", "stop"}
        values = jax.device_get({name: value for name, value in metrics.items() if name not in left_out})
        stop, streak = values.pop("stop", None), int(values.pop("streak"))
        self._progress.update(step, float(values["loss"]))
        if due:
            if (rate := self._progress.tokens_per_second) is not None:
                values["tokens_per_second"] = rate
            values["train_flops"] = self._inputs.plan.flops_until(step)
            self._write(step, values, self._inputs.plan.at(step))
        return stop, streak

    def evaluation(self, step: int, measured: dict[str, Any], params: dict[str, Any], key: jax.Array) -> None:
        """Writes what was measured on held-out text after a step, and thoughts to read if it thinks.

        Args:
          step: after which.
          measured: the held-out metrics.
          params: samples the thoughts.
          key: of these.

        Raises:
          OSError: it can't be written.
        """
        self._write(step, measured, self._inputs.plan.evaluated(step)[0])
        if self._thoughts is not None:
            self._thoughts.write(step, params, self._inputs.held_out[0], key)

    def evaluated(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        return bool(decide_first(lambda: self._last_evaluation(step) is not None))

    def last_evaluation(self, step: int) -> dict[str, Any]:
        """What was measured on held-out text after this step; empty if nothing was."""
        evaluation: dict[str, Any] = decide_first(lambda: self._last_evaluation(step) or {})
        return evaluation

    def _write(self, step: int, values: dict[str, Any], stage: Stage) -> None:
        if self._metrics is not None:
            # The capacity or length of thoughts in force, for the records of a run that changes it.
            self._metrics.write(step, values | self._inputs.plan.setting_of(stage))

    def _last_evaluation(self, step: int) -> dict[str, Any] | None:
        for record in reversed(read_metrics(self._path)):
            if record["step"] == step and "eval_loss" in record:
                return {name: value for name, value in record.items() if name != "step"}
        return None
