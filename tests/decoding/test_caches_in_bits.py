"""Caches that hold bfloat16 keys and values as their bits are the same caches, and a CPU updates them in place."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import Model, lowered_advance, make_prompts
from some_nightly import some_nightly

from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.caches import Cache, FullCache, full_cache, in_bits, in_values, routed_cache
from mod_star.model.attention import KeyValues

RNG = np.random.default_rng(0)
B, K, E = 2, 3, 4


def key_values(tokens: int, dtype: Any) -> KeyValues:
    """Of so many tokens for each row."""
    keys, values = (jnp.asarray(RNG.standard_normal((B, K, tokens, E)), dtype) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (B, tokens))
    return KeyValues(keys, values, positions, jnp.ones_like(positions), positions < tokens)


def with_two_tokens(cache: Cache, own: list[KeyValues]) -> Cache:
    """The cache after two appended tokens, the second of the first row alone where the block is routed."""
    rows = jnp.array([True, False])
    for step, new in enumerate(own):
        if isinstance(cache, FullCache):
            cache = cache.append(new, jnp.int32(step) if step else jnp.array([0, 1]))
        elif step:
            cache = cache.append(new, rows, rows, ~rows)
        else:
            cache = cache.write(new, jnp.array([1, 0]), jnp.array([2, 3]))
    return cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["full", "routed"])
def test_what_is_written_to_bits_is_what_is_read(kind: str, dtype: str) -> None:
    prompt, own = key_values(3, dtype), [key_values(1, dtype) for _ in range(2)]
    plain: Cache = full_cache(prompt, 4) if kind == "full" else routed_cache(prompt, jnp.zeros(B, jnp.int32), 6, 4)
    (bits,) = in_bits((plain,))
    own_leaves = [leaf for leaf in jax.tree.leaves(bits) if leaf.ndim == 4 and leaf.dtype != dtype]
    assert len(own_leaves) == (2 if dtype == "bfloat16" else 0)
    expected, written = with_two_tokens(plain, own), with_two_tokens(bits, own)
    lengths, step = jnp.array([3, 3]), jnp.int32(2)
    jax.tree.map(np.testing.assert_array_equal, in_values((written,)), (expected,))
    read, expected_read = (cache.own_key_values(lengths, step) for cache in (written, expected))
    jax.tree.map(np.testing.assert_array_equal, read, expected_read)
    assert read[0].keys_KxMxE.dtype == dtype


@pytest.mark.parametrize("prompts", some_nightly([1, 2], 1))
def test_the_loop_of_new_tokens_updates_no_bfloat16_cache(prompts: int) -> None:
    generator = Model({}, layers=2, dtype="bfloat16").generator()
    state = jax.eval_shape(lambda: generator.start(make_prompts((5, 7))[:prompts], GenerationConfig(6)))
    text = lowered_advance(generator, state, Sampling(0)).as_text()
    updates = re.findall(r"stablehlo\.(?:dynamic_update_slice|scatter)\b.*?-> tensor<[\dx]*x(\w+)>", text, re.DOTALL)
    assert updates.count("ui16") >= 4 and "bf16" not in updates, updates
