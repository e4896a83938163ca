"""The experts' feed-forward part: against a loop over tokens and experts in float64, its gradients, its balance."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.model.experts import Load, balance_loss, choose, experts, experts_flops, experts_init, load_of
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.training.objectives.expert_use import expert_sums

CONFIG = ModelConfig(vocab_size=13, width=8, layers=2, heads=2, mlp_width=6, context=12, experts=3)
INTEGRATED = replace(CONFIG, experts_null=2)
COPY = replace(INTEGRATED, experts_null_kind="copy", experts_balance="bias")
SWITCH = replace(INTEGRATED, experts_active=1, experts_width=5)


def part_of(config: ModelConfig, seed: int = 0) -> tuple[Part, Any, jax.Array]:
    """The part, its parameters (a bias that decides a few choices), and tokens."""
    part = DEFAULT_PARTS.feed_forward_of(config)
    params = part.init(jax.random.key(seed), config)
    if "balance_bias" in params:
        params["balance_bias"] = jnp.linspace(-0.1, 0.1, config.all_experts)
    return part, params, jax.random.normal(jax.random.key(seed + 1), (20, config.width))


def naive(params: Any, x_NxD: Any, config: ModelConfig) -> tuple[Any, Any, Any]:
    """Result, counts and probabilities: token by token, expert by expert, in float64."""
    params, x_NxD = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x_NxD))
    result, counts, probabilities = np.zeros_like(x_NxD), [], []
    for n, x in enumerate(x_NxD):
        logits = x @ params["router"]
        p = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-(p + params.get("balance_bias", 0.0)), kind="stable")[: config.experts_active]
        for z in chosen:
            weight = p[z] if config.experts_active == 1 else p[z] / p[chosen].sum()
            if z < config.experts:
                gate, up, down = (params["experts"][name][z] for name in ("gate", "up", "down"))
                a = x @ gate
                result[n] += weight * ((a / (1 + np.exp(-a)) * (x @ up)) @ down)
            elif config.experts_null_kind == "copy":
                result[n] += weight * x
        counts.append(np.isin(np.arange(config.all_experts), chosen))
        probabilities.append(p)
    return result, np.asarray(counts), np.asarray(probabilities)


@pytest.mark.parametrize("config", [CONFIG, INTEGRATED, COPY, SWITCH])
def test_each_token_gets_the_weighted_sum_of_its_own_experts(config: ModelConfig) -> None:
    part, params, x = part_of(config)
    result, choice = part.apply(params, x)
    expected, counts, probabilities = naive(params, x, config)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    np.testing.assert_array_equal(choice.counts_NxZ, counts)
    np.testing.assert_allclose(choice.probabilities_NxZ, probabilities, atol=1e-6)
    assert not config.experts_null or 0 < counts[:, config.experts :].sum() < counts.sum(), "both kinds are chosen"


def test_gradients_are_those_of_all_experts_computed_and_masked() -> None:
    part, params, x = part_of(COPY)
    weigh = jax.random.normal(jax.random.key(5), x.shape)

    def masked(params: Any, x: jax.Array) -> jax.Array:
        """No sorting, no grouping: every expert for every token, as a plain swiglu each."""
        logits = jnp.matmul(x, params["router"], precision="highest")
        counts = part.apply(params, x)[1].counts_NxZ
        shares = jnp.exp(logits) * counts / jnp.sum(jnp.exp(logits) * counts, -1, keepdims=True)
        outputs = [swiglu(jax.tree.map(lambda a, z=z: a[z], params["experts"]), x) for z in range(3)] + [x, x]
        return sum(shares[:, z, None] * output for z, output in enumerate(outputs))  # type: ignore[return-value]

    loss = lambda function: lambda p, x: jnp.sum(jnp.sin(function(p, x)) * weigh)  # noqa: E731
    ours = jax.jit(jax.grad(loss(lambda p, x: part.apply(p, x)[0]), (0, 1)))(params, x)
    theirs = jax.jit(jax.grad(loss(masked), (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), ours, theirs)
    assert np.abs(ours[0]["router"]).max() > 1e-3 and not np.any(ours[0]["balance_bias"])


def test_the_weight_of_a_single_expert_has_a_gradient() -> None:
    """Made to add up to 1 it would always be 1."""
    part, params, x = part_of(SWITCH)
    grads = jax.grad(lambda p: jnp.sum(part.apply(p, x)[0] ** 2))(params)
    assert np.abs(grads["router"]).max() > 1e-4


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    for bias, chosen, weights in (
        (None, [0, 1], [0.625, 0.375]),
        ([-0.4, 0.0, 0.0], [1, 2], [0.6, 0.4]),
        ([0.0, 0.0, 0.4], [2, 0], [2 / 7, 5 / 7]),
    ):
        weight_NxA, chosen_NxA, p = choose(logits, 2, None if bias is None else jnp.asarray(bias))
        assert chosen_NxA[0].tolist() == chosen
        np.testing.assert_allclose(weight_NxA[0], weights, rtol=1e-6)
        np.testing.assert_allclose(p[0], [0.5, 0.3, 0.2], rtol=1e-6)


def test_null_experts_cost_nothing_and_give_zero_or_the_token() -> None:
    for config in (INTEGRATED, replace(INTEGRATED, experts_null_kind="copy")):
        part, params, x = part_of(config)
        x = jnp.abs(x)
        params["router"] = jnp.zeros((8, 5)).at[:, 3:].set(1.0)  # both null experts, for every token
        params["experts"] = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), params["experts"])
        result, choice = part.apply(params, x)
        np.testing.assert_allclose(result, x if config.experts_null_kind == "copy" else 0 * x, rtol=1e-6)
        assert choice.counts_NxZ.sum(0).tolist() == [0, 0, 0, 20, 20]


LOAD = Load(jnp.asarray([6.0, 3.0, 1.0, 7.0, 3.0]), jnp.asarray([2.0, 1.0, 1.0, 4.0, 2.0]), jnp.float32(10))


def test_the_balance_loss_is_the_formula_with_the_mean_share_of_null_experts() -> None:
    # Shares .3, .15, .05, and .25 for each null expert; probabilities .2, .1, .1, .4, .2.
    expected = 5 * (0.3 * 0.2 + 0.15 * 0.1 + 0.05 * 0.1 + 0.25 * (0.4 + 0.2))
    np.testing.assert_allclose(balance_loss(LOAD, INTEGRATED), expected, rtol=1e-6)
    even = Load(jnp.full(3, 4.0), jnp.full(3, 2.0), jnp.float32(6))
    np.testing.assert_allclose(balance_loss(even, CONFIG), 1, rtol=1e-6)
    assert balance_loss(Load(jnp.zeros(3), jnp.zeros(3), jnp.float32(0)), CONFIG) == 0
    assert balance_loss(LOAD, replace(INTEGRATED, experts_balance="none")) == 0


def test_the_balance_of_biases_is_all_gradient_and_lowers_what_is_chosen_too_often() -> None:
    def loss(bias: jax.Array) -> jax.Array:
        return balance_loss(replace(LOAD, bias_Z=bias), COPY)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray([0.3, -2.0, 0.1, 0.0, 0.0]))
    assert value == 0
    np.testing.assert_allclose(gradient, np.asarray([0.3, 0.15, 0.05, 0.25, 0.25]) - 0.2, atol=1e-6)
    empty = Load(jnp.zeros(5), jnp.zeros(5), jnp.float32(0))
    assert not np.any(jax.grad(lambda b: balance_loss(replace(empty, bias_Z=b), COPY))(jnp.zeros(5)))


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_gradient_steps_on_the_balance_loss_alone_even_out_the_load(balance: Any) -> None:
    config = replace(INTEGRATED, experts_balance=balance, experts_active=1)
    part, params, x = part_of(config)
    x = jnp.concatenate([x] * 8) + 0.5 * jax.random.normal(jax.random.key(3), (160, 8))
    params["router"] = params["router"].at[:, 0].add(x.mean(0) * 8)  # the first expert is chosen too often

    rate = 1.0 if balance == "aux" else 0.05

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        load = load_of(part.apply(params, x)[1], jnp.ones(160, bool))
        return balance_loss(load, config), load.counts_Z

    @jax.jit
    def step(params: Any) -> tuple[Any, jax.Array]:
        gradient, counts = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), counts

    before = step(params)[1]
    for _ in range(100):
        params, counts = step(params)
    assert before[0] > 70 and 20 < counts[0] < 45, (before, counts)  # 32 at balance


def test_only_valid_tokens_load_experts() -> None:
    part, params, x = part_of(CONFIG)
    choice = part.apply(params, x)[1]
    load = load_of(choice, jnp.arange(20) < 7)
    np.testing.assert_array_equal(load.counts_Z, np.sum(choice.counts_NxZ[:7], 0))
    np.testing.assert_allclose(load.probabilities_Z, np.sum(choice.probabilities_NxZ[:7], 0), rtol=1e-6)
    assert load.tokens == 7


def test_operations_are_those_of_the_experts_that_compute_at_balance() -> None:
    config = replace(INTEGRATED, experts_width=4)  # 2 of 3 + 2 are chosen: 1.2 of them compute
    assert experts_flops(config, 10) == pytest.approx(10 * (2 * 8 * 5 + 1.2 * 3 * 2 * 8 * 4))
    assert CONFIG.expert_width == 3 and replace(CONFIG, mlp_width=7).expert_width == 4  # half of 6, and of 7


@pytest.mark.nightly
def test_experts_as_a_part_of_ones_own_are_the_ones_of_the_configuration() -> None:
    """The same door: what `model.experts` builds can be given as `Parts.feed_forward`."""
    own = Parts(feed_forward=Part(lambda key, _: experts_init(key, CONFIG), lambda p, x: experts(p, x, CONFIG)))
    tokens = jnp.arange(12, dtype=jnp.int32)
    outputs = []
    for config, parts in ((CONFIG, DEFAULT_PARTS), (replace(CONFIG, experts=0), own)):
        decoder = Decoder(config, RoutingConfig(capacity=0.5, predictor_width=4), parts)
        init: Any = jax.jit(lambda decoder=decoder: decoder.init(jax.random.key(0), tokens))
        outputs.append((jax.tree.map(jnp.shape, init()), decoder))
    assert outputs[0][0] == outputs[1][0]
    results = [jax.jit(functools.partial(decoder.apply, mode="top_k"))(init(), tokens) for _, decoder in outputs]
    np.testing.assert_array_equal(results[0].hidden, results[1].hidden)
    assert results[0].load.counts_Z.shape == (1, 2, 3)  # groups, blocks, experts
    sums = [expert_sums(jax.tree.map(lambda a: a[None], r.load), jnp.ones((1, 12), bool), CONFIG) for r in results]
    assert sums[0]["balances"].tolist() == sums[1]["balances"].tolist() and sums[0]["balances"].min() > 12 * 0.99
    np.testing.assert_array_equal(results[0].load.tokens, results[1].load.tokens)


def test_experts_beside_a_feed_forward_layer_of_ones_own_are_refused() -> None:
    parts = Parts(feed_forward=Part(swiglu_init, lambda p, x: swiglu(p, x)))
    with pytest.raises(InputError, match=r"^model\.experts = 3: must be 0 with parts\.feed_forward of your own$"):
        parts.feed_forward_of(CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_null": 2}, "model.experts_null = 2: must be 0 without model.experts"),
        ({"experts": 1}, "model.experts_active = 2: must be at most model.experts + model.experts_null = 1"),
        (
            {"experts": 4, "experts_null": 1, "experts_active": 6},
            "model.experts_active = 6: must be at most model.experts + model.experts_null = 5",
        ),
    ],
)
def test_numbers_that_do_not_go_together(fields: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig(**fields)
    assert str(error.value) == message
