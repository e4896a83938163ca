"""Scoring repeats log-probabilities and routing of sampling, and sampling computes no more than it routes."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import make_generator
from some_nightly import some_nightly
from thinking_models import Thinker, thinking_params

from mod_star.config import RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.think import Think
from mod_star.evaluation import scoring
from mod_star.inspection.thoughts import thoughts_of
from mod_star.model import Decoder, transformer
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.parts import Part, Parts
from mod_star.model.rows import rows_at_once
from mod_star.model.transformer import head_matrix
from mod_star.runs.directory import LoadedRun
from mod_star.thinking import score as score_module
from mod_star.thinking import steps
from mod_star.thinking.objective import Places, memory_of, sample_thoughts
from mod_star.thinking.sample import Place, ThinkingDecoder, thought_slots
from mod_star.thinking.score import Scored, score_thought
from mod_star.thinking.thought import Thought
from mod_star.tokenization import ByteTokenizer
from mod_star.training.objectives.next_token import forward
from mod_star.training.objectives.quiet_star import make_examples, make_quiet_star_eval, make_quiet_star_loss

calls: Counter[str] = Counter()

T, N = 5, 2
"""Tokens of a thought, predictions after it."""


def make_thinker(tiny_run: RunConfig, random_params: Any, make_batch: Any, dtype: Any) -> Thinker:
    """Two layers; a routed block has two slots for the 8 tokens of <start> thought <end> continuation."""
    routing = replace(tiny_run.routing, headroom=1.0)
    thinking = ThinkingConfig(thought_length=T, n_true=N, n_thoughts=2)
    run = replace(tiny_run, model=replace(tiny_run.model, layers=2, dtype=dtype), routing=routing, thinking=thinking)
    return Thinker(run, thinking_params(run, random_params(run.model, routing)), make_batch([[9, 3], [12]], 12, 29))


def score(thinker: Thinker, params: Any, places: Places, thoughts: Thought) -> tuple[jax.Array, Any]:
    """Log-probability of each thought token from all logits, and the routing; the text is read as in sampling."""
    text, batch = thinker.read(thinker.params), thinker.batch

    def one(context: Any, tokens: jax.Array, positions: jax.Array, ids: jax.Array, index: Any, thought: Any) -> Scored:
        following = tokens[index + 1 + jnp.arange(N - 1)]
        return score_thought(thinker.thinks, params, context, Place(positions[index], ids[index]), thought, following)

    over_thoughts = jax.vmap(one, (None, None, None, None, None, 0))
    over_places = jax.vmap(over_thoughts, (None, None, None, None, 0, 0))
    scored = jax.vmap(over_places)(
        memory_of(text), batch["tokens"], batch["positions"], batch["segment_ids"], places.indices_BxJ, thoughts
    )
    logits = scored.thought_TxD.astype(jnp.float32) @ head_matrix(params).T
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, thoughts.tokens_T[..., None], -1)[..., 0], scored.trace


@pytest.mark.parametrize("dtype", some_nightly(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.slow
def test_scoring_repeats_log_probs_and_routing_of_sampling(
    dtype: Any, tiny_run: RunConfig, random_params: Any, make_batch: Any
) -> None:
    thinker = make_thinker(tiny_run, random_params, make_batch, dtype)
    places, thoughts = jax.jit(thinker.think)(thinker.params, jax.random.key(1))
    scoring = jax.jit(lambda params, thoughts: score(thinker, params, places, thoughts))
    filled = np.asarray(places.filled_BxJ)
    assert filled.sum() == 8 + 2 + 11
    tolerance = {"float32": 1e-4, "bfloat16": 0.15}[dtype]

    def assert_repeated(log_probs: jax.Array) -> None:
        np.testing.assert_allclose(log_probs[filled], thoughts.log_probs_T[filled], atol=tolerance)

    log_probs, trace = scoring(thinker.params, thoughts)
    assert_repeated(log_probs)
    assert thoughts.decided_GxT is not None
    assert thought_slots(thinker.run.routing, thinker.run.thinking) == 2
    decided = thoughts.decided_GxT[filled] > 0
    np.testing.assert_array_equal(trace.selected[filled][..., :T], decided)
    says_yes = trace.logits[filled] > 0
    assert 0 < np.mean(decided) < np.mean(says_yes[..., :T]) and decided.sum(-1).max() == 2, "some find no slot"
    assert np.sum(trace.selected[filled], -1).max() == 2
    np.testing.assert_array_equal(trace.overflow[filled], says_yes & ~np.asarray(trace.selected[filled]))

    # With a predictor that has changed its mind, the same again ...
    routed = thinker.params["groups"]["routed"]
    contrary = jax.tree.map(lambda leaf: leaf + 0.0, routed["predictor"])
    contrary |= {"output": -contrary["output"], "shift": -contrary["shift"]}
    groups = {**thinker.params["groups"], "routed": {**routed, "predictor": contrary}}
    changed = {**thinker.params, "groups": groups}
    log_probs, trace = scoring(changed, thoughts)
    assert_repeated(log_probs)
    np.testing.assert_array_equal(trace.selected[filled][..., :T], decided)
    # ... but not if it is asked.
    _, trace = scoring(changed, replace(thoughts, decided_GxT=-jnp.ones_like(thoughts.decided_GxT)))
    assert np.mean(trace.selected[filled][..., :T] != decided) > 0.2


@pytest.mark.parametrize(("fields", "capacity", "slots"), [((8, 4), 0.125, 3), ((16, 9), 0.5, 20)])
@pytest.mark.nightly
def test_a_thought_has_as_many_slots_in_evaluation_and_generation_as_in_training(
    fields: tuple[int, int], capacity: float, slots: int, routed_run: RunConfig, random_params: Any, make_batch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Evaluation predicts one token after a thought, generation none: slots for so few would be 2, and 14."""
    thinking = ThinkingConfig(thought_length=fields[0], n_true=fields[1], n_thoughts=2)
    run = replace(
        routed_run,
        model=replace(routed_run.model, context=32),
        routing=replace(routed_run.routing, capacity=capacity),
        train=replace(routed_run.train, objective="quiet_star"),
        thinking=thinking,
    )
    params = thinking_params(run, random_params(run.model, run.routing))
    decoder, batch, key, one = Decoder(run.model, run.routing), make_batch([[32]], 32, 29), jax.random.key(0), 1.0
    generator = make_generator(decoder, params, thinking=thinking)
    loaded = LoadedRun(run, ByteTokenizer(), decoder, params, 0)
    pairs = [([1, 2], [3])]
    doors: dict[str, Any] = {
        "training": lambda: jax.eval_shape(make_quiet_star_loss(decoder, run), params, batch, key, one, one),
        "evaluation": lambda: jax.eval_shape(make_quiet_star_eval(decoder, run), params, batch, key),
        "log": lambda: jax.eval_shape(make_examples(decoder, run), params, batch, key),
        "generation": lambda: generator.generate([[1, 2, 3]], GenerationConfig(4, Sampling(), think=Think("always"))),
        "thoughts": lambda: thoughts_of(loaded, "a"),
        "scoring": lambda: scoring.score(loaded.model, pairs, scoring.ScoringConfig(Think("always"))),
    }
    for door, through in list(doors.items())[: 6 if slots == 3 else 2]:
        slots_used: set[int | None] = set()

        def counting(*args: Any, slots_used: set[int | None] = slots_used, **options: Any) -> Any:
            slots_used.add(args[3].slots)
            if door in ("generation", "thoughts", "scoring"):  # traced is enough  # noqa: B023
                raise InterruptedError
            return transformer.apply_blocks(*args, **options)

        for module in (steps, score_module):
            monkeypatch.setattr(module, "apply_blocks", counting)
        with suppress(InterruptedError):
            through()
        assert slots_used == {slots}, door


