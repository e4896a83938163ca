"""Log-likelihoods against whole texts run one by one in float64, and against what generation says of its own tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import pytest
from conftest import AS_SHIPPED, random_params
from decoding_models import make_generator, make_model
from numpy_decoder import decode, float64, one_document
from some_nightly import some_nightly
from thinking_models import thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling, Think
from mod_star.errors import InputError
from mod_star.evaluation import scoring
from mod_star.evaluation.score_batch import HEAD_ROWS, ScoreNumbers, TextBatch, score_batch
from mod_star.evaluation.scoring import Pair, ScoringConfig, padded_length, rolling_windows, score, score_rolling
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots

CONTEXT, VOCAB = 48, 29
ROUTING_KEY = jax.random.key(11)
THINKING = ThinkingConfig(thought_length=2, n_true=2)
GREEDY = Sampling(temperature=0)
# headroom 1: slots run out within a text, and which tokens get one must not depend on its padding.
ROUTINGS = {
    "dense": RoutingConfig(every=0),
    "routed": RoutingConfig(every=2, capacity=0.25, predictor_width=8, headroom=1.0),
}
NOBODY_THINKS = Think("auto", float("inf"))


@dataclass(frozen=True)
class Model:
    """A tiny model with random weights, thinking ones included, and what it says when run whole in float64."""

    routing: RoutingConfig

    @cached_property
    def config(self) -> ModelConfig:
        sizes = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24}
        # With the embedding as its head, such a model would be sure of nearly every token.
        return ModelConfig(vocab_size=VOCAB, context=CONTEXT, tie_embeddings=False, **sizes)  # type: ignore[arg-type]

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.config, self.routing)

    @cached_property
    def params(self) -> Any:
        params = random_params(self.config, self.routing)
        return thinking_params(RunConfig(model=self.config, routing=self.routing), params)

    @cached_property
    def generator(self) -> Generator:
        return make_generator(self.decoder, self.params, thinking=THINKING)

    @cached_property
    def naive(self) -> Any:
        """In float64; <start> and <end> are ids of their own."""
        params = float64(self.params)
        own = params["thinking"]
        return {**params, "embedding": np.concatenate([params["embedding"], [own["start"], own["end"]]])}

    def hidden(self, ids: list[int]) -> Any:
        most = causal_slots(self.routing, CONTEXT)
        return decode(self.naive, one_document(ids), self.config, self.routing, mode="causal", most=most)[0]

    def predictions(self, ids: list[int]) -> Any:
        """Log-probabilities of what follows each token."""
        return log_softmax(self.hidden(ids) @ self.naive["head"].T)

    def thoughtful(self, text: list[int]) -> Any:
        """Log-probabilities of what follows a text after a greedy thought, everything run anew for every token."""
        base, ids = self.hidden(text)[-1], [*text, VOCAB]
        for _ in range(THINKING.thought_length):
            ids.append(int(np.argmax(self.predictions(ids)[-1])))
        after = self.hidden([*ids, VOCAB + 1])[-1]
        p = self.naive["thinking"]["mixing"]
        x = np.maximum(np.concatenate([base, after]) @ p["first"] + p["first_bias"], 0)
        weight = np.maximum(x @ p["second"] + p["second_bias"], 0) @ p["output"] + p["output_bias"]
        return log_softmax(((1 - weight) * base + weight * after) @ self.naive["head"].T)


def log_softmax(logits: Any) -> Any:
    logits = logits - np.max(logits, -1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


@pytest.fixture(scope="module", params=some_nightly(ROUTINGS, "dense"))
def model(request: pytest.FixtureRequest) -> Model:
    return Model(ROUTINGS[request.param])


def make_pairs() -> list[Pair]:
    """Of many lengths; with the same context, the same pair, an input that another begins with; as long as may be."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCAB, n)]

    pairs = [(ids(before), ids(after)) for before, after in ((5, 3), (1, 1), (33, 4), (CONTEXT - 6, 7), (1, CONTEXT))]
    question = pairs[0][0]
    choices = [(question, [token]) for token in (*range(VOCAB), 3)]
    beginning = (question, pairs[0][1][:2])
    longer = (question[:2], [*question[2:], *pairs[0][1], 7])
    made: list[Pair] = [*choices, *pairs, pairs[0], beginning, longer]
    return made


PAIRS = make_pairs()
ALLOWED = [4, 1, 20, 4, 9]


