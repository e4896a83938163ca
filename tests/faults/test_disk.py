"""A disk that is full or may not be written to, and files that changed on it."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from fault_runs import arrays, differences, fresh_seed, newest, options, result
from fork_server import Server, shared_server, straight_run

from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.integrity import find_damage

STEPS, EVERY = 12, 2
RUN = options(steps=STEPS, checkpoint_every=EVERY, keep_checkpoints=6, eval_every=0)

# From the checkpoint of step 4 on, no file may grow beyond 1 KiB: for machines where nothing can be mounted.
FULL_AFTER_STEP_4 = """
import resource, sys
def hook(event, args):
    if event == "os.rename" and str(args[1]).endswith("checkpoints/4"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return straight_run(server, tmp_path_factory.mktemp("runs") / "straight", RUN)


@pytest.fixture
def disk(server: Server, tmp_path: Path) -> Path:
    if not server.can_mount:
        pytest.skip("nothing can be mounted here: that takes root, or user namespaces")
    path = tmp_path / "disk"
    path.mkdir()
    return path


def require_intact(run: Path, uninterrupted: Path) -> None:
    """All checkpoints are whole and hold what those of an undisturbed run do."""
    for step in saved_steps(run / "checkpoints"):
        assert find_damage(run / "checkpoints" / str(step)) is None
        assert arrays(run, step) == arrays(uninterrupted, step)


@pytest.mark.slow
def test_full_disk(server: Server, uninterrupted: Path, disk: Path) -> None:
    seed = fresh_seed()
    size = random.Random(seed).randrange(400, 700)
    told = f"MOD_STAR_FAULT_SEED={seed}: {size} KiB"
    seen = server.mount(disk, f"size={size}k") / "run"  # a checkpoint takes about 170
    stopped = server.run("train", str(disk / "run"), *RUN)
    last = newest(seen)
    assert 2 <= last < STEPS, told
    assert stopped.code == 1 and stopped.err == (
        f"error: {disk}/run/checkpoints/{last + EVERY}: No space left on device; "
        f"the last good checkpoint is {disk}/run/checkpoints/{last}. When that is mended, the same command goes on\n"
    ), (told, stopped)
    require_intact(seen, uninterrupted)
    server.mount(disk, "remount,size=8m")
    finished = server.run("train", str(disk / "run"), *RUN)
    assert (finished.code, finished.err) == (0, ""), (told, finished)
    assert f"goes on from step {last}:" in finished.out
    assert differences(result(seen), result(uninterrupted)) == [], told


@pytest.mark.slow
def test_files_that_may_not_grow(server: Server, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = server.run("train", str(run), *RUN, before=FULL_AFTER_STEP_4)
    assert saved_steps(run / "checkpoints") == [2, 4]
    message = rf"error: {run}(/checkpoints/6)?: File too large; the last good checkpoint is {run}/checkpoints/4\. .*\n"
    assert stopped.code == 1 and re.fullmatch(message, stopped.err), stopped
    require_intact(run, uninterrupted)


@pytest.mark.nightly
def test_other_commands_on_a_full_disk(server: Server, trained_run: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """One line, and nothing half-made is left; what an evaluation has is kept."""
    full = "import resource, sys; limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))"
    # Cut off entries in the cache that all tests share would make JAX warn wherever they are read.
    full += "; import jax; jax.config.update('jax_enable_compilation_cache', False)"
    at_once = full + "; limit()"
    hook = "lambda event, args: limit() if event == 'open' and str(args[0]).endswith('results.json.new') else None"
    for_results = full + f"; sys.addaudithook({hook})"
    data, out = tmp_path / "sums.jsonl", tmp_path / "out"
    data.write_text('{"q": "1 + 1?", "a": "2"}\n')
    evaluate: list[str | Path] = ["evaluate", trained_run, "--data", data, "--question", "{q}", "--answer", "{a}"]
    evaluate += ["--kind", "number", "--new-tokens", "2", "--out", out]
    for argv, where, before in (
        (["export", uninterrupted, tmp_path / "exported"], f"{tmp_path}/exported", at_once),
        (
            ["upcycle", uninterrupted, tmp_path / "upcycled", "--every", "1", "--capacity", "0.5"],
            rf"{tmp_path}/\.upcycled\.new",  # which becomes it when all is there
            at_once,
        ),
        (evaluate, rf"{out}/results\.json", for_results),
    ):
        stopped = server.run(*argv, before=before)
        last = stopped.err.splitlines()[-1]  # an evaluation says how far it is before
        assert stopped.code in (1, 2) and re.fullmatch(rf"error: {where}: .*File too large.*", last), stopped
        assert "Traceback" not in stopped.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sums.jsonl"]
    assert (out / "records.jsonl").read_text().count("\n") == 1


@pytest.mark.slow
def test_read_only_directory(server: Server, uninterrupted: Path, disk: Path) -> None:
    seen = server.mount(disk, "size=8m")
    shutil.copytree(uninterrupted, seen / "run")
    before = {path: path.read_bytes() for path in seen.rglob("*") if path.is_file()}
    server.mount(disk, "remount,ro")
    for name, message in (
        ("run", "run: is not writable: Read-only file system"),
        ("new", f"new: {disk} is not writable"),
    ):
        refused = server.run("train", str(disk / name), *RUN)
        assert (refused.code, refused.out, refused.err) == (2, "", f"error: {disk}/{message}\n")
    # Reading from it is fine.
    read = server.run("sample", str(disk / "run"), "--prompt", "a", "--new-tokens", "2", "--temperature", "0")
    assert read.code == 0 and read.out.startswith("a"), read
    assert {path: path.read_bytes() for path in seen.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_damaged_checkpoint(server: Server, uninterrupted: Path, tmp_path: Path) -> None:
    seed = fresh_seed()
    chance = random.Random(seed)
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    (run / "summary.json").unlink()  # as if killed just before the end
    last = run / "checkpoints" / str(STEPS)
    files = sorted(path for path in last.rglob("*") if path.stat().st_size and path.name != "_CHECKPOINT_METADATA")
    files = [path for path in files if path.is_file() and path.name != "commit_success.txt"]
    for flip in (True, False):
        path = chance.choice(files)
        good = path.read_bytes()
        at = chance.randrange(len(good))
        path.write_bytes(
            good[:at] + bytes([good[at] ^ (1 << chance.randrange(8))]) + good[at + 1 :] if flip else good[:at]
        )
        told = f"MOD_STAR_FAULT_SEED={seed}: {path}, {'a bit of' if flip else 'cut off at'} byte {at}"
        refused = server.run("train", str(run), *RUN)
        assert (refused.code, refused.out) == (2, ""), (told, refused)
        named = (
            rf"error: checkpoint {last} is damaged \([^\n]+\); --resume-from {STEPS - EVERY} takes the one before it\n"
        )
        assert re.fullmatch(named, refused.err), (told, refused)
        assert path.name in refused.err or path.name == "SHA256SUMS", (told, refused)
        assert saved_steps(run / "checkpoints") == saved_steps(uninterrupted / "checkpoints")
        if flip:
            path.write_bytes(good)
    finished = server.run("train", str(run), *RUN, "--resume-from", str(STEPS - EVERY))
    assert (finished.code, finished.err) == (0, ""), (told, finished)
    assert differences(result(run), result(uninterrupted)) == [], told
