"""CoT-decoding (Wang and Zhou, arXiv 2402.10200) and self-consistency (Wang et al., arXiv 2203.11171): text to answers.

CoT-decoding branches on the k most probable first tokens, goes on greedily in each branch, and trusts the branch whose
answer the model is surest of. Prompts run as one batch; a prompt's keys/values are computed once for all its branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mod_star.decoding.answers import Finder, as_finder
from mod_star.decoding.branches import Branches, read_branch
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.decoding.continuation import ids_continued
from mod_star.decoding.early_stop import BURST as EARLY_BURST
from mod_star.decoding.early_stop import EarlyStop, Watch
from mod_star.decoding.finder import FindAnswer
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.p_true import p_true, tokens_of_question
from mod_star.decoding.sampling import BRANCHING, GREEDY, Sampling
from mod_star.decoding.text import Completion, StopBranches, complete, complete_many, encode_prompts
from mod_star.decodings import Cot, SelfConsistency
from mod_star.errors import InputError, require
from mod_star.tokenization.tokenizers import Tokenizer

SO_THE_ANSWER_IS = "So the answer is"
ANSWER_TOKENS = 32
"""Room for the answer after a continuation."""
BURST = 32
"""Tokens between two looks for stop strings."""


@dataclass(frozen=True)
class Reading:
    """How the answer of a branch is looked for."""

    continuation: str | None = None
    """Ask for the answer with these words; None: it is in the branch."""
    skip_first: bool = False
    """Leave the branched token out of Δ where it is part of the answer."""
    confidence: ConfidenceConfig | None = None
    """What to measure along the branch; None: Δ and log-probabilities only."""


def cot_decode(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    finder: Finder | FindAnswer,
    *,
    skip_first: bool = False,
    continuation: str | None = None,
    confidence: ConfidenceConfig | None = None,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[Branches]:
    """Answers questions by CoT-decoding.

    All rankings are of the same branches, so they are for the result to choose: `result.answer()` is the answer of the
    path with the largest Δ, `result.answer(aggregate=True)` the aggregated one, `result.answer(LOG_PROB)` goes by
    another of `mod_star.decoding.rankings` or by a function of your own, and `result.first(5)` is what 5 branches give.

    Args:
      generator: the model.
      prompts: the questions, with whatever the model expects around them.
      config: at most so many tokens of a branch (a branch that needs more is dropped), k branches (10 if not given),
        when to think (branches are then of the mixed distribution), ... Its `sampling` is left out: a branch starts
        with its own token and goes on greedily.
      finder: of the kind of answer, see `mod_star.decoding.answers`; or a function (text) -> (start, end) | None.
      skip_first: leave the branched token out of Δ where it is part of the answer.
      continuation: None: the answer is the last one in a branch. Otherwise every branch is continued with this, such as
        `SO_THE_ANSWER_IS`, and what the model answers is aligned back to its last place in the branch.
      confidence: what else to measure of every branch, for the rankings that need it; None: nothing.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them.

    Returns:
      For each prompt its k branches, dropped ones included.

    Raises:
      InputError: more branches than the vocabulary has tokens, no room for a continuation, an answer of any words
        without one, a way of sampling, or as for `complete`.
    """
    left_out = config.sampling in (None, BRANCHING)
    require(left_out, "sampling", config.sampling, "must be left out: CoT-decoding has a rule of its own")
    branches = Cot.branches if config.branches is None else config.branches
    config = replace(config, sampling=BRANCHING, branches=branches)
    return _answers(
        generator, prompts, config, as_finder(finder), encoded, Reading(continuation, skip_first, confidence)
    )


def self_consistency(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    finder: Finder | FindAnswer,
    *,
    continuation: str | None = None,
    confidence: ConfidenceConfig | None = None,
    early_stop: EarlyStop | None = None,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[Branches]:
    """Answers questions by the majority of samples: `result.majority_answer()`.

    Votes weighed by confidence: `result.answer(ranking, aggregate=True)` by the ranking itself, as DeepConf does, or by
    `softmax_weighted(ranking, temperature)`, as CISC does; of the surest half alone with `result.keep(0.5, ranking)`.

    Args as for `cot_decode`, but for `config`: its `branches` are the samples of each prompt (10 if not given; those
    that would be dropped as branches don't vote), and its `sampling` is how they are drawn (temperature 0.7 if not
    given). `early_stop` says when samples stop before their end; they are dropped. None: never.

    Raises:
      InputError: as for `cot_decode`; or all samples warm up, or the vote is to be decided by answers that are only
        asked for afterwards.
    """
    sampling = Sampling(SelfConsistency.temperature) if config.sampling is None else config.sampling
    drawn = not sampling.branch and sampling.temperature > 0
    require(drawn, "sampling", sampling, "must draw every token: temperature above 0, branch False")
    branches = SelfConsistency.branches if config.branches is None else config.branches
    config = replace(config, sampling=sampling, branches=branches)
    if early_stop is None:
        reading = Reading(continuation, confidence=confidence)
        return _answers(generator, prompts, config, as_finder(finder), encoded, reading)
    fine = continuation is None or not early_stop.decided
    require(fine, "early_stop.decided", True, "must be False with a continuation, which is asked afterwards")
    require(config.branch_range is None, "branch_range", config.branch_range, "must be None with an early stop")
    allowed = f"must be less than the number of samples, {branches}"
    require(early_stop.warm_up < branches, "early_stop.warm_up", early_stop.warm_up, allowed)
    if confidence is None and early_stop.warm_up > 0:
        confidence = ConfidenceConfig()
    reading = Reading(continuation, confidence=confidence)
    return _stopping_early(generator, prompts, config, as_finder(finder), encoded, reading, early_stop)


def _stopping_early(
    generator: Generator, prompts: Sequence[str], config: GenerationConfig, finder: Finder,
    encoded: Sequence[Sequence[int]] | None, reading: Reading, rule: EarlyStop,
) -> list[Branches]:  # fmt: skip
    """The samples of each prompt: those that warm up, then the others until they are stopped."""
    warmed: list[Branches] = [Branches(prompt, []) for prompt in prompts]
    if rule.warm_up > 0:
        first = replace(config, branch_range=(0, rule.warm_up))
        warmed = _answers(generator, prompts, first, finder, encoded, reading)
    size = ConfidenceConfig().window if reading.confidence is None else reading.confidence.window
    watches = [Watch(rule, finder, each.branches, size) for each in warmed]
    burst = EARLY_BURST if config.burst is None else config.burst
    rest = replace(config, branch_range=(rule.warm_up, config.branches or 1), burst=burst)
    results = _answers(generator, prompts, rest, finder, encoded, reading, lambda q, texts: watches[q].stops(texts))
    return [
        replace(first, branches=[*first.branches, *map(watch.branch, range(len(each.branches)), each.branches)])
        for first, each, watch in zip(warmed, results, watches, strict=True)
    ]


def _answers(
    generator: Generator, prompts: Sequence[str], config: GenerationConfig, finder: Finder,
    encoded: Sequence[Sequence[int]] | None, reading: Reading, stop: StopBranches | None = None,
) -> list[Branches]:  # fmt: skip
    """Generates the branches of each prompt and reads their answers."""
    encoded = encode_prompts(generator.tokenizer, prompts) if encoded is None else encoded
    check_finder(generator, encoded, config.new_tokens, finder, reading)
    config = replace(config, confidence=config.confidence or reading.confidence is not None)
    if config.rows is None:
        burst = config.burst or (BURST if config.stop else config.new_tokens)
        *_, completions = complete(generator, prompts, replace(config, burst=burst), encoded, stop)
    else:
        by_prompt = dict(complete_many(generator, prompts, config, encoded, stop=stop))
        completions = [completion for number in range(len(prompts)) for completion in by_prompt[number]]
    return read_branches(generator, completions, config, finder, encoded, reading)


def read_branches(
    generator: Generator,
    completions: Sequence[Completion],
    config: GenerationConfig,
    finder: Finder,
    encoded: Sequence[Sequence[int]],
    reading: Reading,
) -> list[Branches]:
    """The second half of `cot_decode` and `self_consistency`: from completions to scored answers.

    Args:
      generator: the model; asked for nothing unless there is a continuation.
      completions: of the first prompt's branches, then of the second's, ...
      config: how they were generated: so many branches of each prompt; when to think and which strings end a text hold
        for what follows a continuation, too.
      finder: of the kind of answer.
      encoded: token ids of the prompts.
      reading: how the answer is looked for.
    """
    tokenizer, branches = generator.tokenizer, config.rows_per_prompt
    continued: Sequence[str | None] = [None] * len(completions)
    if reading.continuation is not None:
        ids = [prompt for prompt in encoded for _ in range(branches)]
        said = continue_texts(generator, ids, completions, reading.continuation, config)
        ends = [min((at for stop in config.stop if (at := text.find(stop)) >= 0), default=None) for text in said]
        continued = [text[:end] for text, end in zip(said, ends, strict=True)]
    confidence = ConfidenceConfig() if reading.confidence is None else reading.confidence
    read = [
        read_branch(
            each, tokenizer.token_text(each.tokens[0]) if each.tokens else "", finder, reading.skip_first, rest,
            confidence.window,
        )
        for each, rest in zip(completions, continued, strict=True)
    ]  # fmt: skip
    if confidence.p_true is not None:
        places = [place for place, branch in enumerate(read) if branch.dropped is None]
        prompts = [encoded[place // branches] for place in places]
        texts = [completions[place] for place in places]
        for place, share in zip(places, p_true(generator, prompts, texts, confidence.p_true, config.rows), strict=True):
            read[place] = replace(read[place], p_true=share)
    firsts = range(0, len(read), branches)
    return [Branches(completions[first].prompt, read[first : first + branches]) for first in firsts]


def tokens_after(tokenizer: Tokenizer, continuation: str) -> int:
    """Room in the context that a continuation and its answer take."""
    return len(tokenizer.encode(" " + continuation)) + ANSWER_TOKENS


def check_finder(
    generator: Generator,
    encoded: Sequence[Sequence[int]],
    new_tokens: int,
    finder: Finder,
    reading: Reading,
) -> None:
    """Raises InputError if answers can't be found so: before anything is compiled."""
    more, what, continuation = 0, "the continuation and its answer", reading.continuation
    if continuation is None:
        needed = finder.needs_continuation
        require(not needed, "continuation", None, "must be given: an answer of any words is read from the continuation")
    else:
        require(bool(continuation.strip()), "continuation", continuation, "must not be empty")
        more = tokens_after(generator.tokenizer, continuation)
    if reading.confidence is not None and reading.confidence.p_true is not None:
        asking = tokens_of_question(generator.tokenizer, reading.confidence.p_true)
        more, what = max((more, what), (asking, "the question of P(True)"))
    context = generator.decoder.config.context
    for number, prompt in enumerate(encoded, 1):
        if more and len(prompt) + new_tokens + more > context:
            raise InputError(
                f"prompt {number} = {len(prompt)} tokens: must have at most {max(0, context - new_tokens - more)} "
                f"(context {context} minus {new_tokens} new tokens and {more} of {what})"
            )


def continue_texts(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    continuation: str,
    config: GenerationConfig,
) -> list[str]:
    """What the model says, greedily, when each of its texts is continued.

    Args:
      generator: the model.
      prompts: token ids of the prompt of each text.
      completions: the texts. What is left of a token that a stop string has cut is encoded anew.
      continuation: the words to put after them.
      config: how the texts were generated: when to think, and the most rows of a batch.
    """
    tokenizer = generator.tokenizer
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        texts.append(ids_continued(tokenizer, prompt, completion, continuation))
    greedy = GenerationConfig(ANSWER_TOKENS, GREEDY, think=config.think, rows=config.rows)
    if config.rows is None:
        results = generator.generate(texts, greedy)
    else:
        by_text = dict(generator.generate_many(texts, greedy))
        results = [result for number in range(len(texts)) for result in by_text[number]]
    return [
        tokenizer.decode([*text, *result.tokens])[len(tokenizer.decode(text)) :]
        for text, result in zip(texts, results, strict=True)
    ]
