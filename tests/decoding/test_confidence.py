"""DeepConf's confidences and self-certainty on hand-made logits in float64; what is kept, weighed, never computed."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import Model, log_softmax, lowered_advance, make_prompts
from test_branches import branch

from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.branches import Branches
from mod_star.decoding.confidence import (
    ConfidenceConfig,
    PathConfidence,
    group_confidences,
    path_confidence,
    token_confidence,
)
from mod_star.decoding.rankings import DELTA, LOG_PROB, MEASURED, Ranking, make_ranking, softmax_weighted
from mod_star.errors import InputError


@pytest.mark.parametrize("vocabulary", [50, 7, 20_001])
def test_a_tokens_confidence_is_that_of_numpy(vocabulary: int) -> None:
    logits = 5 * np.random.default_rng(1).standard_normal((6, vocabulary)).astype(np.float32)
    logits[0] = 3.0
    logits[1] = np.where(np.arange(vocabulary) == 2, 80.0, 0.0)
    found = token_confidence(jnp.asarray(logits))
    for row, confidence, certainty in zip(logits, found.confidences_BxT, found.certainties_BxT, strict=True):
        log_p = log_softmax(row)
        assert confidence == pytest.approx(-np.mean(sorted(log_p)[-min(20, vocabulary) :]), rel=1e-5)
        uniform = 1 / vocabulary
        divergence = sum(uniform * (math.log(uniform) - each) for each in log_p)  # of the prediction from a uniform one
        assert certainty == pytest.approx(divergence, rel=1e-5, abs=1e-5)
    assert found.confidences_BxT[0] == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert found.certainties_BxT[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("tokens", "size"), [(1, 4), (3, 4), (4, 4), (45, 4), (45, 1), (45, 100)])
def test_the_confidences_of_a_path(tokens: int, size: int) -> None:
    rng = np.random.default_rng(tokens)
    confidences, certainties = rng.gamma(2, 3, tokens).tolist(), rng.gamma(2, 3, tokens).tolist()
    groups = [sum(confidences[i - size : i]) / size for i in range(size, tokens + 1)] or [sum(confidences) / tokens]
    lowest = sorted(groups)[: max(1, len(groups) // 10)]
    found = path_confidence(confidences, certainties, size)
    assert found is not None
    expected = PathConfidence(
        mean=sum(confidences) / tokens,
        lowest_group=min(groups),
        bottom_groups=sum(lowest) / len(lowest),
        tail=sum(confidences[-size:]) / min(size, tokens),
        self_certainty=sum(certainties) / tokens,
    )
    assert asdict(found) == pytest.approx(asdict(expected))
    np.testing.assert_allclose(group_confidences(confidences, size), groups)
    assert path_confidence([], []) is None
    with pytest.raises(ValueError, match="no groups"):
        group_confidences([], size)
    with pytest.raises(InputError, match=r"^window = 0: must be at least 1"):
        ConfidenceConfig(0)


@pytest.mark.nightly
def test_nothing_is_computed_unless_it_is_asked_for() -> None:
    generator = Model({"every": 0}).generator()
    programs = {}
    for confidence in (False, True):
        config = GenerationConfig(3, Sampling(0.7), branches=2, confidence=confidence)
        state = generator.start(make_prompts((4,)), config)
        programs[confidence] = lowered_advance(generator, state, config.drawn).as_text()
        assert (state.confidence is not None) == confidence
        if state.confidence is not None:
            extra = [state.confidence.confidences_BxT, state.confidence.certainties_BxT]
            assert {(each.shape, each.dtype.name) for each in extra} == {(state.gaps_BxT.shape, "float32")}
    assert "top_k" not in programs[False] and programs[True].count("chlo.top_k") == 1
    plain = generator.generate(make_prompts((4,)), GenerationConfig(3, Sampling(0.7), branches=2))
    asked = generator.generate(make_prompts((4,)), GenerationConfig(3, Sampling(0.7), branches=2, confidence=True))
    for one, other in zip(plain, asked, strict=True):
        assert one == replace(other, confidences=[], certainties=[]), "measuring changes nothing else"
        assert len(other.confidences) == len(other.certainties) == len(other.tokens) == 3


def paths(*scores: tuple[str | None, float]) -> Branches:
    """Branches with an answer, and this as their lowest group."""
    made = [
        replace(branch(answer, score, score), confidence=PathConfidence(1.0, score, 1.0, 1.0, 1.0))
        for answer, score in scores
    ]
    return Branches("", made)


LOW = MEASURED["lowest_group"]


def test_the_highest_ranked_are_kept() -> None:
    result = paths(("5", 0.3), (None, 9.0), ("7", 0.9), ("5", 0.3), ("9", 0.2))
    assert result.majority_answer() == "5"
    half = result.keep(0.5, LOW)
    assert half.counting == [0, 2], "two of four, of equals the first"
    assert half.branches[3].dropped == "not among the 50 % ranked highest" and half.branches[1] == result.branches[1]
    assert result.keep(0.1, LOW).counting == [2], "one at least"
    assert result.keep(0.51, LOW).counting == [0, 2, 3] and result.keep(1.0, LOW) == result
    many = paths(*[("1", float(i)) for i in range(100)])
    assert [len(many.keep(share, LOW).counting) for share in (0.07, 0.29, 0.57, 0.9)] == [7, 29, 57, 90]
    assert paths((None, 1.0)).keep(0.5, LOW).answer(LOW) is None
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match=rf"^keep = {share}: must lie in \(0, 1\]"):
            result.keep(share, LOW)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 40.0])
def test_votes_are_weighed_by_the_softmax_of_confidence(temperature: float) -> None:
    scored = [("5", 1.1), ("7", 1.6), ("5", 1.0), ("9", 0.2), (None, 50.0), ("5", 0.1)]
    result = paths(*scored)
    counted = [(answer, score) for answer, score in scored if answer is not None]
    exponentials = np.exp(np.array([score for _, score in counted]) / temperature)
    weights = exponentials / exponentials.sum()
    shares = {
        name: sum(weight for weight, (answer, _) in zip(weights, counted, strict=True) if answer == name)
        for name in ("5", "7", "9")
    }
    weighed = softmax_weighted(LOW, temperature)
    totals = {answer: math.exp(total) for answer, total in result.totals(weighed).items()}
    assert {answer: total / sum(totals.values()) for answer, total in totals.items()} == pytest.approx(shares)
    assert result.answer(weighed, aggregate=True) == max(shares, key=lambda answer: shares[answer])
    assert result.answer(weighed, aggregate=True) == ("7" if temperature == 0.05 else "5")
    assert result.answer(weighed) == result.answer(LOW) == "7", "the best path stays"


def test_of_log_probabilities_at_temperature_one_the_weights_are_the_probabilities() -> None:
    result = paths(("5", -3.0), ("7", -2.5), ("5", -2.9))
    assert result.totals(softmax_weighted(LOG_PROB, 1.0)) == pytest.approx(result.totals(LOG_PROB))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"^vote_temperature = .*: must be at least 1e-6 and finite"):
            softmax_weighted(DELTA, temperature)


def test_a_ranking_by_what_was_not_measured_says_so() -> None:
    result = Branches("", [branch("5", 0.3)])
    for name, ranking in MEASURED.items():
        assert make_ranking(name.replace("_", "-")) == ranking
        with pytest.raises(InputError, match=rf"ranking {name} = None: must be .*only if ConfidenceConfig asks for it"):
            result.answer(ranking)
    with pytest.raises(InputError, match=r"for every branch with an answer$"):
        result.answer(Ranking(lambda _: None, "mine", "mine"))
