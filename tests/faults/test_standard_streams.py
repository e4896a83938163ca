"""Standard streams that nobody reads, that are full, closed or of another encoding."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from fault_runs import complaints, differences, newest, options, result
from fork_server import Server, shared_server, straight_run
from some_nightly import some_nightly

from mod_star.runs.checkpoints import saved_steps

STEPS = 4
RUN = options(steps=STEPS, checkpoint_every=2, eval_every=0)

UNREAD = "r, w = os.pipe(); os.close(r); os.dup2(w, {number}); os.close(w)"
FULL = "full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, {number}); os.close(full)"
CLOSED = "[os.close(number) for number in range(3)]; import sys; sys.stdin = sys.stdout = sys.stderr = None"
REASONS = {UNREAD: "Broken pipe", FULL: "No space left on device"}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return straight_run(server, tmp_path_factory.mktemp("runs") / "straight", RUN)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text('{"q": "1 + 1?", "a": "2"}\n')
    return path


@pytest.mark.parametrize("fault", some_nightly([UNREAD, FULL], FULL), ids=["unread", "full"])
@pytest.mark.slow
def test_a_training_goes_on_when_its_output_cannot_be_written(
    server: Server, uninterrupted: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "run"
    finished = server.run("train", str(run), *RUN, before=fault.format(number=1))
    note = f"note: standard output: {REASONS[fault]}: training goes on and prints no progress\n"
    assert (finished.code, finished.out, finished.err) == (0, "", note)
    assert differences(result(run), result(uninterrupted)) == []


@pytest.mark.parametrize("fault", some_nightly([UNREAD, CLOSED], UNREAD), ids=["unread", "closed"])
@pytest.mark.slow
def test_a_training_needs_no_streams_at_all(server: Server, uninterrupted: Path, tmp_path: Path, fault: str) -> None:
    """Nor does what libraries write to standard error get into the run's files."""
    run = tmp_path / "run"
    both = fault if fault == CLOSED else f"{fault.format(number=1)}; {fault.format(number=2)}"
    writes = "\nimport threading; threading.Timer(0.3, os.write, (2, b'from a library')).start()"
    assert server.run("train", str(run), *RUN, before=both + writes).code == 0
    assert differences(result(run), result(uninterrupted)) == []


@pytest.mark.nightly
def test_other_commands_end(server: Server, trained_run: Path, data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    asking = (
        "--question", "{q}", "--answer", "{a}", "--kind", "number", "--new-tokens", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    sample = ("sample", trained_run, "--prompt", "a", "--new-tokens", "2")
    for fault, argv in (
        (UNREAD, (*sample, "--json")),
        (UNREAD, ("evaluate", trained_run, "--data", data, *asking)),
        (UNREAD, ("export", uninterrupted, tmp_path / "exported")),
        (UNREAD, ("train", "--help")),
        (UNREAD, ("--help",)),
        (FULL, sample),
        (FULL, ("evaluate", trained_run, "--data", data, *asking)),
        (FULL, ("--help",)),
    ):
        finished = server.run(*argv, before=fault.format(number=1))
        lines = [line for line in finished.err.splitlines() if not line.startswith(("1 of 1  ", "note: texts end at "))]
        told = [] if fault == UNREAD else ["error: standard output: No space left on device"]
        assert (finished.code, lines) == (141 if fault == UNREAD else 1, told), (argv, finished)
    # The work was done before it was told of.
    assert json.loads((tmp_path / "out" / "results.json").read_text())["items"] == 1
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
def test_standard_error_is_expendable(server: Server, trained_run: Path) -> None:
    finished = server.run(
        "sample", trained_run, "--prompt", "a", "--new-tokens", "2", "--temperature", "0", before=FULL.format(number=2)
    )
    assert finished.code == 0 and finished.out.startswith("a")


@pytest.mark.parametrize("encoding", some_nightly(["latin-1", "ascii"], "ascii"))
@pytest.mark.slow
def test_characters_that_the_encoding_lacks(
    server: Server, trained_run: Path, data: Path, tmp_path: Path, encoding: str
) -> None:
    before = f"import sys; [s.reconfigure(encoding={encoding!r}) for s in (sys.stdout, sys.stderr)]"
    prompt = ("--prompt", "Ω = π…", "--new-tokens", "1", "--temperature", "0")
    sampled = server.run("sample", trained_run, *prompt, before=before)
    assert sampled.code == 0 and sampled.out.startswith("\\u03a9 = \\u03c0..."), sampled
    if encoding != "ascii":  # the other commands write no more than ASCII lacks
        return
    shown = server.run("routes", trained_run, "--text", "aΩ", "--png", tmp_path / "routes.png", before=before)
    assert shown.code == 0 and "#" * 30 in shown.out, shown
    asking = (
        "--question", "{q}", "--answer", "{a}", "--kind", "number", "--new-tokens", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    asked = server.run("evaluate", trained_run, "--data", data, *asking, before=before)
    assert asked.code == 0 and "0.0 - " in asked.out, asked


@pytest.mark.nightly
def test_a_terminal_that_closes(server: Server, uninterrupted: Path, tmp_path: Path) -> None:
    """It saves before it goes, though nobody can be told; nohup keeps it going."""
    words = options(steps=2000, checkpoint_every=2, eval_every=0)
    run = tmp_path / "run"
    as_a_terminal = "; import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # pytest may run under nohup
    process = server.start("train", str(run), *words, before=UNREAD.format(number=2) + as_a_terminal)
    assert process.wait_for(lambda: bool(saved_steps(run / "checkpoints")))
    process.send(signal.SIGHUP)
    assert process.wait().code == 129
    last = newest(run)
    again = server.start(
        "train", str(run), *words, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    assert again.wait_for(lambda: max(saved_steps(run / "checkpoints")) > last)
    assert f"goes on from step {last}:" in again.out()
    again.send(signal.SIGHUP)
    reached = max(saved_steps(run / "checkpoints"))
    assert again.wait_for(lambda: max(saved_steps(run / "checkpoints")) > reached)
    again.send(signal.SIGTERM)
    finished = again.wait()
    assert finished.code == 143 and complaints(finished.err)[0].startswith("SIGTERM: stopped after step ")


@pytest.mark.slow
def test_ctrl_c_with_nobody_to_tell(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = options(steps=2000, checkpoint_every=2, eval_every=0)
    process = server.start("train", str(run), *words, before=UNREAD.format(number=2))
    assert process.wait_for(lambda: bool(saved_steps(run / "checkpoints")))
    process.send(signal.SIGINT)
    assert process.wait().code == 130
    assert newest(run) >= 2
