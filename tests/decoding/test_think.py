"""Thinking while generating, against the naive loop: the plain model on [text; start; T; end] for every token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import VOCAB, Model, draw_naively, log_softmax, make_generator, make_prompts, program_counts
from numpy_decoder import decode, float64, one_document
from thinking_models import thinking_params

from mod_star.config import RunConfig, ThinkingConfig
from mod_star.decoding import Generated, GenerationConfig, Sampling, Think
from mod_star.errors import InputError

SAMPLED = Sampling(0.9)
ALWAYS = Think("always")
THINKING = ThinkingConfig(thought_length=2, n_true=2)
NEW, SEED = 6, 5
PROMPTS = make_prompts((3, 8, 1, 5))


class Thinker:
    """A model with random thinking parameters and room for whatever its routed blocks want."""

    def __init__(self, every: int, thinking: ThinkingConfig = THINKING, layers: int = 2) -> None:
        # With the embedding as its head, such a model would be sure of nearly every token.
        self.model = Model({"every": every, "headroom": 4.0}, layers=layers, tie_embeddings=False)
        self.thinking = thinking
        self.params = thinking_params(RunConfig(model=self.model.config, routing=self.model.routing), self.model.params)
        self.generator = make_generator(self.model.decoder, self.params, thinking=thinking)
        # The naive loop's vocabulary has <start> and <end> too.
        params = float64(self.params)
        own = params["thinking"]
        self._naive = {**params, "embedding": np.concatenate([params["embedding"], [own["start"], own["end"]]])}

    def hidden(self, ids: list[int]) -> Any:
        """The plain model's hidden states of one document, routed causally."""
        model = self.model
        return decode(self._naive, one_document(ids), model.config, model.routing, mode="causal", most=len(ids))[0]

    def logits(self, hidden: Any) -> Any:
        return hidden @ self._naive["head"].T

    def mixing_weight(self, base: Any, after: Any) -> Any:
        p = self._naive["thinking"]["mixing"]
        x = np.maximum(np.concatenate([base, after]) @ p["first"] + p["first_bias"], 0)
        return np.maximum(x @ p["second"] + p["second_bias"], 0) @ p["output"] + p["output_bias"]

    def check(self, row: int, result: Generated) -> None:
        """Every number of a result is what the naive loop says, the thoughts being greedy."""
        prompt = PROMPTS[row]
        t = self.thinking.thought_length
        assert len(result.tokens) == len(result.thoughts) == len(result.entropies) == len(result.mixing_weights) == NEW
        for step, thought in enumerate(result.thoughts):
            text = prompt + result.tokens[:step]
            ids = [VOCAB] * t if self.thinking.kind == "pause" else thought
            hidden = self.hidden(text if ids is None else [*text, VOCAB, *ids, VOCAB + 1])
            base = hidden[len(text) - 1]
            log_p = log_softmax(self.logits(base))
            np.testing.assert_allclose(result.entropies[step], -np.sum(np.exp(log_p) * log_p), atol=1e-4)
            if thought is None:
                assert result.mixing_weights[step] is None
            else:
                drawn = [] if self.thinking.kind == "pause" else np.argmax(self.logits(hidden[len(text) :][:t]), -1)
                assert thought == list(drawn)
                weight = self.mixing_weight(base, hidden[-1])
                assert result.mixing_weights[step] == pytest.approx(weight, abs=1e-4)
                log_p = log_softmax(self.logits((1 - weight) * base + weight * hidden[-1]))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), row), step)
            assert result.tokens[step] == draw_naively(key, log_p / SAMPLED.temperature)
            np.testing.assert_allclose(result.log_probs[step], log_p[result.tokens[step]], atol=2e-4)


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    """A full and a routed block; `test_pauses` has a full one alone."""
    return Thinker(2)


@pytest.fixture(scope="module")
def always(thinker: Thinker) -> list[Generated]:
    return thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=ALWAYS))


@pytest.fixture(scope="module")
def auto(thinker: Thinker, always: list[Generated]) -> Think:
    """With the median of all entropies as threshold."""
    return Think("auto", float(np.median([result.entropies for result in always])))


@pytest.fixture(scope="module")
def sometimes(thinker: Thinker, auto: Think) -> list[Generated]:
    return thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=auto))


def same(found: Generated, expected: Generated) -> None:
    assert found.tokens == expected.tokens
    assert found.thoughts == expected.thoughts
    assert found.routed_fraction == expected.routed_fraction
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    for ours, theirs in zip(found.mixing_weights, expected.mixing_weights, strict=True):
        assert ours == theirs or ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_always_is_the_naive_loop(thinker: Thinker, always: list[Generated]) -> None:
    for row, result in enumerate(always):
        assert None not in result.thoughts
        thinker.check(row, result)
    never = thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))
    assert [r.tokens for r in never] != [r.tokens for r in always], "thoughts must matter for the test to show anything"


