"""The protocol of generated answers: any decoding, the answer found in the text, equal to the gold answer or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mod_star.decoding.answers import Finder
from mod_star.decoding.beam import BeamSearch, check_beams
from mod_star.decoding.branches import Branches
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.decoding.cot import Reading, read_branches, tokens_after
from mod_star.decoding.early_stop import EarlyStop, Replay, replay
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig, config_of
from mod_star.decoding.p_true import tokens_of_question
from mod_star.decoding.rankings import NORMALISED_LOG_PROB
from mod_star.decoding.text import Completion, StopWatch, complete_many, completion_of
from mod_star.decodings import Beam, Cot, Decoding, Greedy, SelfConsistency, name_of
from mod_star.errors import InputError, require
from mod_star.evaluation.branch_records import branch_record, cot_answers, rankings_of, sample_answers
from mod_star.evaluation.protocols import Numbered, Subject, stopwatch
from mod_star.evaluation.records import Record
from mod_star.evaluation.tasks import Item

GREEDY = Greedy()
STOPPED_EARLY = "self-consistency, stopped early"
"""The measure of samples as they would have been with an early stop, by equal votes."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """Generates an answer to every item, many items at a time."""

    decoding: Decoding = GREEDY
    new_tokens: int = 200
    stop: tuple[str, ...] = ()
    continuation: str | None = None
    """Ask for the answer with these words; None: it is the last one in the text."""
    batch_size: int = 8
    """Items at a time."""
    seed: int = 0
    rule: Finder | None = None
    """How numbers are found and compared; None: by our own rules."""
    confidence: ConfidenceConfig | None = None
    """What to measure along branches and samples, whose rankings are then counted too; None: nothing."""

    @property
    def headline(self) -> str:
        """The measure that counts most."""
        return "CoT aggregated, Δ" if isinstance(self.decoding, Cot) else name_of(self.decoding)

    def check(self, subject: Subject, items: Sequence[Item]) -> None:
        """Raises InputError if a prompt leaves no room, or there are more branches than tokens to branch on."""
        config = subject.model.decoder.config
        context, V, branches = config.context, config.vocab_size, self._config(subject).rows_per_prompt
        require(1 <= self.new_tokens < context, "--new-tokens", self.new_tokens, f"must lie in [1, {context - 1}]")
        require(branches <= V, "--branches", branches, f"must be at most the vocabulary, {V}")
        if isinstance(self.decoding, Beam):
            check_beams(branches, self.decoding.length_penalty)
        if self.rule is not None and items[0].kind != "number":
            raise InputError(f"--answer-rule: finds numbers; the answers of this task are of kind {items[0].kind}")
        if items[0].finder.needs_continuation and self.continuation is None:
            raise InputError("--continuation: must be given for answers of any words, such as 'So the answer is'")
        more = 0
        if self.continuation is not None:
            more = tokens_after(subject.model.tokenizer, self.continuation)
        what = "the continuation and its answer"
        if self.confidence is not None and self.confidence.p_true is not None:
            asking = tokens_of_question(subject.model.tokenizer, self.confidence.p_true)
            more, what = max((more, what), (asking, "the question of P(True)"))
        room = context - self.new_tokens - more
        for item in items:
            length = len(subject.prompts.encode(item))
            if length > room:
                raise InputError(
                    f"item {item.id!r} = {length} tokens with its prompt: must be at most {room} "
                    f"(context {context} minus {self.new_tokens} new tokens"
                    f"{f' and {more} of {what}' if more else ''})"
                )

    def records(self, subject: Subject, items: Sequence[Numbered]) -> Iterator[Record]:
        """A record per item, with its branches, samples or beams."""
        generator, config = subject.generator(), self._config(subject)
        skip_first = isinstance(self.decoding, Cot) and self.decoding.skip_first
        reading = Reading(self.continuation, skip_first, self.confidence)
        lap = stopwatch()
        for place, completions in self._completions(generator, subject, items):
            _, item = items[place]
            (branches,) = read_branches(
                generator, completions, replace(config, branches=len(completions)), self.rule or item.finder,
                [subject.prompts.encode(item)], reading,
            )  # fmt: skip
            yield self._record(item, branches) | {"seconds": lap()}

    def _config(self, subject: Subject) -> GenerationConfig:
        """How one item's texts are generated."""
        return config_of(
            self.decoding, self.new_tokens, stop=self.stop, think=subject.think, seed=self.seed,
            confidence=self.confidence is not None,
        )  # fmt: skip

    def _completions(
        self, generator: Generator, subject: Subject, items: Sequence[Numbered]
    ) -> Iterator[tuple[int, list[Completion]]]:
        texts = [subject.prompts.text(item) for _, item in items]
        encoded = [subject.prompts.encode(item) for _, item in items]
        config = self._config(subject)
        if isinstance(self.decoding, Beam):
            yield from self._beams(generator, texts, encoded, config)
            return
        config = replace(config, rows=config.rows_per_prompt * self.batch_size)
        yield from complete_many(generator, texts, config, encoded, [number for number, _ in items])

    def _beams(
        self, generator: Generator, texts: list[str], encoded: list[list[int]], config: GenerationConfig
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert isinstance(self.decoding, Beam)
        search = BeamSearch(generator, config.rows_per_prompt, self.decoding.length_penalty, config.think)
        order = sorted(range(len(texts)), key=lambda place: len(encoded[place]))
        size = min(self.batch_size, len(order))
        for first in range(0, len(order), size):
            places = order[first : first + size]
            filled = places + places[-1:] * (size - len(places))  # the last batch needs no program of its own
            watches = [StopWatch(generator.tokenizer, texts[place], self.stop) for place in filled if self.stop]
            of_places = search.search([encoded[place] for place in filled], self.new_tokens, watches)
            for place, beams in zip(places, of_places, strict=False):
                results = [beam.generated() for beam in beams]
                yield (
                    place,
                    [
                        completion_of(generator.tokenizer, texts[place], result, self.new_tokens, self.stop)
                        for result in results
                    ],
                )

    def _record(self, item: Item, branches: Branches) -> Record:
        answers: dict[str, str | None]
        best: int | None
        more: dict[str, int] = {}
        match self.decoding:
            case Cot():
                answers = cot_answers(branches, rankings_of(self.confidence), self.decoding)
                answer = answers[self.headline]
                best = branches.max_path() if answer is None else branches.representative(answer)
            case SelfConsistency():
                vote = self.decoding
                weighed = self.confidence is not None or vote.keep < 1 or vote.vote_temperature is not None
                answers = sample_answers(branches, rankings_of(self.confidence) if weighed else {}, vote)
                if vote.early_stop is not None:
                    replayed = self._replay(item, branches, vote.early_stop, vote)
                    answers[STOPPED_EARLY] = replayed.branches.majority_answer()
                    more = {"tokens": replayed.all_tokens, "tokens_early": replayed.tokens}
                majority = branches.majority_answer()
                best = None if majority is None else branches.representative(majority, NORMALISED_LOG_PROB)
            case _:
                answers = {self.headline: branches.branches[0].answer}
                best = 0
        answer, gold = answers[self.headline], item.gold_by(self.rule)
        return {
            "id": item.id,
            "prompt": branches.prompt,
            "gold": gold,
            "answer": answer,
            "correct": answer == gold,
            "scores": {name: each == gold for name, each in answers.items()},
            "answers": answers,
            "text": None if best is None else branches.branches[best].completion.text,
            "branches": [branch_record(branch) for branch in branches.branches],
            **more,
        }

    def _replay(self, item: Item, samples: Branches, warm_up: int, vote: SelfConsistency) -> Replay:
        """What stopping early would have come to, of samples that were generated to their end."""
        rule = EarlyStop(warm_up, vote.keep, decided=self.continuation is None)
        size = vote.window if self.confidence is None else self.confidence.window
        return replay(samples, rule, self.rule or item.finder, size)
