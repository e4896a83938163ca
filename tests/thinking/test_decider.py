"""The decider learns what thoughts gain, and nothing else learns from it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.flops import scoring_flops
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.runs.base_run import _require_same_function
from mod_star.thinking.decider import decider_init, decider_of
from mod_star.thinking.objective import Places
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.objectives.quiet_star import decider_sum, make_quiet_star_loss

MODEL = ModelConfig(vocab_size=256, width=8, layers=1, heads=1, mlp_width=8, context=6)
THINKING = ThinkingConfig(thought_length=1, n_true=2, n_thoughts=2, decider_width=3)
RUN = RunConfig(
    MODEL, RoutingConfig(every=0), train=TrainConfig(objective="quiet_star", loss_chunk=8), thinking=THINKING
)


def test_its_error_is_the_formulas_and_its_gradient_goes_to_the_decider_alone() -> None:
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {
        "thinking": {"decider": decider_init(jax.random.key(0), MODEL, 3) | {"output": random(3), "shift": random()}}
    }
    hidden, base_nll, nll = random(2, 6, 8), random(2, 6), random(2, 2, 2, 2)
    batch = {"segment_ids": jnp.asarray([[1, 1, 1, 1, 1, 0], [1] * 6]), "weights": jnp.ones((2, 6)).at[1, 3].set(0)}
    places = Places(jnp.asarray([[0, 4], [3, 2]]), jnp.asarray([[True, True], [True, False]]))

    def error(params: Any, hidden: jax.Array, base_nll: jax.Array, nll: jax.Array) -> jax.Array:
        output: Any = SimpleNamespace(hidden=hidden)
        talk: Any = SimpleNamespace(nll_BxJxMxN=nll)
        return decider_sum(params, output, batch, places, talk, base_nll, THINKING)

    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["thinking"]["decider"])
    expected = 0.0
    for row, place, position in ((0, 0, 0), (0, 1, 4)):  # the others are not filled, or not to be predicted
        units = np.maximum(np.asarray(hidden[row, position]) @ own["hidden"] + own["bias"], 0)
        gain = base_nll[row, position] - np.mean(nll[row, place, :, 0])
        expected += (units @ own["output"] + own["shift"] - gain) ** 2
    value, grads = jax.value_and_grad(error, (0, 1, 2, 3))(params, hidden, base_nll, nll)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    assert not any(np.abs(leaf).max() for leaf in grads[1:])


@pytest.mark.nightly
def test_a_model_learns_the_same_with_a_decider(make_batch: Any) -> None:
    """Its loss is more by the mean squared error; the other gradients are the same, bit for bit."""
    decoder, batch = Decoder(MODEL, RUN.routing), make_batch([[6], [6]], 6, 256)
    params = initial_params(decoder, RUN, ByteTokenizer())
    params["thinking"]["decider"]["shift"] += 0.5
    without = {**params, "thinking": {name: leaf for name, leaf in params["thinking"].items() if name != "decider"}}
    results = []
    for run, start in ((RUN, params), (replace(RUN, thinking=replace(THINKING, decider_width=0)), without)):
        function = jax.jit(jax.value_and_grad(make_quiet_star_loss(decoder, run), has_aux=True))
        results.append(function(start, batch, jax.random.key(1), jnp.sum(batch["weights"]), jnp.float32(12)))
    ((loss, sums), grads), ((alone, sums_alone), grads_alone) = results
    assert float(loss - alone) == pytest.approx(float(sums["decider_error"] / sums["next_predictions"]), rel=1e-4)
    assert "decider_error" not in sums_alone
    learned = grads["thinking"].pop("decider")
    assert float(np.abs(learned["shift"])) > 0
    jax.tree.map(np.testing.assert_array_equal, grads, grads_alone)


def test_one_is_added_to_a_model_that_has_learned_to_think_without() -> None:
    decoder, alone = Decoder(MODEL, RUN.routing), replace(RUN, thinking=replace(THINKING, decider_width=0))
    base = initial_params(decoder, alone, ByteTokenizer())
    with pytest.raises(InputError, match="the model has no decider"):
        decider_of(base)
    params = initial_params(decoder, RUN, ByteTokenizer(), base)
    assert decider_of(params)["hidden"].shape == (8, 3) and decider_of(params)["output"].shape == (3,)
    jax.tree.map(
        np.testing.assert_array_equal, {**params["thinking"], "decider": None}, {**base["thinking"], "decider": None}
    )
    _require_same_function(RUN, alone)
    for other in (alone, replace(RUN, thinking=replace(THINKING, decider_width=2))):
        with pytest.raises(InputError, match=r"^thinking\.decider_width = [02]: must be 3, as in init_from"):
            _require_same_function(other, RUN)


def test_its_operations_are_counted() -> None:
    """Forward and the gradient of its parameters: none goes to its input. Five of the six positions think."""
    more = (
        scoring_flops(RUN, 6).mixing
        - scoring_flops(replace(RUN, thinking=replace(THINKING, decider_width=0)), 6).mixing
    )
    assert more == 2 * 2 * 5 * (8 * 3 + 3)
