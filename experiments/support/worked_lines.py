"""The task of `experiments.cot_decoding_composition`: questions that most lines answer at once and few work out.

A line is Q, a start state, six operations, =, an opening, and the final state; an operation is one of four fixed
permutations of five states, more of them than two layers can compose in one pass. Openings, with their shares:

    #  0.50   the answer at once
    (  0.20   the five states in between first, then ) and the answer
    !  0.15   the answer at once
    [  0.15   the start state five times over, then ] and the answer: looks like working, and isn't

After each state in brackets stands one of three separators, at random: working can be worded in many ways, so that the
probability of any one worked line is small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.support.composition_task import OPERATIONS, OPERATIONS_PER_LINE, PERMUTATIONS, STATES
from experiments.support.pretraining import symbol_batch
from mod_star.errors import InputError
from mod_star.tokenization.chat import Message

SYMBOLS = "01234abcdQ=#!()[],;-\n^"
OPENINGS = {"#": 0.5, "(": 0.2, "!": 0.15, "[": 0.15}
CLOSINGS = {"(": ")", "[": "]"}
SEPARATORS = ",;-"
LENGTH = 48
QUESTIONS = STATES * OPERATIONS**OPERATIONS_PER_LINE
HELD_OUT, TAUGHT = np.split(np.random.default_rng(7).permutation(QUESTIONS), [500])


@dataclass(frozen=True)
class Question:
    """A line up to its =, and the right answer."""

    text: str
    states: tuple[int, ...]
    """The start state, those in between, and the answer."""

    @property
    def answer(self) -> str:
        """The final state."""
        return str(self.states[-1])


def question(number: int) -> Question:
    """One of the `QUESTIONS` questions."""
    number, start = divmod(number, STATES)
    operations = [number // OPERATIONS**place % OPERATIONS for place in range(OPERATIONS_PER_LINE)]
    states = [start]
    for operation in operations:
        states.append(int(PERMUTATIONS[operation, states[-1]]))
    return Question(f"Q{start}{''.join('abcd'[i] for i in operations)}=", tuple(states))


def make_line(rng: np.random.Generator, openings: Mapping[str, float] = OPENINGS) -> str:
    """A question that is not held out, with an opening, perhaps working, the right answer and a newline.

    Args:
      rng: of the question, the opening and the separators.
      openings: of one symbol or several, with their shares; the last symbol says what working follows.
    """
    line_question = question(int(rng.choice(TAUGHT)))
    opening = str(rng.choice(list(openings), p=list(openings.values())))
    working, bracket = "", opening[-1]
    if bracket in CLOSINGS:
        shown = line_question.states[1:-1] if bracket == "(" else line_question.states[:1] * (OPERATIONS_PER_LINE - 1)
        working = "".join(f"{state}{rng.choice(list(SEPARATORS))}" for state in shown) + CLOSINGS[bracket]
    return f"{line_question.text}{opening}{working}{line_question.answer}\n"


def make_batch(rng: np.random.Generator, sequences: int, openings: Mapping[str, float] = OPENINGS) -> dict[str, Any]:
    """Sequences of LENGTH symbols, each beginning with a line; in the form of `mod_star.data`'s batches."""
    rows = []
    for _ in range(sequences):
        text = "^"
        while len(text) <= LENGTH:
            text += make_line(rng, openings)
        rows.append(TOKENIZER.encode(text[: LENGTH + 1]))
    return symbol_batch(rows)


class SymbolTokenizer:
    """A token is a symbol; ^ begins a text, a newline ends it."""

    vocab_size = len(SYMBOLS)
    bos_id, eos_id = SYMBOLS.index("^"), SYMBOLS.index("\n")
    end_ids = (eos_id,)
    starts_with_bos = True
    chat_template = None
    fingerprint = "symbols " + hashlib.sha256(SYMBOLS.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Its symbols."""
        return [SYMBOLS.index(symbol) for symbol in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The symbols of the ids, without ^ and newlines."""
        return "".join(SYMBOLS[i] for i in ids if 0 <= i < len(SYMBOLS) and i not in (self.bos_id, self.eos_id))

    def token_text(self, token: int) -> str:
        """The symbol in printable form."""
        return SYMBOLS[token].replace("\n", "⏎")

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Symbols have no chat template: InputError."""
        raise InputError("symbols have no chat template")


TOKENIZER = SymbolTokenizer()
