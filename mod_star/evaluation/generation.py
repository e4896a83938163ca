"""The protocol of generated answers: any decoding, the answer found in the text, equal to the gold answer or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mod_star.decoding.answers import Finder
from mod_star.decoding.beam import LENGTH_PENALTY, BeamSearch, check_beams
from mod_star.decoding.branches import Branches
from mod_star.decoding.cot import BRANCHING, GREEDY, read_branches, tokens_after
from mod_star.decoding.generate import Generator
from mod_star.decoding.generated import Generated
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.text import Completion, StopWatch, complete_many, completion_of
from mod_star.errors import InputError, require
from mod_star.evaluation.branch_records import branch_record, cot_answers, sample_answers
from mod_star.evaluation.protocols import Numbered, Subject, stopwatch
from mod_star.evaluation.records import Record
from mod_star.evaluation.tasks import Item

Decoding = Literal["greedy", "temperature", "self-consistency", "beam", "cot"]


@dataclass(frozen=True)
class GeneratedAnswer:
    """Generates an answer to every item, many items at a time."""

    decoding: Decoding = "greedy"
    new_tokens: int = 200
    branches: int = 10
    """Branches, samples or beams of each item; of no use for greedy and temperature."""
    sampling: Sampling = GREEDY
    """How temperature and self-consistency draw."""
    stop: tuple[str, ...] = ()
    skip_first: bool = False
    """Leave the branched token out of Δ where it is part of the answer."""
    continuation: str | None = None
    """Ask for the answer with these words; None: it is the last one in the text."""
    batch_size: int = 8
    """Items at a time."""
    seed: int = 0
    length_penalty: float = LENGTH_PENALTY
    """Of beams, see `BeamSearch`."""
    rule: Finder | None = None
    """How numbers are found and compared; None: by our own rules."""

    @property
    def headline(self) -> str:
        """The measure that counts most."""
        if self.decoding == "cot":
            return "CoT aggregated, Δ"
        return self.decoding

    @property
    def rows(self) -> int:
        """Rows per item."""
        return 1 if self.decoding in ("greedy", "temperature") else self.branches

    def check(self, subject: Subject, items: Sequence[Item]) -> None:
        """Raises InputError if a prompt leaves no room, or there are more branches than tokens to branch on."""
        context, V = subject.decoder.config.context, subject.decoder.config.vocab_size
        require(1 <= self.new_tokens < context, "--new-tokens", self.new_tokens, f"must lie in [1, {context - 1}]")
        require(self.rows <= V, "--branches", self.branches, f"must be at most the vocabulary, {V}")
        check_beams(self.branches, self.length_penalty)
        if self.rule is not None and items[0].kind != "number":
            raise InputError(f"--answer-rule: finds numbers, the answers of this task are of kind {items[0].kind}")
        if items[0].kind == "text" and self.continuation is None:
            raise InputError("--continuation: is needed to find an answer of any words, such as 'So the answer is'")
        more = 0
        if self.continuation is not None:
            more = tokens_after(subject.tokenizer, self.continuation)
        room = context - self.new_tokens - more
        for item in items:
            length = len(subject.prompts.encode(item))
            if length > room:
                raise InputError(
                    f"item {item.id!r} = {length} tokens with its prompt: must be at most {room} "
                    f"(context {context} minus {self.new_tokens} new tokens"
                    f"{f' and {more} of the continuation and its answer' if more else ''})"
                )

    def records(self, subject: Subject, items: Sequence[Numbered]) -> Iterator[Record]:
        """A record per item, with its branches, samples or beams."""
        generator = subject.generator()
        lap = stopwatch()
        for place, completions in self._completions(generator, subject, [item for _, item in items], items):
            _, item = items[place]
            (made,) = read_branches(
                generator, subject.tokenizer, completions, self.rule or item.finder, len(completions),
                encoded=[subject.prompts.encode(item)], skip_first=self.skip_first, continuation=self.continuation,
                stop=self.stop, think=subject.think,
            )  # fmt: skip
            yield self._record(item, made) | {"seconds": lap()}

    def _completions(
        self, generator: Generator, subject: Subject, asked: list[Item], items: Sequence[Numbered]
    ) -> Iterator[tuple[int, list[Completion]]]:
        texts = [subject.prompts.text(item) for item in asked]
        encoded = [subject.prompts.encode(item) for item in asked]
        if self.decoding == "beam":
            search = BeamSearch(generator, self.branches, self.length_penalty, subject.think)
            order = sorted(range(len(asked)), key=lambda place: len(encoded[place]))
            size = min(self.batch_size, len(order))
            for first in range(0, len(order), size):
                places = order[first : first + size]
                filled = places + places[-1:] * (size - len(places))  # the last batch needs no program of its own
                watches = [StopWatch(subject.tokenizer, texts[place], self.stop) for place in filled if self.stop]
                found = search.search([encoded[place] for place in filled], self.new_tokens, watches)
                for place, beams in zip(places, found, strict=False):
                    results = [beam.generated() for beam in beams]
                    yield place, [self._completion(subject, texts[place], result) for result in results]
            return
        sampling = {"greedy": GREEDY, "cot": BRANCHING}.get(self.decoding, self.sampling)
        yield from complete_many(
            generator, subject.tokenizer, texts, self.new_tokens, sampling, rows=self.rows * self.batch_size,
            branches=self.rows, seed=self.seed, stop=self.stop, think=subject.think, encoded=encoded,
            numbers=[number for number, _ in items],
        )  # fmt: skip

    def _completion(self, subject: Subject, prompt: str, result: Generated) -> Completion:
        return completion_of(subject.tokenizer, prompt, result, self.new_tokens, self.stop)

    def _record(self, item: Item, made: Branches) -> Record:
        if self.decoding == "cot":
            answers = cot_answers(made)
            best = made.max_path()
        else:
            answers = {self.headline: made.branches[0].answer}
            best = 0
            if self.decoding == "self-consistency":
                answers = sample_answers(made)
                majority = made.majority_answer()
                best = None if majority is None else made.representative(majority, "normalised_log_prob")
        if self.decoding == "cot" and (answer := answers[self.headline]) is not None:
            best = made.representative(answer)
        answer, gold = answers[self.headline], item.gold_by(self.rule)
        return {
            "id": item.id,
            "prompt": made.prompt,
            "gold": gold,
            "answer": answer,
            "correct": answer == gold,
            "scores": {name: given == gold for name, given in answers.items()},
            "answers": answers,
            "text": None if best is None else made.branches[best].completion.text,
            "branches": [branch_record(branch) for branch in made.branches],
        }
