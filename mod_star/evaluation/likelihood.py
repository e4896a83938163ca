"""Protocols that generate nothing: choices by log-likelihood, and the expected probability of the Quiet-STaR paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mod_star.errors import InputError, require
from mod_star.evaluation.prompts import joined
from mod_star.evaluation.protocols import Numbered, Subject, stopwatch
from mod_star.evaluation.records import Record
from mod_star.evaluation.scoring import Pair, Scored, ScoringConfig, score_stream
from mod_star.evaluation.tasks import Item
from mod_star.tokenization.tokenizers import Tokenizer


@dataclass(frozen=True)
class ChoiceLikelihood:
    """The choice whose text the model finds likeliest after the prompt, plain and per character of the choice."""

    texts: bool = False
    """Score what choices stand for ("bank"), not their labels ("A")."""
    batch_size: int = 8
    seed: int = 0
    headline: str = "log-likelihood"

    def check(self, subject: Subject, items: Sequence[Item]) -> None:
        """Raises InputError unless there are choices, and every prompt with any of them fits into the context."""
        kind = items[0].kind
        require(kind == "choice", "--protocol", "choice", f"needs choices; the answers of this task are of kind {kind}")
        for item in items:
            _require_room(subject, item, self._pairs(subject, item))

    def records(self, subject: Subject, items: Sequence[Numbered]) -> Iterator[Record]:
        """A record per item, with the log-likelihood of each choice, in nats, and the overflow of all its texts."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for place, (_, item) in enumerate(items):
            of_choices = self._pairs(subject, item)
            pairs += of_choices
            owners += [place] * len(of_choices)
        first = {place: index for index, place in reversed(list(enumerate(owners)))}
        scored: dict[int, dict[int, Scored]] = {}
        lap = stopwatch()
        for index, score in _scores(subject, pairs, None, self.batch_size, self.seed):
            place = owners[index]
            _, item = items[place]
            of_item = scored.setdefault(place, {})
            of_item[index - first[place]] = score
            if len(of_item) == len(item.choices):
                totals = [math.fsum(of_item[choice].log_probs) for choice in range(len(item.choices))]
                overflow = sum(each.overflow for each in scored.pop(place).values())
                yield self._record(subject, item, totals) | {"overflow": overflow, "seconds": lap()}

    def _pairs(self, subject: Subject, item: Item) -> list[Pair]:
        prompt = subject.prompts.text(item)
        shown = item.choice_texts if self.texts else item.choices
        return continuations(subject, item, [joined(prompt, text)[len(prompt) :] for text in shown])

    def _record(self, subject: Subject, item: Item, totals: list[float]) -> Record:
        shown = item.choice_texts if self.texts else item.choices
        lengths = [len(text) for text in shown]
        normalised = [total / length for total, length in zip(totals, lengths, strict=True)]
        answers = {
            "log-likelihood": item.choices[max(range(len(totals)), key=totals.__getitem__)],
            "log-likelihood per character": item.choices[max(range(len(totals)), key=normalised.__getitem__)],
        }
        return {
            "id": item.id,
            "prompt": subject.prompts.text(item),
            "gold": item.gold,
            "answer": answers[self.headline],
            "correct": answers[self.headline] == item.gold,
            "scores": {name: answer == item.gold for name, answer in answers.items()},
            "answers": answers,
            "log_likelihoods": dict(zip(item.choices, totals, strict=True)),
        }


