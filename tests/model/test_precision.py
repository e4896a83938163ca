"""Products of float32 operands are float32 on accelerators too: every program, lowered for a TPU and for a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, random_params
from decoding_models import make_generator
from some_nightly import some_nightly
from thinking_models import thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import programs
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.think import Think
from mod_star.evaluation.score_batch import ScoreNumbers, TextBatch, score_batch
from mod_star.inspection.thoughts import _think_everywhere
from mod_star.model import Decoder
from mod_star.model.cross_entropy import token_entropy
from mod_star.model.linear import linear
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.model.transformer import head_matrix
from mod_star.parts import load_parts
from mod_star.thinking.mixing import thought_weight
from mod_star.training.lowering import lower_eval_step, lower_train_step
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import init_state

WIDTH, VOCAB, PREDICTOR = 16, 29, 11
MODEL = ModelConfig(vocab_size=VOCAB, width=WIDTH, layers=2, heads=2, kv_heads=1, head_dim=6, mlp_width=24, context=24)
RUN = RunConfig(
    MODEL,
    RoutingConfig(capacity=0.25, predictor_width=PREDICTOR),
    train=TrainConfig(batch_size=2, loss_chunk=10),
    thinking=ThinkingConfig(thought_length=2, n_true=2, n_thoughts=2, chunk=8, think_fraction=0.5),
)


class Product(NamedTuple):
    """A product in the text of a program."""

    precision: str
    dtype: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


def products(text: str) -> Iterator[Product]:
    assert "stablehlo.convolution" not in text
    pattern = (
        r"stablehlo\.dot_general.*?precision = \[(\w+), (\w+)\].*?: \(tensor<([\dx]*)x(\w+)>, tensor<([\dx]*)x(\w+)>\)"
    )
    found = re.findall(pattern, text)
    assert len(found) == text.count("stablehlo.dot_general"), "each says what it asks for"
    for left, right, left_shape, left_type, right_shape, right_type in found:
        assert left == right and left_type == right_type
        shapes = tuple(tuple(int(size) for size in shape.split("x")) for shape in (left_shape, right_shape))
        yield Product(left, left_type, shapes)  # type: ignore[arg-type]


def of(function: Callable[..., Any], *args: Any, platform: str = "tpu") -> list[Product]:
    """The products of a function, lowered for a platform."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return list(products(jitted.trace(*args).lower(lowering_platforms=(platform,)).as_text()))


