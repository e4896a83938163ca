"""What must be true on every platform: attention against NumPy, and invariants of the whole network.

Each check returns the error that it found and the error that is allowed. `on_accelerator` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.initial_params import init_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.attention import KeyValues, attend
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import choose_places, memory_of, sample_thoughts
from mod_star.thinking.parameters import thinking_init
from mod_star.thinking.sample import Place, ThinkingDecoder
from mod_star.thinking.score import score_thought
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step


@dataclass(frozen=True)
class Check:
    """What a check found: it passes if `error` is at most `allowed`."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for an error that is not finite."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    tokens: int
    """Tokens of a sequence."""
    head_size: int
    width: int
    layers: int


FULL, TINY = Sizes(1024, 64, 512, 4), Sizes(48, 8, 32, 2)


# Attention.


@dataclass(frozen=True)
class AttentionCase:
    """One attention of two sequences: which tokens are there, and who may see whom."""

    documents: int = 1
    window: int | None = None
    key_heads: int = 4
    heads: int = 4
    routed: bool = False
    """The tokens are an eighth of eight times as many: their positions lie apart, as in a routed block."""


ATTENTION_CASES = {
    "causal": AttentionCase(),
    "packed": AttentionCase(documents=3),
    "windowed": AttentionCase(documents=2, window=20),
    "grouped": AttentionCase(documents=2, key_heads=2, heads=8),
    "routed": AttentionCase(documents=2, routed=True),
    "routed, windowed": AttentionCase(documents=2, routed=True, window=100),
}


def _attention_problem(case: AttentionCase, sizes: Sizes) -> tuple[Any, ...]:
    """Queries, positions, document ids, keys, values and the cotangent of the result; NumPy, of two sequences."""
    rng = np.random.default_rng(0)
    S, rows = sizes.tokens, 2
    among = 8 * S if case.routed else S
    positions, ids = np.zeros((rows, S), np.int32), np.zeros((rows, S), np.int32)
    for row in range(rows):
        starts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, among), case.documents - 1, replace=False))])
        token = np.sort(rng.choice(among, S, replace=False)) if case.routed else np.arange(S)
        ids[row] = np.searchsorted(starts, token, side="right")
        positions[row] = token - starts[ids[row] - 1]
    ids[:, S - 5 :] = 0  # padding
    shapes = {"query": case.heads, "keys": case.key_heads, "values": case.key_heads, "cotangent": case.heads}
    arrays = {name: rng.normal(size=(rows, S, heads, sizes.head_size)) for name, heads in shapes.items()}
    return arrays["query"], positions, ids, arrays["keys"], arrays["values"], arrays["cotangent"]


def _in_numpy(case: AttentionCase, problem: tuple[Any, ...]) -> list[np.ndarray]:
    """Result and gradients of query, keys and values in float64, from all scores."""
    query, positions, ids, keys, values, cotangent = problem
    group = case.heads // case.key_heads
    keys_all, values_all = (np.repeat(array, group, 2) for array in (keys, values))
    scale = query.shape[-1] ** -0.5
    apart = positions[:, :, None] - positions[:, None]
    seen = (ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0) & (apart >= 0)
    if case.window is not None:
        seen &= apart < case.window
    scores = np.where(seen[:, None], np.einsum("bnhe,bmhe->bhnm", query, keys_all) * scale, -np.inf)
    scores = np.where(ids[:, None, :, None] > 0, scores, 0.0)  # padding: whatever, but finite
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bnhe,bmhe->bhnm", cotangent, values_all)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    per_key_head = lambda array: array.reshape(*array.shape[:2], case.key_heads, group, -1).sum(3)  # noqa: E731
    return [
        np.einsum("bhnm,bmhe->bnhe", weights, values_all),
        np.einsum("bhnm,bmhe->bnhe", of_scores, keys_all) * scale,
        per_key_head(np.einsum("bhnm,bnhe->bmhe", of_scores, query)) * scale,
        per_key_head(np.einsum("bhnm,bnhe->bmhe", weights, cotangent)),
    ]


