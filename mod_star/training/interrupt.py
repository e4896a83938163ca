"""Why a training ends early: SIGTERM, SIGHUP and Ctrl-C, which stop it after the current step; errors."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mod_star.errors import TrainingError


class Interrupted(Exception):
    """SIGTERM, SIGHUP or Ctrl-C ended training after a whole step; everything is saved.

    Attributes:
      signal: number of the signal.
      step: steps done.
    """

    def __init__(self, signal_number: int, step: int, total_steps: int) -> None:
        self.signal, self.step = signal_number, step
        done = f"after step {step} of {total_steps}, all of it saved" if step else "before the first step"
        super().__init__(f"{_name(signal_number)}: stopped {done}")


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that says which signal asked to stop (None: none). A second Ctrl-C aborts at once.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            if callable(usual := before[number]):
                usual(number, frame)
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT:  # someone is watching. Not print: a handler may interrupt one.
            with suppress(OSError):  # or nobody any more
                os.write(2, b"\nstopping after this step; Ctrl-C again aborts at once\n")

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it: the terminal may go
        numbers.append(signal.SIGHUP)
    before = {int(number): signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class LostProcess(TrainingError):
    """Another process has died or can't be reached. This one can't do anything with JAX either; it should end."""

    def __init__(self, error: Exception, last_good: str) -> None:
        reason = str(error).partition("\n")[0][:200]
        super().__init__(
            f"another process is gone ({reason}); {last_good}. Started in all of them, the same command goes on"
        )