@pytest.mark.slow
def test_pairs_are_what_the_whole_text_gives(model: Model) -> None:
    calls: list[tuple[int, int]] = []
    found = score(
        make_model(model.decoder, model.params, routing_key=ROUTING_KEY),
        PAIRS,
        ScoringConfig(allowed_ids=ALLOWED, batch_size=3),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert len(found) == len(PAIRS)
    for (before, after), scored in zip(PAIRS, found, strict=True):
        log_p = model.predictions([*before, *after][:-1])[len(before) - 1 :]
        picked = log_p[np.arange(len(after)), after]
        np.testing.assert_allclose(scored.log_probs, picked, atol=2e-4)
        assert scored.is_greedy == [int(np.argmax(row)) == token for row, token in zip(log_p, after, strict=True)]
        total = np.log(np.sum(np.exp(log_p[:, sorted(set(ALLOWED))]), -1))
        expected = np.where(np.isin(after, ALLOWED), picked - total, -np.inf)
        np.testing.assert_allclose(scored.restricted_log_probs or [], expected, atol=2e-4)
        best = [max(ALLOWED, key=lambda token: row[token]) for row in log_p]
        assert scored.restricted_is_greedy == [a == b for a, b in zip(best, after, strict=True)]
        assert scored.thought == []
    assert sum(scored.is_greedy[0] for scored in found[:VOCAB]) == 1  # of all tokens that can follow
    assert calls[-1] == (len(PAIRS), len(PAIRS)) and [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("model", ["routed"], indirect=True)
@pytest.mark.slow
def test_batches_change_nothing(model: Model) -> None:
    pairs = [pair for pair in PAIRS if len(pair[0]) + len(pair[1]) < 32]
    alone = score(make_model(model.decoder, model.params), pairs, ScoringConfig(batch_size=1))
    many = score(make_model(model.decoder, model.params), pairs, ScoringConfig(batch_size=100))
    for one, other in zip(alone, many, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert one.is_greedy == other.is_greedy and one.restricted_log_probs is one.restricted_is_greedy is None


def test_texts_that_begin_alike_share_a_pass(model: Model) -> None:
    texts = scoring._texts(model.decoder, PAIRS, truncate=False)
    assert len(texts) == 5  # the choices, the copy and both beginnings run along with others
    assert sorted(index for text in texts for index, _, _ in text.pairs) == list(range(len(PAIRS)))


@pytest.mark.parametrize(
    ("model", "when"),
    some_nightly(
        [("routed", "never"), ("routed", "auto"), ("dense", "always")], ("routed", "auto"), ("dense", "always")
    ),
    indirect=["model"],
)
@pytest.mark.slow
def test_generated_tokens_get_the_log_probs_that_generation_reports(model: Model, when: Any) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (3, 20, 1)]
    think = Think(when, 0.0 if when == "auto" else None)
    if when == "auto":  # above the median of the entropies
        nobody = model.generator.generate(prompts, GenerationConfig(6, GREEDY, think=NOBODY_THINKS))
        think = Think("auto", float(np.median([result.entropies for result in nobody])))
    results = model.generator.generate(prompts, GenerationConfig(6, GREEDY, think=think))
    pairs = [(prompt, result.tokens) for prompt, result in zip(prompts, results, strict=True)]
    for scored, result in zip(
        score(make_model(model.decoder, model.params, thinking=THINKING), pairs, ScoringConfig(think=think)),
        results,
        strict=True,
    ):
        np.testing.assert_allclose(scored.log_probs, result.log_probs, atol=1e-5)
        assert scored.is_greedy == [True] * 6
        assert scored.thought == [thought is not None for thought in result.thoughts]
    if when == "auto":
        assert len({thought is None for result in results for thought in result.thoughts}) == 2


@pytest.mark.slow
def test_a_thought_before_each_token_is_the_naive_loop(model: Model) -> None:
    pairs = [PAIRS[0], PAIRS[3], PAIRS[4], ([5, 6, 7], [1, 2, 3, 4])]
    # Room for all that routed blocks want: the naive text with its thought is one text, with one count of slots.
    model = Model(replace(model.routing, headroom=4.0))
    found = score(
        make_model(model.decoder, model.params, thinking=THINKING),
        pairs,
        ScoringConfig(think=Think("always"), allowed_ids=[1, 2, 4]),
    )
    plain = score(make_model(model.decoder, model.params), pairs)
    for (before, after), scored, without in zip(pairs, found, plain, strict=True):
        log_p = np.array([model.thoughtful([*before, *after[:i]]) for i in range(len(after))])
        picked = log_p[np.arange(len(after)), after]
        np.testing.assert_allclose(scored.log_probs, picked, atol=2e-4)
        assert scored.is_greedy == [int(np.argmax(row)) == token for row, token in zip(log_p, after, strict=True)]
        assert scored.thought == [True] * len(after)
        assert np.min(np.abs(np.subtract(scored.log_probs, without.log_probs))) > 1e-3, "thoughts must matter"


@pytest.mark.nightly
def test_stochastic_routing_is_that_of_generation() -> None:
    model = Model(RoutingConfig(every=2, capacity=0.5, selection="stochastic"))
    generator = make_generator(model.decoder, model.params, routing_key=ROUTING_KEY)
    (result,) = generator.generate([[1, 2, 3]], GenerationConfig(6, GREEDY))
    (scored,) = score(make_model(model.decoder, model.params, routing_key=ROUTING_KEY), [([1, 2, 3], result.tokens)])
    np.testing.assert_allclose(scored.log_probs, result.log_probs, atol=1e-5)
    (other,) = score(
        make_model(model.decoder, model.params, routing_key=jax.random.key(5)), [([1, 2, 3], result.tokens)]
    )
    assert np.max(np.abs(np.subtract(other.log_probs, result.log_probs))) > 1e-3
    # Without a key both take the same one.
    (result,) = make_generator(model.decoder, model.params).generate([[1, 2, 3]], GenerationConfig(6, GREEDY))
    (scored,) = score(make_model(model.decoder, model.params), [([1, 2, 3], result.tokens)])
    np.testing.assert_allclose(scored.log_probs, result.log_probs, atol=1e-5)


@pytest.mark.parametrize("model", ["dense"], indirect=True)
@pytest.mark.nightly
def test_drawn_thoughts_depend_on_the_text_and_the_seed_alone(model: Model) -> None:
    think = Think("always", temperature=1.0)
    first, second = ([5, 6, 7], [1, 2]), (list(range(20)), [3, 4, 5])

    def log_probs(pairs: list[Pair], **options: Any) -> list[list[float]]:
        found = score(
            make_model(model.decoder, model.params, thinking=THINKING), pairs, ScoringConfig(think=think, **options)
        )
        return [scored.log_probs for scored in found]

    both = log_probs([first, second])
    for one, together in zip([*log_probs([first]), *log_probs([second])], both, strict=True):
        np.testing.assert_allclose(one, together, atol=1e-5)
    assert np.max(np.abs(np.subtract(log_probs([first], seed=1)[0], both[0]))) > 1e-3


def test_long_contexts_are_refused_or_cut_from_the_left(model: Model) -> None:
    before, after = list(range(VOCAB)) * 2, [1, 2]
    with pytest.raises(InputError, match=r"pair 2 = 58 \+ 2 tokens: must be at most 49"):
        score(make_model(model.decoder, model.params), [([1], [2]), (before, after)])
    (cut,) = score(make_model(model.decoder, model.params), [(before, after)], ScoringConfig(truncate=True))
    (same,) = score(make_model(model.decoder, model.params), [(before[-CONTEXT + 1 :], after)])
    np.testing.assert_allclose(cut.log_probs, same.log_probs, atol=1e-6)
    with pytest.raises(InputError, match="pair 1"):  # no room for a context at all
        score(make_model(model.decoder, model.params), [([1], [2] * (CONTEXT + 1))], ScoringConfig(truncate=True))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([], [1])], {}, "pair 1 = 0 \\+ 1 tokens"),
        ([([1], [])], {}, "pair 1 = 1 \\+ 0 tokens"),
        ([([1], [VOCAB])], {}, "token ids must lie in \\[0, 29\\), has 1 to 29"),
        ([([-1], [1])], {}, "has -1 to 1"),
        ([([1], [1])], {"allowed_ids": []}, "allowed_ids = \\[\\]"),
        ([([1], [1])], {"allowed_ids": [1, VOCAB]}, "allowed_ids"),
        ([([1], [1])], {"batch_size": 0}, "batch_size = 0"),
        ([([1], [1])], {"think": Think("always")}, "think.when = 'always'"),
    ],
)
def test_bad_input_is_refused(pairs: list[Pair], options: dict[str, Any], message: str) -> None:
    model = Model(ROUTINGS["dense"])
    with pytest.raises(InputError, match=message):
        score(make_model(model.decoder, model.params), pairs, ScoringConfig(**options))
    assert score(make_model(model.decoder, model.params), []) == []


