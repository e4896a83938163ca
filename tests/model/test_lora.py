"""Adapters: what they compute against dense formulas, which weights get one, and runs that train and resume them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_nightly import some_nightly

from mod_star import presets
from mod_star.cli import main
from mod_star.config import LoraConfig, RunConfig, ThinkingConfig
from mod_star.data import train_batches
from mod_star.decoding.step import unstack
from mod_star.errors import InputError
from mod_star.flops import parameter_count
from mod_star.initial_params import init_params, initial_params
from mod_star.model import Decoder
from mod_star.model.linear import linear, linear_saveable
from mod_star.model.lora import Adapted, lora_init, matrix_shape, merged, with_adapters, with_merged
from mod_star.model.parts import DEFAULT_PARTS, Part
from mod_star.model.routing import Tokens
from mod_star.model.transformer import apply_blocks, logits_of
from mod_star.pretrained.export import export_model
from mod_star.pretrained.importing import import_model, open_source
from mod_star.pretrained.params_run import write_params_run
from mod_star.pretrained.upcycle import upcycled_config
from mod_star.runs.checkpoints import restore_state
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.summary import read_summary
from mod_star.tokenization import ByteTokenizer
from mod_star.trainable import leaves_by_path, trained_paths
from mod_star.training.lowering import state_shapes
from mod_star.training.objectives import objective_of
from mod_star.training.state import TrainState

RNG = np.random.default_rng(0)
RandomParams = Callable[..., Any]


def with_lora(run: RunConfig, *targets: str, rank: int = 2) -> RunConfig:
    return replace(run, lora=LoraConfig(rank=rank, alpha=6.0, targets=targets or ("block",)))


def random_adapters(lora: LoraConfig, params: Any) -> Any:
    """Adapters whose B is not zero any more."""
    adapters = lora_init(jax.random.key(1), lora, params)
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape) * 0.1, jnp.float32), adapters)


def test_an_adapted_product_and_its_gradients_are_those_of_the_dense_formula() -> None:
    x, weight, a, b = (RNG.normal(size=shape) for shape in ((4, 5), (5, 6), (5, 2), (2, 6)))
    grad = RNG.normal(size=(4, 6))  # of the loss sum(grad * y)

    def loss(x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(linear(x, Adapted(weight, a, b, 1.5)) * grad)

    arrays = [jnp.asarray(each, jnp.float32) for each in (x, weight, a, b)]
    value, found = jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays)
    whole = weight + 1.5 * a @ b
    assert float(value) == pytest.approx(np.sum(grad * (x @ whole)), rel=1e-5)
    # d W = xT g, and by the chain rule d A = s dW BT, d B = s AT dW.
    expected = (grad @ whole.T, x.T @ grad, 1.5 * x.T @ grad @ b.T, 1.5 * a.T @ x.T @ grad)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # Frozen, the weight has no gradient: two products forward and three back through the adapter, one through W.
    text = jax.jit(jax.grad(loss, (0, 2, 3))).lower(*arrays).as_text()
    assert "tensor<5x6xf32>" not in [line.rpartition("-> ")[2] for line in text.splitlines() if "dot_general" in line]
    # Where products are kept for the backward pass, the adapter's last one is made again: of as many numbers as W's.
    kept = jax.checkpoint(lambda a, b: jnp.sum(jnp.sin(linear(arrays[0], Adapted(arrays[1], a, b, 1.5)))),
                          policy=linear_saveable)  # fmt: skip
    assert str(jax.make_jaxpr(jax.grad(kept, (0, 1)))(*arrays[2:])).count("linear[") == 3 + 1 + 1
    with pytest.raises(TypeError, match="transposed"):
        linear(arrays[0], Adapted(arrays[1], arrays[2], arrays[3], 1.5), transposed=True)


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [("query", (8, 2, 4), (8, 8)), ("key", (8, 1, 4), (8, 4)), ("output", (2, 4, 8), (8, 8)), ("down", (9, 8), (9, 8))],
)
def test_heads_are_outputs_of_query_key_and_value_and_inputs_of_output(
    name: str, shape: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    assert matrix_shape(("groups", "full_0", "block", name), shape) == matrix


def test_which_weights_get_an_adapter(tiny_run: RunConfig, random_params: RandomParams) -> None:
    run = replace(tiny_run, model=replace(tiny_run.model, qkv_bias=True))
    params = random_params(run.model, run.routing)

    def adapted(*targets: str) -> set[str]:
        adapters = lora_init(jax.random.key(0), with_lora(run, *targets).lora, params)
        return {"/".join(names[:-1]) for names in leaves_by_path(adapters)}

    seven = ("query", "key", "value", "output", "feed_forward/gate", "feed_forward/up", "feed_forward/down")
    everything = {f"groups/{block}/block/{name}" for block in ("full_0", "routed") for name in seven}
    assert adapted("block") == adapted("groups") == everything
    assert adapted("routed/*/query", "gate") == {
        "groups/routed/block/query", "groups/full_0/block/feed_forward/gate", "groups/routed/block/feed_forward/gate",
    }  # fmt: skip
    for wrong in ("embedding", "final_norm", "attention_norm", "query_bias", "router", "predictor/hidden", "quarry"):
        with pytest.raises(InputError) as error:
            adapted("query", wrong)
        start = f"lora.targets = ('query', {wrong!r}): {wrong!r} matches no matrix of a block; "
        assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_adapters_are_trained_with_what_a_pretrained_model_lacks_or_what_is_named(tiny_run: RunConfig) -> None:
    run = with_lora(replace(tiny_run, train=replace(tiny_run.train, objective="quiet_star")), "query")
    decoder = Decoder(run.model, run.routing)
    shapes = jax.eval_shape(lambda: initial_params(decoder, run, ByteTokenizer()))

    def trained(*patterns: str) -> set[str]:
        paths = trained_paths(replace(run, train=replace(run.train, trainable=patterns)), shapes)
        return {names[0] if names[0] != "groups" else names[2] for names in paths}

    assert trained() == {"lora", "router", "predictor", "thinking"}
    assert trained("final_norm") == {"lora", "final_norm"}
    with pytest.raises(InputError, match="'lora' matches no parameter"):  # they are trained in any case
        trained("lora")


def test_a_new_adapter_changes_nothing_to_the_bit(tiny_run: RunConfig, random_params: RandomParams) -> None:
    run = with_lora(replace(tiny_run, model=replace(tiny_run.model, dtype="bfloat16")))
    decoder, params = Decoder(run.model, run.routing), random_params(run.model, run.routing)
    started = initial_params(decoder, run, ByteTokenizer(), params)
    hidden = jax.jit(lambda params, tokens: decoder.apply({"params": params}, tokens).hidden)  # type: ignore[union-attr]
    tokens = jnp.arange(24, dtype=jnp.int32)
    np.testing.assert_array_equal(hidden(with_adapters(started, run.lora), tokens), hidden(params, tokens))
    jax.tree.map(np.testing.assert_array_equal, merged(started, run.lora), params)


def test_stacked_and_unstacked_adapters_and_the_merged_model_give_the_same_logits(
    tiny_run: RunConfig, random_params: RandomParams
) -> None:
    run = with_lora(tiny_run)
    decoder, params = Decoder(run.model, run.routing), random_params(run.model, run.routing)
    params = params | {"lora": random_adapters(run.lora, params)}
    adapted = with_adapters(params, run.lora)
    ids = jnp.ones(24, jnp.int32)
    tokens = Tokens(jnp.asarray(RNG.normal(size=(24, 16)), jnp.float32), jnp.arange(24, dtype=jnp.int32), ids)
    run_blocks = jax.jit(lambda params: logits_of(params, apply_blocks(decoder, params, tokens).hidden))
    whole = run_blocks(merged(params, run.lora))
    for form in (adapted, unstack(decoder, adapted)):
        np.testing.assert_allclose(run_blocks(form), whole, rtol=1e-5, atol=1e-5)  # logits of up to 8
    without = {name: leaf for name, leaf in params.items() if name != "lora"}
    assert np.abs(run_blocks(without) - whole).max() > 0.01
    for use in (run_blocks, lambda params: decoder.apply({"params": params}, ids)):
        with pytest.raises(InputError, match=r"adapters .* that are not merged"):
            use(params)


@pytest.mark.parametrize("objective", some_nightly(["next_token", "quiet_star"], "quiet_star"))
def test_the_loss_and_its_gradient_are_those_of_explicit_sums(
    routed_run: RunConfig, random_params: RandomParams, tiny_batch: dict[str, jax.Array], objective: Any
) -> None:
    """W + s·A·B is made outside of the network and differentiated there. Of thoughts the loss alone: it is costly."""
    run = with_lora(replace(routed_run, train=replace(routed_run.train, objective=objective)))
    thinking = ThinkingConfig(thought_length=1, n_true=2, chunk=24, think_fraction=0.1)
    run = replace(run, thinking=thinking, routing=replace(run.routing, causal_rule="router"))
    decoder, plain = Decoder(run.model, run.routing), replace(run, lora=LoraConfig())
    params = initial_params(decoder, plain, ByteTokenizer(), random_params(run.model, run.routing))
    adapters, totals = random_adapters(run.lora, params), (jnp.float32(80), jnp.float32(88))

    def ours(adapters: Any) -> jax.Array:
        loss = objective_of(decoder, run).loss
        return loss(params | {"lora": adapters}, tiny_batch, jax.random.key(0), *totals)[0]

    def explicit(adapters: Any) -> jax.Array:
        tree = with_merged(with_adapters(params | {"lora": adapters}, run.lora))
        return objective_of(decoder, plain).loss(tree, tiny_batch, jax.random.key(0), *totals)[0]

    if objective == "quiet_star":
        values = jax.jit(lambda adapters: [ours(adapters), explicit(adapters)])(adapters)
        assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-6)
        return
    both = jax.jit(lambda adapters: [jax.value_and_grad(each)(adapters) for each in (ours, explicit)])
    (value, found), (other, expected) = both(adapters)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected)


@pytest.mark.parametrize("door", ["feed_forward", "block"])
def test_a_part_of_the_users_own_gets_merged_arrays(
    routed_run: RunConfig, random_params: RandomParams, door: str
) -> None:
    run, params = with_lora(routed_run), random_params(routed_run.model, routed_run.routing)
    built_in = getattr(DEFAULT_PARTS, door)
    given: list[Any] = []

    def own(params: Any, *others: Any) -> Any:
        given.extend(leaves_by_path(params).items())
        return built_in.apply(params, *others)

    parts = replace(DEFAULT_PARTS, **{door: Part(built_in.init, own)})  # type: ignore[arg-type]
    decoder = Decoder(run.model, run.routing, parts)
    params = with_adapters(params | {"lora": random_adapters(run.lora, params)}, run.lora)
    jax.eval_shape(lambda: decoder.apply({"params": params}, jnp.ones(24, jnp.int32)))
    assert len({names for names, _ in given}) == (3 if door == "feed_forward" else 9)
    assert all(isinstance(leaf, jax.Array) for _, leaf in given)


def small_run() -> RunConfig:
    run = presets.dense(presets.tiny())
    model = replace(run.model, width=8, heads=2, layers=2, context=16, vocab_size=320)
    few: dict[str, Any] = {
        "steps": 4,
        "batch_size": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "eval_every": 0,
        "eval_batches": 1,
    }
    return replace(run, model=model, train=replace(run.train, **few))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that was imported, say: parameters alone."""
    run, path = small_run(), tmp_path_factory.mktemp("base") / "base"
    write_params_run(path, run, ByteTokenizer(), init_params(Decoder(run.model, run.routing), 3))
    return path


