"""The experiment on experts: its arms cost the same, and experts drop the tokens that there is no slot for."""

from dataclasses import replace

import jax
import numpy as np

from experiments.mode.dropping import ACTIVE, EXPERTS, apply, init
from experiments.mode.run import ARMS, Options, config
from mod_star.config import ModelConfig
from mod_star.flops import forward_flops
from mod_star.model.experts import experts
from mod_star.parts import load_parts


def test_all_arms_cost_the_same_for_each_token() -> None:
    totals = []
    for arm in ARMS:
        run = config(Options(), arm, 0)
        model = replace(run.model, vocab_size=320)
        totals.append(forward_flops(model, run.routing, model.context, load_parts(run.parts)).total)
    assert max(totals) < 1.02 * min(totals)


def test_a_full_expert_gives_zero_to_later_tokens() -> None:
    own = ModelConfig(width=8, layers=1)
    params, x = init(jax.random.key(0), own), jax.random.normal(jax.random.key(1), (24, 8))
    result, choice = jax.jit(apply)(params, x)
    slots, taken = 4, np.zeros(EXPERTS)  # two thirds of 24 · 2 / 8
    whole = replace(own, experts=EXPERTS, experts_active=ACTIVE, experts_width=params["experts"]["up"].shape[-1])
    expected, one = np.zeros((24, 8)), jax.jit(lambda params, x: experts(params, x, whole)[0])
    for n in range(24):
        chosen = np.flatnonzero(choice.counts_NxZ[n])
        full = [z for z in chosen if taken[z] >= slots]
        taken[chosen] += 1
        heard = np.isin(np.arange(EXPERTS), full, invert=True)[:, None, None]
        own_experts = params["experts"] | {"down": params["experts"]["down"] * heard}
        expected[n] = one(params | {"experts": own_experts}, x[n : n + 1])[0]
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert (taken > slots).any() and (taken <= slots).any()