@pytest.mark.parametrize(("length", "window", "overlap"), [(1, 4, 1), (4, 4, 1), (11, 4, 1), (11, 4, 3), (10, 4, 4)])
def test_windows_score_every_token_once(length: int, window: int, overlap: int) -> None:
    tokens, first = list(range(100, 100 + length)), 7
    pairs = rolling_windows(tokens, first, window, overlap)
    assert [token for _, after in pairs for token in after] == tokens
    whole, position = [first, *tokens], 1
    for number, (before, after) in enumerate(pairs):
        seen = len(before) + len(after) - 1
        assert seen <= window and list(before) == whole[position - len(before) : position]
        assert number == 0 or (len(before) >= overlap and seen == window), "later windows see as much as they can"
        position += len(after)


def test_long_texts_in_windows(model: Model) -> None:
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, VOCAB, length).tolist() for length in (100, 0, 5)]
    found = score_rolling(
        make_model(model.decoder, model.params), texts, 3, ScoringConfig(allowed_ids=ALLOWED), window=20, overlap=8
    )
    assert [len(scored.log_probs) for scored in found] == [100, 0, 5]
    expected: list[float] = []
    while len(expected) < 100:
        new = 20 if not expected else 13
        end = min(100, len(expected) + new)
        window = [3, *texts[0]][: end + 1][-21:]
        log_p = model.predictions(window[:-1])
        scored_here = end - len(expected)
        expected += [log_p[i, window[i + 1]] for i in range(len(window) - 1 - scored_here, len(window) - 1)]
    np.testing.assert_allclose(found[0].log_probs, expected, atol=2e-4)
    assert len(found[0].restricted_log_probs or []) == len(found[0].restricted_is_greedy or []) == 100
    with pytest.raises(InputError, match="window = 49: must be at most 48"):
        score_rolling(make_model(model.decoder, model.params), texts, 3, window=49)
    with pytest.raises(InputError, match="overlap = 21"):
        score_rolling(make_model(model.decoder, model.params), texts, 3, window=20, overlap=21)