FINE = ("--lora.rank", "2", "--lora.targets", "query", "feed_forward")


def succeed(*argv: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    path = base.parent / "fine"
    succeed("train", str(path), "--init-from", str(base), *FINE)
    return path


def state_at(path: Path, step: int) -> TrainState:
    """A checkpoint as it is saved, adapters apart."""
    run = read_config(path)
    like = state_shapes(Decoder(run.model, run.routing), run, ByteTokenizer(), 4)
    batches = iter(train_batches(run.data, ByteTokenizer(), run.model.context, run.train.batch_size))
    return restore_state(path / "checkpoints", step, like, batches)[0]


def test_a_run_with_adapters_trains_them_alone_and_goes_on_bit_for_bit(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = leaves_by_path(load_run(base).params)
    first, half, last = (leaves_by_path(state_at(trained, step).params) for step in (0, 2, 4))
    assert {names for names in last if names[0] != "lora"} == before.keys()
    for names, leaf in last.items():
        if names[0] == "lora":
            assert (leaf != half[names]).any() and (half[names] != first[names]).any()
            assert names[-1] == "a" or not first[names].any()
        else:
            np.testing.assert_array_equal(leaf, before[names])
    adapters = sum(leaf.size for names, leaf in last.items() if names[0] == "lora")
    summary, state = read_summary(trained), state_at(trained, 4)
    assert (summary.trained_parameters, summary.parameters) == (adapters, adapters + parameter_count(before))
    moments = {names: leaf for names, leaf in leaves_by_path(state.opt_state).items() if leaf.ndim}
    assert all("lora" in names for names in moments) and parameter_count(moments) == 2 * adapters
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    succeed("train", str(again), "--init-from", str(base), *FINE, "--resume-from", "2")
    assert f"{adapters} of them trained" in " ".join(capsys.readouterr().out.split())
    assert read_summary(again).evaluation == summary.evaluation
    resumed = replace(state_at(again, 4), key=jax.random.key_data(state.key))
    jax.tree.map(np.testing.assert_array_equal, resumed, replace(state, key=jax.random.key_data(state.key)))


def test_what_is_loaded_and_exported_is_merged_and_computes_what_was_trained(trained: Path, tmp_path: Path) -> None:
    loaded, run = load_run(trained), read_config(trained)
    params = state_at(trained, 4).params
    adapted = with_adapters(params, run.lora)
    tokens = jnp.asarray(RNG.integers(0, 256, 16), jnp.int32)

    def logits(params: Any) -> Any:
        return logits_of(params, loaded.decoder.apply({"params": params}, tokens).hidden)  # type: ignore[union-attr]

    expected = logits(adapted)
    assert "lora" not in loaded.params and loaded.config.lora == LoraConfig()
    np.testing.assert_allclose(logits(loaded.params), expected, atol=1e-5)
    export_model(loaded, tmp_path / "exported")
    import_model(open_source(str(tmp_path / "exported")), tmp_path / "imported")
    np.testing.assert_allclose(logits(load_run(tmp_path / "imported").params), expected, atol=1e-5)
    assert np.abs(logits({name: leaf for name, leaf in params.items() if name != "lora"}) - expected).max() > 1e-4
    with pytest.raises(InputError, match=r"adapters .* that are not merged"):
        export_model(replace(loaded, params=params), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert upcycled_config(run, 0.5).lora == LoraConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora.rank", "2", "--lora.targets", "querry"), "lora.targets = ('querry',): 'querry' matches no matrix of"),
        (("--lora.rank", "2", "--lora.targets", "embedding"), "'embedding' matches no matrix of a block; "),
        (("--lora.rank", "-1"), "lora.rank = -1: must be at least 0"),
        (("--train.trainable", "adapter"), "train.trainable = ('adapter',): 'adapter' matches no parameter; "),
        (("--lora.rank", "2", "--train.trainable", "router"), "train.trainable = ('router',): 'router' matches no "),
    ],
)
def test_errors_are_one_line_before_anything_is_written(
    base: Path, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "new"), "--init-from", str(base), *options])
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
