"""Generation from text to text: prompts are encoded, what is generated is decoded as it comes, stop strings end it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mod_star.decoding.generate import Generator
from mod_star.decoding.generated import Generated
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.tokenization.tokenizers import StreamDecoder, Tokenizer, begin


@dataclass(frozen=True)
class Completion:
    """What became of one prompt, or what has up to now."""

    prompt: str
    text: str
    """The new text, without the stop string. While `finished` is None, only what can't change any more."""
    tokens: list[int]
    """New tokens, without the end token, up to the one that completes a stop string."""
    log_probs: list[float]
    """Their log-probabilities in nats under the model (temperature 1, all tokens), mixed where it thought."""
    finished: Literal["end", "length", "stop"] | None
    """By the model's own end token, the limit of new tokens, or a stop string; None: not yet."""
    routed_fraction: list[float]
    """Share of the tokens that each routed block computed, prompt included; empty for a dense model."""
    overflow: int
    """Times a token passed by because a routed block had no slot left, over all routed blocks."""
    gaps: list[float] = field(default_factory=list)
    """Probability of the best token less that of the second best at each token's step: see `Generated`."""
    end_log_prob: float | None = None
    """Log-probability of the model's own end token; None if `finished` is anything else than "end"."""
    end_gap: float | None = None
    """The gap at that token."""
    confidences: list[float] = field(default_factory=list)
    """Token confidence of each token, see `Generated`. Empty if not asked for, as the next."""
    certainties: list[float] = field(default_factory=list)
    """Self-certainty of each token."""
    entropies: list[float] = field(default_factory=list)
    """Entropy in nats of the prediction of each token without a thought. Empty if it never thinks, as the next."""
    thoughts: list[list[int] | None] = field(default_factory=list)
    """Tokens of the thought before each token; None where it didn't think, [] for pauses."""
    thought_texts: list[str | None] = field(default_factory=list)
    """The same as text."""
    mixing_weights: list[float | None] = field(default_factory=list)
    """Weight of the prediction after the thought; None where it didn't think."""
    starts: list[int] = field(default_factory=list)
    """Index in the text at which each token begins; beyond its end for tokens that are held back or left out."""

    def path_log_prob(self) -> tuple[float, float]:
        """Log-probability of the path in nats, its end token included if it has one; and the same per token."""
        log_probs = list(self.log_probs)
        if self.finished == "end" and self.end_log_prob is not None:
            log_probs.append(self.end_log_prob)
        total = math.fsum(log_probs)
        return total, total / max(1, len(log_probs))


