"""CoT-decoding (Wang and Zhou, arXiv 2402.10200) and self-consistency (Wang et al., arXiv 2203.11171): text to answers.

CoT-decoding branches on the k most probable first tokens, goes on greedily in each branch, and trusts the branch whose
answer the model is surest of. Prompts run as one batch; a prompt's keys/values are computed once for all its branches.
"""

from __future__ import annotations

from collections.abc import Sequence

from mod_star.decoding.answers import Finder, Phrase
from mod_star.decoding.branches import Branches, read_branch
from mod_star.decoding.generate import NEVER, Generator
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.text import Completion, complete, complete_many, encode_prompts
from mod_star.decoding.think import Think
from mod_star.errors import InputError, require
from mod_star.tokenization.tokenizers import Tokenizer

GREEDY = Sampling(0.0)
BRANCHING = Sampling(0.0, branch=True)
SAMPLES = Sampling(0.7)
SO_THE_ANSWER_IS = "So the answer is"
ANSWER_TOKENS = 32
"""Room for the answer behind a continuation."""
BURST = 32
"""Tokens between two looks for stop strings."""


def cot_decode(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    finder: Finder,
    *,
    branches: int = 10,
    skip_first: bool = False,
    continuation: str | None = None,
    stop: Sequence[str] = (),
    think: Think = NEVER,
    rows: int | None = None,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[Branches]:
    """Answers questions by CoT-decoding.

    All rankings are of the same branches, so they are for the result to choose: `result.answer("delta")` is the max
    path's, `result.answer("delta", aggregate=True)` the aggregated one, and `result.first(5)` is what 5 branches give.

    Args:
      generator: the model; its end ids should be the tokenizer's.
      tokenizer: the model's.
      prompts: the questions, with whatever the model expects around them.
      new_tokens: the most tokens of a branch. A branch that needs more is dropped.
      finder: of the kind of answer, see `mod_star.decoding.answers`.
      branches: k, how many first tokens to branch on.
      skip_first: leave the branched token out of Δ where it is part of the answer.
      continuation: None: the answer is the last one in a branch. Otherwise every branch is continued with this, such as
        `SO_THE_ANSWER_IS`, and what the model answers is aligned back to its last place in the branch.
      stop: strings that end a branch.
      think: when to think; branches are then of the mixed distribution.
      rows: the most of a batch, as for `complete_many`; None: all in one.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them.

    Returns:
      For each prompt its k branches, dropped ones included.

    Raises:
      InputError: more branches than the vocabulary has tokens, no room for a continuation, an answer of any words
        without one, or as for `complete`.
    """
    encoded = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    check_finder(generator, tokenizer, encoded, new_tokens, finder, continuation)
    completions = _complete(
        generator, tokenizer, prompts, new_tokens, BRANCHING, branches, 0, stop, think, rows, encoded
    )
    return read_branches(
        generator, tokenizer, completions, finder, branches, encoded=encoded, skip_first=skip_first,
        continuation=continuation, stop=stop, think=think, rows=rows,
    )  # fmt: skip


def self_consistency(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    finder: Finder,
    *,
    samples: int = 10,
    sampling: Sampling = SAMPLES,
    seed: int = 0,
    continuation: str | None = None,
    stop: Sequence[str] = (),
    think: Think = NEVER,
    rows: int | None = None,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[Branches]:
    """Answers questions by the majority of samples: `result.majority_answer()`.

    Args as for `cot_decode`, but for:
      samples: how many for each prompt; those that would be dropped as branches don't vote.
      sampling: how they are drawn.
      seed: of the draws.
    """
    drawn = not sampling.branch and sampling.temperature > 0
    require(drawn, "sampling", sampling, "must draw every token: temperature above 0, branch False")
    encoded = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    check_finder(generator, tokenizer, encoded, new_tokens, finder, continuation)
    completions = _complete(
        generator, tokenizer, prompts, new_tokens, sampling, samples, seed, stop, think, rows, encoded
    )
    return read_branches(
        generator, tokenizer, completions, finder, samples, encoded=encoded, continuation=continuation, stop=stop,
        think=think, rows=rows,
    )  # fmt: skip


def _complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    sampling: Sampling,
    branches: int,
    seed: int,
    stop: Sequence[str],
    think: Think,
    rows: int | None,
    encoded: Sequence[Sequence[int]],
) -> list[Completion]:
    """The completions of the first prompt's branches, then of the second's, ..."""
    if rows is None:
        *_, completions = complete(
            generator, tokenizer, prompts, new_tokens, sampling, seed=seed, stop=stop, think=think, branches=branches,
            encoded=encoded, burst=BURST if stop else new_tokens,
        )  # fmt: skip
        return completions
    found = dict(
        complete_many(
            generator, tokenizer, prompts, new_tokens, sampling, rows=rows, branches=branches, seed=seed, stop=stop,
            think=think, encoded=encoded,
        )
    )  # fmt: skip
    return [completion for number in range(len(prompts)) for completion in found[number]]


def read_branches(
    generator: Generator,
    tokenizer: Tokenizer,
    completions: Sequence[Completion],
    finder: Finder,
    branches: int,
    *,
    encoded: Sequence[Sequence[int]],
    skip_first: bool = False,
    continuation: str | None = None,
    stop: Sequence[str] = (),
    think: Think = NEVER,
    rows: int | None = None,
) -> list[Branches]:
    """The second half of `cot_decode` and `self_consistency`: from completions to scored answers.

    Args:
      generator: the model; asked for nothing unless there is a continuation.
      tokenizer: the model's.
      completions: of the first prompt's branches, then of the second's, ...
      finder: of the kind of answer.
      branches: how many each prompt has.
      encoded: token ids of the prompts.
      skip_first: as for `cot_decode`.
      continuation: as there.
      stop: strings that end what the model says after the continuation, too.
      think: as there.
      rows: as there.
    """
    continued: Sequence[str | None] = [None] * len(completions)
    if continuation is not None:
        ids = [prompt for prompt in encoded for _ in range(branches)]
        said = continue_texts(generator, tokenizer, ids, completions, continuation, think, rows)
        continued = [text[: min((at for each in stop if (at := text.find(each)) >= 0), default=None)] for text in said]
    made = [
        read_branch(each, tokenizer.token_text(each.tokens[0]) if each.tokens else "", finder, skip_first, rest)
        for each, rest in zip(completions, continued, strict=True)
    ]
    firsts = range(0, len(made), branches)
    return [Branches(completions[first].prompt, made[first : first + branches]) for first in firsts]


def tokens_after(tokenizer: Tokenizer, continuation: str) -> int:
    """Room in the context that a continuation and its answer take."""
    return len(tokenizer.encode(" " + continuation)) + ANSWER_TOKENS


def check_finder(
    generator: Generator,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    new_tokens: int,
    finder: Finder,
    continuation: str | None,
) -> None:
    """Raises InputError if answers can't be found so: before anything is compiled."""
    if continuation is None:
        needed = isinstance(finder, Phrase)
        require(not needed, "continuation", None, "is needed, with an answer of any words there is no other way")
        return
    require(bool(continuation.strip()), "continuation", continuation, "must not be empty")
    context = generator.decoder.config.context
    more = tokens_after(tokenizer, continuation)
    for number, prompt in enumerate(encoded, 1):
        if len(prompt) + new_tokens + more > context:
            raise InputError(
                f"prompt {number} = {len(prompt)} tokens: must have at most {max(0, context - new_tokens - more)} "
                f"(context {context} minus {new_tokens} new tokens and {more} of the continuation and its answer)"
            )


def continue_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    continuation: str,
    think: Think = NEVER,
    rows: int | None = None,
) -> list[str]:
    """What the model says, greedily, when each of its texts is continued.

    Args:
      generator: the model.
      tokenizer: the model's.
      prompts: token ids of the prompt of each text.
      completions: the texts. What is left of a token that a stop string has cut is encoded anew.
      continuation: the words to put behind them.
      think: when to think.
      rows: as for `cot_decode`.
    """
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = completion.tokens
        if completion.finished == "stop":
            tokens = _without_stop(tokenizer, prompt, completion)
        texts.append([*prompt, *tokens, *_joined(tokenizer, tokens, continuation)])
    if rows is None:
        results = generator.generate(texts, ANSWER_TOKENS, GREEDY, think=think)
    else:
        found = dict(generator.generate_many(texts, ANSWER_TOKENS, GREEDY, rows=rows, think=think))
        results = [result for number in range(len(texts)) for result in found[number]]
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
