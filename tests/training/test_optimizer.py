"""AdamW, clipping and schedules against formulas in float64 NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import OptimizerConfig, RunConfig
from mod_star.training.optimizer import clip_apart, decay_mask, make_optimizer, make_schedule, split_norms

RNG = np.random.default_rng(0)


def tree(scale: float = 1.0) -> dict[str, Any]:
    """A params tree in small: blocks are stacked over two groups."""
    shapes: dict[str, Any] = {
        "embedding": (5, 3),
        "final_norm": (3,),
        "groups": {
            "full_0": {
                "block": {
                    "query": (2, 3, 1, 2),
                    "query_bias": (2, 1, 2),
                    "attention_norm": (2, 3),
                    "feed_forward": {"bias": (2, 4)},
                }
            },
            "routed": {"router": {"weight": (2, 3), "mix": (2, 3, 3)}, "predictor": {"hidden": (2, 3, 4)}},
        },
    }
    draw = lambda shape: jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def flat(values: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


DECAYED = {"['embedding']", "['groups']['full_0']['block']['query']"}


def test_decay_is_for_matrices_but_not_those_of_routers_and_predictors() -> None:
    assert {name for name, decayed in flat(decay_mask(tree())).items() if decayed} == DECAYED


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_several_steps_equal_adamw_in_float64(clip: float) -> None:
    config = OptimizerConfig(
        learning_rate=0.02, warmup_steps=2, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-4, clip=clip, schedule="cosine"
    )
    optimizer = make_optimizer(RunConfig(optimizer=config), 6)
    rates = [0.01, 0.02] + [0.02 * (0.9 * (1 + math.cos(math.pi * t / 4)) / 2 + 0.1) for t in range(4)]
    params = tree()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    expected = {name: np.asarray(p, np.float64) for name, p in flat(params).items()}
    m = {name: np.zeros(p.shape) for name, p in expected.items()}
    v = {name: np.zeros(p.shape) for name, p in expected.items()}
    for t in range(6):
        grads = tree(scale=[0.01, 3.0][t % 2])  # below and above the limit of clipping
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        g = {name: np.asarray(a, np.float64) for name, a in flat(grads).items()}
        if clip:
            for own in (True, False):
                names = [name for name in g if ("predictor" in name) == own]
                norm = math.sqrt(sum(np.sum(g[name] ** 2) for name in names))
                for name in names:
                    g[name] = g[name] * min(1.0, clip / norm)
        for name, p in expected.items():
            m[name] = 0.8 * m[name] + 0.2 * g[name]
            v[name] = 0.9 * v[name] + 0.1 * g[name] ** 2
            step = m[name] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[name] / (1 - 0.9 ** (t + 1))) + 1e-4)
            decay = 0.3 * p if name in DECAYED else 0.0
            expected[name] = p - rates[t] * (step + decay)
        for name, p in flat(params).items():
            np.testing.assert_allclose(p, expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} at step {t}")


def test_the_predictor_is_clipped_apart() -> None:
    grads = tree()
    huge = jax.tree_util.tree_map_with_path(
        lambda path, g: g * 1e6 if "predictor" in jax.tree_util.keystr(path) else g, grads
    )
    clipped, clipped_huge = (flat(clip_apart(0.5).update(g, None)[0]) for g in (grads, huge))
    own = "['groups']['routed']['predictor']['hidden']"
    for name, g in clipped.items():
        if name != own:
            np.testing.assert_array_equal(g, clipped_huge[name])
    np.testing.assert_allclose(np.linalg.norm(clipped_huge[own]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(clipped[own], clipped_huge[own], rtol=1e-5)


def test_norms_are_of_the_model_and_of_the_predictor() -> None:
    grads = tree()
    predictor = np.linalg.norm(grads["groups"]["routed"]["predictor"]["hidden"])
    everything = math.sqrt(sum(float(np.sum(np.square(g))) for g in flat(grads).values()))
    model, own = split_norms(grads)
    np.testing.assert_allclose(own, predictor, rtol=1e-6)
    np.testing.assert_allclose(model, math.sqrt(everything**2 - predictor**2), rtol=1e-6)
    dense = {"embedding": grads["embedding"]}
    assert split_norms(dense)[1] == 0


def rates(total: int, **fields: Any) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **fields), total)
    return np.array([schedule(step) for step in range(total + 1)])


def test_warm_up_is_linear_starts_above_zero_and_ends_at_the_peak() -> None:
    by_step = rates(20, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(by_step[:6], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


def test_warm_up_is_at_most_half_of_the_run_and_may_be_absent() -> None:
    np.testing.assert_allclose(rates(4, warmup_steps=100, schedule="constant"), [0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(rates(4, warmup_steps=0, schedule="constant"), np.ones(5))
    np.testing.assert_allclose(rates(1, warmup_steps=5, schedule="cosine", final_fraction=0.2), [1, 0.2], rtol=1e-6)


def test_cosine_goes_from_the_peak_to_the_final_fraction() -> None:
    by_step = rates(24, warmup_steps=4, schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(by_step[4], 1)
    np.testing.assert_allclose(by_step[14], 0.55, rtol=1e-6)
    np.testing.assert_allclose(by_step[24], 0.1, rtol=1e-5)
    assert np.all(np.diff(by_step[4:]) < 0)


def test_wsd_is_stable_then_falls_linearly_over_the_last_share_of_the_steps() -> None:
    by_step = rates(24, warmup_steps=4, schedule="wsd", decay_fraction=0.2, final_fraction=0.2)
    np.testing.assert_allclose(by_step[4:21], 1)
    np.testing.assert_allclose(by_step[20:], [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
