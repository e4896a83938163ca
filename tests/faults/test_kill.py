"""Processes that are killed, stopped and started again: at random moments, and at every moment there is."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import complaints, differences, fresh_seed, newest, options, records, result
from fork_server import Server, shared_server, straight_run

from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.integrity import find_damage

STEPS, EVERY = 240, 10
RUN = options(steps=STEPS, checkpoint_every=EVERY, eval_every=40)
GRACE_SECONDS = 15.0
"""Half of what clouds and schedulers leave between SIGTERM and SIGKILL."""

# Decades back and forth, now and then; and it is another clock in every process. It doesn't jump while Orbax waits for
# a signal among its own threads, some microseconds: that wait goes by this clock, and would be given up.
JUMPING_CLOCK = """
import random, sys, time
real, chance, offset = time.time, random.Random({seed}), 0.0
def waits(frame):
    while frame is not None and frame.f_code.co_name != "blocking_key_value_get":
        frame = frame.f_back
    return frame is not None
def jumping():
    global offset
    if chance.random() < 0.05 and not any(map(waits, sys._current_frames().values())):
        offset = chance.uniform(-1e9, 1e9)
    return real() + offset
offset = chance.uniform(-1e9, 1e9)
time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)
"""

# Stops the whole process just before each change of a file in a directory.
STOPS_BEFORE_EVERY_CHANGE = """
import os, signal, sys
def hook(event, args):
    if event == "open":
        changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
    relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # as shutil.rmtree does it
    if changes and (relative or str(args[0]).startswith({directory!r})):
        os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(hook)
