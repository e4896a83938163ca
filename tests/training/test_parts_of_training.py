"""A user's own objective and optimizer: their numbers, their errors, and a teacher that is no constant."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mod_star.config import MeshConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.distributed.sharding import make_mesh, spec_of
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.model.parts import Parts
from mod_star.parts import load_parts
from mod_star.presets import tiny
from mod_star.training.extension import require_extendable
from mod_star.training.lowering import StageObjective, lower_eval_step, lower_train_step
from mod_star.training.objectives import Objective, next_token
from mod_star.training.optimizer import clip_apart, make_schedule, optimizer_of
from mod_star.training.state import TrainState
from mod_star.training.step import make_train_step
from mod_star.training.train import train

Batch = dict[str, jax.Array]


@pytest.fixture(scope="module")
def dense(tiny_run: RunConfig) -> RunConfig:
    return replace(
        tiny_run, model=replace(tiny_run.model, layers=1, heads=2, kv_heads=1), routing=RoutingConfig(every=0)
    )


@pytest.mark.slow
def test_distillation_from_a_frozen_teacher(
    dense: RunConfig, tiny_batch: Batch, random_state: Callable[..., TrainState], random_params: Any, tmp_path: Any
) -> None:
    """The how-to's objective: its number in float64, and a program that doesn't hold the teacher."""
    (tmp_path / "distil.py").write_text(example("distil"))
    parts = load_parts(f"{tmp_path / 'distil.py'}:parts")
    decoder, state = Decoder(dense.model, dense.routing, parts), random_state(dense, parts)
    params = random_state(dense, parts).params  # the step consumes those of `state`
    teacher = random_params(dense.model, dense.routing, seed=9)
    made: Any = parts.objective
    made.__globals__["teacher"] = lambda: SimpleNamespace(decoder=Decoder(dense.model, dense.routing), params=teacher)

    def log_p(params: Any) -> np.ndarray:
        of_row: Any = decoder.apply
        run = lambda *row: of_row({"params": params}, *row, mode="causal").hidden  # noqa: E731
        hidden: Any = jax.jit(jax.vmap(run))(*(tiny_batch[n] for n in ("tokens", "positions", "segment_ids")))
        logits = np.asarray(hidden, np.float64) @ np.asarray(params["embedding"], np.float64).T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_student, log_teacher, weights = log_p(state.params), log_p(teacher), np.asarray(tiny_batch["weights"])
    kl = np.sum(weights[..., None] * np.exp(log_teacher) * (log_teacher - log_student)) / weights.sum()
    nll = -np.take_along_axis(log_student, np.asarray(tiny_batch["targets"])[..., None], -1)[..., 0]
    assert kl > 0.1

    constants = lambda program: max(map(len, re.findall(r'dense<"0x([0-9A-F]+)"', program.as_text())), default=0)  # noqa: E731
    lowered = lower_train_step(decoder, dense, 10, jax.eval_shape(lambda: state))
    closing_over = jax.jit(make_train_step(decoder, dense, 10)).lower(state, tiny_batch)
    assert constants(lowered) < 1000 < constants(closing_over)
    (_, metrics), before = lowered.compile()(state, tiny_batch), jax.tree.map(np.asarray, teacher)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.sum(weights * nll) / weights.sum() + kl, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, teacher)
    evaluate = lower_eval_step(decoder, dense, jax.eval_shape(lambda: params)).compile()
    sums = evaluate(params, tiny_batch, jax.random.key(0))
    np.testing.assert_allclose(sums["nll"], np.sum(weights * nll), rtol=1e-5)


def example(name: str) -> str:
    """The how-to's file of this name."""
    page = (Path(__file__).parents[2] / "docs/how-to/extend.md").read_text(encoding="utf-8")
    (source,) = re.findall(rf"^```python\n(# {name}\.py.*?)^```", page, re.DOTALL | re.MULTILINE)
    return str(source)