def test_few_lengths_and_little_padding() -> None:
    padded = [padded_length(tokens, 2000) for tokens in range(1, 2001)]
    assert all(length >= tokens for tokens, length in enumerate(padded, 1))
    assert all(length <= max(tokens + 32, 1.25 * tokens) for tokens, length in enumerate(padded, 1))
    assert len(set(padded)) <= 20 and max(padded) == 2000
    assert [padded_length(tokens, 2000, 1) for tokens in (3, 33, 65, 128, 1025)] == [32, 64, 128, 128, 2000]


def test_logits_of_all_tokens_never_exist() -> None:
    V, B, S = 20_000, 4, 128
    config = ModelConfig(vocab_size=V, context=S, width=16, layers=1, heads=2, mlp_width=16)
    decoder = Decoder(config, RoutingConfig(every=0))
    params = jax.eval_shape(lambda: random_params(config, decoder.routing))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    draws = jax.ShapeDtypeStruct((B * S,), np.uint32)
    batch = TextBatch(ints(B, S), ints(B), ints(B * S, 2), ints(B * S, 1), draws, ints())
    numbers = ScoreNumbers(None, jax.ShapeDtypeStruct((), np.float32), ints(), None)
    lowered = score_batch.lower(decoder, None, Think(), HEAD_ROWS, params, None, batch, numbers)
    compiled = lowered.compile(AS_SHIPPED)
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < B * S * V * 4 / 2


@pytest.mark.slow
def test_texts_that_share_slots_score_as_alone_while_there_are_slots(model: Model) -> None:
    """Else each text is told how often one was missing; what is scored alone, with slots of its own, says nothing."""
    if not model.routing.every:
        return
    pairs = sorted(make_pairs(), key=lambda pair: -len(pair[0]) - len(pair[1]))[:3]
    config = ScoringConfig(batch_size=2)  # the second batch has a row without a text
    for capacity, headroom in ((0.25, 4.0), (0.05, 1.0)):
        decoder = model.decoder.clone(routing=replace(model.routing, capacity=capacity, headroom=headroom))
        alone = score(make_model(decoder, model.params), pairs, config)
        shared = score(make_model(decoder.clone(budget_over="batch"), model.params), pairs, config)
        lacking = [each.overflow for each in shared]
        if headroom == 4:
            assert lacking == [0, 0, 0] == [each.overflow for each in alone]
            for one, other in zip(alone, shared, strict=True):
                np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    assert sum(lacking) > 0
    thoughtful = make_model(decoder.clone(budget_over="batch"), model.params, thinking=THINKING)
    with pytest.raises(InputError, match=r"^think\.when = 'auto': must be never with budget_over = 'batch'$"):
        score(thoughtful, pairs, ScoringConfig(NOBODY_THINKS))