class Programs:
    """Everything that computes with a model, by what it is; each method gives the products of one program."""

    def __init__(self, run: RunConfig, parts: Parts = DEFAULT_PARTS, platform: str = "tpu") -> None:
        self.platform = platform
        self.run = replace(run, train=replace(run.train, objective="quiet_star"))
        self.decoder, self.plain = Decoder(run.model, run.routing, parts), random_params(run.model, run.routing, parts)
        self.params, self.batch = thinking_params(run, self.plain), make_batch([[13, 7], [24]], 24, VOCAB)
        self.generator = make_generator(self.decoder, self.params, thinking=run.thinking)

    def forward(self) -> list[Product]:
        return of(lambda p, b: forward(self.decoder, p, b, None), self.plain, self.batch)

    def calibration(self) -> list[Product]:
        def entropies(p: Any, b: Any) -> jax.Array:
            return token_entropy(forward(self.decoder, p, b, None, "causal").hidden, head_matrix(p), 10)

        return of(entropies, self.plain, self.batch)

    def next_token_training(self) -> list[Product]:
        return self._training(replace(self.run, train=RUN.train), self.plain)

    def thought_training(self) -> list[Product]:
        """Sampling and scoring thoughts, with gradients."""
        return self._training(self.run, self.params)

    def _training(self, run: RunConfig, params: Any) -> list[Product]:
        state = jax.eval_shape(lambda p: init_state(self.decoder, run, 10, p), params)
        return list(products(lower_train_step(self.decoder, run, 10, state, platforms=(self.platform,)).as_text()))

    def thought_evaluation(self) -> list[Product]:
        return list(
            products(lower_eval_step(self.decoder, self.run, self.params, platforms=(self.platform,)).as_text())
        )

    def thoughts_of_a_text(self) -> list[Product]:
        args = (self.run.thinking, 1.0, self.batch["tokens"][0], jnp.int32(9), jax.random.key(0))
        return of(_think_everywhere, self.decoder, self.params, *args)

    def prefill(self) -> list[Product]:
        return list(products(self._prefilled.lower(lowering_platforms=(self.platform,)).as_text()))

    def decoding(self) -> list[Product]:
        return self._decoding(Think())

    def decoding_with_thoughts(self) -> list[Product]:
        return self._decoding(Think("auto", threshold=0.0))

    @cached_property
    def _prefilled(self) -> Any:
        lengths, rows = np.array([3, 8], np.int32), np.arange(4, dtype=np.uint32)
        prompts = programs.Prompts(
            np.zeros((2, 8), np.int32), lengths, rows, np.int32(2), np.int32(4), jax.random.key(0)
        )  # fmt: skip
        model = (self.decoder, self.run.thinking, self.generator.params)
        prefill = jax.jit(programs.prefill, static_argnames=("decoder", "thinking", "size"))
        return prefill.trace(*model, prompts, None, size=programs.Size(prompt=8, room=4, branches=2))

    def _decoding(self, think: Think) -> list[Product]:
        static = ("decoder", "thinking", "sampling", "think")
        advance = jax.jit(programs._advance, static_argnames=static)
        number = np.float32(1)
        bounds = programs.Bounds(np.int32(4), np.float32(0), number, number, number, np.full(8, -1, np.int32))
        model = (self.decoder, self.run.thinking, self.generator.params)
        arrays = (*model, self._prefilled.out_info, bounds, None)
        traced = advance.trace(*arrays, sampling=Sampling(top_k=3), think=think)
        return list(products(traced.lower(lowering_platforms=(self.platform,)).as_text()))

    def scoring(self) -> list[Product]:
        return self._scoring(None, Think())

    def scoring_with_thoughts(self) -> list[Product]:
        return self._scoring(self.run.thinking, Think("always"))

    def _scoring(self, thinking: ThinkingConfig | None, think: Think) -> list[Product]:
        groups = None if thinking is None else self.generator.params["groups"]
        lengths, where, targets = (
            jnp.array([3, 8], jnp.int32),
            jnp.zeros((4, 2), jnp.int32),
            jnp.zeros((4, 1), jnp.int32),
        )
        batch = TextBatch(self.batch["tokens"], lengths, where, targets, jnp.zeros(4, jnp.uint32), jnp.int32(3))
        numbers = ScoreNumbers(jnp.arange(3, dtype=jnp.int32), jnp.float32(0), jnp.int32(0), None)
        return of(score_batch, self.decoder, thinking, think, 2, self.params, groups, batch, numbers)


EVERY = [name for name in vars(Programs) if not name.startswith("_")]
QUICK = ("forward", "next_token_training", "thought_training", "decoding")


@pytest.mark.parametrize("name", some_nightly(EVERY, *(name for name in EVERY if name not in QUICK)))
@pytest.mark.slow
def test_every_product_of_float32_operands_asks_for_the_highest_precision(name: str) -> None:
    assert len(EVERY) == 11 and set(QUICK) <= {*EVERY}
    found = getattr(Programs(RUN), name)()
    assert found and {(each.dtype, each.precision) for each in found} == {("f32", "HIGHEST")}


@pytest.mark.parametrize("name", ["next_token_training", "decoding"])
@pytest.mark.nightly
def test_every_product_for_a_gpu_asks_for_the_highest_precision_too(name: str) -> None:
    found = getattr(Programs(RUN, platform="cuda"), name)()
    assert {(each.dtype, each.precision) for each in found} == {("f32", "HIGHEST")}


@pytest.mark.slow
def test_in_bfloat16_only_what_computes_in_float32_asks_for_more() -> None:
    model = Programs(replace(RUN, model=replace(MODEL, dtype="bfloat16")))
    for found in (model.forward(), model.thoughts_of_a_text()):
        assert {(each.dtype, each.precision) for each in found} == {("bf16", "DEFAULT"), ("f32", "HIGHEST")}


@pytest.mark.slow
def test_a_lower_precision_is_that_of_linear_layers_and_attention_alone() -> None:
    model = Programs(replace(RUN, model=replace(MODEL, precision="default")))
    for found in (model.forward(), model.thoughts_of_a_text()):
        assert {each.precision for each in found} == {"HIGHEST", "DEFAULT"}
        for product in (each for each in found if each.precision == "DEFAULT"):
            sizes = {size for shape in product.shapes for size in shape}
            # Neither the LM head nor the predictor nor the mixing head, which ends in products with a vector.
            assert not sizes & {VOCAB, PREDICTOR, 2 * WIDTH}, product
            assert all(len(shape) > 1 for shape in product.shapes), product
    batch, high = make_batch([[24]], 24, VOCAB), Decoder(replace(MODEL, precision="high"), RUN.routing)
    found = of(jax.grad(lambda p: jnp.sum(forward(high, p, batch, None).hidden)), model.plain)
    assert {each.precision for each in found} == {"HIGHEST", "HIGH"}


