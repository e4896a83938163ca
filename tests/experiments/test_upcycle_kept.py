"""The experiment on models that are upcycled and kept: arms cost what they should, and learn from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.upcycle_kept import distil
from experiments.upcycle_kept.arms import RECIPES, Options, arms, config_of
from mod_star.config import DataConfig, ModelConfig, RoutingConfig, RunConfig
from mod_star.flops import forward_flops
from mod_star.model import Decoder
from mod_star.training.objectives import forward, next_token

DENSE = RunConfig(
    model=ModelConfig(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, context=256),
    routing=RoutingConfig(every=0),
)


def test_all_arms_cost_their_share_where_a_layout_can() -> None:
    whole = forward_flops(DENSE.model, DENSE.routing, 256).total
    for arm in arms(Options(), DataConfig()):
        for share, every in ((0.9, 3), (0.8, 3), (0.7, 2)):
            run = config_of(DENSE, arm, share)
            assert run is not None and (run.routing.every, run.routing.first) == (every, 2)
            assert forward_flops(run.model, run.routing, 256).total / whole == pytest.approx(share, abs=0.004)
        assert config_of(DENSE, arm, 0.5) is None


def test_every_recipe_starts_from_an_arm_that_has_what_it_trains() -> None:
    starts = {arm.name: arm for arm in arms(Options(), DataConfig())}
    for recipe in RECIPES.values():
        if recipe.start is not None:
            skipping = starts[recipe.start].skipping
            assert ("adapter" in recipe.trainable) <= (skipping.adapter_rank > 0)
            assert recipe.stages == (not starts[recipe.start].fitted)
    assert Options().best in RECIPES


def test_the_loss_is_that_of_the_next_token_plus_the_divergence(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], random_params: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = replace(tiny_run, model=replace(tiny_run.model, layers=2), init_from="runs/upcycled")
    dense = replace(run, routing=replace(run.routing, every=0))
    decoder, teacher = (Decoder(each.model, each.routing) for each in (run, dense))
    params, frozen = (random_params(each.model, each.routing, seed=seed) for seed, each in enumerate((run, dense)))
    loaded = type("Loaded", (), {"decoder": teacher, "params": frozen})
    monkeypatch.setattr(distil, "teacher_of", lambda start: loaded)
    objective, plain, key = distil.distil(decoder, run), next_token(decoder, run), jax.random.key(0)
    targets, valid = jnp.sum(tiny_batch["weights"]), jnp.sum(tiny_batch["segment_ids"] > 0)

    @jax.jit
    def losses(params: Any, frozen: Any) -> Any:
        total, sums = objective.loss(params, tiny_batch, key, targets, valid, frozen)
        hidden = (
            forward(decoder, params, tiny_batch, key, "top_k").hidden,
            forward(teacher, frozen, tiny_batch, None).hidden,
        )
        return total, sums["kl"], plain.loss(params, tiny_batch, key, targets, valid)[0], hidden

    total, kl, alone, (student, reference) = jax.device_get(losses(params, frozen))
    expected = 0.0
    for row, column in np.argwhere(np.asarray(tiny_batch["weights"]) > 0):
        logits = student[row, column] @ params["embedding"].T, reference[row, column] @ frozen["embedding"].T
        q, p = (np.exp(np.float64(each) - each.max()) for each in logits)
        q, p = q / q.sum(), p / p.sum()
        expected += np.sum(p * np.log(p / q))
    assert float(kl) == pytest.approx(expected, rel=1e-4) and expected > 1
    assert float(total) == pytest.approx(float(alone + kl / targets), rel=1e-5)
