"""The FLOP counter against XLA's own count of the compiled programs, and its arithmetic."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.flops import Flops, forward_flops, parameter_count, training_flops, training_step_flops
from mod_star.model import Decoder
from mod_star.model.layers import fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.model.transformer import head_matrix
from mod_star.training.next_token import forward, make_loss
from mod_star.training.state import init_params

S = 128
# Unscanned: XLA counts the body of a loop once. Wide enough for elementwise work to be small beside matrix products.
MODEL = ModelConfig(vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, context=S, scan=False)
DENSE, MOD = RoutingConfig(every=0), RoutingConfig(predictor_width=96)
GELU = Part(
    lambda key, config: {"up": fan_in_normal(key, (config.width, 512), 128), "down": jnp.zeros((512, config.width))},
    lambda params, x: linear(jax.nn.gelu(linear(x, params["up"])), params["down"]),
)
SCORER = Part(
    lambda key, config: {"first": fan_in_normal(key, (config.width, 64), 128), "second": jnp.ones(64)},
    lambda params, x: jnp.tanh(linear(x.astype(jnp.float32), params["first"])) @ params["second"],
)


def compiled_flops(model: ModelConfig, routing: RoutingConfig, parts: Parts, *, training: bool) -> float:
    decoder = Decoder(model, routing, parts)
    run = RunConfig(model, routing, train=TrainConfig(batch_size=1, loss_chunk=S))
    params = jax.eval_shape(lambda: init_params(decoder, 0))
    batch = {n: jax.ShapeDtypeStruct((1, S), jnp.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((1, S), jnp.float32)
    loss = make_loss(decoder, run)

    def logits(params: Any, batch: Any) -> jax.Array:
        return forward(decoder, params, batch, None).hidden @ head_matrix(params).T

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: loss(p, batch, None, jnp.float32(S), jnp.float32(S))[0])(params)

    analysis: Any = jax.jit(gradient if training else logits).lower(params, batch).compile().cost_analysis()
    return float(analysis["flops"])


@pytest.mark.parametrize("routing", [DENSE, MOD], ids=["dense", "mod"])
def test_forward_agrees_with_the_compiled_program_within_5_percent(routing: RoutingConfig) -> None:
    ours = forward_flops(MODEL, routing, S).total
    assert ours == pytest.approx(compiled_flops(MODEL, routing, DEFAULT_PARTS, training=False), rel=0.05)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("routing", [DENSE, MOD], ids=["dense", "mod"])
def test_training_agrees_with_the_compiled_program_within_5_percent(remat: Any, routing: RoutingConfig) -> None:
    model = replace(MODEL, remat=remat)
    ours = training_flops(model, routing, S).total
    assert ours == pytest.approx(compiled_flops(model, routing, DEFAULT_PARTS, training=True), rel=0.05)


def test_rematerialisation_of_a_dense_block_does_not_repeat_its_last_product() -> None:
    """Where the feed-forward layer is nearly everything, counting it would be 8 % too much."""
    model = replace(MODEL, remat="full", layers=1, vocab_size=64, mlp_width=1024)
    ours = training_flops(model, DENSE, S).total
    assert ours == pytest.approx(compiled_flops(model, DENSE, DEFAULT_PARTS, training=True), rel=0.03)


def test_parts_of_the_users_own_are_counted() -> None:
    parts = Parts(router=SCORER, feed_forward=GELU)
    counted = forward_flops(MODEL, MOD, S, parts)
    assert counted.total == pytest.approx(compiled_flops(MODEL, MOD, parts, training=False), rel=0.05)
    rows = S + S // 8  # of the full and of the routed block
    assert counted.mlp == pytest.approx(2 * rows * 2 * 128 * 512, rel=0.05)
    assert counted.router == pytest.approx(2 * S * 128 * 64, rel=0.05)


def test_a_block_of_the_users_own_is_counted() -> None:
    ours = DEFAULT_PARTS.block
    parts = Parts(block=Part(ours.init, lambda *arguments: ours.apply(*arguments)))
    counted, expected = forward_flops(MODEL, MOD, S, parts), forward_flops(MODEL, MOD, S)
    assert counted.mlp == pytest.approx(expected.projections + expected.attention + expected.mlp, rel=0.05)


def test_each_kind_by_hand() -> None:
    counted = forward_flops(MODEL, MOD, S)
    C, D, V, F = 16, 128, 512, MODEL.hidden_width
    assert counted.projections == 2 * (S + C) * D * (2 * 128 + 2 * 64)
    assert counted.attention == 2 * 2 * (S**2 + C**2) * 128
    assert counted.mlp == 2 * (S + C) * 3 * D * F
    assert counted.router == 2 * S * D
    assert counted.predictor == 2 * S * (D * 96 + 96)
    assert counted.head == 2 * S * D * V
    for silent in (replace(MOD, causal_rule="router"), replace(MOD, selection="stochastic")):
        assert forward_flops(MODEL, silent, S).predictor == 0
    assert forward_flops(MODEL, DENSE, S).router == 0


def test_the_limit_of_the_saving_is_that_of_the_paper() -> None:
    """Linear layers (1+c)/2 of dense, attention products (1+c²)/2, at one routed block in two and c = 1/8."""
    dense, mod = (forward_flops(MODEL, routing, 2048) for routing in (DENSE, MOD))
    assert mod.mlp / dense.mlp == mod.projections / dense.projections == 0.5625
    assert mod.attention / dense.attention == (1 + 1 / 64) / 2


def test_arithmetic() -> None:
    a, b = Flops(1, 2, 3, 4, 5, 6), Flops(head=1.0)
    assert a.total == 21
    assert a + b == Flops(1, 2, 3, 4, 5, 7)
    assert a * 3 == Flops(3, 6, 9, 12, 15, 18)


def test_a_step_of_a_run_is_its_batch() -> None:
    run = RunConfig(MODEL, MOD, train=TrainConfig(batch_size=6))
    assert training_step_flops(run) == 6 * training_flops(MODEL, MOD, S).total


def test_parameters_are_counted() -> None:
    shapes = jax.eval_shape(lambda: init_params(Decoder(MODEL, DENSE), 0))
    F = MODEL.hidden_width
    assert parameter_count(shapes) == 512 * 128 + 128 + 2 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * F + 2 * 128)