OWN_OBJECTIVE = """
from dataclasses import replace
from pathlib import Path
import jax.numpy as jnp
from mod_star import Parts
from mod_star.training.objectives import next_token
from mod_star.training.objectives.quiet_star import Examples

def own(decoder, run):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write("called, ")
    plain = next_token(decoder, run)
    return replace(
        plain,
        loss=lambda *arguments: plain.loss(*arguments[:-1]),
        eval_step=lambda *arguments: plain.eval_step(*arguments[:-1]),
        examples=lambda params, batch, key, frozen: Examples(
            jnp.zeros(1, jnp.int32), jnp.ones((1, 1, 2), jnp.int32), jnp.zeros((1, 1)), frozen["gains"]
        ),
        frozen=({"gains": jnp.full((1, 1), 7.0)},),
    )

parts = Parts(objective=own)
"""


@pytest.mark.slow
def test_a_session_makes_its_objective_once(tmp_path: Path) -> None:
    """For step, evaluation, its summary and the thoughts to read, which get the frozen arrays as well."""
    (tmp_path / "own.py").write_text(OWN_OBJECTIVE)
    run = tiny()
    run = replace(
        run,
        model=replace(run.model, width=8, layers=1, heads=1, mlp_width=8, context=32),
        routing=RoutingConfig(every=0),
        train=replace(run.train, objective="quiet_star", steps=2, batch_size=2, eval_every=1, eval_batches=1),
        thinking=ThinkingConfig(thought_length=2, n_true=2, n_thoughts=2, chunk=40),
        parts=f"{tmp_path / 'own.py'}:parts",
    )
    train(run, tmp_path / "run", quiet=True)
    assert (tmp_path / "calls").read_text() == "called, "
    thoughts = [json.loads(line) for line in (tmp_path / "run" / "thoughts.jsonl").read_text().splitlines()]
    assert [thought["step"] for thought in thoughts] == [1, 2]
    assert [thought["gains"] for thought in thoughts] == [[7.0], [7.0]]


def test_programs_of_a_stage_share_the_frozen_arrays(dense: RunConfig) -> None:
    """On a mesh, where they lie as parameters do, and elsewhere."""
    arrays = {"groups": {"full_0": {"block": {"query": np.ones((1, 16, 2, 8), np.float32)}}}}
    parts = Parts(objective=objective(frozen=(arrays,)))
    decoder, calls = Decoder(dense.model, dense.routing, parts), []
    for mesh in (None, make_mesh(MeshConfig(), jax.devices()[:1])):
        stage = StageObjective.of(decoder, dense, mesh)
        first, second = (stage.bind(lambda *given: calls.append(given)) for _ in range(2))
        first("state")
        second("params", "batch")
        (_, frozen), (_, _, again) = calls[-2:]
        assert jax.tree.leaves(frozen)[0] is jax.tree.leaves(again)[0]
        jax.tree.map(np.testing.assert_array_equal, frozen, arrays)
        (shape,), (leaf,) = jax.tree.leaves(stage.frozen_shapes), jax.tree.leaves(frozen)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        if mesh is not None:
            assert leaf.sharding == shape.sharding and leaf.sharding.spec[1:] == ("fsdp", "tensor", None)


def sgd(run: RunConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(clip_apart(run.optimizer.clip), optax.sgd(make_schedule(run.optimizer, steps), momentum=0.9))


@pytest.mark.slow
def test_momentum_in_place_of_adamw(
    dense: RunConfig, tiny_batch: Batch, random_state: Callable[..., TrainState]
) -> None:
    parts = Parts(optimizer=sgd)
    decoder = Decoder(dense.model, dense.routing, parts)
    run = replace(dense, optimizer=replace(dense.optimizer, clip=0.5))
    state = random_state(run)
    state = replace(state, opt_state=optimizer_of(parts, run, 10).init(state.params))
    objective = next_token(decoder, run)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, tiny_batch, jax.random.key(0), 46.0, 60.0)[0]))
    step = jax.jit(make_train_step(decoder, run, 10))
    targets = float(jnp.sum(tiny_batch["weights"]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    momentum = jax.tree.map(np.zeros_like, params)
    for _ in range(3):
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64) * 46 / targets, gradient(state.params))
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        assert norm > 0.5
        momentum = jax.tree.map(lambda m, g, norm=norm: 0.9 * m + g * 0.5 / norm, momentum, grads)
        params = jax.tree.map(lambda p, m: p - 0.01 * m, params, momentum)
        state, metrics = step(state, tiny_batch)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), state.params, params)
    assert "learning_rate" not in metrics, "whatever it is, it is not that of the built-in optimizer"

    kept = jax.tree.map(np.asarray, (state.params, state.opt_state))
    broken = {**tiny_batch, "weights": tiny_batch["weights"] * jnp.inf}
    state, metrics = step(state, broken)
    assert metrics["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, kept, (state.params, state.opt_state))


def test_the_state_of_a_factored_optimizer_has_its_places(tiny_run: RunConfig, random_params: Any) -> None:
    """Every leaf is cut up along dimensions that the mesh divides; one of the parameters' shape as they are."""
    params = random_params(tiny_run.model, tiny_run.routing)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    optimizer = optax.adafactor(0.1, min_dim_size_to_factor=4)
    state = jax.eval_shape(optimizer.init, params)
    cut = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name, leaf.shape, sizes["fsdp"])
        assert len(spec) <= leaf.ndim, name
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or axis == "tensor" or size % sizes[axis] == 0, name
        cut += spec != PartitionSpec()
    assert cut > 0


