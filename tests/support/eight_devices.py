"""Runs steps and sampling on meshes of eight CPU devices and writes what came out: `eight_devices.py OUT PART`.

A process of its own, with JAX_NUM_CPU_DEVICES=8: the number of devices is fixed once JAX begins.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import jax
import numpy as np
from interpreted_attention import INTERPRETED, problem, value_and_gradients
from thinking_models import thinking_params

from mod_star.config import (
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RoutingConfig,
    RunConfig,
    ThinkingConfig,
    TrainConfig,
)
from mod_star.decoding import GenerationConfig, Generator, Sampling, Think, programs
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.distributed.sharding import batch_sharding, make_mesh, place, placed_shapes, shardings, use_mesh
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.planning.hlo import parse
from mod_star.planning.program_cost import program_cost
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.lowering import lower_eval_step, lower_train_step
from mod_star.training.objectives.next_token import forward
from mod_star.training.optimizer import make_optimizer
from mod_star.training.state import TrainState

AUTO = Think("auto", 0.2)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
QUICK = {"dense": ("fsdp",), "routed": ("tensor", "mixed")}
"""Kinds, and the meshes that each trains on besides a single device."""
NIGHTLY = {
    "dense": ("data",), "quiet_star": ("mixed",), "gathered": ("fsdp",), "accumulated": ("mixed",),
    "experts": ("mixed",),
}  # fmt: skip
"""The same for what takes longest."""
THINKING = ("quiet_star", "gathered", "sampled")


def make_run(kind: str) -> RunConfig:
    """A full and a routed block; every dimension is a multiple of 8. No clipping: the first moments are gradients.

    Accumulation and experts are as they are in full blocks alone, scoring thoughts in a routed one: quicker to compile.
    """
    run = RunConfig(
        model=ModelConfig(vocab_size=64, width=16, layers=2, heads=8, head_dim=2, mlp_width=32, context=24),
        routing=RoutingConfig(every=0, capacity=0.25, predictor_width=8),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0, clip=0.0),
        train=TrainConfig(batch_size=8, loss_chunk=10),
        thinking=ThinkingConfig(thought_length=3, n_true=2, n_thoughts=2, chunk=12),
    )
    if kind in ("routed", "sampled"):
        run = replace(run, routing=replace(run.routing, every=2))
    if kind == "quiet_star":  # as wide as vectors, which stay whole, may count
        run = replace(run, model=replace(run.model, layers=1, mlp_width=64), routing=replace(run.routing, every=1))
    if kind == "experts":
        return replace(run, model=replace(run.model, experts=4, experts_null=1, experts_balance="bias"))
    if kind == "accumulated":
        return replace(run, train=replace(run.train, batch_size=16, accumulation=2))
    if kind == "gathered":  # two groups: what a single one needs is the same for all tokens, and put together once
        model, thinking = replace(run.model, layers=4), replace(run.thinking, gather="step", thought_length=6)
        run = replace(run, model=model, thinking=thinking)
    return replace(run, train=replace(run.train, objective="quiet_star")) if kind in THINKING else run


def make_state(run: RunConfig, kind: str) -> TrainState:
    """Random parameters of all kinds, on one device."""
    state = conftest.random_state(run)
    if kind not in THINKING:
        return state
    params = thinking_params(run, state.params)
    return replace(state, params=params, opt_state=make_optimizer(run, 100).init(params))


def named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def train(kind: str, name: str, out: Path) -> None:
    """One training step, as the loop compiles it, and for routed models the tokens that it selects."""
    run = make_run(kind)
    decoder, state = Decoder(run.model, run.routing), make_state(run, kind)
    rows = [[24], [10, 14], [7, 8, 4], [4], [12, 12], [24], [20], [3, 3, 3]] * (run.train.batch_size // 8)
    batch = conftest.make_batch(rows, 24, 64)
    mesh = None if name == "one" else make_mesh(MeshConfig(*MESHES[name]))
    shapes = jax.eval_shape(lambda: state)
    if mesh is not None:
        places = shardings(mesh, shapes)
        shapes = placed_shapes(mesh, shapes)
        batch = place(batch, batch_sharding(mesh))
        state = jax.device_put(state, places)
    program = lower_train_step(decoder, run, 100, shapes, mesh).compile()
    memory: Any = program.memory_analysis()
    found: dict[str, Any] = {"argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes}
    if kind == "gathered" and mesh is not None:
        by_token = replace(run, thinking=replace(run.thinking, gather="token"))
        other = lower_train_step(decoder, by_token, 100, shapes, mesh).compile()
        found["put_together"] = [put_together_bytes(each) for each in (program, other)]
    if kind == "routed" and name in ("one", "mixed"):

        def selected(params: Any, batch: Any) -> Any:
            return forward(decoder, params, batch, None, "top_k").trace.selected  # type: ignore[union-attr]

        with use_mesh(mesh):
            found["selected"] = np.asarray(jax.jit(selected)(state.params, batch)).tolist()
    if name == "tensor":
        found["eval_program"] = lower_eval_step(decoder, run, shapes.params, mesh).compile().as_text()
    (out / f"{kind}-{name}.json").write_text(json.dumps(found))
    after, metrics = program(state, batch)
    adam = after.opt_state[1]
    arrays: dict[str, Any] = named({"metrics": metrics, "gradients": adam.mu})
    np.savez(out / f"{kind}-{name}.npz", **arrays)


def put_together_bytes(program: Any) -> float:
    """That each device sends in all-gathers."""
    collectives = program_cost(parse(program.as_text())).collectives
    return sum(each.total for each in collectives if each.kind == "all-gather")


def sample(name: str, out: Path) -> None:
    """Tokens and log-probabilities of four prompts: without thoughts, with one before every token, and before some."""
    run = make_run("sampled")
    decoder, params = Decoder(run.model, run.routing), make_state(run, "sampled").params
    mesh = None if name == "one" else make_mesh(MeshConfig(*MESHES[name]))
    if mesh is not None:
        params = place(params, shardings(mesh, params))
    generator = Generator(Model(decoder, params, ByteTokenizer(), run.thinking, mesh), end_ids=())
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    found = {}
    for way, think in (("plain", Think()), ("thinking", Think("always")), ("auto", AUTO)):
        results = generator.generate(prompts, GenerationConfig(6, Sampling(1.0), seed=3, think=think))
        found[way] = [{"tokens": r.tokens, "log_probs": r.log_probs, "overflow": r.overflow} for r in results]
    (out / f"sample-{name}.json").write_text(json.dumps(found))
    if mesh is not None:
        state = generator.start(prompts, GenerationConfig(6))
        ids_B = jax.numpy.arange(4, dtype=jax.numpy.int32)
        new = NewTokens(ids_B, ids_B + 3, jax.numpy.int32(0), ids_B >= 0)
        with use_mesh(mesh):
            step = jax.jit(functools.partial(decode_step, decoder)).lower(generator.params, state.caches, new)
        (out / f"decode-{name}.txt").write_text(step.compile().as_text() or "")
        numbers = np.float32(1)
        bounds = programs.Bounds(np.int32(6), np.float32(0.2), numbers, numbers, numbers, np.full(8, -1, np.int32))
        with use_mesh(mesh):
            loop = programs.advance_program().lower(
                decoder, run.thinking, generator.params, state, bounds, None,
                sampling=Sampling(1.0), think=replace(AUTO, threshold=0.0),
            )  # fmt: skip
        (out / f"auto-{name}.txt").write_text(loop.compile().as_text() or "")


def attention(out: Path) -> None:
    """The kernels for TPUs, interpreted, on each device's own rows and heads."""
    arrays = jax.tree.leaves(problem((8, 8, 2, 1, 128, 130, 8), documents=2))
    cotangents = jax.numpy.cos(arrays[0]), jax.numpy.sin(arrays[0][..., 0])
    one = jax.jit(functools.partial(value_and_gradients, 1, None))(arrays, cotangents)
    with use_mesh(make_mesh(MeshConfig(*MESHES["mixed"]))):
        mesh = jax.sharding.get_abstract_mesh()
        program = jax.jit(functools.partial(value_and_gradients, 1, INTERPRETED["tpu"], mesh=mesh))
        many = program(arrays, cotangents)
    np.savez(out / "attention-one.npz", *one)
    np.savez(out / "attention-mixed.npz", *many)


if __name__ == "__main__":
    folder, nightly = Path(sys.argv[1]), sys.argv[2] == "nightly"
    for kind, meshes in (NIGHTLY if nightly else QUICK).items():
        for name in ("one", *meshes):
            train(kind, name, folder)
    if nightly:
        for name in ("one", "mixed"):
            sample(name, folder)
    else:
        attention(folder)
