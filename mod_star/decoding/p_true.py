"""P(True) (Kadavath et al., arXiv 2207.05221): the model is asked whether what it wrote is right."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.decoding.confidence import TrueQuestion
from mod_star.decoding.continuation import ids_continued, ids_following
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.text import Completion
from mod_star.distributed.sharding import use_mesh
from mod_star.errors import InputError
from mod_star.model.transformer import logits_of
from mod_star.tokenization.tokenizers import Tokenizer


def p_true(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    question: TrueQuestion,
    rows: int | None = None,
) -> list[float]:
    """The probability of `question.true` among the two answers after each text, in [0, 1].

    The answers are told apart at the first token in which they differ; what they share is part of the question. The
    prediction is that without a thought.

    Args:
      generator: the model.
      prompts: token ids of the prompt of each text.
      completions: the texts.
      question: what is asked.
      rows: the most texts of a batch; None: all are one batch.

    Raises:
      InputError: the two answers have the same tokens, or a text leaves no room for the question.
    """
    if not completions:
        return []
    tokenizer = generator.tokenizer
    texts, pairs = [], np.zeros((len(completions), 2), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = ids_continued(tokenizer, prompt, completion, question.text, blank=not question.text[:1].isspace())
        true, false = (ids_following(tokenizer, ids, answer) for answer in (question.true, question.false))
        shared = next((i for i, (a, b) in enumerate(zip(true, false, strict=False)) if a != b), None)
        if shared is None:
            raise InputError(f"p_true = {question}: true and false must differ in a token")
        texts.append([*ids, *true[:shared]])
        pairs[row] = true[shared], false[shared]
    order = np.argsort([len(text) for text in texts], kind="stable")
    size = len(order) if rows is None else min(rows, len(order))
    shares = np.zeros(len(order))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        filled = np.pad(batch, (0, size - len(batch)), mode="edge")  # the last batch needs no program of its own
        state = generator.start([texts[i] for i in filled], GenerationConfig(1))
        answers_Bx2 = np.zeros((len(state.done_B), 2), np.int32)
        answers_Bx2[:size] = pairs[filled]
        with use_mesh(generator.mesh):
            shares_B = _share_of_first(generator.params, state.hidden_BxD, answers_Bx2)
        shares[batch] = np.asarray(shares_B)[: len(batch)]
    return [float(share) for share in shares]


def tokens_of_question(tokenizer: Tokenizer, question: TrueQuestion) -> int:
    """Room in the context that the question, its answer and a blank take."""
    longest = max((question.true, question.false), key=len)
    return len(tokenizer.encode(f" {question.text}{longest}")) + 1


@jax.jit
def _share_of_first(params: dict[str, jax.Array], hidden_BxD: jax.Array, pairs_Bx2: jax.Array) -> jax.Array:
    """Probability B of the first token of a pair among the two."""
    logits_Bx2 = jnp.take_along_axis(logits_of(params, hidden_BxD), pairs_Bx2, 1)
    return jax.nn.softmax(logits_Bx2.astype(jnp.float32))[:, 0]
