"""The command `mod-star`: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 training failed or what it needs can't be had now, 2 bad input, 129 SIGHUP, 130 Ctrl-C, 141 nobody
reads its output any more, 143 SIGTERM.
"""

from __future__ import annotations

import difflib
import importlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import mod_star
from mod_star.errors import InputError
from mod_star.standard_streams import OutputError, usable_streams

# A subcommand is a module of `mod_star.commands`, by the same name (`import`: import_model), and a line here.
COMMANDS = {
    "train": "train a Mixture-of-Depths model (or its dense twin), or go on with an interrupted run",
    "plan": "compile the training step for devices that are not there: memory, FLOPs, communication; does it fit?",
    "upcycle": "make a dense model a Mixture-of-Depths model that computes the same, to lower its capacity in training",
    "import": "make a run of a pretrained model: a Hugging Face directory, a hub name or a GGUF file",
    "export": "write a dense model as a Hugging Face directory, for transformers",
    "verify": "compare every file of a run's checkpoints with its checksum",
    "sample": "generate text with a trained model",
    "routes": "show which tokens of a text each routed block computes",
    "calibrate": "choose how unsure a thinking model must be to think, for sample --think auto",
    "evaluate": "ask a model the questions of a task, by any decoding, and count right answers",
    "harness": "run EleutherAI's lm-evaluation-harness (lm_eval) with --model mod_star --model_args run=RUN",
    "thoughts": "show what a thinking model thinks before every token of a text",
}

HELP = """usage: mod-star COMMAND ...

Adaptive-compute language models in JAX: a Mixture-of-Depths network decides which tokens each block computes.

commands:
{commands}

example:
  mod-star train runs/first --preset tiny

Every command explains itself: mod-star COMMAND --help
"""

ABORTED = "aborted; what was saved before is kept"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `mod-star` with these arguments (None: the process's own) and exits."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with usable_streams() as output, _noticed_interrupts() as interrupts:
        try:
            try:
                _run(argv)
            finally:
                output.flush()
        except InputError as error:
            _leave(error.exit_code, f"error: {_with_addresses(str(error))}")
        except OutputError as error:  # as in `mod-star train --help | head`
            _leave(141) if error.is_closed else _leave(1, f"error: {error}")
        except OSError as error:  # of a file that nobody has said more about
            _leave(1, f"error: {_with_addresses(_described(error))}")
        except KeyboardInterrupt:
            _leave(130, ABORTED)
        except Exception as error:
            if interrupts:  # what it interrupted made another error of it
                _leave(130, ABORTED)
            if reason := _out_of_memory(error):
                _leave(1, f"error: out of memory: {reason}; mod-star plan says what a training step needs")
            if isinstance(error, ValueError) and _raised_in(error).endswith("jax/_src/config.py"):
                _leave(2, f"error: {error}")  # a variable of JAX's, such as JAX_ENABLE_X64=maybe
            raise
        sys.exit(0)


@contextmanager
def _noticed_interrupts() -> Iterator[list[int]]:
    """Yields a list that each Ctrl-C adds its signal to, besides raising KeyboardInterrupt as ever.

    Compiled code that calls Python, such as JAX's comparison of arguments, may turn that into an error of its own.
    Where Ctrl-C has another effect (or none, as with nohup), it keeps it.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield received
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
        print(HELP.format(commands=commands), end="")
        return
    if argv[0] == "--version":
        print(f"mod-star {mod_star.__version__}")
        return
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"; perhaps you meant {near[0]}" if near else ""
        raise InputError(f"unknown command {name!r}{meant}; there are {', '.join(COMMANDS)}, see mod-star --help")
    module = "import_model" if name == "import" else name  # `import` is a word of Python's
    command = importlib.import_module(f"mod_star.commands.{module}")
    command.run(rest)


def _described(error: OSError) -> str:
    """File and reason on one line."""
    if isinstance(error, FileNotFoundError) and not error.filename:  # by getcwd(2), which a relative path asks
        return "the current directory has been deleted"
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _out_of_memory(error: Exception) -> str | None:
    """What Python or XLA couldn't allocate, on one line; None: it is another error."""
    if isinstance(error, MemoryError):
        return str(error) or "of this machine"
    exhausted = re.search(r"RESOURCE_EXHAUSTED: *([^\n]*)|(Out of memory [^\n]*)", str(error))
    return exhausted[1] or exhausted[2] if exhausted and type(error).__name__ == "JaxRuntimeError" else None


def _raised_in(error: Exception) -> str:
    """The file of the line that raised it."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


def _with_addresses(message: str) -> str:
    from mod_star.runs.buckets import with_addresses  # only now: help and versions need no configuration

    return with_addresses(message)


def _leave(code: int, message: str = "") -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)
