"""How many programs are compiled: few for prompts and outputs of all lengths, and none again for an equal network."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params
from decoding_models import make_generator, make_model, make_prompts, program_counts

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import Generated, GenerationConfig, Generator, Sampling
from mod_star.decoding.beam import BeamSearch
from mod_star.decoding.beam_rules import run_search
from mod_star.decoding.lengths import coarse, rounded_up
from mod_star.evaluation.score_batch import score_batch
from mod_star.evaluation.scoring import score
from mod_star.model import Decoder

MODEL = ModelConfig(vocab_size=29, width=16, layers=1, heads=2, mlp_width=24, context=256, tie_embeddings=False)
ROUTING = RoutingConfig(every=0)
PROMPTS = make_prompts((5, 17, 30, 41, 64, 80, 100))
GREEDY, NEW = Sampling(0), 10


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(MODEL, ROUTING)


def generator(params: dict[str, Any], end_ids: tuple[int, ...] = ()) -> Generator:
    return make_generator(Decoder(MODEL, ROUTING), params, end_ids)


def compiled_since(before: tuple[int, int]) -> tuple[int, int]:
    prefill, decode = program_counts()
    return prefill - before[0], decode - before[1]


def same(found: Generated, expected: Generated) -> None:
    assert (found.tokens, found.routed_fraction, found.overflow) == (
        expected.tokens,
        expected.routed_fraction,
        expected.overflow,
    )
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-5)


def test_lengths_are_rounded_up_in_coarse_steps() -> None:
    assert [rounded_up(n, 1, 99) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    sizes = {rounded_up(n, 64, 2048) for n in range(1, 2049)}
    assert sizes == {64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
    assert {rounded_up(n, 64, 300) for n in range(1, 301)} == {64, 128, 192, 256, 300}
    assert {rounded_up(n, 64, 48) for n in range(1, 49)} == {48}
    assert all(n <= rounded_up(n, 64, 10**6) <= max(128, 1.5 * n) for n in range(1, 5000))


def test_few_rows_have_room_for_prompts_of_many_lengths() -> None:
    assert [coarse(n, 1, 2000) for n in (1, 128, 129, 512, 513, 1100)] == [128, 128, 256, 512, 1024, 2000]
    assert coarse(64, 4, 100) == 100
    assert [coarse(n, 5, 2000) for n in (64, 300)] == [64, 300]


@pytest.mark.nightly
def test_prompts_and_outputs_of_many_lengths_share_programs(params: dict[str, Any]) -> None:
    before = program_counts()
    one = generator(params)
    alone = [one.generate([prompt], GenerationConfig(NEW, GREEDY))[0] for prompt in PROMPTS]
    assert compiled_since(before) == (2, 1), "two lengths that prompts are padded to; their caches are equally long"
    for count in (1, 33, 100):
        (result,) = one.generate(PROMPTS[:1], GenerationConfig(count, GREEDY))
        assert len(result.tokens) == count and result.tokens[:NEW] == alone[0].tokens[:count]
    for end_ids, seed in (((), 3), ((4, 5), 3)):
        generator(params, end_ids).generate(
            PROMPTS[3:4], GenerationConfig(50, GREEDY, seed=seed)
        )  # a generator of its own
    assert compiled_since(before) == (2, 1), "neither lengths nor seeds nor end tokens nor generators are programs"
    for prompt in PROMPTS:  # all the room there is
        (result,) = one.generate([prompt], GenerationConfig(MODEL.context - len(prompt), GREEDY))
        assert len(result.tokens) == MODEL.context - len(prompt)
    assert compiled_since(before) == (4, 2)
    # Padding changes nothing: neither that of one length by another nor that of the batch by rows.
    before = program_counts()
    for found, expected in zip(one.generate(PROMPTS, GenerationConfig(NEW, GREEDY)), alone, strict=True):
        same(found, expected)
    one.generate([*PROMPTS, [1]], GenerationConfig(NEW, GREEDY))
    assert compiled_since(before) == (1, 1), "seven prompts and eight are a batch of eight"


def test_numbers_of_sampling_are_data(params: dict[str, Any]) -> None:
    one = generator(params)
    one.generate(PROMPTS[:1], GenerationConfig(5, Sampling(0.7, top_p=0.9, min_p=0.1)))
    before = program_counts()
    drawn = {
        tuple(one.generate(PROMPTS[:1], GenerationConfig(5, Sampling(heat, 0, top_p, min_p), seed=seed))[0].tokens)
        for heat, top_p, min_p, seed in ((0.2, 0.9, 0.1, 0), (3.0, 0.9, 0.01, 0), (3.0, 0.5, 0.02, 1))
    }
    assert compiled_since(before) == (0, 0)
    assert len(drawn) == 3
    # What is drawn is what a program of these very numbers would draw.
    cold = one.generate(PROMPTS[:1], GenerationConfig(5, Sampling(1e-6, top_p=0.9, min_p=0.5)))
    same(cold[0], one.generate(PROMPTS[:1], GenerationConfig(5, GREEDY))[0])
    alone = one.generate(PROMPTS[:1], GenerationConfig(5, Sampling(3.0, top_p=0.9, min_p=1.0)))
    same(alone[0], one.generate(PROMPTS[:1], GenerationConfig(5, GREEDY))[0])


@pytest.mark.nightly
def test_collections_branches_and_beams_share_programs(params: dict[str, Any]) -> None:
    one, branching = generator(params), Sampling(0, branch=True)
    before = program_counts()
    for count in (NEW, NEW + 3):
        for number in (7, 5, 3):  # the last batch is filled up
            dict(one.generate_many(PROMPTS[:number], GenerationConfig(count, branching, rows=6, branches=3, burst=99)))
    assert compiled_since(before) == (2, 2)
    before = program_counts()
    beams: Any = run_search
    known = beams._cache_size()
    for count in (4, 7):
        for prompts in (PROMPTS[:3], PROMPTS[1:4]):
            found = BeamSearch(generator(params, (2,)), 2).search(prompts, count)
            assert [len(each) for each in found] == [2, 2, 2]
            assert all(len(each.tokens) <= count for texts in found for each in texts)
    assert (compiled_since(before), beams._cache_size() - known) == ((1, 0), 1)
    # A batch that is filled up finds the same.
    search = BeamSearch(one, 2)
    for each, alone in zip(search.search(PROMPTS[:5], 4), PROMPTS[:5], strict=True):
        (expected,) = search.search([alone], 4)
        assert [text.tokens for text in each] == [text.tokens for text in expected]
        assert all(math.isfinite(text.score) for text in each)


def test_scoring_shares_programs(params: dict[str, Any]) -> None:
    program: Any = score_batch
    before = program._cache_size()
    for prompt in PROMPTS:
        score(make_model(Decoder(MODEL, ROUTING), params), [(prompt, [1, 2])])
    assert program._cache_size() - before == 2
    for count in (5, 6):
        score(make_model(Decoder(MODEL, ROUTING), params), [(prompt, [1, 2]) for prompt in PROMPTS[:count]])
    assert program._cache_size() - before == 3, "five texts are run as six"


def test_a_generator_holds_the_weights_once_and_in_memory_of_its_own(params: dict[str, Any]) -> None:
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(**{**vars(MODEL), "dtype": dtype})
        given = jax.tree.map(lambda leaf: leaf + 0, params)
        sizes = jax.tree.map(lambda leaf: leaf.nbytes, given)
        weights = sum(jax.tree.leaves(sizes))
        (expected,) = make_generator(Decoder(model, ROUTING), given).generate(PROMPTS[:1], GenerationConfig(5, GREEDY))
        before = live_bytes()
        copied = make_generator(Decoder(model, ROUTING), given)
        assert live_bytes() - before == sum(leaf.nbytes for leaf in jax.tree.leaves(copied.params)) <= weights
        jax.tree.map(lambda leaf: leaf.delete(), given)  # as a training step does with a state that is donated to it
        assert copied.generate(PROMPTS[:1], GenerationConfig(5, GREEDY))[0].tokens == expected.tokens
        del copied

        given = jax.tree.map(lambda leaf: leaf + 0, params)
        before = live_bytes()
        owner = make_generator(Decoder(model, ROUTING), given, donate=True)
        assert live_bytes() <= before - (dtype == "bfloat16") * weights // 4
        assert owner.generate(PROMPTS[:1], GenerationConfig(5, GREEDY))[0].tokens == expected.tokens
        assert given["groups"]["full_0"]["block"]["query"].is_deleted()


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())
