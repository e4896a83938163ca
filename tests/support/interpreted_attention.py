"""The kernels for TPUs and GPUs without these: interpreted, beside what other platforms compute, on random problems."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from mod_star.model import attention_kernel, attention_primitive, attention_triton, attention_whole
from mod_star.model.attention_primitive import Way
from mod_star.model.attention_whole import Memory, Queries

SHAPE = (2, 2, 2, 2, 300, 390, 8)
"""Rows of queries and of keys; key heads, queries per key head, queries, keys, width of a head."""


def problem(
    shape: tuple[int, ...] = SHAPE,
    documents: int = 1,
    window: int | None = None,
    dtype: Any = jnp.float32,
    seed: int = 0,
    whole: bool = False,
) -> tuple[Queries, Memory]:
    """Random positions with gaps, of queries and keys alike; empty slots, and queries that see nothing.

    `whole`: all of one document, and no empty slots, so that there are blocks of which everything is seen.
    """
    B, C, K, G, N, M, E = shape
    rng = np.random.default_rng(seed)
    floats = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    ordered = lambda low, high, shape: np.sort(rng.integers(low, high, shape), -1)  # noqa: E731
    ids, key_ids = ordered(1, documents + 2, (B, N)), ordered(1, documents + 1, (C, M))
    positions, key_positions = ordered(0, 2 * M, (B, N)), ordered(0, 2 * M, (C, M))
    key_ids = np.where(rng.random((C, M)) < 0.1, -1, key_ids)
    ids, key_ids = (np.ones_like(a) if whole else a for a in (ids, key_ids))
    after = positions - window if window else np.full((B, N), np.iinfo(np.int32).min)
    ints = [jnp.asarray(a, jnp.int32) for a in (ids, after, key_ids, key_positions, positions)]
    queries = Queries(floats(B, K, G, N, E) * E**-0.5, *ints[:2])
    return queries, Memory(floats(C, K, M, E), floats(C, K, M, E), *ints[2:])


INTERPRETED = {
    platform: Way(
        kernels.is_large,
        functools.partial(kernels.forward, interpret=True),
        functools.partial(kernels.gradient, interpret=True),
        on_meshes=True,
    )
    for platform, kernels in {"tpu": attention_kernel, "cuda": attention_triton}.items()
}
"""By platform."""


def value_and_gradients(memories: int, way: Way | None, arrays: Any, cotangents: Any, mesh: Any = None) -> Any:
    """Result, log-sum-exp and gradients as the primitives compute them on a platform of that way."""
    params: Any = {"count": memories, "precision": None, "mesh": mesh, "way": way}
    result, log_sum = attention_primitive._forward(*arrays, **params)
    seen = log_sum > attention_whole.HIDDEN / 2
    grad, of_log_sum = jnp.where(seen[..., None], cotangents[0], 0), jnp.where(seen, cotangents[1], 0)
    gradients = attention_primitive._gradient(*arrays, result, log_sum, grad.astype(result.dtype), of_log_sum, **params)
    return jnp.where(seen[..., None], result, 0), jnp.where(seen, log_sum, 0), *gradients
