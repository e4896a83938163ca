"""Models with experts, staged and integrated: generated token by token as a full forward pass has it, at what cost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import Model, log_softmax, lowered_advance, make_prompts

from mod_star.decoding import GenerationConfig, Sampling
from mod_star.model.grouped import block_size, cut_up
from mod_star.model.parts import DEFAULT_PARTS

NEW, GREEDY = 8, Sampling(0)
STAGED: tuple[dict[str, Any], dict[str, Any]] = ({"every": 2}, {"experts": 4})
INTEGRATED: tuple[dict[str, Any], dict[str, Any]] = (
    {"every": 0},
    {"experts": 3, "experts_null": 2, "experts_null_kind": "copy", "experts_balance": "bias"},
)


@pytest.mark.parametrize(
    "kind", [pytest.param(STAGED, marks=pytest.mark.nightly), INTEGRATED], ids=["staged", "integrated"]
)
@pytest.mark.slow
def test_decoding_is_the_full_forward_pass(kind: Any) -> None:
    model = Model(kind[0], **kind[1])
    prompts = make_prompts((3, 7, 1, 5))
    for prompt, result in zip(prompts, model.generator().generate(prompts, GenerationConfig(NEW, GREEDY)), strict=True):
        teacher = model.teach(prompt + result.tokens)
        before = teacher.logits_SxV[len(prompt) - 1 : -1]
        assert result.tokens == np.argmax(before, -1).tolist()
        expected = log_softmax(before)[np.arange(NEW), result.tokens]
        np.testing.assert_allclose(result.log_probs, expected, atol=2e-5)
        np.testing.assert_allclose(result.routed_fraction, teacher.selected_LxS.mean(1))


def operations(experts: int) -> float:
    """XLA's count of one decoding step of one row; the body of each loop over blocks once."""
    model = Model({"every": 0}, experts=experts, experts_active=2, experts_width=64, layers=1)
    generator = model.generator()
    state = jax.eval_shape(lambda: generator.start(make_prompts((5,)), GenerationConfig(NEW)))
    analysis: Any = lowered_advance(generator, state, GREEDY).cost_analysis()
    return float(analysis["flops"])


@pytest.mark.nightly
def test_a_single_row_pays_for_its_active_experts_alone() -> None:
    """Each loop runs once for each choice that is no null expert, and what it costs does not grow with the experts."""
    for chosen, blocks in (([5, 2], 2), ([0, 8], 1), ([8, 9], 0)):  # of 8 experts and 2 null ones
        size = block_size(2, 8)
        assert size == 1 and cut_up(jnp.asarray(chosen, jnp.int32), 8, size).ends_G[-1] == blocks
    few, many = operations(2), operations(16)
    an_expert = 3 * 2 * 16 * 64
    assert few > an_expert, "one is counted"
    assert many - few < an_expert / 2, "14 more experts cost the router's columns, and comparing"


def test_weights_of_experts_that_nobody_chose_are_not_even_multiplied() -> None:
    config = Model({"every": 0}, experts=6).config
    part = DEFAULT_PARTS.feed_forward_of(config)
    params, x = part.init(jax.random.key(0), config), jax.random.normal(jax.random.key(1), (1, config.width))
    apply = jax.jit(part.apply)
    result, choice = apply(params, x)
    others = choice.counts_NxZ[0] == 0
    params["experts"] = jax.tree.map(lambda a: jnp.where(others[:, None, None], jnp.nan, a), params["experts"])
    np.testing.assert_array_equal(apply(params, x)[0], result)
    assert np.sum(others) == 4