def changing(run: RunConfig, steps: int) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: jnp.zeros(()), lambda g, s, p=None: (g, s.astype(jnp.int32)))


def halves(run: RunConfig, steps: int) -> optax.GradientTransformation:
    cast = lambda g: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), g)  # noqa: E731
    return optax.GradientTransformation(lambda params: (), lambda g, s, p=None: (cast(g), s))


def objective(**fields: Any) -> Callable[..., Objective]:
    return lambda decoder, run: replace(next_token(decoder, run), **fields)


BAD: dict[str, Parts] = {
    r"parts\.optimizer = float: must return an optax.GradientTransformation": Parts(optimizer=lambda run, steps: 0.1),
    r"parts\.optimizer state = int32\[\]: must be float32\[\]": Parts(optimizer=changing),
    r"parts\.optimizer updates\['\w+'\].* = float16\[.*\]: must be float32": Parts(optimizer=halves),
    r"parts\.optimizer updates = PyTreeDef.*must have the structure": Parts(
        optimizer=lambda run, steps: optax.stateless(lambda grads, params: [])
    ),
    r"parts\.objective = int: must return a mod_star.training.objectives.Objective": Parts(objective=lambda d, r: 3),
    r"parts\.objective\.loss = float32\[2\]: must be float32\[\]": Parts(
        objective=objective(loss=lambda *arguments: (jnp.zeros(2), {}))
    ),
    r"parts\.objective\.loss = \w+: must be a pair": Parts(objective=objective(loss=lambda *a: jnp.float32(0))),
    r"parts\.objective\.loss's sums = list: must be a dict of arrays": Parts(
        objective=objective(loss=lambda *arguments: (jnp.float32(0), []))
    ),
    r"parts\.objective\.loss: must take the keyword step": Parts(
        objective=objective(loss=lambda params, batch, key, targets, valid: (jnp.float32(0), {}), takes_step=True)
    ),
    r"parts\.objective\.metrics = float: must be a dict of arrays": Parts(objective=objective(metrics=lambda *a: 0.0)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_part_that_is_no_good_is_named_before_anything_is_compiled(
    message: str, dense: RunConfig, tiny_batch: Batch, random_state: Callable[..., TrainState]
) -> None:
    parts, state = BAD[message], random_state(dense)
    decoder = Decoder(dense.model, dense.routing, parts)

    def trace() -> None:
        own = replace(state, opt_state=jax.eval_shape(optimizer_of(parts, dense, 10).init, state.params))
        jax.eval_shape(make_train_step(decoder, dense, 10), own, tiny_batch)

    with pytest.raises(InputError, match=message):
        trace()


def test_another_number_of_steps_is_for_an_optimizer_of_ones_own_to_know(dense: RunConfig, tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(
        "import optax\nfrom mod_star import Parts\nparts = Parts(optimizer=lambda run, steps: optax.sgd(1 / steps))\n"
    )
    old = replace(dense, parts=f"{tmp_path / 'own.py'}:parts")
    new = replace(old, train=replace(old.train, steps=old.train.steps + 1))
    with pytest.raises(InputError, match=r"train\.steps = 1001: .*parts\.optimizer.*--redraw-schedule"):
        require_extendable(old, new, 1, redraw=False)
    require_extendable(old, new, 1, redraw=True)
    require_extendable(replace(old, parts=None), replace(new, parts=None), 1, redraw=False)  # a constant rate
