"""The decodings of `mod-star sample` that make several texts of a prompt: cot, self-consistency and beam."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from mod_star.decoding import Completion, GenerationConfig, Generator
from mod_star.decoding.answers import Finder, make_finder
from mod_star.decoding.beam import beam_search, check_beams
from mod_star.decoding.branches import Branches
from mod_star.decoding.confidence import ConfidenceConfig, TrueQuestion
from mod_star.decoding.cot import SO_THE_ANSWER_IS, cot_decode, self_consistency, tokens_after
from mod_star.decoding.early_stop import EarlyStop
from mod_star.decoding.p_true import tokens_of_question
from mod_star.decoding.rankings import DELTA, Ranking, make_ranking, softmax_weighted
from mod_star.decodings import Beam, Cot, Decoding, SelfConsistency
from mod_star.errors import require
from mod_star.tokenization.tokenizers import Tokenizer
from mod_star.views.branches import beam_record, beams_table, branches_record, branches_table, outcome
from mod_star.views.sample import write

if TYPE_CHECKING:
    from mod_star.commands.sample import SampleOptions

Generated = TypeVar("Generated")


def ways_to_answer(options: SampleOptions, decoding: Decoding) -> Answering | BeamTexts | None:
    """What the options ask for; None: one text per prompt. Raises InputError for options that can't be."""
    match decoding:
        case Beam():
            check_beams(decoding.branches, decoding.length_penalty)
            return BeamTexts(options, decoding)
        case Cot() | SelfConsistency():
            finder = make_finder(decoding.answer, "--answer")
            continuation = decoding.continuation
            if continuation is None and finder.needs_continuation:
                continuation = SO_THE_ANSWER_IS
            fine = continuation is None or bool(continuation.strip())
            require(fine, "--continuation", continuation, "must not be empty")
            ranking = None if decoding.ranking is None else make_ranking(decoding.ranking, "--ranking")
            if ranking is None:
                temperature, why = decoding.vote_temperature, "needs --ranking: it says which votes weigh more"
                require(temperature is None, "--vote-temperature", temperature, why)
                stops = isinstance(decoding, SelfConsistency) and (decoding.early_stop or 0) > 0
                require(decoding.keep == 1 or stops, "--keep", decoding.keep, why)
            rule = None if isinstance(decoding, Cot) else early_stop_of(decoding, ranking is None, continuation)
            return Answering(options, decoding, finder, continuation, ranking, rule)
        case _:
            return None


def early_stop_of(decoding: SelfConsistency, equal_votes: bool, continuation: str | None) -> EarlyStop | None:
    """When samples stop; None: never. Raises InputError if --early-stop would stop nothing."""
    if decoding.early_stop is None:
        return None
    decided = equal_votes and continuation is None
    fine = decoding.early_stop > 0 or decided
    require(fine, "--early-stop", 0, "must be positive with --ranking or a continuation: no vote is decided before")
    return EarlyStop(decoding.early_stop, decoding.keep, decided)


