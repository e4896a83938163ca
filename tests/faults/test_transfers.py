"""What moves between host and devices while a run trains: batches in, metrics out, nothing else."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star import presets
from mod_star.config import RunConfig
from mod_star.training import session
from mod_star.training.train import train
from mod_star.views.progress import TrainingProgress

STEPS = 12


def make_run() -> RunConfig:
    run = presets.dense(presets.tiny())
    model = replace(run.model, width=8, heads=1, mlp_width=8, layers=1, context=16)
    fields: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 2,
        "log_every": 2,
        "eval_batches": 1,
        "eval_every": 0,
        "checkpoint_every": 0,
    }
    return replace(run, model=model, train=replace(run.train, **fields))


@pytest.mark.slow
def test_a_batch_that_is_not_on_the_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "prefetch_to_device", lambda batches, where: batches)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(make_run(), tmp_path / "run", quiet=True)


def test_only_batches_go_in_and_metrics_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # JAX's guard doesn't see what comes from a CPU "device", so every way out of an array is watched here.
    moved: list[tuple[str, Any]] = []
    asked = threading.local()
    get, put, update = jax.device_get, jax.device_put, TrainingProgress.update
    array = type(jnp.zeros(1))
    value = array._value.fget  # type: ignore[attr-defined]

    def counted_get(tree: Any) -> Any:
        moved.append(("get", jax.tree.map(np.shape, tree)))
        asked.now = True
        try:
            return get(tree)
        finally:
            asked.now = False

    def counted_put(tree: Any, *where: Any, **options: Any) -> Any:
        moved.append(("put", jax.tree.map(np.shape, tree)))
        return put(tree, *where, **options)

    def counted_value(self: Any) -> Any:
        if not getattr(asked, "now", False):
            moved.append(("unasked", self.shape))
        return value(self)

    def marking(self: TrainingProgress, step: int, loss: float) -> None:
        moved.append(("step", step))
        update(self, step, loss)

    monkeypatch.setattr(jax, "device_get", counted_get)
    monkeypatch.setattr(jax, "device_put", counted_put)
    monkeypatch.setattr(array, "_value", property(counted_value))
    monkeypatch.setattr(TrainingProgress, "update", marking)
    assert int(jnp.ones((), jnp.int32)) == 1
    assert moved == [("unasked", ())], "the watch works"
    train(make_run(), tmp_path / "run", quiet=True)

    hot = moved[moved.index(("step", 1)) + 1 : moved.index(("step", STEPS - 1))]
    batch = dict.fromkeys(("positions", "segment_ids", "targets", "tokens", "weights"), (2, 16))
    shown = dict.fromkeys(("loss", "streak"), ())
    recorded = shown | dict.fromkeys(("grad_norm", "learning_rate", "lm_loss", "skipped"), ())
    # A step's numbers are read once, when the next step is on its way; all of them only where they are recorded.
    expected = [("get", shown if step % 2 else recorded) for step in range(2, STEPS)]
    assert [event for event in hot if event[0] not in ("put", "step")] == expected
    puts = [event for event in hot if event[0] == "put"]
    assert puts == [("put", batch)] * len(puts)
    assert len(puts) <= STEPS + 2, "each batch once, two of them ahead"