@dataclass(frozen=True)
class ExpectedProbability:
    """The evaluation of the Quiet-STaR paper (Zelikman et al., arXiv 2403.09629), and the accuracy that goes with it.

    The gold answer and a newline are put after the prompt. The expected probability is the product over their tokens
    of p(token), renormalised over digits (numbers) or the choices' tokens (choices), and the newline: how often a model
    that samples under that restriction would be right. A token that is neither, such as the sign of a negative number,
    makes it 0. The argmax is right if each of those tokens is the most probable of the allowed ones, greedy decoding if
    each is the most probable of all.
    """

    batch_size: int = 8
    seed: int = 0
    headline: str = "expected probability"

    def check(self, subject: Subject, items: Sequence[Item]) -> None:
        """Raises InputError if answers are free text, or a prompt with its answer doesn't fit into the context."""
        allowed = "needs numbers or choices, not answers of any text"
        require(items[0].kind != "text", "--protocol", "expected", allowed)
        for item in items:
            _require_room(subject, item, [self._pair(subject, item)])

    def records(self, subject: Subject, items: Sequence[Numbered]) -> Iterator[Record]:
        """A record per item, with the probability of each token of the answer, and the overflow of its text."""
        groups: dict[tuple[int, ...], list[Item]] = {}
        numbers = digit_ids(subject.model.tokenizer) if items and items[0][1].kind == "number" else ()
        for _, item in items:
            groups.setdefault(self._allowed(subject, item, numbers), []).append(item)
        lap = stopwatch()
        for allowed, members in groups.items():
            pairs = [self._pair(subject, item) for item in members]
            for index, scored in _scores(subject, pairs, allowed, self.batch_size, self.seed):
                item = members[index]
                restricted, argmax = scored.restricted_log_probs, scored.restricted_is_greedy
                assert restricted is not None and argmax is not None
                probabilities = [math.exp(each) for each in restricted]
                right = all(argmax)
                yield {
                    "id": item.id,
                    "prompt": subject.prompts.text(item),
                    "gold": item.gold,
                    "answer": item.gold if right else None,  # what else it would have answered was not asked
                    "correct": right,
                    "scores": {
                        "expected probability": math.prod(probabilities),
                        "argmax": right,
                        "greedy": all(scored.is_greedy),
                    },
                    "tokens": [subject.model.tokenizer.token_text(token) for token in pairs[index][1]],
                    "probabilities": probabilities,
                    "log_probs": scored.log_probs,
                    "is_greedy": scored.is_greedy,
                    "overflow": scored.overflow,
                    "seconds": lap(),
                }

    def _pair(self, subject: Subject, item: Item) -> Pair:
        return self._pairs(subject, item, (item.gold,))[0]

    def _pairs(self, subject: Subject, item: Item, answers: Sequence[str]) -> list[Pair]:
        """Prefix and answer with its newline. A blank that is a token of its own belongs to the prefix."""
        prompt = subject.prompts.text(item)
        pairs = continuations(subject, item, [joined(prompt, answer)[len(prompt) :] + "\n" for answer in answers])
        decode = subject.model.tokenizer.decode  # after the prefix: a decoder may drop a text's first blank
        blanks = [decode([*before, after[0]]) == decode(before) + " " for before, after in pairs]
        return [
            ([*before, after[0]], after[1:]) if blank else (before, after)
            for (before, after), blank in zip(pairs, blanks, strict=True)
        ]

    def _allowed(self, subject: Subject, item: Item, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Ids to renormalise over: digits or the tokens of all choices, and the newline."""
        if item.kind == "number":
            newline = self._pair(subject, item)[1][-1]
            return tuple(sorted({*numbers, newline}))
        pairs = self._pairs(subject, item, item.choices)
        return tuple(sorted({token for _, after in pairs for token in after}))


def continuations(subject: Subject, item: Item, texts: Sequence[str]) -> list[Pair]:
    """Prefix and continuation for each of some texts that may follow a prompt.

    Where a tokenizer joins the prompt's end with what follows, the prefix ends before that, for all texts alike.
    """
    encoded = subject.prompts.encode(item)
    prompt = subject.prompts.text(item)
    start = len(encoded) - len(subject.model.tokenizer.encode(prompt))  # bos, if there is one
    wholes = [[*encoded[:start], *subject.model.tokenizer.encode(prompt + text)] for text in texts]
    shared = min(_shared(encoded, whole) for whole in wholes)
    if shared < 1:
        raise InputError(
            f"item {item.id!r}: its prompt and answer are one token; nothing comes before it to predict it from"
        )
    return [(whole[:shared], whole[shared:]) for whole in wholes]


def digit_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of all tokens that are nothing but ASCII digits, perhaps with a blank before them."""
    digits = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token]).removeprefix(" ")
        if text.isascii() and text.isdigit():
            digits.append(token)
    return tuple(digits)


def _scores(
    subject: Subject, pairs: Sequence[Pair], allowed: Sequence[int] | None, batch_size: int, seed: int
) -> Iterator[tuple[int, Scored]]:
    return score_stream(subject.model, pairs, ScoringConfig(subject.think, batch_size, seed, allowed))


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning; one of `second` is always left."""
    count = 0
    while count < min(len(first), len(second) - 1) and first[count] == second[count]:
        count += 1
    return count


def _require_room(subject: Subject, item: Item, pairs: Sequence[Pair]) -> None:
    context = subject.model.decoder.config.context
    longest = max(len(before) + len(after) for before, after in pairs)
    if longest > context + 1:
        raise InputError(
            f"item {item.id!r} = {longest} tokens with its prompt: must be at most {context + 1} (context {context})"
        )
