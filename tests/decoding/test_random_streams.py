"""What is drawn for one purpose tells nothing about what is drawn for another, whatever seeds they were given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import Model, make_generator, make_prompts

from mod_star import random_streams
from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import GenerationConfig
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts, ThoughtInput
from mod_star.model.routing import stochastic_noise
from mod_star.model.transformer import group_init
from mod_star.thinking.mixing import mixing_weight
from mod_star.thinking.parameters import thinking_init

POSITIONS = 400


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(a: jax.Array, b: jax.Array) -> float:
    return float(np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1])


@pytest.mark.parametrize("given", [None, 0, 3], ids=["default key", "key of seed 0", "key of seed 3"])
@pytest.mark.slow
def test_stochastic_routing_and_draws_of_tokens_are_independent(given: int | None) -> None:
    """As `mod-star sample` does it: the seed gives the routing key and the rows' keys. Step and position go along."""
    model, seed = Model({"selection": "stochastic", "every": 1}), given or 0
    key = None if given is None else jax.random.key(given)
    generator = make_generator(model.decoder, model.params, routing_key=key)
    state = generator.start(make_prompts((3, 5)), GenerationConfig(4, seed=seed, branches=2))
    steps = jnp.arange(POSITIONS, dtype=jnp.int32)
    uniform = jax.jit(
        lambda key: jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step), (), jnp.float32))(steps)
    )
    noise = jax.jit(lambda key: stochastic_noise(key, steps)())
    assert generator.routing_key is not None
    by_block = [noise(jax.random.fold_in(generator.routing_key, block)) for block in range(4)]
    thoughts = jax.random.fold_in(state.keys_B[0], random_streams.THOUGHTS)
    for drawn in (*(uniform(row) for row in state.keys_B), uniform(thoughts)):
        for block in by_block:
            for ahead in range(3):
                found = spearman(block[ahead:], drawn[: POSITIONS - ahead])
                assert abs(found) < 0.2, "chance gives 0.05"
    # Blocks and rows are independent of one another too.
    rows = [uniform(row) for row in state.keys_B]
    for each in (rows, by_block):
        for i, one in enumerate(each):
            assert all(abs(spearman(one, other)) < 0.2 for other in each[:i])


def test_words_of_streams_differ_and_are_above_any_index() -> None:
    names = ("THOUGHTS", "ROUTING_NOISE", "PLACES", "EXAMPLES", "ROUTING_PARAMETERS", "THOUGHT_PARAMETERS")
    of_keys = [getattr(random_streams, name) for name in names]
    of_runs = [
        random_streams.TRAINING,
        random_streams.EVALUATION,
        random_streams.THINKING_PARAMETERS,
        random_streams.UPCYCLING,
    ]
    assert len({int(word) for word in of_keys}) == 6 and min(of_keys) > 2**32 - 16
    assert len(set(of_runs)) == 4
    keys = {jax.random.key_data(jax.random.fold_in(jax.random.key(0), word)).tobytes() for word in of_keys}
    assert len(keys) == 6


def test_no_two_initialisers_of_a_block_draw_from_one_key() -> None:
    """Splitting a key gives what folding 0, 1, ... into it gives: a small word beside a split is one of its keys."""
    drawn: list[tuple[int, ...]] = []

    def init(key: jax.Array, *_: Any) -> dict[str, jax.Array]:
        drawn.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return {"weight": jnp.zeros(1, jnp.float32)}

    def block(key: jax.Array, config: ModelConfig, parts: Parts) -> dict[str, Any]:
        return {str(i): init(each) for i, each in enumerate(jax.random.split(key, 5))}

    parts = Parts(router=Part(init, DEFAULT_PARTS.router.apply), block=Part(block, DEFAULT_PARTS.block.apply))
    key = jax.random.key(3)
    group_init(key, ModelConfig(vocab_size=8), RoutingConfig(every=1), parts)
    (block_key,) = jax.random.split(key, 1)
    parents = [jax.random.fold_in(block_key, random_streams.ROUTING_PARAMETERS)]
    drawn += [tuple(np.asarray(jax.random.key_data(each)).tolist()) for each in parents]
    assert len(drawn) == len(set(drawn)) == 7


def test_mixing_and_thought_of_ones_own_draw_from_different_keys() -> None:
    drawn: list[tuple[int, ...]] = []

    def init(key: jax.Array, config: ModelConfig) -> dict[str, jax.Array]:
        drawn.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return {"weight": jnp.zeros(1, jnp.float32)}

    parts = Parts(mixing=Part(init, mixing_weight), thought=ThoughtInput(lambda *_: None, lambda *_: None, init))
    params = thinking_init(jax.random.key(3), ModelConfig(vocab_size=8), jnp.ones((8, 4)), [1], [2], parts)
    assert set(params) == {"start", "end", "mixing", "thought"}
    assert len(drawn) == len(set(drawn)) == 2