StopBranches = Callable[[int, list[Completion]], Sequence[bool]]
"""Sees a prompt's index and the completions of its branches so far, and says which of them to end."""


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, as the model saw texts begin: see `mod_star.tokenization.tokenizers.begin`."""
    return [begin(tokenizer, prompt) for prompt in prompts]


def complete(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    encoded: Sequence[Sequence[int]] | None = None,
    stop: StopBranches | None = None,
) -> Iterator[list[Completion]]:
    """Completes texts, all in one batch.

    Args:
      generator: the model.
      prompts: the texts to go on from.
      config: how. A row generates up to `config.burst` tokens beyond its stop string.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them (a chat's).
      stop: ends rows besides, after a burst; `finished` of their completions stays None. None: no others.

    Yields:
      The completions so far, those of one prompt after those of another, after every burst; the last ones are finished.

    Raises:
      InputError: the model is asked to think and can't, or as for `Generator.start`.
    """
    tokenizer = generator.tokenizer
    encoded = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    rows = [
        _Row(prompt, tokenizer, config.new_tokens, config.stop)
        for prompt in prompts
        for _ in range(config.rows_per_prompt)
    ]

    def stopped(results: list[Generated]) -> list[bool]:
        ended, k = _take(rows, results), config.rows_per_prompt
        if stop is None:
            return ended
        completions = [row.completion(result) for row, result in zip(rows, results, strict=True)]
        more = [each for q in range(len(prompts)) for each in stop(q, completions[q * k : (q + 1) * k])]
        return [one or other for one, other in zip(ended, more, strict=True)]

    for results in generator.stream(encoded, config, stopped):
        yield [row.completion(result) for row, result in zip(rows, results, strict=True)]


def complete_many(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    encoded: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
    stop: StopBranches | None = None,
) -> Iterator[tuple[int, list[Completion]]]:
    """Completes any number of texts, `config.rows` rows at a time, see `Generator.generate_many`; else as `complete`.

    Yields:
      A prompt's index and the completions of its branches, as prompts get finished.
    """
    tokenizer = generator.tokenizer
    encoded = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    texts = [
        [_Row(prompt, tokenizer, config.new_tokens, config.stop) for _ in range(config.rows_per_prompt)]
        for prompt in prompts
    ]

    def stopped(number: int, results: list[Generated]) -> list[bool]:
        ended = _take(texts[number], results)
        if stop is None:
            return ended
        completions = [row.completion(result) for row, result in zip(texts[number], results, strict=True)]
        return [one or other for one, other in zip(ended, stop(number, completions), strict=True)]

    for number, results in generator.generate_many(encoded, config, stopped, numbers):
        yield number, [row.completion(result) for row, result in zip(texts[number], results, strict=True)]


def completion_of(
    tokenizer: Tokenizer, prompt: str, result: Generated, new_tokens: int, stop: Sequence[str] = ()
) -> Completion:
    """One finished result as text, cut at the first of the stop strings."""
    row = _Row(prompt, tokenizer, new_tokens, stop)
    row.take(result)
    return row.completion(result)


class StopWatch:
    """Whether a text that grows token by token has come to one of the stop strings. Never changes: see `after`."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: Sequence[str]) -> None:
        self._stream = StreamDecoder(tokenizer)
        for token in tokenizer.encode(prompt):
            self._stream.push(token)
        self._stop = tuple(stop)
        self._tail = ""  # as much of the new text as may begin a stop string
        self.stopped = False

    def after(self, token: int) -> StopWatch:
        """The watch of the text that goes on with this token."""
        other = copy.copy(self)
        other._stream = self._stream.copy()
        text = self._tail + other._stream.push(token)
        other.stopped = self.stopped or any(stop in text for stop in self._stop)
        other._tail = text[max(0, len(text) + 1 - max(map(len, self._stop))) :]
        return other


def _take(rows: Sequence[_Row], results: Sequence[Generated]) -> list[bool]:
    """Gives each row its new tokens, and says which have come to a stop string."""
    for row, result in zip(rows, results, strict=True):
        row.take(result)
    return [row.finished == "stop" for row in rows]


class _Row:
    """The text of one row as its tokens arrive."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, new_tokens: int, stop: Sequence[str]) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._stream = StreamDecoder(tokenizer)
        for token in tokenizer.encode(prompt):  # decoders may treat what starts a text in another way
            self._stream.push(token)
        self._stop = stop
        self._limit = new_tokens
        self._text = ""
        self._starts: list[int] = []  # one for each token taken
        self._thought_texts: list[str | None] = []
        self.finished: Literal["end", "length", "stop"] | None = None

    def take(self, result: Generated) -> None:
        """Adds the tokens that are new in `result`."""
        if self.finished is not None:
            return
        for thought in result.thoughts[len(self._thought_texts) :]:
            self._thought_texts.append(None if thought is None else self._tokenizer.decode(thought))
        for token in result.tokens[len(self._starts) :]:
            self._starts.append(len(self._text))
            if self._add(self._stream.push(token)):
                return
        ended = result.finished or len(result.tokens) == self._limit
        if ended and not self._add(self._stream.flush()):
            self.finished = "end" if result.finished else "length"

    def _add(self, piece: str) -> bool:
        """Appends to the text; if that completes a stop string, ends the row before it and returns True."""
        seen = len(self._text)
        self._text += piece
        places = [self._text.find(stop, max(0, seen - len(stop) + 1)) for stop in self._stop]
        completed = [place for place in places if place >= 0]
        if completed:
            self._text = self._text[: min(completed)]
            self.finished = "stop"
        return bool(completed)

    def completion(self, result: Generated) -> Completion:
        """The row's state, with the numbers of the latest result."""
        text = self._text
        if self.finished is None:  # the end may yet turn out to begin a stop string
            beginnings = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
            held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
            text = text[: len(text) - held]
        taken = len(self._starts)
        return Completion(
            prompt=self._prompt,
            text=text,
            tokens=result.tokens[:taken],
            log_probs=result.log_probs[:taken],
            finished=self.finished,
            routed_fraction=result.routed_fraction,
            overflow=result.overflow,
            gaps=result.gaps[:taken],
            end_log_prob=result.end_log_prob if self.finished == "end" else None,
            end_gap=result.end_gap if self.finished == "end" else None,
            confidences=result.confidences[:taken],
            certainties=result.certainties[:taken],
            entropies=result.entropies[:taken],
            thoughts=result.thoughts[:taken],
            thought_texts=self._thought_texts[:taken],
            mixing_weights=result.mixing_weights[:taken],
            starts=list(self._starts),
        )
