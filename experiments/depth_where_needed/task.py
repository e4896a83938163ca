"""The task: one line that needs step after step, at a random place in filler that needs nothing.

A line is a start state and operations, each one of two permutations of three states: a rotation and a swap, which do
not commute. The label of an operation is the state after it, which takes as many steps of work as there are operations
up to it; that of the start state and of filler is the symbol itself. Labels are not the next symbols: everything that
is asked for can be worked out.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

STATES, OPERATIONS = 3, 2
PERMUTATIONS = np.array([[1, 2, 0], [1, 0, 2]])
FILLER = STATES + OPERATIONS
VOCAB = 8


def context_of(operations: int) -> int:
    """Symbols of a sequence with one line. An eighth is hard: the start state and the operations."""
    return 8 * (operations + 1)


def make_batch(
    rng: np.random.Generator, sequences: int, operations: int
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """A batch in the form of `mod_star.data`'s, and for each symbol its steps of work; -1 for filler."""
    rows, context = np.arange(sequences), context_of(operations)
    tokens = np.full((sequences, context), FILLER, np.int32)
    labels, work = tokens.copy(), np.full(tokens.shape, -1)
    start = rng.integers(0, context - operations, sequences)
    chosen = rng.integers(0, OPERATIONS, (sequences, operations))
    states = rng.integers(0, STATES, sequences)
    tokens[rows, start] = labels[rows, start] = states
    work[rows, start] = 0
    for i in range(operations):
        states = PERMUTATIONS[chosen[:, i], states]
        tokens[rows, start + 1 + i] = STATES + chosen[:, i]
        labels[rows, start + 1 + i] = states
        work[rows, start + 1 + i] = i + 1
    batch = {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(labels),
        "positions": jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), tokens.shape),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "weights": jnp.ones(tokens.shape, jnp.float32),
    }
    return batch, work
