"""Streams of random numbers: what is folded into a key, so that each key serves one purpose.

A key that draws two things makes them depend on one another: stochastic routing once took its noise from the very keys
that drew the tokens, and every token drawn told the noise of a later one. So a key is either drawn from or folded, and
where several things start from one seed, each folds its own word from here first. (`jax.random.split` gives the keys
that folding in 0, 1, 2, ... gives; the words of streams beside it are out of reach of any count.)
"""

from __future__ import annotations

import numpy as np

# Folded into the key of `train.seed`, from which the parameters are made.
TRAINING = 1
EVALUATION = 2
THINKING_PARAMETERS = 3
UPCYCLING = 4
BUDGETS = 5
ADAPTERS = 6

# Folded into keys beside indices (rows, steps, positions, batches), above any of which they are.
THOUGHTS = np.uint32(2**32 - 1)
"""Of a row: its thoughts, so that its tokens are drawn the same without any."""
ROUTING_NOISE = np.uint32(2**32 - 2)
"""Of a routed block: the noise of stochastic routing."""
PLACES = np.uint32(2**32 - 3)
"""Of an evaluation: where to think."""
EXAMPLES = np.uint32(2**32 - 4)
"""Of evaluations: the thoughts that are written down to be read."""
ROUTING_PARAMETERS = np.uint32(2**32 - 5)
"""Of a routed block's parameters: its router's and its predictor's."""
THOUGHT_PARAMETERS = np.uint32(2**32 - 6)
"""Of thinking's parameters: those of a user's `ThoughtInput`."""
EXPLORATION = np.uint32(2**32 - 7)
"""Of a routed block in training: which tokens it computes besides those that its router has chosen."""
DECIDER = np.uint32(2**32 - 8)
"""Of thinking's parameters: those of the decider."""
SKIP_PATH = np.uint32(2**32 - 9)
"""Of a routed block's parameters: the adapter's."""