def _attention(case: AttentionCase, dtype: str) -> Callable[..., tuple[jax.Array, ...]]:
    """`attend` for two sequences, with gradients: what `_in_numpy` computes."""

    def result(query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, ids: jax.Array) -> jax.Array:
        def one(query: Any, keys: Any, values: Any, positions: Any, ids: Any) -> jax.Array:
            own = KeyValues(keys.swapaxes(0, 1), values.swapaxes(0, 1), positions, ids, ids > 0)
            return attend(query, positions, ids, (own,), window=case.window)

        return jax.vmap(one)(query, keys, values, positions, ids)

    def both(query: Any, positions: Any, ids: Any, keys: Any, values: Any, cotangent: Any) -> tuple[jax.Array, ...]:
        query, keys, values, cotangent = (array.astype(dtype) for array in (query, keys, values, cotangent))
        output, back = jax.vjp(lambda q, k, v: result(q, k, v, positions, ids), query, keys, values)
        return output, *back(cotangent)

    return jax.jit(both)


def attention_equals_numpy(case: AttentionCase, dtype: str, sizes: Sizes) -> Check:
    """Result and gradients; the largest difference over the largest value, padding aside."""
    query, positions, ids, keys, values, cotangent = _attention_problem(case, sizes)
    cotangent = np.where((ids > 0)[..., None, None], cotangent, 0.0)
    rounded = [np.asarray(jnp.asarray(array, dtype), np.float64) for array in (query, keys, values, cotangent)]
    expected = _in_numpy(case, (rounded[0], positions, ids, *rounded[1:]))
    results = _attention(case, dtype)(query, positions, ids, keys, values, cotangent)
    real = (ids > 0)[..., None, None]
    errors = []
    for its, exact in zip(results, expected, strict=True):
        difference = np.where(real, np.asarray(its, np.float64) - exact, 0.0)
        errors.append(np.max(np.abs(difference)) / np.max(np.abs(np.where(real, exact, 0.0))))
    return Check(float(np.max(errors)), {"float32": 2e-5, "bfloat16": 0.03}[dtype])


def documents_do_not_see_each_other(dtype: str, sizes: Sizes) -> Check:
    """Another second document changes no bit of the first one's results and gradients."""
    case = AttentionCase(documents=2)
    query, positions, ids, keys, values, cotangent = _attention_problem(case, sizes)
    second = (ids == 2)[..., None, None]
    function, arrays = _attention(case, dtype), (query, keys, values, cotangent)
    changed = [np.where(second, array + 1.0, array) for array in arrays]
    results = [function(q, positions, ids, k, v, c) for q, k, v, c in (arrays, changed)]
    first = (ids == 1)[..., None, None]
    pairs = zip(*results, strict=True)
    return Check(float(sum(np.sum(np.where(first, np.asarray(a != b), False)) for a, b in pairs)), 0.0)


# Invariants of the network.


@dataclass(frozen=True)
class Network:
    """A Mixture-of-Depths model with random parameters in float32, and a batch of packed documents."""

    run: RunConfig
    params: Any
    batch: dict[str, Any]

    @property
    def decoder(self) -> Decoder:
        """Of `run`."""
        return Decoder(self.run.model, self.run.routing)

    def hidden(self, rows: dict[str, Any]) -> np.ndarray:
        """Hidden states of these sequences under the causal rule, with slots for all tokens."""

        def one(tokens: jax.Array, positions: jax.Array, ids: jax.Array) -> jax.Array:
            slots = tokens.shape[0]
            output: Any = self.decoder.apply(
                {"params": self.params}, tokens, positions, ids, mode="causal", slots=slots
            )
            return output.hidden

        names = ("tokens", "positions", "segment_ids")
        return np.asarray(jax.jit(jax.vmap(one))(*(rows[name] for name in names)))


