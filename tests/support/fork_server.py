"""Many real `mod-star` processes for the price of one import.

A server imports the package once and forks for every command; JAX starts its backend (and its threads) after the fork,
in the command's own process. From there on such a process is like any other: signals reach it alone, its exit code and
its output are its own. Run as a script this file is the server, imported it is what tests talk to it with.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME_STEPS = "# What comes first changes nothing that a training step computes.\n"
"""In `before` of a command, which then shares its steps although `before` changes something of ours."""
TIMEOUT = 120.0
"""Seconds after which a command hangs, for all we know."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    """Exit code; -9 if it was killed."""
    out: str
    err: str
    cpu_seconds: float


class Process:
    """A running `mod-star` command."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self._server, self._output = server, output
        self.pid = pid

    def out(self) -> str:
        """What it has written to standard output up to now."""
        return self._read("out")

    def err(self) -> str:
        """What it has written to standard error up to now."""
        return self._read("err")

    def running(self) -> bool:
        """Whether it still is. False also for one that nobody has waited for yet."""
        return any(state not in "ZX" for state in self._states())

    def send(self, number: int) -> None:
        """Sends it a signal; one that has ended already doesn't mind."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def pause(self) -> bool:
        """Stops all of its threads where they are, until `send(SIGCONT)`; False if it ended instead."""
        self.send(signal.SIGSTOP)
        while self.running() and not self.paused():
            time.sleep(0.0005)
        return self.running()

    def paused(self) -> bool:
        """Whether all of its threads are stopped."""
        states = self._states()
        return bool(states) and all(state == "T" for state in states)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits until something holds (True) or the process has ended (False)."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if not self.running():
                return condition()
            assert time.monotonic() < deadline, f"hangs: {self.out()}{self.err()}"
            time.sleep(0.001)
        return True

    def wait(self) -> Finished:
        """Waits for its end."""
        code, cpu_seconds = self._server.ask(wait=self.pid)
        assert code is not None, f"hangs: {self.out()}{self.err()}"
        finished = Finished(code, self.out(), self.err(), cpu_seconds)
        shutil.rmtree(self._output)
        return finished

    def _read(self, name: str) -> str:
        """The file as it is: reading it as text would make newlines of a model's "\\r"."""
        return (self._output / name).read_bytes().decode(errors="replace")

    def _states(self) -> list[str]:
        """Of all threads, as in proc(5)."""
        states = []
        for thread in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                states.append(thread.read_text().rpartition(")")[2].split()[0])
        return states