@pytest.mark.slow
def test_auto_thinks_where_the_entropy_is_above_the_threshold_and_nowhere_else(
    thinker: Thinker, auto: Think, sometimes: list[Generated]
) -> None:
    assert auto.threshold is not None
    for row, result in enumerate(sometimes):
        thought = [thought is not None for thought in result.thoughts]
        assert thought == [entropy > auto.threshold for entropy in result.entropies]
        thinker.check(row, result)
    counts = [sum(thought is not None for thought in result.thoughts) for result in sometimes]
    assert min(counts) < max(counts), "rows that are not in step"


@pytest.mark.nightly
def test_a_row_alone_thinks_as_in_a_batch(thinker: Thinker, auto: Think, sometimes: list[Generated]) -> None:
    same(
        thinker.generator.generate(PROMPTS[:1], GenerationConfig(NEW, SAMPLED, seed=SEED, think=auto))[0], sometimes[0]
    )


@pytest.mark.slow
def test_bursts_change_nothing(thinker: Thinker, auto: Think, always: list[Generated]) -> None:
    """Rows that wait for one another at the end of a burst, and a thought after it; one that waits for three."""
    often = replace(auto, threshold=float(np.quantile([result.entropies for result in always], 0.25)))
    thinking_rows: set[int] = set()
    for think in (auto, often):
        whole = thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=think))
        bursts = list(
            thinker.generator.stream(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, burst=1, think=think))
        )
        assert len(bursts) == NEW
        for found, expected in zip(bursts[-1], whole, strict=True):
            same(found, expected)
        thinking_rows |= {sum(result.thoughts[step] is not None for result in whole) for step in range(NEW)}
    assert thinking_rows >= {2, 3}


@pytest.mark.nightly
def test_latent_thoughts_at_their_own_pace() -> None:
    thinker = Thinker(0, ThinkingConfig(thought_length=2, n_true=2, kind="latent", policy_weight=0.0, n_thoughts=1), 1)
    config = GenerationConfig(NEW, SAMPLED, seed=SEED, think=Think("auto", 3.0))
    together = thinker.generator.generate(PROMPTS[:2], config)
    assert 0 < sum(thought == [] for thought in together[0].thoughts) < NEW
    same(thinker.generator.generate(PROMPTS[:1], config)[0], together[0])


@pytest.mark.slow
def test_an_infinite_threshold_is_never_or_always(thinker: Thinker, auto: Think, always: list[Generated]) -> None:
    _, before = program_counts()
    none = thinker.generator.generate(
        PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=replace(auto, threshold=math.inf))
    )
    every = thinker.generator.generate(
        PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=replace(auto, threshold=-math.inf))
    )
    assert program_counts()[1] <= before + 1, "a threshold is data"
    never = thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))
    for found, expected in zip(none, never, strict=True):
        assert (found.tokens, found.routed_fraction) == (expected.tokens, expected.routed_fraction)
        assert [*found.thoughts, *found.mixing_weights] == [None] * (2 * NEW)
        assert [*expected.thoughts, *expected.mixing_weights, *expected.entropies] == []
    for found, expected in zip(every, always, strict=True):
        same(found, expected)
        np.testing.assert_allclose(found.entropies, expected.entropies, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "thinks"), [(0.0, False), (-1e-6, True)])
def test_a_row_whose_entropy_is_the_threshold_does_not_think(threshold: float, thinks: bool) -> None:
    thinker = Thinker(0, layers=1)
    params = {**thinker.params, "final_norm": thinker.params["final_norm"] * 1e6}  # sure of every token
    generator = make_generator(thinker.model.decoder, params, thinking=THINKING)
    for result in generator.generate(PROMPTS, GenerationConfig(2, Sampling(0), think=Think("auto", threshold))):
        assert result.entropies == [0, 0]
        assert [thought is not None for thought in result.thoughts] == [thinks] * 2


@pytest.mark.slow
def test_never_is_what_a_model_without_thinking_generates(thinker: Thinker) -> None:
    found = thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))
    assert found == thinker.model.generator().generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED))


@pytest.mark.nightly
def test_thoughts_that_weigh_nothing_change_nothing_not_even_what_is_drawn() -> None:
    thinker = Thinker(0, layers=1)
    mixing = thinker.params["thinking"]["mixing"]
    mixing |= {"output": jnp.zeros_like(mixing["output"]), "output_bias": jnp.zeros(())}
    generator = make_generator(thinker.model.decoder, thinker.params, thinking=THINKING)
    drawn = Think("always", temperature=1.0)
    results = generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=drawn))
    for found, expected in zip(
        results, generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED)), strict=True
    ):
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-6)
        assert found.mixing_weights == [0.0] * NEW
    again = generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=drawn))
    assert [r.thoughts for r in again] == [r.thoughts for r in results]
    own_pace = Think("auto", -math.inf, temperature=1.0)
    apart = generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=own_pace))
    assert [r.thoughts for r in apart] == [r.thoughts for r in results], "each at its own pace, the same are drawn"
    other = generator.generate([PROMPTS[0]] * 4, GenerationConfig(NEW, SAMPLED, seed=SEED, think=drawn))
    assert other[0].thoughts == results[0].thoughts, "a row's draws are its own"
    assert len({str(result.thoughts) for result in other}) == 4
    assert other[0].thoughts[0] != other[0].thoughts[1] or other[1].thoughts[0] != other[1].thoughts[1]