def make_network(sizes: Sizes) -> Network:
    """Two documents in each of two sequences."""
    S, V = sizes.tokens, 256
    model = ModelConfig(vocab_size=V, width=sizes.width, layers=sizes.layers, heads=4, kv_heads=2, context=S)
    thinking = ThinkingConfig(thought_length=4, n_true=2, n_thoughts=2)
    run = RunConfig(model, RoutingConfig(every=2, capacity=0.5, predictor_width=16), thinking=thinking)
    run = replace(run, train=TrainConfig(batch_size=2, loss_chunk=S // 2))
    params = init_params(Decoder(model, run.routing), 0)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (2, S + 1)).astype(np.int32)
    first = S // 3
    positions = np.concatenate([np.arange(first), np.arange(S - first)]).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(positions, (2, 1)),
        "segment_ids": np.tile(1 + (np.arange(S) >= first), (2, 1)).astype(np.int32),
        "weights": np.ones((2, S), np.float32),
    }
    return Network(run, jax.tree.unflatten(tree, noisy), batch)


def no_token_changes_an_earlier_one(network: Network) -> Check:
    """Under the causal rule, another last third changes no bit of the first two thirds' hidden states."""
    tokens, V = network.batch["tokens"], network.run.model.vocab_size
    later = np.arange(tokens.shape[1]) >= 2 * tokens.shape[1] // 3
    changed = {**network.batch, "tokens": np.where(later, (tokens + 1) % V, tokens)}
    before, after = network.hidden(network.batch), network.hidden(changed)
    assert np.all(np.any(before[:, later] != after[:, later], -1)), "nothing was changed"
    return Check(float(np.sum(before[:, ~later] != after[:, ~later])), 0.0)


def packed_documents_equal_each_alone(network: Network) -> Check:
    """Hidden states of the second document, packed and at the beginning of a sequence of its own."""
    second = network.batch["segment_ids"][0] == 2
    count = int(second.sum())
    alone = {name: np.zeros_like(array) for name, array in network.batch.items()}
    for name in ("tokens", "positions"):
        alone[name][:, :count] = network.batch[name][:, second]
    alone["segment_ids"][:, :count] = 1
    packed, own = network.hidden(network.batch)[:, second], network.hidden(alone)[:, :count]
    return Check(float(np.max(np.abs(packed - own)) / np.max(np.abs(own))), 1e-4)


def a_row_does_not_depend_on_others(network: Network) -> Check:
    """Hidden states of one sequence, beside another one and twice."""
    twice = {name: np.stack([array[0], array[0]]) for name, array in network.batch.items()}
    together, alone = network.hidden(network.batch)[0], network.hidden(twice)[0]
    return Check(float(np.max(np.abs(together - alone)) / np.max(np.abs(alone))), 1e-5)


