"""A tokenizer for the tiny models of `decoding_models`: a symbol per id, five of them ends; and naive next logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from decoding_models import VOCAB, Model, log_softmax, make_generator
from test_think import THINKING, Thinker

SYMBOLS = '0123456789 ?!;(|&"=<>)#@'
END_IDS = tuple(range(len(SYMBOLS), VOCAB))


class SymbolTokenizer:
    """Numbers in its texts are runs of digits: nothing else that belongs to numbers or words is there."""

    vocab_size = VOCAB
    bos_id = 0
    eos_id = VOCAB - 1
    end_ids = END_IDS
    starts_with_bos = False
    chat_template = None
    fingerprint = "symbols"

    def encode(self, text: str) -> list[int]:
        return [SYMBOLS.index(symbol) for symbol in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(SYMBOLS[i] for i in ids if i < len(SYMBOLS))

    def token_text(self, token: int) -> str:
        return SYMBOLS[token].replace(" ", "␣")

    def apply_chat(self, messages: Any, add_generation_prompt: bool = True) -> str:
        raise NotImplementedError


class Subject:
    """A model to decode with, and its next-token log-probabilities from running a whole text anew."""

    def __init__(self, kind: str) -> None:
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self.thinker: Thinker | None = None
        if kind == "thinking":
            self.thinker = Thinker(2)
            model = self.thinker.model
            self.generator = make_generator(
                model.decoder, self.thinker.params, END_IDS, tokenizer=SymbolTokenizer(), thinking=THINKING
            )
        else:
            # With so little headroom that caches fill up; with the embedding as head it would be too sure.
            routing = {"every": 0} if kind == "dense" else {"headroom": 1.0}
            self.model = Model(routing, tie_embeddings=False)
            self.generator = self.model.generator(END_IDS, SymbolTokenizer())

    def log_p(self, ids: Sequence[int]) -> np.ndarray:
        """Float64 log-probabilities V of the token after `ids`."""
        if tuple(ids) not in self._known:
            self._known[tuple(ids)] = self._log_p(ids)
        return self._known[tuple(ids)]

    def _log_p(self, ids: Sequence[int]) -> np.ndarray:
        if self.thinker is None:
            return log_softmax(self.model.teach(list(ids)).logits_SxV[-1])
        thinker, text = self.thinker, list(ids)
        base = thinker.hidden(text)[-1]
        thought = [*text, VOCAB]
        for _ in range(THINKING.thought_length):
            thought.append(int(np.argmax(thinker.logits(thinker.hidden(thought)[-1]))))
        after = thinker.hidden([*thought, VOCAB + 1])[-1]
        weight = thinker.mixing_weight(base, after)
        return log_softmax(thinker.logits((1 - weight) * base + weight * after))
