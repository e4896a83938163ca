"""Thoughts and scores equal the naive loop: the plain model on [X_{<=j}; start; T; end; X...] for every j, in NumPy."""

from typing import Any

import jax
import numpy as np
import pytest
from numpy_decoder import decode, float64, one_document
from thinking_models import Thinker

from mod_star.thinking.objective import Places, Talk
from mod_star.thinking.thought import Thought


def log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def plain(thinker: Thinker, ids: list[int]) -> tuple[Any, list[Any]]:
    """Hidden states of one document under causal routing with room for everything; <start> is V, <end> V + 1."""
    params = float64(thinker.params)
    own = params["thinking"]
    extended = {**params, "embedding": np.concatenate([params["embedding"], [own["start"], own["end"]]])}
    run = thinker.run
    return decode(extended, one_document(ids), run.model, run.routing, mode="causal", most=len(ids))


def mixing(params: Any, base: Any, thought: Any) -> Any:
    p = float64(params["thinking"]["mixing"])
    x = np.maximum(np.concatenate([base, thought]) @ p["first"] + p["first_bias"], 0)
    return np.maximum(x @ p["second"] + p["second_bias"], 0) @ p["output"] + p["output_bias"]


def each_place(thinker: Thinker, places: Places) -> Any:
    """(row, number of the place, index, tokens of the document up to it, tokens after it)."""
    tokens, ids = np.asarray(thinker.batch["tokens"]), np.asarray(thinker.batch["segment_ids"])
    for row in range(len(tokens)):
        for number, index in enumerate(np.asarray(places.indices_BxJ[row])):
            if places.filled_BxJ[row, number]:
                same = np.flatnonzero(ids[row] == ids[row, index])
                start, end = same[0], same[-1] + 1
                yield row, number, index, tokens[row, start : index + 1].tolist(), tokens[row, index + 1 : end].tolist()


@pytest.mark.slow
def test_log_probs_and_talk_equal_the_naive_loop(
    thinker: Thinker, thought_of: tuple[Places, Thought], scored: tuple[jax.Array, Talk]
) -> None:
    (places, thoughts), (_, talk) = thought_of, scored
    V, t, n_true = thinker.run.model.vocab_size, 3, 3
    head = float64(thinker.params)["embedding"]
    count = 0
    for row, number, index, before, after in each_place(thinker, places):
        base_hidden, _ = plain(thinker, before + after)
        for m in range(2):
            thought = thoughts.tokens_T[row, number, m].tolist()
            following = after[: n_true - 1]
            hidden, traces = plain(thinker, [*before, V, *thought, V + 1, *following])
            at = len(before)
            expected = log_softmax(hidden[at : at + t] @ head.T)[np.arange(t), thought]
            np.testing.assert_allclose(thoughts.log_probs_T[row, number, m], expected, atol=1e-4)
            np.testing.assert_allclose(talk.log_probs_BxJxM[row, number, m], expected.sum(), atol=2e-4)
            if traces:
                assert thoughts.decided_GxT is not None
                routed = np.stack([trace["selected"] for trace in traces])
                np.testing.assert_array_equal(thoughts.decided_GxT[row, number, m], routed[:, at : at + t])
            for s in range(len(following) + 1):
                target = thinker.batch["targets"][row, index + s]
                if thinker.batch["weights"][row, index + s] == 0:
                    continue
                base, after_thought = base_hidden[at - 1 + s], hidden[at + t + 1 + s]
                w = mixing(thinker.params, base, after_thought)
                mixed = log_softmax(((1 - w) * base + w * after_thought) @ head.T)
                np.testing.assert_allclose(talk.weights_BxJxMxN[row, number, m, s], w, atol=1e-4)
                np.testing.assert_allclose(talk.nll_BxJxMxN[row, number, m, s], -mixed[target], rtol=1e-4, atol=1e-4)
                count += 1
    assert count == 2 * (12 + 11 + 10 + 6 + 5 + 4 + 22 + 22 + 21)