def counted_swiglu(params: Any, x_NxD: jax.Array) -> jax.Array:
    """The default feed-forward layer, counting the rows for which it really runs."""
    rows = x_NxD.shape[0]
    jax.debug.callback(lambda _: calls.update(rows=rows), x_NxD[0, 0])
    return swiglu(params, x_NxD)


@pytest.mark.slow
def test_sampling_runs_a_routed_block_for_as_many_chunks_as_the_routed_thoughts_of_all_positions_fill(
    routed_run: RunConfig, random_params: Any, make_batch: Any
) -> None:
    routing = replace(routed_run.routing, capacity=0.125, headroom=8.0)
    run = replace(routed_run, routing=routing, thinking=ThinkingConfig(thought_length=4, n_true=1, n_thoughts=2))
    params, batch = thinking_params(run, random_params(run.model, routing)), make_batch([[24]], 24, 29)
    routed = params["groups"]["routed"]
    decoder = Decoder(run.model, routing, Parts(feed_forward=Part(swiglu_init, counted_swiglu)))
    places = Places(jnp.arange(24)[None], jnp.ones((1, 24), bool))

    @jax.jit
    def sample(params: Any, batch: Any) -> Thought:
        text = forward(Decoder(run.model, routing), params, batch, None, "causal", keep_keys_values=True)
        return sample_thoughts(
            ThinkingDecoder(decoder, run.thinking), params, text, batch, places, jax.random.key(0), 1.0
        )

    chunk = rows_at_once(24 * 2, 3 / 24)
    assert chunk == 10
    shares = []
    for shift in (-1e6, -2.5, -2.0, -1.0, 1e6):
        predictor = {**routed["predictor"], "output": routed["predictor"]["output"] / 2, "shift": jnp.full(1, shift)}
        jax.effects_barrier()
        calls.clear()
        thoughts = jax.block_until_ready(
            sample({**params, "groups": {"routed": {**routed, "predictor": predictor}}}, batch)
        )
        jax.effects_barrier()
        assert thoughts.decided_GxT is not None
        computed = np.sum(np.asarray(thoughts.decided_GxT), (0, 1, 2, 3))
        assert calls["rows"] == np.sum(np.ceil(computed / chunk)) * chunk
        shares.append(float(np.mean(computed) / 48))
    assert shares[0] == 0 and shares[-1] == 1 and sum(0 < share < 0.8 for share in shares) >= 2, shares
