"""The task of `experiments.quiet_star_composition`: composing permutations, more steps than two layers can do at once.

A line is Q, a start state, six operations, = and the final state: an operation is one of four fixed permutations of
five states. Some lines show five states in brackets before the answer: the five intermediate states, or, a habit that
helps nobody, the start state five times over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.support.pretraining import cut_from_lines

SYMBOLS = "01234abcdQ()="
STATES, OPERATIONS, OPERATIONS_PER_LINE = 5, 4, 6
QUESTION, OPEN, CLOSE, EQUALS = (SYMBOLS.index(symbol) for symbol in "Q()=")
FIRST_OPERATION = SYMBOLS.index("a")
VOCAB = 16
LENGTH = 48
PERMUTATIONS = np.stack([np.random.default_rng(100 + i).permutation(STATES) for i in range(OPERATIONS)])


def states_of(start: int, operations: npt.NDArray[np.int64]) -> list[int]:
    """The start state, and the state after each operation."""
    states = [start]
    for operation in operations:
        states.append(int(PERMUTATIONS[operation, states[-1]]))
    return states


def make_line(rng: np.random.Generator, brackets: float, truthful: float) -> list[int]:
    """One line's symbols; `brackets` is the probability of brackets, `truthful` that they hold the true states."""
    operations = rng.integers(0, OPERATIONS, OPERATIONS_PER_LINE)
    start = int(rng.integers(0, STATES))
    states = states_of(start, operations)
    shown: list[int] = []
    if rng.random() < brackets:
        steps = states[1:-1] if rng.random() < truthful else [start] * (OPERATIONS_PER_LINE - 1)
        shown = [OPEN, *steps, CLOSE]
    return [QUESTION, start, *(FIRST_OPERATION + operations).tolist(), EQUALS, *shown, states[-1]]


def make_batch(rng: np.random.Generator, sequences: int, brackets: float, truthful: float) -> dict[str, Any]:
    """Sequences of LENGTH symbols, cut from lines set end to end; in the form of `mod_star.data`'s batches."""
    return cut_from_lines(lambda: make_line(rng, brackets, truthful), sequences, LENGTH)


def is_answer(batch: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """Where the next symbol is the answer of a line without brackets."""
    equals: npt.NDArray[np.bool_] = np.asarray(batch["tokens"]) == EQUALS
    return equals & (np.asarray(batch["targets"]) < STATES)


def spell(symbols: Any) -> str:
    """Symbols as text; ? for ids that are none, _ for pauses."""
    return "".join("_" if i < 0 else SYMBOLS[i] if i < len(SYMBOLS) else "?" for i in np.asarray(symbols).tolist())
