"""Trains many runs, several at a time, each on a core of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from pathlib import Path

from mod_star.config import RunConfig
from mod_star.errors import require


def train_all(runs: Mapping[str, RunConfig], out: Path, workers: int) -> None:
    """Trains what is not complete yet, in the given order. Interrupted, the same call goes on.

    Args:
      runs: by name: a run is kept in `out`/NAME, and what it prints in `out`/NAME.log.
      out: a directory; made if absent.
      workers: processes at a time, each bound to one core; at most as many as there are cores.

    Raises:
      InputError: there are no workers.
      SystemExit: a run failed. Runs that were complete are kept.
    """
    require(workers >= 1, "--workers", workers, "must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a process reads the number of its cores when it imports JAX
    cores: Queue[int] = context.Queue()
    own = sorted(os.sched_getaffinity(0))[:workers]
    for core in own:
        cores.put(core)
    with ProcessPoolExecutor(len(own), mp_context=context, initializer=_bind, initargs=(cores,)) as pool:
        names = {pool.submit(train_one, run, out, name): name for name, run in runs.items()}
        for done in as_completed(names):
            if (error := done.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                log = out / f"{names[done]}.log"
                raise SystemExit(f"run {names[done]} failed ({error}), see {log}; the others are kept")


def _bind(cores: Queue[int]) -> None:
    os.sched_setaffinity(0, {cores.get()})


def train_one(run: RunConfig, out: Path, name: str) -> None:
    """Trains one run, or goes on with it, in this process; what it prints goes to its log."""
    log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    from mod_star.commands import keep_compiled_programs
    from mod_star.training.train import train

    keep_compiled_programs()
    train(run, out / name)
