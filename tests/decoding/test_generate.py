"""Generation with caches against full forward passes: every token, its log-probability, and who computed it."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from decoding_models import CONTEXT, Model, draw_naively, log_softmax, make_prompts, program_counts, restrict_naively
from some_nightly import some_nightly

from mod_star.decoding import Generated, GenerationConfig, Sampling, generate
from mod_star.decoding.caches import RoutedCache
from mod_star.errors import InputError
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.threshold import THRESHOLD_RULE

GREEDY, SAMPLED = Sampling(0), Sampling(0.9, top_k=12, top_p=0.9)
NEW, SEED = 14, 5
PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def mod() -> Model:
    """Two groups of (full, routed), the predictor decides; so little headroom that the cache fills up."""
    return Model({"headroom": 1.0}, layers=4)


@pytest.fixture(scope="module")
def generator(mod: Model) -> generate.Generator:
    return mod.generator()


@pytest.fixture(scope="module")
def greedy(generator: generate.Generator) -> list[Generated]:
    return generator.generate(PROMPTS, GenerationConfig(NEW, GREEDY, seed=SEED))


def next_token(logits_V: np.ndarray, sampling: Sampling, row: int, step: int) -> int:
    """The token that row and step must draw from these logits."""
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), row), step)
    allowed = restrict_naively(logits_V, sampling.temperature, sampling.top_k, sampling.top_p)
    return draw_naively(key, allowed)


def check(model: Model, prompt: list[int], result: Generated, sampling: Sampling, row: int, atol: float = 2e-5) -> None:
    """A result is what the full pass over prompt and new tokens says, token by token."""
    teacher = model.teach(prompt + result.tokens)
    before = teacher.logits_SxV[len(prompt) - 1 : -1]
    assert result.tokens == [next_token(logits, sampling, row, step) for step, logits in enumerate(before)]
    expected = log_softmax(before)[np.arange(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.log_probs, expected, atol=atol)
    np.testing.assert_allclose(result.routed_fraction, teacher.selected_LxS.mean(1))
    assert result.overflow == teacher.overflow_LxS.sum()


@pytest.mark.parametrize("sampling", some_nightly([GREEDY, SAMPLED], GREEDY), ids=["greedy", "sampled"])
@pytest.mark.slow
def test_decoding_is_teacher_forced_causal_routing(
    mod: Model, generator: generate.Generator, sampling: Sampling
) -> None:
    results = generator.generate(PROMPTS, GenerationConfig(NEW, sampling, seed=SEED))
    for row, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert len(result.tokens) == NEW and not result.finished
        check(mod, prompt, result, sampling, row)
    assert sum(result.overflow for result in results) > 0, "no cache was ever full: the test shows less than it should"
    fractions = [fraction for result in results for fraction in result.routed_fraction]
    assert min(fractions) < 0.5 < max(fractions) < 1


VARIANTS = {
    "router decides": Model({"causal_rule": "router", "headroom": 1.0}),
    "stochastic": Model({"selection": "stochastic", "headroom": 1.0}, layers=4),
    "every block": Model({"every": 1, "gate": "tanh", "causal_rule": "router"}),
    "thresholds": Model({"headroom": 1.0}, replace(DEFAULT_PARTS, causal_rule=THRESHOLD_RULE), layers=4),
    "one in three": Model({"every": 3, "gate": "identity", "headroom": 4.0}, layers=3),
    "kept keys": Model({"first": 1, "keep_key_values": True, "adapter_rank": 2, "router_norm": True, "headroom": 1.0}),
    "dense, untied head": Model({"every": 0}, tie_embeddings=False, kv_heads=4),
}


@pytest.mark.parametrize(
    "name", some_nightly(VARIANTS, "router decides", "stochastic", "every block", "thresholds", "one in three")
)
@pytest.mark.slow
def test_every_kind_of_routing_decodes_as_it_is_taught(name: str) -> None:
    model = VARIANTS[name]
    generator = model.generator()
    generator.warm_up(PROMPTS, GenerationConfig(NEW, SAMPLED))
    compiled = program_counts()
    results = generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))
    assert program_counts() == compiled, "warm_up has compiled all that it takes"
    for row, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        check(model, prompt, result, SAMPLED, row)
    fractions = [fraction for result in results for fraction in result.routed_fraction]
    assert name.startswith("dense") or any(0 < fraction < 1 for fraction in fractions)


@pytest.mark.slow
def test_a_row_alone_keeps_the_keys_of_tokens_that_pass_by() -> None:
    """Its block is a branch of the program: what is kept must be computed beside it."""
    model = VARIANTS["kept keys"]
    (result,) = model.generator().generate(PROMPTS[1:2], GenerationConfig(NEW, SAMPLED, seed=SEED))
    check(model, PROMPTS[1], result, SAMPLED, 0)
    assert 0 < result.routed_fraction[0] < 1


@pytest.mark.nightly
def test_bfloat16_stays_close() -> None:
    model = Model({}, dtype="bfloat16")
    for prompt, result in zip(PROMPTS, model.generator().generate(PROMPTS, GenerationConfig(NEW, GREEDY)), strict=True):
        teacher = model.teach(prompt + result.tokens)
        expected = log_softmax(teacher.logits_SxV[len(prompt) - 1 : -1])[np.arange(NEW), result.tokens]
        # A token whose logit of the causal rule is close to 0 may be routed in one and not in the other.
        assert np.median(np.abs(expected - result.log_probs)) < 0.05
        np.testing.assert_allclose(result.routed_fraction, teacher.selected_LxS.mean(1), atol=0.1)


def same(found: Generated, expected: Generated) -> None:
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    assert found.routed_fraction == expected.routed_fraction
    assert found.overflow == expected.overflow


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_rows_beside_it(generator: generate.Generator, greedy: list[Generated]) -> None:
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        same(generator.generate([prompt], GenerationConfig(NEW, GREEDY))[0], expected)
    (found,) = generator.generate(PROMPTS[:1], GenerationConfig(NEW, SAMPLED, seed=SEED))
    same(found, generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))[0])


@pytest.mark.parametrize("burst", [1, 5, NEW, 100])
def test_a_stream_ends_in_what_generate_gives(
    generator: generate.Generator, greedy: list[Generated], burst: int
) -> None:
    bursts = list(generator.stream(PROMPTS, GenerationConfig(NEW, GREEDY, seed=SEED, burst=burst)))
    assert [len(results[0].tokens) for results in bursts] == [*range(burst, NEW, burst), NEW]
    for results in bursts:
        for result, whole in zip(results, greedy, strict=True):
            assert result.tokens == whole.tokens[: len(result.tokens)]
    for found, expected in zip(bursts[-1], greedy, strict=True):
        same(found, expected)


def test_seeds_reproduce_and_differ(generator: generate.Generator) -> None:
    first, again, other = (
        [result.tokens for result in generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    same_prompt = generator.generate([PROMPTS[1]] * 4, GenerationConfig(NEW, SAMPLED, seed=1))
    assert len({tuple(result.tokens) for result in same_prompt}) > 1, "rows draw apart"


def test_an_end_token_ends_its_row_alone(mod: Model, greedy: list[Generated]) -> None:
    end = greedy[1].tokens[4]
    generator = mod.generator(end_ids=(end, 10_000))
    ended = [end in whole.tokens for whole in greedy]
    assert any(ended) and not all(ended)
    for prompt, result, whole in zip(
        PROMPTS, generator.generate(PROMPTS, GenerationConfig(NEW, GREEDY, seed=SEED)), greedy, strict=True
    ):
        assert result.finished == (end in whole.tokens)
        count = whole.tokens.index(end) if result.finished else NEW
        assert result.tokens == whole.tokens[:count]
        np.testing.assert_allclose(result.log_probs, whole.log_probs[:count], atol=1e-5)
        np.testing.assert_allclose(result.gaps, whole.gaps[:count], atol=1e-5)
        if result.finished:
            assert result.end_log_prob == pytest.approx(whole.log_probs[count], abs=1e-5)
            assert result.end_gap == pytest.approx(whole.gaps[count], abs=1e-5)
        else:
            assert result.end_log_prob is result.end_gap is None
        # What is routed after the end would be counted here.
        teacher = mod.teach(prompt + result.tokens)
        np.testing.assert_allclose(result.routed_fraction, teacher.selected_LxS.mean(1))
        assert result.overflow == teacher.overflow_LxS.sum()
    alone = generator.start([PROMPTS[1]], GenerationConfig(NEW))
    alone = generator.advance(alone, NEW, GREEDY)
    assert int(alone.step) == greedy[1].tokens.index(end) + 1, "when all rows have ended, so does the loop"


def test_a_stream_ends_rows_when_told(generator: generate.Generator, greedy: list[Generated]) -> None:
    def first_row_after_six(results: list[Generated]) -> list[bool]:
        return [row == 0 and len(result.tokens) >= 6 for row, result in enumerate(results)]

    *_, last = generator.stream(PROMPTS, GenerationConfig(NEW, GREEDY, seed=SEED, burst=3), first_row_after_six)
    assert [len(result.tokens) for result in last] == [6, NEW, NEW, NEW]
    assert not last[0].finished
    for result, whole in zip(last, greedy, strict=True):
        assert result.tokens == whole.tokens[: len(result.tokens)]
    bursts = list(
        generator.stream(PROMPTS, GenerationConfig(NEW, GREEDY, seed=SEED, burst=3), lambda results: [True] * 4)
    )
    assert len(bursts) == 1, "nothing is generated for nobody"


@pytest.mark.nightly
def test_the_context_can_be_filled_to_the_last_token() -> None:
    model = VARIANTS["router decides"]
    generator = model.generator()
    longest = make_prompts((CONTEXT - 1, 1))
    for row, (prompt, result) in enumerate(
        zip(longest, generator.generate(longest, GenerationConfig(1, GREEDY)), strict=True)
    ):
        assert len(result.tokens) == 1
        check(model, prompt, result, GREEDY, row)
    (result,) = generator.generate(longest[1:], GenerationConfig(CONTEXT - 1, GREEDY))
    assert len(result.tokens) == CONTEXT - 1
    check(model, longest[1], result, GREEDY, 0)


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([], 4, r"prompts = \[\]: must be at least one"),
        ([[1], []], 4, r"prompt 2 = 0 tokens: must have 1 to 44 \(context 48 minus 4 new tokens\)"),
        ([[1] * 45], 4, r"prompt 1 = 45 tokens: must have 1 to 44"),
        ([[1]], 0, r"new_tokens = 0: must lie in \[1, 47\]"),
        ([[1]], 48, r"new_tokens = 48: must lie in \[1, 47\]"),
        ([[3], [1, 29]], 4, r"prompt 2: token ids must lie in \[0, 29\), has 1 to 29"),
        ([[-1]], 4, r"prompt 1: token ids must lie in \[0, 29\), has -1 to -1"),
    ],
)
def test_bad_prompts_are_refused(
    generator: generate.Generator, prompts: list[list[int]], new_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator.start(prompts, GenerationConfig(new_tokens))


def test_bursts_must_be_positive(generator: generate.Generator) -> None:
    with pytest.raises(InputError, match="burst = 0: must be at least 1"):
        next(generator.stream(PROMPTS, GenerationConfig(NEW, GREEDY, burst=0)))


def test_routed_caches_hold_nothing_but_computed_tokens(mod: Model, generator: generate.Generator) -> None:
    state = generator.advance(generator.start(PROMPTS, GenerationConfig(NEW, seed=SEED)), NEW, GREEDY)
    results = generator.results(state)
    routed = [cache for cache in state.caches if isinstance(cache, RoutedCache)]
    for layer, cache in enumerate(routed):
        for row, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
            computed = np.flatnonzero(mod.teach(prompt + result.tokens).selected_LxS[layer])
            held = np.asarray(cache.positions_BxM[row, : int(cache.count_B[row])])
            np.testing.assert_array_equal(held, computed)
