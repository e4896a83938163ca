"""What a person sees while a run trains: a progress bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from mod_star.units import duration, short_number

SMOOTHING_SECONDS = 10.0
"""Time constant of the tokens/s shown: what happened longer ago hardly counts."""


class TrainingProgress:
    """Progress of a training run: step, loss, smoothed tokens/s, time left. A context manager.

    In a terminal it is one bar, redrawn in place. Where output goes to a file or a pipe it is a plain line every
    `seconds_between_lines`, and one at the end.

    Args:
      steps: number of steps of the whole run.
      tokens_per_step: tokens that one step trains on.
      start: step that the run resumes from, 0 for a new one.
      label: word in front, such as the run's name.
      console: where to write; None: standard output.
      seconds_between_lines: outside a terminal, the least time between two lines.
      clock: seconds since any moment; tests bring their own.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        *,
        start: int = 0,
        label: str = "training",
        console: Console | None = None,
        seconds_between_lines: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._tokens_per_step, self._step, self._label = steps, tokens_per_step, start, label
        self._console = Console() if console is None else console
        self._seconds_between_lines, self._clock = seconds_between_lines, clock
        self._loss: float | None = None
        # Decayed sums over the recent past. The first interval holds compilation and is not counted.
        self._tokens, self._seconds = 0.0, 0.0
        self._last_update: float | None = None
        self._last_line = -math.inf
        self._printed_step = -1
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("[cyan]{task.fields[numbers]}"),
            console=self._console,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(escape(label), total=steps, completed=start, numbers="compiling")

    @property
    def tokens_per_second(self) -> float | None:
        """Smoothed over the last ten seconds or so, without compilation and pauses; None before two steps are done."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before there is one."""
        rate = self.tokens_per_second
        return None if rate is None else (self._steps - self._step) * self._tokens_per_step / rate

    def update(self, step: int, loss: float) -> None:
        """Reports that `step` steps are done, the latest with this loss."""
        now = self._clock()
        if self._last_update is not None:
            seconds = now - self._last_update
            share = math.exp(-seconds / SMOOTHING_SECONDS)
            self._seconds = share * self._seconds + seconds
            self._tokens = share * self._tokens + (step - self._step) * self._tokens_per_step
        self._last_update, self._step, self._loss = now, step, loss
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=self._numbers())
        elif now - self._last_line >= self._seconds_between_lines:
            self._print_line()

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Shows `what` is being done, such as "evaluating", and leaves its time out of the tokens/s."""
        self._bar.update(self._task, numbers=what)
        began = self._clock()
        try:
            yield
        finally:
            if self._last_update is not None:
                self._last_update += self._clock() - began
            self._bar.update(self._task, numbers=self._numbers())

    def say(self, message: str) -> None:
        """Prints a line of its own, above the bar. Rich markup is taken literally."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not self._console.is_terminal and self._last_update is not None and self._printed_step != self._step:
            self._print_line()

    def _numbers(self) -> str:
        if self._last_update is None:
            return "compiling"
        parts = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        rate, left = self.tokens_per_second, self.seconds_left
        if rate is not None and left is not None:
            parts.append(f"{short_number(rate)} tokens/s")
            if self._step < self._steps:
                parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._last_line, self._printed_step = self._clock(), self._step
        width = len(str(self._steps))
        self.say(f"{self._label}  step {self._step:{width}}/{self._steps}  {self._numbers()}")
