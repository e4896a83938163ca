"""Standard streams that a command can rely on: open, able to write every character, and closed in a known way.

A command may be started with a stream closed (`>&-`), with an encoding that lacks most characters, with a reader that
goes away (`| head -1`) or onto a full device. What then becomes of standard output is the command's choice: by default
the first failure ends it; a training gives its output up and goes on. Standard error is given up without a word: there
is nowhere left to say one.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

SIGNS = {
    "─": "-", "│": "|", "█": "#", "░": ".", "⟨": "<", "⟩": ">", "↵": "|", "→": ">", "·": ".", "…": "...", "×": "x",
    "–": "-", "−": "-", "Δ": "D", "Σ": "S", "∅": "-",
}  # fmt: skip
"""What stands for the signs of our own output where an encoding lacks them."""
_ERRORS = "mod_star_signs"


class OutputError(Exception):
    """Standard output can't be written. No OSError, so that nobody takes it for one of a file.

    Attributes:
      is_closed: nobody reads it any more, which is no failure.
      reason: in words.
    """

    def __init__(self, error: OSError) -> None:
        self.is_closed = error.errno == errno.EPIPE
        self.reason = error.strerror or str(error)
        super().__init__(f"standard output: {self.reason}")


class Output:
    """A text stream whose failures are `OutputError`, or end it: from then on what is written goes nowhere.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._note: str | None = None

    def may_end(self, note: str) -> None:
        """Lets the stream end at a failure, with `note` and the reason on standard error; an empty one isn't told."""
        self._note = note

    def write(self, text: str) -> int:
        """As of a text stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As of a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of a text stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        # What the stream still holds must not fail once more when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._note is None:
            raise OutputError(error)
        if self._note:
            print(f"note: standard output: {error.strerror or error}: {self._note}", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting_output(note: str) -> TextIO | None:
    """Standard output for work that is worth more than what it prints: at a failure the output ends, not the work.

    Args:
      note: what is told then on standard error, after the reason.

    Returns:
      The stream; None if there is none.
    """
    if sys.stdout is None:
        return None
    stream: Any = sys.stdout
    output = stream if isinstance(stream, Output) else Output(stream)
    output.may_end(note)
    return cast(TextIO, output)


@contextlib.contextmanager
def usable_streams() -> Iterator[Output]:
    """Makes the three standard streams usable, and yields standard output; gives them back as they were.

    A stream that is closed becomes one of nothing: otherwise the next file that is opened would take its number, and
    get what libraries write to it. Characters that the encoding lacks are written as `SIGNS` or escaped.

    Raises:
      OutputError: standard output couldn't be written, at the latest when it is flushed at the end.
    """
    before = sys.stdout, sys.stderr
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _open_if_closed(number, name)
    codecs.register_error(_ERRORS, _sign)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape", "backslashreplace"):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                cast(Any, stream).reconfigure(errors=_ERRORS)
    output, complaints = Output(sys.stdout), Output(sys.stderr)
    complaints.may_end("")
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, complaints)
    try:
        try:
            yield output
        finally:
            output.flush()
            complaints.flush()
    finally:
        sys.stdout, sys.stderr = before


def _open_if_closed(number: int, name: str) -> None:
    try:
        os.fstat(number)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
    if getattr(sys, name) is None:
        setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


def _sign(error: UnicodeError) -> tuple[str | bytes, int]:
    """Signs, escapes, and the very bytes of a file's name that is no text."""
    assert isinstance(error, UnicodeEncodeError)
    written = b""
    for character in error.object[error.start : error.end]:
        if "\udc80" <= character <= "\udcff":
            written += character.encode("utf-8", "surrogateescape")
        else:
            written += SIGNS.get(character, character).encode("ascii", "backslashreplace")
    return written, error.end
