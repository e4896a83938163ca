"""The decoder against the same in float64 NumPy, and what must hold of it: documents apart, skipped rows, padding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from some_nightly import some_nightly

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.model import Decoder, Output
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.noise import noise_threshold, position_noise
from mod_star.model.parts import Part, Parts
from mod_star.model.routing import (
    RoutingCall,
    Tokens,
    capacity_of,
    causal_slots,
    routed_block,
    routed_share,
)
from mod_star.model.transformer import group_count, head_matrix

Batch = dict[str, jax.Array]
RandomParams = Callable[..., Any]


def apply(decoder: Decoder, params: Any, batch: Batch, mode: Any = "top_k", **options: Any) -> Output:
    """Every sequence of a batch."""

    def one(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> Any:
        return decoder.apply({"params": params}, tokens, positions, segment_ids, mode=mode, **options)

    output: Output = jax.vmap(one)(batch["tokens"], batch["positions"], batch["segment_ids"])
    return output


@pytest.fixture(scope="module")
def model(tiny_run: RunConfig) -> ModelConfig:
    return tiny_run.model


@pytest.fixture(scope="module")
def routing(tiny_run: RunConfig) -> RoutingConfig:
    return tiny_run.routing


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"layers": 2}, {"every": 0}),
    "dense, untied, one key head, own head width": (
        {"layers": 2, "tie_embeddings": False, "kv_heads": 1, "head_dim": 6, "rope_theta": 50.0, "norm_eps": 0.01},
        {"every": 0},
    ),
    "sigmoid": ({}, {"gate": "sigmoid"}),
    "identity": ({}, {"gate": "identity"}),
    "tanh, every third": ({"layers": 3}, {"gate": "tanh", "every": 3, "capacity_tokens": 5}),
    "every block, router's own rule": ({"layers": 2}, {"every": 1, "causal_rule": "router", "headroom": 1.2}),
    "stochastic": ({}, {"selection": "stochastic"}),
    "kept keys, first of two, normed router, adapter": (
        {"qkv_bias": True, "qk_norm": True},
        {"first": 1, "keep_key_values": True, "router_norm": True, "adapter_rank": 3, "headroom": 1.0},
    ),
    "second of three, adapter, kept keys, window": (
        {"layers": 3, "sliding_window": 5},
        {"every": 3, "first": 2, "adapter_rank": 2, "keep_key_values": True, "capacity_tokens": 5, "gate": "tanh"},
    ),
    "dense, window, biases, norms, linear": (
        {"layers": 2, "sliding_window": 5, "qkv_bias": True, "qk_norm": True, "norm_eps": 0.1}
        | {"rope_scaling": "linear", "rope_factor": 3.0},
        {"every": 0},
    ),
    "routed, window, biases, norms, llama3": (  # one frequency whole, one mixed, two divided
        {"head_dim": 8, "sliding_window": 7, "qkv_bias": True, "qk_norm": True, "rope_theta": 100.0}
        | {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 30, "rope_high_freq_factor": 2.0},
        {},
    ),
}


@pytest.mark.parametrize("case", some_nightly(CASES, "sigmoid", "identity", "tanh, every third", "stochastic"))
@pytest.mark.slow
def test_equals_the_decoder_in_float64_numpy(
    case: str, model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    """Both routing modes, on rows with one document, several, and padding."""
    model, routing = replace(model, **CASES[case][0]), replace(routing, **CASES[case][1])
    params = random_params(model, routing, seed=1)
    S = model.context
    key = jax.random.key(3) if routing.selection == "stochastic" else None
    options: dict[str, Any] = {}
    if key is not None:
        folded = [jax.random.fold_in(key, group) for group in range(2)]
        noise = np.array([position_noise(k, jnp.arange(S)) for k in folded], np.float64)
        options["noise"] = noise, float(noise_threshold(routed_share(routing, S)))
    decoder = Decoder(model, routing)
    modes = ("top_k", "causal") if routing.every else ("top_k",)
    run = jax.jit(lambda p, b: [apply(decoder, p, b, mode=mode, key=key) for mode in modes])
    outputs = jax.device_get(run(params, tiny_batch))
    batch = jax.device_get(tiny_batch)
    valid = batch["segment_ids"] > 0
    routed = []
    for mode, output in zip(modes, outputs, strict=True):
        for row in range(len(valid)):
            tokens, positions, ids = (batch[name][row] for name in ("tokens", "positions", "segment_ids"))
            capacity = capacity_of(routing, int(valid[row].sum()))
            most = capacity if mode == "top_k" else causal_slots(routing, S)
            hidden, traces = numpy_decoder.decode(
                params, (tokens, positions, ids), model, routing, mode=mode, most=most, **options
            )
            np.testing.assert_allclose(output.hidden[row][valid[row]], hidden[valid[row]], rtol=2e-4, atol=2e-4)
            for group, trace in enumerate(traces):
                ours = jax.tree.map(lambda a, row=row, group=group: a[row, group], output.trace)
                np.testing.assert_array_equal(ours.selected, trace["selected"])
                for name in ("scores", "logits", "gates"):
                    np.testing.assert_allclose(
                        np.where(valid[row], getattr(ours, name), 0),
                        np.where(valid[row], trace[name], 0),
                        rtol=2e-4,
                        atol=2e-4,
                    )
                wanted = (trace["logits"] > 0) & valid[row] & (mode == "causal")
                np.testing.assert_array_equal(ours.overflow, wanted & ~trace["selected"])
                routed.append((mode, int(trace["selected"].sum()), int(ours.overflow.sum())))
                assert mode == "causal" or routed[-1][1] == capacity, "its share of what is no padding"
    if routing.every:
        counts = [count for mode, count, _ in routed if mode == "causal"]
        assert len(set(counts)) > 1, "the causal rule decides by content"
    if case in ("sigmoid", "every block, router's own rule"):
        assert any(overflow for *_, overflow in routed), "this case is to test the limit of slots"


@pytest.mark.slow
def test_parameters_and_trace_are_float32_and_bfloat16_compute_is_close(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    params = random_params(model, routing)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # The selection of a few near ties differs; compare with all tokens selected, and the first scores exactly.
    everyone = replace(routing, capacity=1.0)
    run = jax.jit(lambda p, b, dtype: apply(Decoder(replace(model, dtype=dtype), everyone), p, b), static_argnums=2)
    wide, narrow = run(params, tiny_batch, "float32"), run(params, tiny_batch, "bfloat16")
    assert wide.hidden.dtype == jnp.float32 and narrow.hidden.dtype == jnp.bfloat16
    for name in ("scores", "gates", "logits"):
        assert getattr(narrow.trace, name).dtype == jnp.float32
    valid = np.asarray(tiny_batch["segment_ids"]) > 0
    error = np.asarray(narrow.hidden, np.float32)[valid] - np.asarray(wide.hidden)[valid]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(np.asarray(wide.hidden)[valid] ** 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["top_k", "causal"])
def test_skipped_tokens_pass_a_routed_block_unchanged_to_the_bit(
    mode: Any, dtype: Any, routed_run: RunConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    model, routing = replace(routed_run.model, dtype=dtype), routed_run.routing
    decoder = Decoder(model, routing)
    params = random_params(model, routing)
    params["final_norm"] = jnp.ones(model.width)

    def one(tokens: jax.Array, segment_ids: jax.Array) -> Any:
        """The stream before and after the block: the output is its RMSNorm."""
        output: Any = decoder.apply({"params": params}, tokens, None, segment_ids, mode=mode)
        before: Any = decoder.apply({"params": params}, tokens, method="embed")
        own = jax.tree.map(lambda a: a[0], params["groups"]["routed"])
        delta, _, trace, _ = routed_block(
            decoder, own, Tokens(before, jnp.arange(24), segment_ids), RoutingCall(mode, slots=9)
        )
        return before, before + delta, trace.selected, output.trace.selected[0]

    before, after, selected, selected_inside = jax.jit(jax.vmap(one))(tiny_batch["tokens"], tiny_batch["segment_ids"])
    np.testing.assert_array_equal(selected, selected_inside)
    changed = np.any(np.asarray(before) != np.asarray(after), -1)
    np.testing.assert_array_equal(changed, selected)
    assert 0 < np.sum(selected) < np.sum(tiny_batch["segment_ids"] > 0)


@pytest.mark.slow
def test_at_full_capacity_with_a_gate_of_one_it_is_the_dense_model(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    routing = replace(routing, capacity=1.0)
    parts = Parts(gate=jnp.ones_like)
    params = random_params(model, routing)
    groups = params["groups"]
    interleaved = jax.tree.map(
        lambda full, routed: jnp.stack([full, routed], 1).reshape(-1, *full.shape[1:]),
        groups["full_0"]["block"],
        groups["routed"]["block"],
    )
    dense_params = {**params, "groups": {"full_0": {"block": interleaved}}}
    ours = jax.jit(lambda p, b: apply(Decoder(model, routing, parts), p, b).hidden)(params, tiny_batch)
    dense_decoder = Decoder(model, replace(routing, every=0))
    dense = jax.jit(lambda p, b: apply(dense_decoder, p, b).hidden)(dense_params, tiny_batch)
    valid = np.asarray(tiny_batch["segment_ids"]) > 0
    np.testing.assert_allclose(np.asarray(ours)[valid], np.asarray(dense)[valid], rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_each_alone_under_the_causal_rule(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    """With slots for all. (With fewer, earlier documents can leave none for later ones: documents share the slots.)"""
    decoder, params = Decoder(model, routing), random_params(model, routing)
    program = jax.jit(lambda p, t, q, s: decoder.apply({"params": p}, t, q, s, mode="causal", slots=24))
    run: Any = lambda *args: jax.device_get(program(*args))  # noqa: E731
    row = {name: np.asarray(tiny_batch[name])[2] for name in ("tokens", "positions", "segment_ids")}
    packed = run(params, row["tokens"], row["positions"], row["segment_ids"])
    for document in (1, 2, 3):
        own = np.flatnonzero(row["segment_ids"] == document)
        alone = {name: np.zeros(24, np.int32) for name in row}
        for name in row:
            alone[name][: len(own)] = row[name][own]
        output = run(params, alone["tokens"], alone["positions"], np.minimum(alone["segment_ids"], 1))
        np.testing.assert_allclose(packed.hidden[own], output.hidden[: len(own)], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(packed.trace.selected[:, own], output.trace.selected[:, : len(own)])
        assert np.any(output.trace.selected)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other_but_compete_for_capacity_under_top_k(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    """With the selection held fixed, changing one document changes nothing in the other; with learned scores who is
    selected among all tokens of the sequence may change, as the paper's top-k over a sequence has it."""
    row = [tiny_batch[name][1] for name in ("tokens", "positions", "segment_ids")]
    tokens, _, ids = map(np.asarray, row)
    fixed = Parts(router=Part(lambda key, config: {}, lambda params, x: jnp.cos(2.0 * jnp.arange(x.shape[0]))))
    others = np.where(ids == 2, (tokens[None] + np.arange(1, 9)[:, None]) % 29, tokens)
    for parts, competes in [(fixed, False), (Parts(), True)]:
        decoder, params = Decoder(model, routing, parts), random_params(model, routing, parts, seed=2)
        run = jax.jit(jax.vmap(lambda t, d=decoder, p=params: d.apply({"params": p}, t, *row[1:], mode="top_k")))
        output = jax.device_get(run(np.concatenate([tokens[None], others])))
        first, second = output.hidden[:, ids == 1], output.hidden[:, ids == 2]
        assert np.any(output.trace.selected[..., ids == 1]) and np.any(output.trace.selected[..., ids == 2])
        assert np.all(np.any(second[1:] != second[:1], -1))
        assert np.any(first[1:] != first[:1]) == competes


