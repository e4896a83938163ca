"""NaN that a user's own part brings into a run, now and then or for good: real processes, counts made by hand."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_runs import SMALLEST, arrays, complaints, records
from fork_server import Server, shared_server

from mod_star.config import DataConfig
from mod_star.data import train_batches
from mod_star.runs.checkpoints import saved_steps
from mod_star.tokenization import load_tokenizer

STEPS = 30

# A sequence of exactly three documents makes NaN, one of exactly four a finite number whose gradient is NaN.
BREAKS = """
from dataclasses import replace
import jax.numpy as jnp
from mod_star.parts import DEFAULT_PARTS, Parts

def block(params, x, positions, segment_ids, valid, context, config, parts):
    delta, own = DEFAULT_PARTS.block.apply(params, x, positions, segment_ids, valid, context, config, parts)
    documents = jnp.max(segment_ids)
    root_of_zero = jnp.sqrt(jnp.where(documents == 4, 0.0, 1.0) * (1 + jnp.sum(delta**2)))
    return delta + jnp.where(documents == 3, jnp.nan, 0.0) + 0.0 * root_of_zero, own

parts = Parts(block=replace(DEFAULT_PARTS.block, apply=block))
"""


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run on documents short and long, with the part above."""
    place = tmp_path_factory.mktemp("breaks")
    (place / "breaks.py").write_text(BREAKS)
    chance = random.Random(5)
    texts = ["x" * chance.choice((1, 4, 9, 40)) for _ in range(300)]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = ["--data.source", str(place / "texts.jsonl"), "--parts", f"{place / 'breaks.py'}:parts"]
    return [*SMALLEST, *source, "--train.steps", str(STEPS), "--train.eval-every", "0"]


@pytest.fixture(scope="module")
def breaking(words: list[str]) -> list[set[int]]:
    """By step, the numbers of documents in its sequences that break it."""
    config = replace(DataConfig(), source=(words[words.index("--data.source") + 1],))
    batches = itertools.islice(train_batches(config, load_tokenizer("bytes"), 16, 2), STEPS)
    found = [{3, 4} & set(np.max(batch["segment_ids"], axis=1).tolist()) for batch in batches]
    assert {3} in found and {4} in found and set() in found, "both faults, and none"
    return found


@pytest.mark.slow
def test_skipped_and_counted(server: Server, words: list[str], breaking: list[set[int]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    every = ["--train.checkpoint-every", "1", "--train.keep-checkpoints", str(STEPS), "--train.max-skipped", str(STEPS)]
    finished = server.run("train", str(run), *words, *every)
    assert (finished.code, complaints(finished.err)) == (0, []), finished
    bad = [bool(kinds) for kinds in breaking]
    steps = [record for record in records(run) if "loss" in record]
    assert [record["skipped"] for record in steps] == list(itertools.accumulate(bad))
    # NaN in the forward pass shows in the loss, NaN in the gradient alone doesn't.
    assert [record["loss"] == "NaN" for record in steps] == [3 in kinds for kinds in breaking]
    assert [record["grad_norm"] == "NaN" for record in steps] == bad
    assert json.loads((run / "summary.json").read_text())["skipped"] == sum(bad)
    assert f"after {STEPS} steps, {sum(bad)} of them skipped" in finished.out
    # No checkpoint within a streak: it would be no good one to go back to. The last step's is always there.
    good = [step for step in range(1, STEPS + 1) if not bad[step - 1] or step == STEPS]
    assert saved_steps(run / "checkpoints") == good
    for (_, old), (after, new) in itertools.pairwise((step, arrays(run, step)) for step in good):
        same = {name for name in old if name.startswith("params") and old[name] == new[name]}
        assert bool(same) == (after == STEPS and bad[-1]), "a good step moves all parameters, a bad one none"


@pytest.mark.nightly
def test_stops_if_it_goes_on(server: Server, words: list[str], breaking: list[set[int]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    streaks = list(itertools.accumulate(breaking, lambda length, kinds: length + 1 if kinds else 0, initial=0))
    longest = max(streaks)
    assert longest > 1
    stops = streaks.index(longest)
    words = [*words, "--train.checkpoint-every", "1", "--train.max-skipped", str(longest)]
    stopped = server.run("train", str(run), *words)
    last = saved_steps(run / "checkpoints")[-1]
    assert last == stops - longest
    assert stopped.code == 1 and stopped.err == (
        f"error: loss or gradient was not finite in {longest} steps in a row, {last + 1} to {stops}; "
        f"the last good checkpoint is {run}/checkpoints/{last}. "
        "A lower --optimizer.learning-rate (now 0.003) in a new run may help\n"
    ), stopped
    assert [record["step"] for record in records(run)] == list(range(1, stops + 1))