def generation_is_the_causal_forward_pass(network: Network) -> Check:
    """Log-probabilities of greedily generated tokens, token by token and from one pass over the whole text."""
    generator = Generator(Model(network.decoder, network.params, ByteTokenizer()), end_ids=())
    S = network.run.model.context
    prompt = network.batch["tokens"][0, : S // 2].tolist()
    [generated] = generator.generate([prompt], GenerationConfig(min(16, S - S // 2), Sampling(0)))
    text = np.asarray(prompt + generated.tokens, np.int32)

    @jax.jit
    def log_probs(tokens: jax.Array) -> jax.Array:
        output: Any = network.decoder.apply({"params": network.params}, tokens)
        return jax.nn.log_softmax(jnp.dot(output.hidden, head_matrix(network.params).T, precision="highest"))

    before = np.asarray(log_probs(text))[len(prompt) - 1 : -1]
    expected = before[np.arange(len(generated.tokens)), generated.tokens]
    return Check(float(np.max(np.abs(expected - generated.log_probs))), 1e-3)


def _loss_and_gradient(network: Network) -> Callable[..., Any]:
    def loss(params: Any, batch: Any) -> jax.Array:
        hidden = forward(network.decoder, params, batch, None, "top_k").hidden
        chunk = network.run.train.loss_chunk
        return cross_entropy(hidden, head_matrix(params), batch["targets"], batch["weights"], chunk)

    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradient_are_those_of_a_cpu(network: Network) -> Check:
    """Relative to each leaf's largest value. On a CPU: against the network without scan over depth."""
    function = _loss_and_gradient(network)
    here = function(network.params, network.batch)
    if jax.default_backend() == "cpu":
        unrolled = replace(network.run, model=replace(network.run.model, scan=False))
        there = _loss_and_gradient(replace(network, run=unrolled))(network.params, network.batch)
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            there = function(*jax.device_get((network.params, network.batch)))
    errors = [
        np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(np.max(np.abs(np.asarray(b))), 1e-6)
        for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    ]
    return Check(float(np.max(errors)), 1e-3)


def the_loss_is_that_of_all_logits(network: Network) -> Check:
    """The loss, which never holds all logits, against log-softmax in float64."""
    loss, _ = _loss_and_gradient(network)(network.params, network.batch)
    hidden = forward(network.decoder, network.params, network.batch, None, "top_k").hidden
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_matrix(network.params), np.float64).T
    largest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    right = np.take_along_axis(logits, network.batch["targets"][..., None], -1)[..., 0]
    expected = float(np.sum(log_sum - right))
    return Check(abs(float(loss) - expected) / expected, 1e-5)


def the_same_step_gives_the_same_bits(network: Network) -> Check:
    """Two training steps from one state: how many numbers of the new states differ."""
    state = init_state(network.decoder, network.run, 100, network.params)
    step = jax.jit(make_train_step(network.decoder, network.run, 100))
    first, second = (jax.tree.leaves(step(state, network.batch)[0].params) for _ in range(2))
    return Check(float(sum(np.sum(np.asarray(a != b)) for a, b in zip(first, second, strict=True))), 0.0)


def scoring_repeats_the_sampling_of_thoughts(network: Network) -> Check:
    """Log-probabilities of thought tokens, as they were drawn and as the gradient's pass computes them."""
    run, batch = network.run, network.batch
    thinks = ThinkingDecoder(network.decoder, run.thinking)
    thought_params = thinking_init(jax.random.key(1), run.model, network.params["embedding"], [1], [2])
    params = {**network.params, "thinking": thought_params}

    @jax.jit
    def differences(params: Any, batch: Any) -> jax.Array:
        text = forward(network.decoder, params, batch, None, "causal", keep_keys_values=True)
        places = choose_places(thinks, batch, text, head_matrix(params), jax.random.key(2), 8)
        thoughts = sample_thoughts(thinks, params, text, batch, places, jax.random.key(2), temperature=1.0)

        def one(memory: Any, tokens: Any, positions: Any, ids: Any, index: Any, thought: Any) -> jax.Array:
            following = tokens[index + 1 + jnp.arange(run.thinking.n_true - 1)]
            scored = score_thought(thinks, params, memory, Place(positions[index], ids[index]), thought, following)
            logits = jnp.dot(scored.thought_TxD.astype(jnp.float32), head_matrix(params).T, precision="highest")
            log_p = jax.nn.log_softmax(logits)
            own = jnp.take_along_axis(log_p, thought.tokens_T[..., None], -1)[..., 0]
            return jnp.abs(own - thought.log_probs_T)

        over_thoughts = jax.vmap(one, (None, None, None, None, None, 0))
        over_places = jax.vmap(over_thoughts, (None, None, None, None, 0, 0))
        errors = jax.vmap(over_places)(
            memory_of(text), batch["tokens"], batch["positions"], batch["segment_ids"], places.indices_BxJ, thoughts
        )
        return jnp.max(jnp.where(places.filled_BxJ[..., None, None], errors, 0.0))

    return Check(float(differences(params, batch)), 1e-3)


INVARIANTS: dict[str, Callable[[Network], Check]] = {
    "no token changes an earlier one": no_token_changes_an_earlier_one,
    "packed documents equal each alone": packed_documents_equal_each_alone,
    "a row does not depend on others": a_row_does_not_depend_on_others,
    "generation is the causal forward pass": generation_is_the_causal_forward_pass,
    "loss and gradient are those of a CPU": loss_and_gradient_are_those_of_a_cpu,
    "the loss is that of all logits": the_loss_is_that_of_all_logits,
    "the same step gives the same bits": the_same_step_gives_the_same_bits,
    "scoring repeats the sampling of thoughts": scoring_repeats_the_sampling_of_thoughts,
}