@pytest.mark.slow
def test_branches_at_their_own_pace_begin_with_the_most_probable_tokens() -> None:
    generator = Thinker(0, layers=1).generator
    config = GenerationConfig(3, Sampling(0.0, branch=True), branches=3, think=ALWAYS)
    in_step = generator.generate(PROMPTS[:1], config)
    assert len({result.tokens[0] for result in in_step}) == 3
    for found, expected in zip(
        generator.generate(PROMPTS[:1], replace(config, think=Think("auto", -math.inf))), in_step, strict=True
    ):
        same(found, expected)


@pytest.mark.slow
def test_pauses() -> None:
    thinker = Thinker(0, ThinkingConfig(thought_length=2, n_true=2, kind="pause", policy_weight=0.0, n_thoughts=1), 1)
    for row, result in enumerate(
        thinker.generator.generate(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, think=ALWAYS))
    ):
        assert result.thoughts == [[]] * NEW
        thinker.check(row, result)


@pytest.mark.slow
def test_a_stream_with_an_end(thinker: Thinker, always: list[Generated]) -> None:
    end = always[0].tokens[2]
    generator = make_generator(thinker.model.decoder, thinker.params, (end,), thinking=THINKING)
    generator.warm_up(PROMPTS, GenerationConfig(NEW, SAMPLED, think=ALWAYS))
    compiled = program_counts()
    bursts = list(generator.stream(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, burst=4, think=ALWAYS)))
    assert program_counts() == compiled
    assert len(bursts) == 2
    for row, whole in enumerate(always):
        last = whole.tokens.index(end) if end in whole.tokens else NEW
        for burst, count in zip(bursts, (min(4, last), last), strict=True):
            assert burst[row].tokens == whole.tokens[:count]
            assert burst[row].thoughts == whole.thoughts[:count]
            assert len(burst[row].entropies) == len(burst[row].mixing_weights) == count, "the end token has no entry"
    assert bursts[-1][0].finished and not all(result.finished for result in bursts[-1])
    own_pace = Think("auto", -math.inf)
    *_, apart = generator.stream(PROMPTS, GenerationConfig(NEW, SAMPLED, seed=SEED, burst=4, think=own_pace))
    for found, expected in zip(apart, bursts[-1], strict=True):
        same(found, expected)
    state = generator.advance(generator.start(PROMPTS, GenerationConfig(NEW, seed=SEED)), NEW, SAMPLED, ALWAYS)
    assert state.record is not None
    first = always[0].tokens.index(end)
    assert np.asarray(state.record.thinks_BxT[0, :NEW]).tolist() == [step <= first for step in range(NEW)]
    assert np.asarray(state.record.may_think_BxT[0, :NEW]).tolist() == [step <= first for step in range(NEW)]
    assert not np.any(state.record.entropies_BxT[0, first + 1 :])
    assert not np.any(state.record.weights_BxT[0, first + 1 :])
    assert np.all(state.record.thoughts_BxTxN[0, first + 1 :] == -1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"when": "sometimes"}, "think.when = 'sometimes': must be one of never, always, auto"),
        ({"when": "auto"}, "think.threshold = None: must be a number with think.when = 'auto'"),
        ({"when": "auto", "threshold": math.nan}, "think.threshold = nan: must be a number"),
        ({"share": 0.0}, r"think.share = 0.0: must lie in \(0, 1\]"),
        ({"temperature": -1.0}, r"think.temperature = -1.0: must be 0 \(greedy\) or at least 1e-6"),
    ],
)
def test_bad_ways_of_thinking_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Think(**values)


def test_a_model_that_cannot_think_says_so_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model({"every": 0})
    generator = make_generator(model.decoder, model.params, thinking=THINKING)
    monkeypatch.setattr("mod_star.decoding.programs.prefill", None)
    for ask in (generator.generate, generator.warm_up):
        with pytest.raises(InputError, match=r"^think\.when = 'always': must be never: the model has not learned to"):
            ask(PROMPTS, GenerationConfig(NEW, SAMPLED, think=ALWAYS))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"^think\.when"):
        next(generator.stream(PROMPTS, GenerationConfig(NEW, SAMPLED, think=ALWAYS)))