def test_a_mixing_and_a_causal_rule_of_ones_own_ask_for_the_highest_precision() -> None:
    def rule(params: Any, x_SxD: jax.Array, *rest: Any) -> jax.Array:
        return jnp.sum(x_SxD @ params["matrix"], -1)

    parts = Parts(mixing=Part(jnp.ones, rule), causal_rule=Part(jnp.ones, rule))
    own, x = {"matrix": jnp.ones((WIDTH, WIDTH))}, jnp.ones((3, WIDTH))
    mixing = of(lambda own, x: thought_weight(parts, ThinkingConfig(), {"thinking": {"mixing": own}}, x, x), own, x)
    deciding = of(lambda own, x: parts.decide(own, x, x[:, 0], lambda: x[:, 0], RUN.routing, MODEL), own, x)
    assert [product.precision for product in (*mixing, *deciding)] == ["HIGHEST"] * 2


MY_PARTS = """
import jax, jax.numpy as jnp
from mod_star.parts import DEFAULT_PARTS, Part, Parts

def router_init(key, config):
    return {"hidden": jax.random.normal(key, (config.width, 4)), "out": jnp.ones(4)}

def router(params, x):
    return jnp.tanh(x.astype(jnp.float32) @ params["hidden"]) @ params["out"]

def mlp_init(key, config):
    return {"up": jnp.ones((config.width, 20)), "down": jnp.ones((20, config.width))}

def mlp(params, x):
    return jax.nn.gelu(x @ params["up"].astype(x.dtype)) @ params["down"].astype(x.dtype)

def block_init(key, config, parts):
    return {"own": jnp.ones((config.width, config.width)), "block": DEFAULT_PARTS.block.init(key, config, parts)}

def block(params, x, positions, segment_ids, valid, context, config, parts):
    delta, own = DEFAULT_PARTS.block.apply(
        params["block"], x, positions, segment_ids, valid, context, config, parts)
    return delta + jnp.einsum("nd,de->ne", x, params["own"].astype(x.dtype)), own

parts = Parts(router=Part(router_init, router), feed_forward=Part(mlp_init, mlp), block=Part(block_init, block))
"""


@pytest.mark.slow
def test_the_products_of_a_users_own_parts_are_float32_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MY_PARTS)
    parts = load_parts(f"{tmp_path}/mine.py:parts")
    model = Programs(RUN, parts)
    for found in (model.next_token_training(), model.decoding()):
        assert any(4 in shape for product in found for shape in product.shapes), "the router is there"
        assert {(each.dtype, each.precision) for each in found} == {("f32", "HIGHEST")}
    for changed in (replace(MODEL, precision="default"), replace(MODEL, dtype="bfloat16")):
        found = Programs(replace(RUN, model=changed), parts).forward()
        by_router = [each for each in found if any(shape in ((WIDTH, 4), (4,)) for shape in each.shapes)]
        assert len(by_router) >= 2 and all(each[:2] == ("HIGHEST", "f32") for each in by_router)
        assert {each.precision for each in found if any(20 in shape for shape in each.shapes)} == {"DEFAULT"}


def test_the_documentations_router_asks_for_it_itself(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/extend.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# my_parts\.py.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(source)
    router = load_parts(f"{tmp_path}/mine.py:parts").router
    params = router.init(jax.random.key(0), MODEL)
    found = of(jax.grad(lambda p, x: jnp.sum(router.apply(p, x))), params, jnp.ones((3, WIDTH), jnp.bfloat16))
    assert len(found) >= 3 and {(each.dtype, each.precision) for each in found} == {("f32", "HIGHEST")}


@pytest.mark.slow
def test_what_the_environment_says_lowers_nothing_of_the_network() -> None:
    with jax.default_matmul_precision("bfloat16"):
        batch = make_batch([[24]], 24, VOCAB)
        loss = jax.grad(lambda p: jnp.sum(forward(Decoder(MODEL, RUN.routing), p, batch, None).hidden))
        found = of(loss, random_params(MODEL, RUN.routing))
    assert {each.precision for each in found} == {"HIGHEST"}


def test_linear_asks_for_what_it_is_told_or_for_what_stands_around_it() -> None:
    x, w = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    gradient = lambda **options: of(jax.grad(lambda x, w: jnp.sum(linear(x, w, **options) ** 2), (0, 1)), x, w)  # noqa: E731
    with jax.default_matmul_precision("high"):
        around = gradient()
    for found, precision in ((gradient(), "HIGHEST"), (gradient(precision="default"), "DEFAULT"), (around, "HIGH")):
        assert {each.precision for each in found} == {precision} and len(found) >= 3