VARIANTS: dict[str, dict[str, Any]] = {
    "unscanned": {"scan": False},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "unscanned, remat dots": {"scan": False, "remat": "dots"},
}


def loss_and_gradient(model: ModelConfig, routing: RoutingConfig, params: Any, batch: Batch) -> Any:
    def loss(params: Any) -> jax.Array:
        output = apply(Decoder(model, routing), params, batch)
        return cross_entropy(output.hidden, head_matrix(params), batch["targets"], batch["weights"], 24) / 50

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def scanned(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> tuple[Any, Any]:
    """Parameters, and the loss with its gradient, scanned without rematerialisation."""
    params = random_params(model, routing)
    return params, jax.jit(partial(loss_and_gradient, model, routing))(params, tiny_batch)


@pytest.mark.parametrize("variant", some_nightly(VARIANTS, "unscanned", "remat dots", "remat full"))
@pytest.mark.slow
def test_scan_and_rematerialisation_change_neither_value_nor_gradient(
    variant: str, model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, scanned: tuple[Any, Any]
) -> None:
    params, expected = scanned
    changed = replace(model, **VARIANTS[variant])
    result = jax.jit(partial(loss_and_gradient, changed, routing))(params, tiny_batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), result, expected)


@pytest.mark.nightly
def test_without_jit_it_is_the_same(routed_run: RunConfig, tiny_batch: Batch, random_params: RandomParams) -> None:
    """For debugging, in Python from the outermost loop to the single operation: unscanned, one sequence."""
    model = replace(routed_run.model, scan=False)
    decoder, params = Decoder(model, routed_run.routing), random_params(model, routed_run.routing)
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(24, model.width)), jnp.float32)

    def loss(params: Any) -> jax.Array:
        output: Any = decoder.apply({"params": params}, tiny_batch["tokens"][0], mode="top_k")
        return jnp.sum(output.hidden * direction)

    expected = jax.jit(jax.value_and_grad(loss))(params)
    with jax.disable_jit():
        result = jax.value_and_grad(loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), result, expected)


