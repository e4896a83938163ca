"""The FLOP counter against XLA's own count of the compiled programs, and its arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import AS_SHIPPED
from some_nightly import some_nightly

from mod_star.config import LoraConfig, ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.flops import (
    Flops,
    forward_flops,
    parameter_count,
    sampling_flops,
    scoring_flops,
    training_flops,
    training_step_flops,
)
from mod_star.function_flops import function_flops
from mod_star.initial_params import init_params, initial_params
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.layers import fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.model.transformer import head_matrix
from mod_star.stages import plan_stages
from mod_star.thinking.objective import Places, sample_thoughts, talk_loss
from mod_star.thinking.parameters import thinking_init
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.thinking.thought import Thought
from mod_star.tokenization import ByteTokenizer
from mod_star.trainable import trained_part, with_trained_part
from mod_star.training.lowering import batch_shapes
from mod_star.training.objectives import objective_of
from mod_star.training.objectives.next_token import forward, make_loss
from mod_star.training.train import train

S = 128
# Unscanned: XLA counts the body of a loop once. Wide enough for elementwise work to be small beside matrix products.
MODEL = ModelConfig(vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, context=S, scan=False)
DENSE, MOD = RoutingConfig(every=0), RoutingConfig(predictor_width=96)
KEPT = RoutingConfig(capacity=0.5, first=1, keep_key_values=True, adapter_rank=16)
GELU = Part(
    lambda key, config: {"up": fan_in_normal(key, (config.width, 512), 128), "down": jnp.zeros((512, config.width))},
    lambda params, x: linear(jax.nn.gelu(linear(x, params["up"])), params["down"]),
)
SCORER = Part(
    lambda key, config: {"first": fan_in_normal(key, (config.width, 64), 128), "second": jnp.ones(64)},
    lambda params, x: jnp.tanh(linear(x.astype(jnp.float32), params["first"])) @ params["second"],
)


def compiled_flops(model: ModelConfig, routing: RoutingConfig, parts: Parts, *, training: bool) -> float:
    decoder = Decoder(model, routing, parts)
    run = RunConfig(model, routing, train=TrainConfig(batch_size=1, loss_chunk=S))
    params = jax.eval_shape(lambda: init_params(decoder, 0))
    batch = {n: jax.ShapeDtypeStruct((1, S), jnp.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((1, S), jnp.float32)
    loss = make_loss(decoder, run)

    def logits(params: Any, batch: Any) -> jax.Array:
        return forward(decoder, params, batch, None, "top_k").hidden @ head_matrix(params).T

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: loss(p, batch, None, jnp.float32(S), jnp.float32(S))[0])(params)

    analysis: Any = jax.jit(gradient if training else logits).lower(params, batch).compile(AS_SHIPPED).cost_analysis()
    return float(analysis["flops"])


@pytest.mark.parametrize("routing", [MOD, KEPT], ids=["mod", "kept"])
@pytest.mark.slow
def test_forward_agrees_with_the_compiled_program_within_5_percent(routing: RoutingConfig) -> None:
    ours = forward_flops(MODEL, routing, S).total
    assert ours == pytest.approx(compiled_flops(MODEL, routing, DEFAULT_PARTS, training=False), rel=0.05)


@pytest.mark.parametrize(
    ("remat", "routing"),
    [
        ("none", DENSE),
        *(pytest.param(each, MOD, marks=pytest.mark.nightly) for each in ("none", "dots")),
        ("full", MOD),
    ],
)
@pytest.mark.slow
def test_training_agrees_with_the_compiled_program_within_5_percent(remat: Any, routing: RoutingConfig) -> None:
    """A model with routing has a full block too; one of full blocks alone shows that their counts don't even out."""
    model = replace(MODEL, remat=remat, layers=2 if routing.every else 1)
    ours = training_flops(model, routing, S).total
    assert ours == pytest.approx(compiled_flops(model, routing, DEFAULT_PARTS, training=True), rel=0.05)


