"""Several branches of a prompt: the same as rows of their own, over one copy of the prompt's keys and values."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED
from decoding_models import CONTEXT, VOCAB, Model, log_softmax, lowered_advance, make_generator, make_prompts
from some_nightly import some_nightly
from thinking_models import thinking_params

from mod_star.config import RunConfig, ThinkingConfig
from mod_star.decoding import Generated, GenerationConfig, Generator, Sampling, Think
from mod_star.decoding.caches import FullCache, routed_cache
from mod_star.decoding.state import reorder
from mod_star.errors import InputError
from mod_star.model.attention import KeyValues

NEW, BRANCHES, SEED = 9, 3, 5
PROMPTS = make_prompts((4, 17, 9))
BRANCHING, SAMPLED = Sampling(0, branch=True), Sampling(3.0)


@pytest.fixture(scope="module", params=some_nightly(["dense", "routed"], "dense"))
def model(request: pytest.FixtureRequest) -> Model:
    routing: dict[str, Any] = {"every": 0} if request.param == "dense" else {"headroom": 1.0, "capacity": 0.15}
    if request.param == "kept":
        routing |= {"keep_key_values": True, "adapter_rank": 2}
    return Model(routing, layers=2)


@pytest.fixture(scope="module")
def generator(model: Model) -> Generator:
    return model.generator()


@pytest.fixture(scope="module")
def branched(generator: Generator) -> list[Generated]:
    return generator.generate(PROMPTS, GenerationConfig(NEW, BRANCHING, seed=SEED, branches=BRANCHES))


def same(one: Generated, other: Generated) -> None:
    assert (one.tokens, one.thoughts, one.overflow) == (other.tokens, other.thoughts, other.overflow)
    for name in ("log_probs", "gaps", "routed_fraction", "entropies"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=3e-5)


@pytest.mark.parametrize("model", some_nightly(["dense", "routed", "kept"], "dense", "kept"), indirect=True)
@pytest.mark.slow
def test_branches_are_greedy_after_the_most_probable_first_tokens(model: Model, branched: list[Generated]) -> None:
    overflow = 0
    for row, result in enumerate(branched):
        prompt, branch = PROMPTS[row // BRANCHES], row % BRANCHES
        teacher = model.teach(prompt + result.tokens)
        log_p = log_softmax(teacher.logits_SxV[len(prompt) - 1 : -1])
        ranked = np.argsort(-log_p, axis=1, kind="stable")
        assert result.tokens == [ranked[0, branch], *ranked[1:, 0]]
        np.testing.assert_allclose(result.log_probs, log_p[np.arange(NEW), result.tokens], atol=3e-5)
        best, second = np.exp(np.take_along_axis(log_p, ranked[:, :2], 1)).T
        np.testing.assert_allclose(result.gaps, best - second, atol=3e-5)
        np.testing.assert_allclose(result.routed_fraction, teacher.selected_LxS.mean(1))
        assert result.overflow == teacher.overflow_LxS.sum()
        overflow += result.overflow
    assert not model.routing.every or overflow > 0, "no cache was ever full: the test shows less than it should"


@pytest.mark.parametrize("model", ["routed"], indirect=True)
@pytest.mark.nightly
def test_sampled_branches_are_rows_of_their_own(generator: Generator) -> None:
    together = generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, branches=BRANCHES))
    apart = generator.generate(
        [prompt for prompt in PROMPTS for _ in range(BRANCHES)], GenerationConfig(NEW, SAMPLED, seed=SEED)
    )
    for one, other in zip(together, apart, strict=True):
        same(one, other)
    assert len({tuple(result.tokens) for result in together[:BRANCHES]}) == BRANCHES


@pytest.mark.parametrize("when", ["always", "auto"])
@pytest.mark.nightly
def test_branches_of_a_thinking_model_think(when: Any) -> None:
    model = Model({"every": 0 if when == "always" else 1, "headroom": 1.0}, layers=1)
    run = RunConfig(model=model.config, routing=model.routing)
    thinking = ThinkingConfig(thought_length=3, n_true=2)
    generator = make_generator(model.decoder, thinking_params(run, model.params), thinking=thinking)
    think = Think(when, threshold=math.inf if when == "auto" else None)
    if when == "auto":  # about half of the rows are to think
        plain = generator.generate(PROMPTS[:2], GenerationConfig(5, SAMPLED, seed=SEED, think=think, branches=BRANCHES))
        think = Think("auto", threshold=float(np.median([result.entropies for result in plain])))
    together = generator.generate(PROMPTS[:2], GenerationConfig(5, SAMPLED, seed=SEED, think=think, branches=BRANCHES))
    apart = generator.generate(
        [prompt for prompt in PROMPTS[:2] for _ in range(BRANCHES)],
        GenerationConfig(5, SAMPLED, seed=SEED, think=think),
    )
    for one, other in zip(together, apart, strict=True):
        same(one, other)
    thought = [thoughts is not None for result in together for thoughts in result.thoughts]
    assert any(thought) and all(thought) == (when == "always")


@pytest.mark.slow
def test_the_prompt_is_held_once_and_never_copied(generator: Generator) -> None:
    prompt, new, branches = make_prompts((31,)), 6, 5  # padded to the context
    generation = GenerationConfig(new, branches=branches)
    state = jax.eval_shape(lambda: generator._start(generator._padded(prompt, generation), generation, room=new))
    config = generator.decoder.config
    per_token = 2 * config.key_heads * config.head_size * 4
    for cache in state.caches:
        sizes = [leaf.size * 4 for leaf in jax.tree.leaves(cache) if leaf.ndim == 4]
        assert sum(sizes) <= per_token * (CONTEXT + branches * (new + 1))  # + 1: a routed block's spare slot
    lowered = lowered_advance(generator, state, BRANCHING)
    text = lowered.compile(AS_SHIPPED).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", str(text))}
    held = (config.key_heads, CONTEXT, config.head_size)
    assert held in shapes or (1, *held) in shapes
    copies = {shape for shape in shapes if math.prod(shape) >= branches * math.prod(held)}
    assert not {shape for shape in copies if shape[-1] == config.head_size and CONTEXT in shape}


@pytest.mark.parametrize("model", ["routed"], indirect=True)
@pytest.mark.slow
def test_no_step_copies_the_cache_of_generated_tokens(generator: Generator) -> None:
    prompt, new = make_prompts((7,)), 23
    state = jax.eval_shape(lambda: generator.start(prompt, GenerationConfig(new, branches=2)))
    lowered = lowered_advance(generator, state, BRANCHING)
    full = next(cache for cache in state.caches if isinstance(cache, FullCache))
    shape = re.escape(f"f32[{','.join(map(str, full.keys_BxKxTxE.shape))}]")
    text = str(lowered.compile(AS_SHIPPED).as_text())
    assert re.search(rf"= {shape}\S* (?:fusion|dynamic-update-slice)\(", text)  # it is there, and written
    assert not re.search(rf"= {shape}\S* copy\(", text)


@pytest.mark.parametrize("model", ["routed"], indirect=True)
@pytest.mark.slow
def test_reordered_rows_go_on_as_the_rows_they_copy(generator: Generator, branched: list[Generated]) -> None:
    half, greedy = NEW // 2, Sampling(0)
    state = generator.advance(
        generator.start(PROMPTS, GenerationConfig(NEW, seed=SEED, branches=BRANCHES)), half, BRANCHING
    )
    rows = np.array([2, 0, 0, 3, 4, 5, 8, 8, 8])
    state = reorder(state, jnp.asarray(rows))
    results = generator.results(generator.advance(state, NEW, greedy))
    for row, result in zip(rows, results, strict=True):
        same(result, branched[row])


@pytest.mark.slow
def test_many_prompts_are_what_each_is_alone() -> None:
    model, branches = Model({"every": 1, "headroom": 1.0}, layers=1), 2
    prompts = make_prompts((5, 20, 3, 11, 8, 2, 7), seed=3)
    probe = model.generator().generate(prompts, GenerationConfig(12, SAMPLED, seed=SEED, branches=branches))
    end = probe[4].tokens[3]
    generator = model.generator((end,))
    together = generator.generate(prompts, GenerationConfig(12, SAMPLED, seed=SEED, branches=branches))
    told = 6

    def stop(number: int, results: list[Generated]) -> list[bool]:
        return [number == told and len(result.tokens) >= 4 for result in results]

    found = dict(
        generator.generate_many(
            prompts, GenerationConfig(12, SAMPLED, rows=3 * branches, branches=branches, seed=SEED, burst=2), stop=stop
        )
    )
    assert sorted(found) == list(range(len(prompts)))
    for number, results in found.items():
        for branch, result in enumerate(results):
            expected = together[number * branches + branch]
            if number == told:
                assert result.tokens == expected.tokens[: len(result.tokens)] and len(result.tokens) <= 4
                continue
            same(result, expected)
            assert result.finished == expected.finished == (result.end_log_prob is not None)
    assert {result.finished for results in found.values() for result in results} == {False, True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g: g.generate(PROMPTS, GenerationConfig(2, BRANCHING, branches=VOCAB + 1)),
            f"branches = {VOCAB + 1}: must be at most the",
        ),
        (lambda g: g.generate(PROMPTS, GenerationConfig(2, SAMPLED, branches=0)), "branches = 0: must be at least 1"),
        (
            lambda g: list(g.generate_many(PROMPTS, GenerationConfig(2, SAMPLED, rows=2, branches=3))),
            "rows = 2: must be at least the",
        ),
    ],
)
@pytest.mark.parametrize("model", ["routed"], indirect=True)
@pytest.mark.slow
def test_branches_that_cannot_be_are_refused(generator: Generator, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(generator)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_full_routed_cache_keeps_all_that_it_has_computed(branches: int) -> None:
    """Rows that compute nothing write to a slot that is never read."""
    none = jnp.zeros((1, 2), jnp.int32)
    prompt = KeyValues(jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 1, 2, 4)), none, none, none > 0)
    cache = routed_cache(prompt, jnp.zeros(1, jnp.int32), slots=2, new_tokens=5, branches=branches)
    for number, computes in enumerate((True, True, False), start=1):
        new = jnp.full((branches, 1, 1, 4), float(number))
        own = KeyValues(
            new, new, jnp.full((branches, 1), number), jnp.ones((branches, 1), jnp.int32), new[:, 0, :, 0] > 0
        )
        computed = jnp.full(branches, computes)
        cache = cache.append(own, computed, computed, ~computed)
    (held,) = cache.own_key_values(jnp.ones(branches, jnp.int32), jnp.int32(3))
    for row in range(branches):
        assert held.positions_M[row][held.valid_M[row]].tolist() == [1, 2]
        assert held.keys_KxMxE[row, 0][held.valid_M[row]][:, 0].tolist() == [1, 2]
