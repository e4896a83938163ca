"""The decodings of `mod-star sample` that make several texts of a prompt: cot, self-consistency and beam."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rich.console import Console

from mod_star.decoding import Completion, Generator, Sampling, Think
from mod_star.decoding.answers import Finder, Phrase, make_finder
from mod_star.decoding.beam import LENGTH_PENALTY, beam_search, check_beams
from mod_star.decoding.branches import Branches, Ranking
from mod_star.decoding.cot import SO_THE_ANSWER_IS, cot_decode, self_consistency, tokens_after
from mod_star.errors import require
from mod_star.tokenization import Tokenizer
from mod_star.views.branches import beam_record, beams_table, branches_record, branches_table, outcome
from mod_star.views.sample import write

if TYPE_CHECKING:
    from mod_star.commands.sample import SampleOptions

DEFAULT_BRANCHES, DEFAULT_BEAMS = 10, 4


def ways_to_answer(options: SampleOptions, sampling: Sampling) -> Answering | None:
    """What the options ask for; None: one text per prompt. Raises InputError for options that can't be."""
    if options.decoding in ("greedy", "temperature"):
        return None
    if options.decoding == "beam":
        check_beams(options.branches or DEFAULT_BEAMS, length_penalty_of(options))
        return Answering(options, sampling)
    if options.decoding == "self-consistency":
        require(sampling.temperature > 0, "--temperature", options.temperature, "must be above 0: samples must differ")
    finder = make_finder(options.answer or "number", "--answer")
    continuation = options.continuation
    if continuation is None and isinstance(finder, Phrase):
        continuation = SO_THE_ANSWER_IS
    require(continuation is None or bool(continuation.strip()), "--continuation", continuation, "must not be empty")
    return Answering(options, sampling, finder, continuation)


def length_penalty_of(options: SampleOptions) -> float:
    """What beams are ranked by."""
    return LENGTH_PENALTY if options.length_penalty is None else options.length_penalty


@dataclass(frozen=True)
class Answering:
    """One of these decodings, as the options have it."""

    options: SampleOptions
    sampling: Sampling
    finder: Finder | None = None
    """None: beam search, which looks for no answer."""
    continuation: str | None = None

    @property
    def ranking(self) -> Ranking:
        """As the library calls it."""
        return cast(Ranking, (self.options.ranking or "delta").replace("-", "_"))

    def tokens_after(self, tokenizer: Tokenizer) -> int:
        """Room that the context must have beyond the new tokens."""
        return 0 if self.continuation is None else tokens_after(tokenizer, self.continuation)

    def run(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        new_tokens: int,
        think: Think,
        notes: Console,
    ) -> None:
        """Generates and writes what the options ask for."""
        options, began = self.options, time.perf_counter()
        with notes.status(f"generating from {len(prompts)} prompt{'s' * (len(prompts) > 1)}"):
            if self.finder is None:
                beams = beam_search(
                    generator, tokenizer, prompts, new_tokens, beams=options.branches or DEFAULT_BEAMS,
                    length_penalty=length_penalty_of(options), stop=options.stop, think=think, encoded=encoded,
                )  # fmt: skip
            else:
                results = self._answers(generator, tokenizer, prompts, encoded, new_tokens, think)
        seconds = time.perf_counter() - began
        if self.finder is None:
            self._write_beams(beams)
            tokens = sum(len(beam.tokens) for found in beams for beam in found)
        else:
            self._write_answers(results, notes)
            tokens = sum(len(branch.completion.tokens) for result in results for branch in result.branches)
        sys.stdout.flush()
        notes.print(f"{tokens} tokens in {seconds:.1f} s, compilation included", style="dim")

    def _answers(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        new_tokens: int,
        think: Think,
    ) -> list[Branches]:
        assert self.finder is not None
        options = self.options
        count = options.branches or DEFAULT_BRANCHES
        if options.decoding == "cot":
            return cot_decode(
                generator, tokenizer, prompts, new_tokens, self.finder, branches=count, skip_first=options.skip_first,
                continuation=self.continuation, stop=options.stop, think=think, encoded=encoded,
            )  # fmt: skip
        return self_consistency(
            generator, tokenizer, prompts, new_tokens, self.finder, samples=count, sampling=self.sampling,
            seed=options.seed, continuation=self.continuation, stop=options.stop, think=think, encoded=encoded,
        )  # fmt: skip

    def _write_answers(self, results: list[Branches], notes: Console) -> None:
        samples, ranking = self.options.decoding == "self-consistency", self.ranking
        out = Console(highlight=False)
        for number, result in enumerate(results):
            answer = result.majority_answer() if samples else result.answer(ranking, self.options.aggregate)
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
                if samples or self.options.aggregate or best is None:
                    best = result.representative(answer, ranking)
                write(result.branches[best].completion.text)
            write("\n")
            sys.stdout.flush()
            for line in outcome(result, ranking, samples):
                notes.print(line)

    def _write_beams(self, beams: list[list[Completion]]) -> None:
        out = Console(highlight=False)
        for number, found in enumerate(beams):
            prompt = found[0].prompt
            if self.options.json:
                record = {"prompt": prompt, "text": found[0].text, "beams": [beam_record(beam) for beam in found]}
                print(json.dumps(record))
                continue
            write("\n" * bool(number))
            write(prompt, dim=True)
            if self.options.show_branches:
                write("\n\n")
                out.print(beams_table(found, out.width))
            else:
                write(f"{found[0].text}\n")