@pytest.mark.parametrize(("routing", "layers"), some_nightly([(DENSE, 1), (MOD, 2)], (MOD, 2)), ids=["dense", "mod"])
@pytest.mark.slow
def test_rematerialisation_of_a_full_block_does_not_repeat_its_last_product(
    routing: RoutingConfig, layers: int
) -> None:
    """Where the feed-forward layer is nearly everything, counting it would be 8 % too much."""
    model = replace(MODEL, remat="full", layers=layers, vocab_size=64, mlp_width=1024)
    ours = training_flops(model, routing, S).total
    assert ours == pytest.approx(compiled_flops(model, routing, DEFAULT_PARTS, training=True), rel=0.03)


@pytest.mark.slow
def test_parts_of_the_users_own_are_counted() -> None:
    parts = Parts(router=SCORER, feed_forward=GELU)
    counted = forward_flops(MODEL, MOD, S, parts)
    assert counted.total == pytest.approx(compiled_flops(MODEL, MOD, parts, training=False), rel=0.05)
    rows = S + S // 8  # of the full and of the routed block
    assert counted.mlp == pytest.approx(2 * rows * 2 * 128 * 512, rel=0.05)
    assert counted.router == pytest.approx(2 * S * 128 * 64, rel=0.05)


def test_a_block_of_the_users_own_is_counted() -> None:
    ours = DEFAULT_PARTS.block
    parts = Parts(block=Part(ours.init, lambda *arguments: ours.apply(*arguments)))
    counted, expected = forward_flops(MODEL, MOD, S, parts), forward_flops(MODEL, MOD, S)
    assert counted.mlp == pytest.approx(expected.projections + expected.attention + expected.mlp, rel=0.05)


def test_what_a_block_of_the_users_own_attends_to_is_counted() -> None:
    """Thoughts attend to the text: as many keys as for the built-in block."""
    ours = DEFAULT_PARTS.block
    parts = Parts(block=Part(ours.init, lambda *arguments: ours.apply(*arguments)))
    run = thinking_run(replace(MOD, every=1))
    for function in (sampling_flops, scoring_flops):
        assert function(run, S, parts).total == pytest.approx(function(run, S).total, rel=0.1)


