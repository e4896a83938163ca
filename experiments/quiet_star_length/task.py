"""Questions of one to eight steps of work: compose as many permutations.

A line is Q, a start state, eight places for operations, = and the final state. The first n places hold operations, each
one of four permutations of five states; the others hold a dot, which does nothing. Some lines show L states in brackets
before the answer, L from 1 to 12: token i is the state after i places, and after the eighth the state stays. Where they
show a habit that helps nobody, it is the start state L times over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.support.composition_task import STATES, states_of
from experiments.support.pretraining import cut_from_lines

SYMBOLS = "01234abcd.Q()="
OPERATIONS, PLACES, LONGEST = 4, 8, 12
QUESTION, OPEN, CLOSE, EQUALS, DOT = (SYMBOLS.index(symbol) for symbol in "Q()=.")
FIRST_OPERATION = SYMBOLS.index("a")
VOCAB = 16
LENGTH = 64


def make_line(rng: np.random.Generator, brackets: float, truthful: float) -> list[int]:
    """One line's symbols, of 1 to 8 steps of work, all equally likely.

    Args:
      rng: draws everything.
      brackets: probability of brackets.
      truthful: probability that they hold the true states.
    """
    n = int(rng.integers(1, PLACES + 1))
    operations = rng.integers(0, OPERATIONS, n)
    start = int(rng.integers(0, STATES))
    states = states_of(start, operations)
    shown: list[int] = []
    if rng.random() < brackets:
        L = int(rng.integers(1, LONGEST + 1))
        is_true = rng.random() < truthful
        shown = [OPEN, *([states[min(i, n)] for i in range(1, L + 1)] if is_true else [start] * L), CLOSE]
    places = [*(FIRST_OPERATION + operations).tolist(), *[DOT] * (PLACES - n)]
    return [QUESTION, start, *places, EQUALS, *shown, states[-1]]


def make_batch(rng: np.random.Generator, sequences: int, brackets: float, truthful: float = 0.5) -> dict[str, Any]:
    """Sequences of LENGTH symbols, cut from lines set end to end; in the form of `mod_star.data`'s batches."""
    return cut_from_lines(lambda: make_line(rng, brackets, truthful), sequences, LENGTH)


def steps_of(batch: dict[str, Any]) -> npt.NDArray[np.int32]:
    """Where the next symbol is the answer of a line without brackets, the steps of work of its question; else 0."""
    tokens, targets = np.asarray(batch["tokens"]), np.asarray(batch["targets"])
    steps = np.zeros(tokens.shape, np.int32)
    for row, index in zip(*np.nonzero((tokens == EQUALS) & (targets < STATES)), strict=True):
        if index > PLACES:  # the whole question is in the sequence
            places = tokens[row, index - PLACES : index]
            steps[row, index] = np.sum(places != DOT)
    return steps