"""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return straight_run(server, tmp_path_factory.mktemp("runs") / "straight", RUN)


def unfinished(run: Path) -> set[int]:
    """Saves that are under way, or were: the inodes of their directories."""
    if not (run / "checkpoints").is_dir():
        return set()
    with os.scandir(run / "checkpoints") as entries:
        return {entry.inode() for entry in entries if "tmp" in entry.name}


@pytest.mark.nightly
def test_stopped_at_random_moments(
    server: Server, uninterrupted: Path, tmp_path: Path, record_property: Record
) -> None:
    seed = fresh_seed()
    chance = random.Random(seed)
    run = tmp_path / "run"
    moments = ["start", "training", "save", "SIGTERM"] * 2
    chance.shuffle(moments)
    counts: Counter[str] = Counter()
    start_up, slowest = 1.0, 0.0
    for number, moment in enumerate(moments):
        told = f"process {number} of MOD_STAR_FAULT_SEED={seed}"
        before, left, began = newest(run), unfinished(run), time.monotonic()
        process = server.start("train", str(run), *RUN, before=JUMPING_CLOCK.format(seed=seed + number))
        if moment == "start":
            time.sleep(chance.uniform(0, start_up))
        else:
            process.wait_for(lambda least=before: max(saved_steps(run / "checkpoints"), default=0) > least)  # type: ignore[misc]
            start_up = time.monotonic() - began
            if moment == "save":
                process.wait_for(lambda left=left: bool(unfinished(run) - left))  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.06))
        sent = time.monotonic()
        process.send(signal.SIGTERM if moment == "SIGTERM" else signal.SIGKILL)
        finished = process.wait()
        if finished.code == 0:  # it was faster, at its end
            break
        if moment == "SIGTERM":
            slowest = max(slowest, time.monotonic() - sent)
            assert finished.code == 143, (told, finished)
            said = re.search(r"^SIGTERM: stopped after step (\d+) of \d+, all of it saved", finished.err, re.MULTILINE)
            assert said and newest(run) == int(said[1]) > before, (told, finished)
            assert not unfinished(run), told
        else:
            assert (finished.code, complaints(finished.err)) == (-signal.SIGKILL, []), (told, finished)
        if before and "step" in finished.out:  # or it was killed before it came to say so
            assert f"goes on from step {before}:" in finished.out, (told, finished)
        # What isn't saved is lost, and no more: the steps since the last checkpoint, and a checkpoint on its way.
        assert newest(run) >= before, told
        assert max([0, *(record["step"] for record in records(run))]) - newest(run) <= 2 * EVERY, told
        counts["SIGTERM" if moment == "SIGTERM" else "save" if unfinished(run) - left else moment] += 1
    assert counts.total() >= 7 and slowest < GRACE_SECONDS, (seed, counts, slowest)
    finished = server.run("train", str(run), *RUN, before=JUMPING_CLOCK.format(seed=seed - 1))
    assert (finished.code, complaints(finished.err)) == (0, []), (seed, finished)
    assert differences(result(run), result(uninterrupted)) == [], seed
    record_property(
        "faults",
        f"{counts.total() - counts['SIGTERM']} x kill -9 ({counts['start']} at start-up, {counts['training']} between "
        f"saves, {counts['save']} in a save), {counts['SIGTERM']} x SIGTERM (gone in {slowest:.2f} s), seed {seed}",
    )


@pytest.mark.slow
def test_killed_at_every_change_of_a_file(server: Server, tmp_path: Path, record_property: Record) -> None:
    seed = fresh_seed()
    chance = random.Random(seed)
    parts = tmp_path / "own.py"
    parts.write_text("from mod_star.parts import Parts\nparts = Parts()\n")
    words = [*options(steps=3, checkpoint_every=1, keep_checkpoints=1), "--parts", f"{parts}:parts"]
    run, images = tmp_path / "run", tmp_path / "images"
    process = server.start("train", str(run), *words, before=STOPS_BEFORE_EVERY_CHANGE.format(directory=str(run)))
    seen: Counter[str] = Counter()
    while process.wait_for(process.paused):
        # What is on the disk now is what a kill at this moment leaves.
        steps = saved_steps(run / "checkpoints")
        done = newest(run)
        assert done >= (max(steps) if steps else 0)
        trained = [record["step"] for record in records(run) if "loss" in record]
        assert trained[:done] == list(range(1, done + 1)), "what belongs to a checkpoint is written before it"
        if not (run / "config.json").exists():
            moment = "creation"
        elif any(find_damage(run / "checkpoints" / str(step)) for step in steps):
            moment = "deletion"
        else:
            moment = "save" if unfinished(run) else "training"
        seen[moment] += 1
        if chance.random() < 1 / seen[moment]:  # each is as likely as the others to be the last one kept
            shutil.rmtree(images / moment, ignore_errors=True)
            if run.exists():
                shutil.copytree(run, images / moment)
        process.send(signal.SIGCONT)
    finished = process.wait()
    assert (finished.code, complaints(finished.err)) == (0, []), finished
    assert seen["creation"] >= 4 and seen["save"] > 60 and seen["deletion"] > 40, seen
    for image in sorted(images.iterdir()):
        again = server.run("train", str(image), *words)
        assert (again.code, complaints(again.err)) == (0, []), (image.name, seed, again)
        assert differences(result(image), result(run)) == [], (image.name, seed)
        assert not unfinished(image) and newest(image) == 3
    record_property(
        "faults",
        f"{seen.total()} moments at which a kill was looked at ({', '.join(f'{n} {m}' for m, n in seen.items())}), "
        f"{len(list(images.iterdir()))} of them gone on from, seed {seed}",
    )


@pytest.mark.slow
def test_one_process_in_a_directory_and_none_after_a_kill(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = server.start("train", str(run), *RUN)
    assert first.wait_for((run / "config.json").exists)
    assert first.pause()
    second = server.run("train", str(run), *RUN)
    assert (second.code, second.out) == (2, "")
    assert second.err == f"error: {run}: another process is training here\n"
    first.send(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    third = server.start("train", str(run), *RUN)
    assert third.wait_for(lambda: f"{run} starts: " in third.out()), third.err()
    third.send(signal.SIGKILL)
    third.wait()