def scanned(length: int, function: Any) -> Any:
    """`function(x, w)` again and again."""
    return lambda x, w: jax.lax.scan(lambda x, _: (function(x, w), None), x, None, length=length)[0]


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def customised(x: jax.Array, w: jax.Array) -> jax.Array:
    inner = jax.custom_vjp(scanned(8, product))
    inner.defvjp(lambda x, w: (inner(x, w), w), lambda w, grad: (grad @ w.T, None))
    return inner(x, w)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (product, 1),
        (scanned(8, product), 8),
        (scanned(8, linear), 8),
        (lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=8, unroll=3)[0], 8),
        (lambda x, w: jax.lax.fori_loop(0, 8, lambda _, x: x @ w, x), 8),
        (lambda x, w: jax.lax.map(lambda row: row @ w, x), 1),
        (lambda x, w: jax.vmap(lambda row: scanned(8, product)(row, w))(x), 8),
        (scanned(3, scanned(4, product)), 12),
        (lambda x, w: jax.jit(scanned(3, product))(jax.jit(scanned(5, product))(x, w), w), 8),
        (jax.checkpoint(scanned(8, product)), 8),
        (customised, 8),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, scanned(8, product), product, x, w), 8),
        (scanned(2, lambda x, w: jax.lax.cond(x[0, 0] > 0, product, scanned(4, product), x, w)), 8),
        (lambda x, w: jax.grad(lambda x: jnp.sum(scanned(8, product)(x, w)))(x), 8),  # linear: backward alone is left
        (lambda x, w: x, 0),
    ],
)  # fmt: skip
def test_a_loop_is_counted_as_often_as_it_runs(function: Any, products: int) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 128), (128, 128)]]
    counted = function_flops("parts.feed_forward", function, *shapes)
    assert counted == pytest.approx(products * 2 * 64 * 128 * 128, rel=0.01)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x), r"jax\.lax\.while_loop, which"),
        (lambda x, w: jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: x @ w, x), r"jax\.lax\.while_loop, which"),
        (jax.jit(scanned(2, lambda x, w: jax.pure_callback(lambda x: x, x, x) @ w)), "pure_callback"),
        (lambda x, w: x @ jnp.linalg.inv(w), "lu of jax"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(function: Any, said: str) -> None:
    feed_forward = Part(GELU.init, lambda params, x: function(x, params["up"][:, :128]))
    with pytest.raises(
        InputError, match=rf"^parts\.feed_forward: its FLOPs cannot be counted, because it calls {said}"
    ):
        forward_flops(MODEL, MOD, S, Parts(feed_forward=feed_forward))
    told = replace(feed_forward, flops=lambda config, tokens: 1000.0 * tokens)
    assert forward_flops(MODEL, MOD, S, Parts(feed_forward=told)).mlp == 1000 * (S + S // 8)


def test_a_budget_buys_as_many_steps_of_a_loop_as_of_what_it_does(tmp_path: Path) -> None:
    """Also that a run whose part can't be counted is refused before anything is made."""
    source = """
import jax
from mod_star.parts import Part, Parts

def init(key, config):
    return {"w": jax.random.normal(key, (config.width, config.width))}

def loop(params, x):
    return jax.lax.scan(lambda x, _: (x @ params["w"], None), x, None, length=8)[0]

def written_out(params, x):
    for _ in range(8):
        x = x @ params["w"]
    return x

def unknown(params, x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ params["w"], x)

def once(params, x):
    return x @ params["w"]

loop, written_out, once, unknown = (Parts(feed_forward=Part(init, f)) for f in (loop, written_out, once, unknown))
"""
    (tmp_path / "own.py").write_text(source)
    run = RunConfig(replace(MODEL, scan=True), MOD, train=TrainConfig(batch_size=2, flops=1e12))
    named = lambda name: replace(run, parts=f"{tmp_path}/own.py:{name}")  # noqa: E731
    steps = [plan_stages(named(name)).steps for name in ("loop", "written_out", "once")]
    assert steps[0] == pytest.approx(steps[1], rel=0.01) and steps[0] < 0.7 * steps[2]
    with pytest.raises(InputError, match=r"^parts\.feed_forward: its FLOPs cannot be counted"):
        train(named("unknown"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_layers_that_fit_no_group_are_refused() -> None:
    with pytest.raises(InputError, match=r"^model\.layers = 5: must be a multiple of routing\.every = 2"):
        forward_flops(replace(MODEL, layers=5), MOD, S)


def test_each_kind_by_hand() -> None:
    counted = forward_flops(MODEL, MOD, S)
    C, D, V, F = 16, 128, 512, MODEL.hidden_width
    assert counted.projections == 2 * (S + C) * D * (2 * 128 + 2 * 64)
    assert counted.attention == 2 * 2 * (S**2 + C**2) * 128
    assert counted.mlp == 2 * (S + C) * 3 * D * F
    assert counted.router == 2 * S * D
    assert counted.predictor == 2 * S * (D * 96 + 96)
    assert counted.head == 2 * S * D * V
    for silent in (replace(MOD, causal_rule="router"), replace(MOD, selection="stochastic")):
        assert forward_flops(MODEL, silent, S).predictor == 0
    assert forward_flops(MODEL, DENSE, S).router == 0


def test_the_limit_of_the_saving_is_that_of_the_paper() -> None:
    """Linear layers (1+c)/2 of dense, attention products (1+c²)/2, at one routed block in two and c = 1/8."""
    dense, mod = (forward_flops(MODEL, routing, 2048) for routing in (DENSE, MOD))
    assert mod.mlp / dense.mlp == mod.projections / dense.projections == 0.5625
    assert mod.attention / dense.attention == (1 + 1 / 64) / 2


def test_arithmetic() -> None:
    a, b = Flops(1, 2, 3, 4, 5, 6), Flops(head=1.0)
    assert a.total == 21
    assert a + b == Flops(1, 2, 3, 4, 5, 7)
    assert a * 3 == Flops(3, 6, 9, 12, 15, 18)


def test_a_step_of_a_run_is_its_batch() -> None:
    run = RunConfig(MODEL, MOD, train=TrainConfig(batch_size=6))
    assert training_step_flops(run) == 6 * training_flops(MODEL, MOD, S).total


def test_parameters_are_counted() -> None:
    shapes = jax.eval_shape(lambda: init_params(Decoder(MODEL, DENSE), 0))
    F = MODEL.hidden_width
    assert parameter_count(shapes) == 512 * 128 + 128 + 2 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * F + 2 * 128)


def thinking_run(routing: RoutingConfig, **fields: Any) -> RunConfig:
    """Everything at one time, for loops are counted once: one chunk of places, one chunk of logits."""
    thinking = ThinkingConfig(**{"n_true": 3, "n_thoughts": 2, "think_fraction": 0.25, "chunk": S} | fields)
    train = TrainConfig(objective="quiet_star", batch_size=1, loss_chunk=10_000)
    return RunConfig(replace(MODEL, layers=1), routing, train=train, thinking=thinking)


def compiled_thinking(run: RunConfig, *, sampling: bool) -> float:
    """Operations of sampling without the text's own pass, or of the gradient of base and talk loss together."""
    decoder, thinking = Decoder(run.model, run.routing), run.thinking
    count, M, t = round(0.25 * (S - thinking.n_true + 1)), thinking.n_thoughts, thinking.thought_length

    def init() -> Any:
        params = init_params(decoder, 0)
        return params | {"thinking": thinking_init(jax.random.key(0), run.model, params["embedding"], [0], [0])}

    batch = {n: jax.ShapeDtypeStruct((1, S), jnp.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((1, S), jnp.float32)
    places = Places(jnp.zeros((1, count), jnp.int32), jnp.ones((1, count), bool))
    zeros = jnp.zeros((1, count, M, t))
    thoughts = Thought(zeros.astype(jnp.int32), zeros, zeros, None)

    def read(params: Any, batch: Any) -> Any:
        return forward(decoder, params, batch, None, "causal", keep_keys_values=True)

    def gradient(params: Any, batch: Any, places: Places, thoughts: Thought) -> Any:
        def loss(params: Any) -> jax.Array:
            text = read(params, batch)
            nll = cross_entropy(text.hidden, head_matrix(params), batch["targets"], batch["weights"], S)
            return nll + talk_loss(ThinkingDecoder(decoder, thinking), params, text, batch, places, thoughts, 10_000)[0]

        return jax.grad(loss)(params)

    def sample(params: Any, text: Any, batch: Any, places: Places) -> Thought:
        return sample_thoughts(ThinkingDecoder(decoder, thinking), params, text, batch, places, jax.random.key(0), 1.0)

    shapes = jax.eval_shape(init)
    if sampling:
        lowered = jax.jit(sample).lower(shapes, jax.eval_shape(read, shapes, batch), batch, places)
    else:
        lowered = jax.jit(gradient).lower(shapes, batch, places, thoughts)
    analysis: Any = lowered.compile(AS_SHIPPED).cost_analysis()
    return float(analysis["flops"])


@pytest.mark.slow
def test_sampling_agrees_with_the_compiled_program_within_10_percent() -> None:
    """Sampling's loop over the tokens of a thought is counted once: here it has one."""
    run = thinking_run(DENSE, thought_length=1)
    assert sampling_flops(run, S).total == pytest.approx(compiled_thinking(run, sampling=True), rel=0.1)


@pytest.mark.nightly
def test_scoring_agrees_with_the_compiled_program_within_10_percent() -> None:
    run = thinking_run(DENSE, thought_length=4)
    assert scoring_flops(run, S).total == pytest.approx(compiled_thinking(run, sampling=False), rel=0.1)
    run = thinking_run(DENSE, thought_length=1, kind="expected", n_thoughts=1, policy_weight=0.0)
    assert scoring_flops(run, S).total == pytest.approx(compiled_thinking(run, sampling=False), rel=0.02)


def test_a_step_that_thinks_is_sampling_and_scoring_and_grows_with_them() -> None:
    dense, mod = thinking_run(DENSE), thinking_run(RoutingConfig(every=1, predictor_width=96))
    assert training_step_flops(dense) == sampling_flops(dense, S).total + scoring_flops(dense, S).total
    narrow = replace(dense, model=replace(dense.model, dtype="bfloat16"))
    predictions = 32 * dense.thinking.n_thoughts * dense.thinking.n_true  # 32 positions think
    extra = scoring_flops(narrow, S).head - scoring_flops(dense, S).head
    assert extra == 2 * predictions * MODEL.width * MODEL.vocab_size, "the base prediction's product is one more"
    for function in (sampling_flops, scoring_flops):
        full, routed = function(dense, S), function(mod, S)
        assert routed.router > 0 and routed.predictor > 0 and full.router == full.predictor == 0
        assert (routed.head, routed.mixing) == (full.head, full.mixing)
        # Between the share of the capacity and that of all slots, 1.5 times it and rounded up.
        assert 0.125 <= routed.mlp / full.mlp < 0.3 and routed.attention < 0.1 * full.attention
    sampled = [sampling_flops(thinking_run(DENSE, thought_length=t), S) for t in (8, 16)]
    assert sampled[1].mlp == 2 * sampled[0].mlp and sampled[1].head == 2 * sampled[0].head
    many = [sampling_flops(thinking_run(DENSE, n_thoughts=m), S).total for m in (2, 4)]
    assert many[1] == 2 * many[0]
    pauses = thinking_run(DENSE, kind="pause", n_thoughts=1, policy_weight=0.0)
    one = thinking_run(DENSE, n_thoughts=1, policy_weight=0.0)
    assert sampling_flops(pauses, S) == replace(sampling_flops(one, S), head=0.0)
    # Without REINFORCE the logits of thought tokens are not needed: 3 of 11 predictions are left.
    text = 3 * 2 * S * 128 * 512
    heads = [scoring_flops(thinking_run(DENSE, policy_weight=w), S).head - text for w in (0.0, 1.0)]
    assert heads[0] == pytest.approx(heads[1] * 3 / 11)


@pytest.mark.parametrize(
    "patterns",
    [
        pytest.param(("routed/block", "embedding"), marks=pytest.mark.nightly),
        pytest.param(("predictor",), marks=pytest.mark.nightly),
        pytest.param((), id="lora"),
    ],
)
def test_gradients_of_frozen_weights_are_not_counted_and_adapters_are(patterns: tuple[str, ...]) -> None:
    """Against the compiled program's own count. Where groups are unrolled, as here, XLA also saves what would go back
    to before the first trained parameter; a scan does not, so here something of the first block is trained."""
    model = replace(MODEL, width=64, heads=2, kv_heads=1, mlp_width=256)
    lora = LoraConfig(0 if patterns else 16)
    run = RunConfig(model, MOD, train=TrainConfig(batch_size=1, loss_chunk=S, trainable=patterns), lora=lora)
    decoder = Decoder(model, MOD)
    params = jax.eval_shape(lambda: initial_params(decoder, run, ByteTokenizer()))
    loss = objective_of(decoder, run).loss

    def gradient(params: Any, batch: Any) -> Any:
        def of_part(part: Any) -> jax.Array:
            return loss(with_trained_part(run, params, part), batch, None, jnp.float32(S), jnp.float32(S))[0]

        return jax.value_and_grad(of_part)(trained_part(run, params))

    analysis: Any = jax.jit(gradient).lower(params, batch_shapes(run)).compile(AS_SHIPPED).cost_analysis()
    assert training_step_flops(run) == pytest.approx(float(analysis["flops"]), rel=0.06)