def test_keys_and_values_are_kept_when_asked_for_and_hold_the_routed_tokens_original_positions(
    model: ModelConfig, routing: RoutingConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    decoder, params = Decoder(model, routing), random_params(model, routing)
    row = [tiny_batch[name][2] for name in ("tokens", "positions", "segment_ids")]
    run = jax.jit(lambda p: decoder.apply({"params": p}, *row, mode="top_k", keep_keys_values=True))
    output: Any = jax.device_get(run(params))
    assert output.keys_values["full_0"].keys_KxMxE.shape == (2, 2, 24, 4)
    routed = output.keys_values["routed"]
    assert routed.keys_KxMxE.shape == (2, 2, 6, 4) and np.sum(routed.valid_M) == 10, "5 of 19"
    for group in range(2):
        chosen = np.flatnonzero(output.trace.selected[group])
        np.testing.assert_array_equal(routed.positions_M[group][routed.valid_M[group]], np.asarray(row[1])[chosen])
        np.testing.assert_array_equal(routed.segment_ids_M[group][routed.valid_M[group]], np.asarray(row[2])[chosen])
    without: Any = jax.eval_shape(lambda p: decoder.apply({"params": p}, *row), params)
    assert without.keys_values is None


def test_stochastic_routing_without_a_key_says_so(
    model: ModelConfig, routing: RoutingConfig, random_params: RandomParams
) -> None:
    routing = replace(routing, selection="stochastic")
    decoder, params = Decoder(model, routing), random_params(model, routing)
    with pytest.raises(ValueError, match="needs a key"):
        decoder.apply({"params": params}, jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize(
    ("layers", "fields", "said"),
    [
        (5, {}, r"^model\.layers = 5: must be a multiple of routing\.every = 2"),
        (4, {"every": 3}, r"^model\.layers = 4: must be a multiple of routing\.every = 3"),
        (4, {"capacity_tokens": 25}, r"^routing\.capacity_tokens = 25: must be at most model\.context = 24"),
    ],
)
def test_what_makes_no_network_is_refused_wherever_it_comes_from(
    layers: int, fields: dict[str, Any], said: str, model: ModelConfig, routing: RoutingConfig
) -> None:
    model, routing = replace(model, layers=layers), replace(routing, **fields)
    for make in (RunConfig, Decoder, group_count):
        with pytest.raises(InputError, match=said):
            make(model, routing)
    RunConfig(model, replace(routing, every=0))
    assert group_count(model, replace(routing, every=0)) == layers


DOCUMENTS = [[4], [8], [16], [32], [64], [20, 30], []]
COUNTS = [1, 1, 2, 4, 8, 6, 0]


@pytest.mark.parametrize("fields", [{}, {"selection": "stochastic"}, {"capacity": 1.0}, {"capacity_tokens": 6}])
@pytest.mark.slow
def test_padding_has_no_share_in_the_capacity(
    fields: dict[str, Any], routed_run: RunConfig, random_params: RandomParams, make_batch: Any
) -> None:
    """Documents of 4 to 64 tokens in sequences of 64, as without packing, and two packed ones with padding."""
    model, routing = replace(routed_run.model, context=64), replace(routed_run.routing, **{"capacity": 0.125} | fields)
    decoder, params = Decoder(model, routing), random_params(model, routing)
    key = jax.random.key(0) if routing.selection == "stochastic" else None
    run = jax.jit(lambda params, batch: apply(decoder, params, batch, key=key))
    batch = make_batch(DOCUMENTS, 64, 29)
    output = run(params, batch)
    selected, valid = np.asarray(output.trace.selected[:, 0]), np.asarray(batch["segment_ids"]) > 0  # type: ignore[union-attr]
    tokens = valid.sum(1)
    expected = {"capacity": tokens, "capacity_tokens": np.minimum(tokens, 6)}.get(next(iter(fields), ""), COUNTS)
    np.testing.assert_array_equal(selected.sum(1), expected)
    assert not np.any(selected & ~valid) and np.all(np.isfinite(output.hidden))
    if fields:
        return
    # A document alone, without padding, is the same.
    for row in (0, 3):
        alone = {name: values[row : row + 1, : tokens[row]] for name, values in batch.items()}
        unpadded = jax.jit(lambda params, batch: apply(decoder, params, batch))(params, alone)
        np.testing.assert_array_equal(unpadded.trace.selected[0, 0], selected[row, : tokens[row]])  # type: ignore[union-attr]
        np.testing.assert_allclose(output.hidden[row, : tokens[row]], unpadded.hidden[0], rtol=2e-4, atol=2e-4)


def test_a_vocabulary_of_zero_is_refused(routing: RoutingConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size = 0"):
        Decoder(ModelConfig(), routing).init(jax.random.key(0), jnp.zeros(4, jnp.int32))


def test_initial_parameters_are_plain_float32_dicts_stacked_over_groups(
    model: ModelConfig, routing: RoutingConfig
) -> None:
    shapes: Any = jax.eval_shape(Decoder(model, routing).init, jax.random.key(0), jnp.zeros(4, jnp.int32))["params"]
    assert type(shapes) is dict and type(shapes["groups"]["routed"]["block"]) is dict
    assert set(shapes) == {"embedding", "groups", "final_norm"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes["groups"])} == {2}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