class Server:
    """Starts commands. `shared_server` gives the one that all tests of a session share."""

    def __init__(self) -> None:
        self._outputs = Path(tempfile.mkdtemp(prefix="mod-star-commands-"))
        self._started = 0
        self._server = subprocess.Popen(
            [*_own_mounts(), sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.can_mount: bool = self.ask(can_mount=True)

    def start(self, *argv: str | Path, before: str = "", environment: dict[str, str] | None = None) -> Process:
        """Starts `mod-star` with these arguments.

        Args:
          argv: what follows `mod-star`.
          before: Python code that the process runs first, such as what makes a fault; `os` is imported. If it has to
            do with matplotlib, curves are drawn, see quick_pictures.py.
          environment: variables of its own. JAX, which the server has imported, doesn't read them any more.
        """
        self._started += 1
        output = self._outputs / str(self._started)
        output.mkdir()
        for name in ("out", "err"):
            (output / name).touch()
        request = {"argv": [str(word) for word in argv], "before": before, "environment": environment or {}}
        return Process(self, self.ask(**request, output=str(output)), output)

    def run(self, *argv: str | Path, before: str = "", environment: dict[str, str] | None = None) -> Finished:
        """Runs `mod-star` with these arguments to its end."""
        return self.start(*argv, before=before, environment=environment).wait()

    def mount(self, path: Path, options: str) -> Path:
        """Mounts a tmpfs on a directory (or again, with other options), for the commands only.

        Returns:
          The path under which this process sees it.
        """
        error = self.ask(mount=str(path), options=options)
        assert not error, os.strerror(error)
        return Path(f"/proc/{self._server.pid}/root{path}")

    def ask(self, **request: Any) -> Any:
        """Sends a request and returns the answer."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """Ends the server and whatever it has started."""
        self._server.communicate()
        shutil.rmtree(self._outputs, ignore_errors=True)


@functools.cache
def shared_server() -> Server:
    """The server; it ends with this process."""
    server = Server()
    atexit.register(server.close)
    return server


def succeed(*argv: str | Path, before: str = "", environment: dict[str, str] | None = None) -> Finished:
    """`Server.run` of a command that must succeed."""
    finished = shared_server().run(*argv, before=before, environment=environment)
    assert finished.code == 0, finished.err[-3000:]
    return finished


def straight_run(server: Server, path: Path, options: Sequence[str]) -> Path:
    """Trains a run with these options to its end, without interruption or complaint; returns its directory."""
    finished = server.run("train", str(path), *options)
    assert (finished.code, finished.err) == (0, "")
    return path


def _own_mounts() -> list[str]:
    """Words before a command that give it mounts of its own, if that is permitted: they are gone when it ends."""
    for words in (["unshare", "--mount"], ["unshare", "--mount", "--user", "--map-root-user"]):
        with contextlib.suppress(OSError):
            if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
                return words
    return []


def _serve() -> None:
    """Answers requests until there are no more."""
    import importlib
    import pkgutil
    import warnings

    import matplotlib.backends.backend_agg
    import matplotlib.pyplot  # noqa: F401
    import one_mlir_context
    import quick_pictures  # noqa: F401
    import shared_steps  # noqa: F401

    import mod_star.cli

    for module in pkgutil.walk_packages(mod_star.__path__, "mod_star."):
        if not module.name.endswith(".__main__"):
            with contextlib.suppress(ImportError):  # what an extra would bring
                importlib.import_module(module.name)
    warnings.filterwarnings("ignore", message=".*fork")  # JAX's threads aren't there yet
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # as in conftest.py
    one_mlir_context.keep_contexts()
    libc = ctypes.CDLL(None, use_errno=True)
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if "argv" in request:
            pid = os.fork()
            if pid == 0:
                libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the server
                _become(request)
                mod_star.cli.main(request["argv"])
            living.add(pid)
            answer = pid
        elif "wait" in request:
            answer = _end_of(request["wait"])
            living.discard(request["wait"])
        elif "mount" in request:
            flags = 32 if "remount" in request["options"] else 0  # MS_REMOUNT
            flags |= 1 if "ro" in request["options"].split(",") else 0  # MS_RDONLY
            data = ",".join(word for word in request["options"].split(",") if word not in ("ro", "remount"))
            failed = libc.mount(b"tmpfs", request["mount"].encode(), b"tmpfs", flags, data.encode())
            answer = ctypes.get_errno() if failed else 0
        elif "can_mount" in request:
            with tempfile.TemporaryDirectory() as place:
                answer = _own_mounts() != [] and libc.mount(b"tmpfs", place.encode(), b"tmpfs", 0, b"size=64k") == 0
                if answer:
                    libc.umount(place.encode())
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any]) -> None:
    """Makes a fork of the server what a shell would start, and runs what is to come first."""
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        file = os.open(os.path.join(request["output"], name), flags | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environment"])
    faulthandler.register(signal.SIGUSR1)  # writes where all threads are
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    before = request["before"]
    if programs and (SAME_STEPS in before or not re.search("jax|mod_star|optax", before)):
        from shared_steps import share_steps

        share_steps(Path(programs) / "steps")
    if "matplotlib" not in before:
        from quick_pictures import draw_quickly

        draw_quickly()
    exec(before, {"os": os})


def _end_of(pid: int) -> tuple[int | None, float]:
    """Exit code (None: it hung, said where on standard error, and was killed) and CPU seconds of a process."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.002)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, 0.0


if __name__ == "__main__":
    _serve()
