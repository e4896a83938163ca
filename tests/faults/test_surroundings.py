"""Surroundings that a process doesn't expect: no locks, no home, no device."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from fault_runs import differences, options, result
from fork_server import Server, shared_server, straight_run
from some_nightly import some_nightly

from mod_star.distributed.sharding import all_devices
from mod_star.errors import UnavailableError
from mod_star.home import cache_root, expanded, home
from mod_star.runs.locks import is_locked

ROOT = Path(__file__).parents[2]
RUN = options(steps=2, eval_every=0)

NO_LOCKS = """
import fcntl
def flock(file, how):
    raise OSError({number}, os.strerror({number}))
fcntl.flock = flock
"""
NO_HOME = """
import pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found")
pwd.getpwuid = getpwuid
for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
    os.environ.pop(name, None)
"""


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return straight_run(server, tmp_path_factory.mktemp("runs") / "straight", RUN)


@pytest.mark.nightly
def test_a_file_system_without_locks(server: Server, straight: Path, tmp_path: Path) -> None:
    run, number = tmp_path / "run", errno.EOPNOTSUPP
    finished = server.run("train", str(run), *RUN, before=NO_LOCKS.format(number=number))
    note = f"note: {run}: its file system has no locks ({os.strerror(number)}): nothing keeps a second process from "
    assert (finished.code, finished.err) == (0, f"{note}training here at the same time\n")
    assert differences(result(run), result(straight)) == []


@pytest.mark.slow
def test_a_lock_that_is_refused_as_fcntl_may(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    finished = server.run("train", str(run), *RUN, before=NO_LOCKS.format(number=errno.EACCES))
    assert (finished.code, finished.err) == (2, f"error: {run}: another process is training here\n")
    (tmp_path / ".lock").touch()
    for number, locked in ((errno.EACCES, True), (errno.EWOULDBLOCK, True), (errno.ENOLCK, False)):
        with monkeypatch.context() as patched:
            patched.setattr("fcntl.flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "")))
            assert is_locked(tmp_path) is locked


@pytest.mark.nightly
def test_no_home(server: Server, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = server.run("train", str(run), *RUN, before=NO_HOME)
    assert (finished.code, finished.err) == (0, "")
    assert differences(result(run), result(straight)) == []
    refused = server.run("sample", "gs://bucket/run", before=NO_HOME)
    needs = "error: gs://bucket/run: needs a directory for a working copy: set HOME or XDG_CACHE_HOME\n"
    assert refused.code == 2 and refused.err in (needs, needs.replace("a directory", "the package gcsfs")), refused
    unknown = server.run("import", "~/model.gguf", tmp_path / "new", before=NO_HOME)
    assert unknown.code == 2 and unknown.err.startswith("error: ~/model.gguf: there is no such file"), unknown


def test_where_home_and_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for named, found in (("/cache", "/cache"), ("", "/home/me/.cache"), ("relative/cache", "/home/me/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert str(cache_root()) == found
    assert str(expanded("~/a")) == "/home/me/a"
    assert str(expanded("~no-such-user/a")) == "~no-such-user/a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for named in ("", "not/absolute"):
        monkeypatch.setenv("HOME", named)
        monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)
        assert home() is cache_root() is None


@pytest.mark.parametrize("words", some_nightly([[], ["-O"]], ["-O"]), ids=["asserts", "-O"])
@pytest.mark.slow
def test_a_platform_that_is_not_there(trained_run: Path, tmp_path: Path, words: list[str]) -> None:
    routes, train = ["routes", str(trained_run), "--text", "a"], ["train", str(tmp_path / "run"), *RUN]
    command = [sys.executable, *words, "-m", "mod_star", *(routes if words else train)]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS = 'cuda': cannot be used here: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_current_directory_that_is_gone(server: Server, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    finished = server.run("train", "run", *RUN, before=f"os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})")
    assert (finished.code, finished.err) == (1, "error: the current directory has been deleted\n")


def test_variables_that_nobody_understands(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mod_star", "routes", str(tmp_path), "--text", "a"]
    environment = os.environ | {"JAX_ENABLE_X64": "maybe", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    told = "error: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


@pytest.mark.parametrize("columns", ["0", "1", "wide"])
@pytest.mark.slow
def test_help_on_a_terminal_of_any_width(server: Server, columns: str) -> None:
    finished = server.run("sample", "--help", environment={"COLUMNS": columns})
    assert (finished.code, finished.err) == (0, "") and "--new-tokens" in finished.out


@pytest.mark.slow
def test_out_of_memory(server: Server, tmp_path: Path) -> None:
    exhausted = (
        "import mod_star.training.train as t, jax\n"
        "def fail(*_, **__): raise {error}\n"
        "t.TrainingSession.run_to_end = fail"
    )
    for error, told in (
        ("jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of 8 TB.\\n\\ndetails')", "Out of 8 TB."),
        ("jax.errors.JaxRuntimeError('INTERNAL: x: Out of memory for 9 B.')", "Out of memory for 9 B."),
        ("MemoryError()", "of this machine"),
    ):
        finished = server.run("train", tmp_path / "run", *RUN, before=exhausted.format(error=error))
        told = f"error: out of memory: {told}; mod-star plan says what a training step needs\n"
        assert (finished.code, finished.err) == (1, told)


def test_why_there_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, reason in (
        (RuntimeError("Unable to initialize backend 'tpu':\n in use"), "Unable to initialize backend 'tpu': in use"),
        (AssertionError(), "nothing that JAX has installed gives it such a device"),
        (AttributeError("'NoneType' object has"), "nothing that JAX has installed gives it such a device"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(jax, "devices", fail)
        with pytest.raises(UnavailableError) as raised:
            all_devices()
        assert str(raised.value).endswith(f"cannot be used here: {reason}")
        assert raised.value.exit_code == 1
