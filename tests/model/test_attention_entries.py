"""Attention of each row to an entry of a shared memory: what TPUs do instead of a gather, against the gather."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.model import attention_entries
from mod_star.model.attention_whole import Queries

R, C, K, G, M, E = 4, 6, 2, 3, 20, 8
ENTRIES = {"some rows": [5, 0, 2, -1], "all rows": [1, 2, 3, 4]}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("few_bytes", [0, 2**21], ids=["row after row", "slices together"])
def test_slices_of_a_memory_equal_a_gather(entries: list[int], few_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_entries, "FEW_BYTES", few_bytes)
    rng = np.random.default_rng(0)
    keys, values, query = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(C, K, M, E)] * 2 + [(R, K, G, 1, E)]
    )
    positions = jnp.asarray(rng.permuted(np.tile(np.arange(M, dtype=np.int32), (C, 1)), axis=1))
    ids = jnp.asarray(np.where(rng.random((C, M)) < 0.8, 1, -1), jnp.int32)
    queries = Queries(query, jnp.ones((R, 1), jnp.int32), jnp.full((R, 1), 2, jnp.int32))  # positions 0 to 2: unseen
    until = jnp.full((R, 1), 15, jnp.int32)
    entry = jnp.asarray(entries, jnp.int32)

    def run(function: Any) -> Any:
        compute = jax.jit(lambda *arrays: function(*arrays[:3], arrays[3:], None))
        return compute(queries, until, entry, keys, values, ids, positions)

    wanted = entry >= 0
    for ours, gathered in zip(run(attention_entries._on_tpu), run(attention_entries._gathered), strict=True):
        np.testing.assert_allclose(ours[wanted], gathered[wanted], rtol=1e-5, atol=1e-6)
