"""CoT-decoding (Wang and Zhou, arXiv 2402.10200) and self-consistency (Wang et al., arXiv 2203.11171): text to answers.

CoT-decoding branches on the k most probable first tokens, goes on greedily in each branch, and trusts the branch whose
answer the model is surest of. Prompts run as one batch; a prompt's keys/values are computed once for all its branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mod_star.decoding.answers import Finder, as_finder
from mod_star.decoding.branches import Branches, read_branch
from mod_star.decoding.finder import FindAnswer
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.sampling import BRANCHING, GREEDY, Sampling
from mod_star.decoding.text import Completion, complete, complete_many, encode_prompts
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


def cot_decode(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    finder: Finder | FindAnswer,
    *,
    skip_first: bool = False,
    continuation: str | None = None,
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
    return _answers(generator, prompts, config, as_finder(finder), encoded, Reading(continuation, skip_first))


def self_consistency(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    finder: Finder | FindAnswer,
    *,
    continuation: str | None = None,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[Branches]:
    """Answers questions by the majority of samples: `result.majority_answer()`.

    Args as for `cot_decode`, but for `config`: its `branches` are the samples of each prompt (10 if not given; those
    that would be dropped as branches don't vote), and its `sampling` is how they are drawn (temperature 0.7 if not
    given).
    """
    sampling = Sampling(SelfConsistency.temperature) if config.sampling is None else config.sampling
    drawn = not sampling.branch and sampling.temperature > 0
    require(drawn, "sampling", sampling, "must draw every token: temperature above 0, branch False")
    branches = SelfConsistency.branches if config.branches is None else config.branches
    config = replace(config, sampling=sampling, branches=branches)
    return _answers(generator, prompts, config, as_finder(finder), encoded, Reading(continuation))


def _answers(
    generator: Generator, prompts: Sequence[str], config: GenerationConfig, finder: Finder,
    encoded: Sequence[Sequence[int]] | None, reading: Reading,
) -> list[Branches]:  # fmt: skip
    """Generates the branches of each prompt and reads their answers."""
    encoded = encode_prompts(generator.tokenizer, prompts) if encoded is None else encoded
    check_finder(generator, encoded, config.new_tokens, finder, reading.continuation)
    if config.rows is None:
        burst = config.burst or (BURST if config.stop else config.new_tokens)
        *_, completions = complete(generator, prompts, replace(config, burst=burst), encoded)
    else:
        by_prompt = dict(complete_many(generator, prompts, config, encoded))
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
    read = [
        read_branch(each, tokenizer.token_text(each.tokens[0]) if each.tokens else "", finder, reading.skip_first, rest)
        for each, rest in zip(completions, continued, strict=True)
    ]
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
    continuation: str | None,
) -> None:
    """Raises InputError if answers can't be found so: before anything is compiled."""
    if continuation is None:
        needed = finder.needs_continuation
        require(not needed, "continuation", None, "must be given: an answer of any words is read from the continuation")
        return
    require(bool(continuation.strip()), "continuation", continuation, "must not be empty")
    context = generator.decoder.config.context
    more = tokens_after(generator.tokenizer, continuation)
    for number, prompt in enumerate(encoded, 1):
        if len(prompt) + new_tokens + more > context:
            raise InputError(
                f"prompt {number} = {len(prompt)} tokens: must have at most {max(0, context - new_tokens - more)} "
                f"(context {context} minus {new_tokens} new tokens and {more} of the continuation and its answer)"
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
        tokens = completion.tokens
        if completion.finished == "stop":
            tokens = _without_stop(tokenizer, prompt, completion)
        texts.append([*prompt, *tokens, *_joined(tokenizer, tokens, continuation)])
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


def _without_stop(tokenizer: Tokenizer, prompt: Sequence[int], completion: Completion) -> list[int]:
    """Ids of a text that a stop string has cut: its tokens up to the one that is cut, and the rest of that one anew."""
    start = max(start for start in completion.starts if start <= len(completion.text))
    whole = completion.tokens[: completion.starts.index(start)]
    return [*whole, *_following(tokenizer, [*prompt, *whole], completion.text[start:])]


def _joined(tokenizer: Tokenizer, tokens: Sequence[int], continuation: str) -> list[int]:
    """Ids that go on from `tokens` with the continuation, one blank before it unless white space is there."""
    text = tokenizer.decode(tokens)
    blank = "" if not text or text[-1].isspace() else " "
    return _following(tokenizer, tokens, blank + continuation)


def _following(tokenizer: Tokenizer, before: Sequence[int], text: str) -> list[int]:
    """Ids that add nothing but `text` to the text of `before`."""
    ids = tokenizer.encode(text)
    if tokenizer.decode([*before, *ids]) != tokenizer.decode(before) + text:
        # A tokenizer that puts a blank before every text by itself: it then stands before the line's end.
        return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]
    return ids
