"""Processes that can't be had now: one line, and an exit code after which the same command may be tried again."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from mod_star.cli import main
from mod_star.config import ProcessesConfig
from mod_star.distributed import processes
from mod_star.errors import InputError, UnavailableError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What JAX is asked to join, instead of doing so."""
    asked: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **_: asked.append(words))
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.1)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    return asked


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "refused"), ("[::1]", ""), ("no-such-host.invalid", ""), ("x" * 70, "label too long")],
)
def test_a_first_process_that_is_not_there(
    host: str, reason: str, joined: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"{host}:{free_port()}"
    options = ["--processes.coordinator", where, "--processes.count", "2", "--processes.index", "1"]
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "run"), "--preset", "tiny", *options])
    out, err = capsys.readouterr()
    assert (left.value.code, out, joined) == (1, "", [])
    assert err.startswith(f"error: processes: cannot be joined ({where}): ") and reason in err
    assert err.count("\n") == 1


def test_a_first_process_that_is_late(joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "JOIN_SECONDS", 30)
    port = free_port()
    config = ProcessesConfig(f"127.0.0.1:{port}", 2, 1)
    late = socket.socket()

    def listen() -> None:
        assert joined == []
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        late.bind(("127.0.0.1", port))
        late.listen()

    timer = threading.Timer(0.3, listen)
    timer.start()
    processes.join_processes(config)
    timer.join()
    late.close()
    assert joined == [(config.coordinator, 2, 1)]


def test_the_first_process_itself_and_a_single_one_wait_for_nothing(joined: list[Any]) -> None:
    for config in (ProcessesConfig(f"127.0.0.1:{free_port()}", 2, 0), ProcessesConfig()):
        processes.join_processes(config)
    assert len(joined) == 2


@pytest.mark.parametrize("error", [RuntimeError("Failed to recognize\ncoordinator address w-0"), OSError("no route")])
def test_a_cluster_that_jax_cannot_find_out_about(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UnavailableError) as raised:
        processes.join_processes(ProcessesConfig())
    assert str(raised.value) == f"processes: cannot be joined (found by JAX): {str(error).replace(chr(10), ' ')}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("bad"), InputError("bad")),
        (UnavailableError("gone"), UnavailableError("gone")),
        (OSError("disk"), UnavailableError("process 0 failed: OSError: disk")),
    ],
)
def test_what_the_first_process_cannot_have_no_other_can(
    error: Exception, expected: InputError, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, sent = 0, ""

    def gather(value: Any) -> list[Any]:
        nonlocal sent
        sent = sent if index else json.dumps(value)
        return [json.loads(sent)]

    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "gather", gather)
    for index in range(2):
        with pytest.raises(Exception, match=f"^{expected if index else error}$") as raised:
            processes.decide_first(fail)
        assert type(raised.value) is type(expected if index else error)