@dataclass(frozen=True)
class Answering:
    """One of the decodings that answer questions, as the options have it."""

    options: SampleOptions
    decoding: Cot | SelfConsistency
    finder: Finder
    continuation: str | None
    ranking: Ranking | None
    """What branches are ranked and weighed by; None: samples, whose votes are equal."""
    early_stop: EarlyStop | None = None
    """When samples stop before their end; None: never."""

    def tokens_after(self, tokenizer: Tokenizer) -> int:
        """Room that the context must have beyond the new tokens."""
        asking = 0 if self.continuation is None else tokens_after(tokenizer, self.continuation)
        confidence = self._confidence()
        if confidence is None or confidence.p_true is None:
            return asking
        return max(asking, tokens_of_question(tokenizer, confidence.p_true))

    def run(
        self,
        generator: Generator,
        prompts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        config: GenerationConfig,
        notes: Console,
    ) -> None:
        """Generates and writes what the options ask for."""
        results, seconds = _timed(lambda: self._answers(generator, prompts, encoded, config), len(prompts), notes)
        self._write(results, notes)
        _summarise([branch.completion for result in results for branch in result.branches], seconds, notes)

    def _answers(
        self, generator: Generator, prompts: Sequence[str], encoded: Sequence[Sequence[int]], config: GenerationConfig
    ) -> list[Branches]:
        decoding, continuation = self.decoding, self.continuation
        confidence = self._confidence()
        if isinstance(decoding, Cot):
            return cot_decode(
                generator, prompts, config, self.finder, skip_first=decoding.skip_first, continuation=continuation,
                confidence=confidence, encoded=encoded,
            )  # fmt: skip
        return self_consistency(
            generator, prompts, config, self.finder, continuation=continuation, confidence=confidence,
            early_stop=self.early_stop, encoded=encoded,
        )  # fmt: skip

    def _confidence(self) -> ConfidenceConfig | None:
        """What the ranking needs beyond Δ and log-probabilities; None: nothing."""
        needs = None if self.ranking is None else self.ranking.needs
        if needs is None and (self.early_stop is None or self.early_stop.warm_up == 0):
            return None
        return ConfidenceConfig(self.decoding.window, TrueQuestion() if needs == "p_true" else None)

    def _write(self, results: list[Branches], notes: Console) -> None:
        samples, ranking = self.ranking is None, self.ranking or DELTA
        aggregate = isinstance(self.decoding, SelfConsistency) or self.decoding.aggregate
        if self.decoding.vote_temperature is not None:
            ranking = softmax_weighted(ranking, self.decoding.vote_temperature)
        out = Console(highlight=False)
        for number, every in enumerate(results):
            result = every if samples else every.keep(self.decoding.keep, ranking)
            answer = result.majority_answer() if samples else result.answer(ranking, aggregate)
            if self.options.json:
                print(json.dumps({"answer": answer, **branches_record(result, ranking, samples)}))
                continue
            write("\n" * bool(number))
            write(result.prompt, dim=True)
            if self.options.show_branches:
                write("\n\n")
                out.print(branches_table(result, ranking, samples, out.width))
                continue
            if answer is not None:
                best = result.max_path(ranking)
                if aggregate or best is None:
                    best = result.representative(answer, ranking)
                write(result.branches[best].completion.text)
            write("\n")
            sys.stdout.flush()
            for line in outcome(result, ranking, samples):
                notes.print(line)


@dataclass(frozen=True)
class BeamTexts:
    """Beam search, which looks for no answer, as the options have it."""

    options: SampleOptions
    decoding: Beam

    def tokens_after(self, tokenizer: Tokenizer) -> int:
        """Room that the context must have beyond the new tokens: none."""
        return 0

    def run(
        self,
        generator: Generator,
        prompts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        config: GenerationConfig,
        notes: Console,
    ) -> None:
        """Generates and writes what the options ask for."""
        penalty = self.decoding.length_penalty
        beams, seconds = _timed(
            lambda: beam_search(generator, prompts, config, length_penalty=penalty, encoded=encoded),
            len(prompts),
            notes,
        )
        self._write(beams)
        _summarise([beam for of_prompt in beams for beam in of_prompt], seconds, notes)

    def _write(self, beams: list[list[Completion]]) -> None:
        out = Console(highlight=False)
        for number, of_prompt in enumerate(beams):
            prompt = of_prompt[0].prompt
            if self.options.json:
                record = {
                    "prompt": prompt,
                    "text": of_prompt[0].text,
                    "beams": [beam_record(beam) for beam in of_prompt],
                }
                print(json.dumps(record))
                continue
            write("\n" * bool(number))
            write(prompt, dim=True)
            if self.options.show_branches:
                write("\n\n")
                out.print(beams_table(of_prompt, out.width))
            else:
                write(f"{of_prompt[0].text}\n")


def _timed(generate: Callable[[], Generated], prompts: int, notes: Console) -> tuple[Generated, float]:
    """What is generated from so many prompts, and its seconds; meanwhile the notes say so."""
    began = time.perf_counter()
    with notes.status(f"generating from {prompts} prompt{'s' * (prompts > 1)}"):
        generated = generate()
    return generated, time.perf_counter() - began


def _summarise(completions: Sequence[Completion], seconds: float, notes: Console) -> None:
    sys.stdout.flush()
    tokens = sum(len(completion.tokens) for completion in completions)
    notes.print(f"{tokens} tokens in {seconds:.1f} s, compilation included", style="dim")
