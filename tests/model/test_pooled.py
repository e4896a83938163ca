"""Routed blocks whose slots the sequences of a batch share: against loops in float64 NumPy, and what they compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import block_delta, float64, layer, predictor_logits, rms_norm, sigmoid, top_tokens

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.parts import Part, Parts
from mod_star.model.pooled import first_in_step, pooled_slots
from mod_star.model.routing import capacity_of


def naive(params: Any, batch: Any, config: ModelConfig, routing: RoutingConfig, mode: str) -> tuple[Any, Any, Any]:
    """Hidden states BxSxD, and what each routed block computed and had no slot for, [groups, B, S]: token by token."""
    params = float64(params)
    B, S = batch["tokens"].shape
    ids = batch["segment_ids"]
    rows = [list(zip(batch["positions"][b].tolist(), ids[b].tolist(), strict=True)) for b in range(B)]
    streams = [params["embedding"][batch["tokens"][b]] for b in range(B)]
    share = math.floor(routing.capacity * int((ids > 0).sum()) + 0.5)
    selected, overflow = [], []
    for group in range(config.layers // 2):
        full, routed = (layer(params["groups"][name], group) for name in ("full_0", "routed"))
        streams = [x + block_delta(full["block"], x, rows[b], config) for b, x in enumerate(streams)]
        scores = np.stack([x @ routed["router"]["weight"] for x in streams])
        wanted = np.stack([predictor_logits(routed["predictor"], x) > 0 for x in streams]) & (ids > 0)
        chosen: list[tuple[int, int]] = []
        if mode == "top_k":
            chosen = [divmod(i, S) for i in top_tokens(scores.reshape(-1), (ids > 0).reshape(-1), share)]
        else:
            for position in range(S):
                for b in range(B):
                    if wanted[b, position] and len(chosen) < math.ceil(routing.headroom * share):
                        chosen.append((b, position))
        mask = np.zeros((B, S), bool)
        for b, position in chosen:
            mask[b, position] = True
        selected.append(mask)
        overflow.append(wanted & ~mask & (mode == "causal"))
        for b in range(B):
            own = np.flatnonzero(mask[b]).tolist()
            if own:
                delta = block_delta(routed["block"], streams[b][own], [rows[b][i] for i in own], config)
                streams[b] = streams[b].copy()
                streams[b][own] += sigmoid(scores[b, own])[:, None] * delta
    hidden = np.stack([rms_norm(x, params["final_norm"], config.norm_eps) for x in streams])
    return hidden, np.stack(selected), np.stack(overflow)


@pytest.fixture(scope="module")
def pooled(tiny_run: RunConfig) -> RoutingConfig:
    return replace(tiny_run.routing, capacity=0.125, headroom=1.0)


@pytest.mark.slow
def test_it_equals_a_loop_over_the_tokens_of_the_batch_in_float64_numpy(
    tiny_run: RunConfig, pooled: RoutingConfig, tiny_batch: dict[str, jax.Array], random_params: Any
) -> None:
    """On rows with one document, several, and padding; the block is given all slots of the batch at once."""
    seen: list[int] = []

    def spied(params: Any, x_NxD: jax.Array) -> jax.Array:
        seen.append(x_NxD.shape[0])
        return swiglu(params, x_NxD)

    model = tiny_run.model
    decoder = Decoder(model, pooled, Parts(feed_forward=Part(swiglu_init, spied)), "batch")
    params = random_params(model, pooled, seed=1)

    def run(params: Any, batch: Any) -> list[Any]:
        def one(mode: str, *arrays: jax.Array) -> Any:
            return decoder.apply({"params": params}, *arrays, mode=mode)

        arrays = (batch["tokens"], batch["positions"], batch["segment_ids"])
        return [jax.vmap(lambda *each, mode=mode: one(mode, *each))(*arrays) for mode in ("top_k", "causal")]

    outputs = jax.device_get(jax.jit(run)(params, tiny_batch))
    batch = jax.device_get(tiny_batch)
    valid = batch["segment_ids"] > 0
    for mode, output in zip(("top_k", "causal"), outputs, strict=True):
        hidden, selected, overflow = naive(params, batch, model, pooled, mode)
        np.testing.assert_array_equal(output.trace.selected, np.moveaxis(selected, 0, 1))
        np.testing.assert_array_equal(output.trace.overflow, np.moveaxis(overflow, 0, 1))
        np.testing.assert_allclose(output.hidden[valid], hidden[valid], rtol=2e-4, atol=2e-4)
        counts = selected.sum(2)
        assert mode == "causal" or (counts.sum(1) == math.floor(0.125 * valid.sum() + 0.5)).all()
        shares = counts / valid.sum(1)
        assert np.ptp(shares, 1).min() > 0.1, "sequences have shares of their own"
    assert overflow.any(), "the slots were never all taken: the test shows less than it should"
    B, S = valid.shape
    # `vmap` traces the function of a sequence alone first, with slots of its own; it is not part of the program.
    assert set(seen) == {S, capacity_of(pooled, S), capacity_of(pooled, B * S)}, "all slots of the batch at once"


def test_slots_are_headroom_times_the_share_of_the_tokens_that_there_are() -> None:
    for capacity, headroom in ((0.25, 1.0), (0.125, 1.5), (1.0, 2.0), (0.01, 1.0)):
        slots = pooled_slots(RoutingConfig(capacity=capacity, headroom=headroom), 100)
        for tokens in range(1, 101):
            share = max(1, math.floor(capacity * tokens + 0.5))
            assert slots[tokens] == min(tokens, math.ceil(headroom * share))
        assert slots[0] == 0 and slots.dtype == np.int32


def test_slots_are_taken_by_position_then_by_sequence_whatever_comes_later() -> None:
    rng = np.random.default_rng(0)
    passing = rng.random((3, 7)) < 0.6
    for most in range(passing.sum() + 2):
        order = [(s, b) for s in range(7) for b in range(3) if passing[b, s]][:most]
        expected = np.zeros((3, 7), bool)
        for s, b in order:
            expected[b, s] = True
        np.testing.assert_array_equal(first_in_step(jnp.asarray(passing), jnp.int32(most)), expected)
        later = passing.copy()
        later[:, 4:] = rng.random((3, 3)) < 0.6
        changed = first_in_step(jnp.asarray(later), jnp.int32(most))
        np.testing.assert_array_equal(changed[:, :4], expected[:, :4])


def test_what_cannot_share_slots_is_refused(tiny_run: RunConfig, random_params: Any) -> None:
    for fields, said in (
        ({"every": 0}, "the model is dense"),
        ({"selection": "stochastic"}, r"routing\.selection is stochastic"),
        ({"capacity_tokens": 3}, r"routing\.capacity_tokens is a count of each sequence"),
        ({"keep_key_values": True}, "the model computes something for tokens that pass by"),
        ({"adapter_rank": 2}, "the model computes something for tokens that pass by"),
    ):
        with pytest.raises(InputError, match=rf"^budget_over = 'batch': must be left out: {said}"):
            Decoder(tiny_run.model, replace(tiny_run.routing, **fields), budget_over="batch")
    decoder = Decoder(tiny_run.model, tiny_run.routing, budget_over="batch")
    params = random_params(tiny_run.model, tiny_run.routing)
    with pytest.raises(InputError, match=r"^budget_over = 'batch': must be sequence for generation and thoughts, "):
        decoder.apply({"params": params}, jnp.zeros(4, jnp.int32), keep_keys_values=True)
    each = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    with pytest.raises(NotImplementedError, match=r"^sequences with parameters of their own cannot share the slots"):
        jax.eval_shape(jax.vmap(lambda p, t: decoder.apply({"params": p}, t)), each, jnp.zeros((2, 4), jnp.int32))
