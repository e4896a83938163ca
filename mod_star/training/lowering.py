"""The programs of training, lowered from shapes alone: what the loop runs is what a plan or a test looks at."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mod_star.config import RunConfig
from mod_star.distributed.sharding import batch_sharding, place, placed_shapes, replicated, shardings, use_mesh
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.tokenization import Tokenizer
from mod_star.training.objectives import Objective, objective_of
from mod_star.training.state import TrainState, init_state
from mod_star.training.step import make_train_step


class WithFrozen:
    """A program, lowered or compiled, whose last arguments are an objective's frozen arrays.

    It is called without them. They are put in their places at the first call, for a plan has no devices to put them on.
    """

    def __init__(self, program: Any, frozen: tuple[Any, ...], mesh: Mesh | None) -> None:
        self._program, self._frozen, self._mesh = program, frozen, mesh

    def compile(self, *args: Any, **options: Any) -> WithFrozen:
        """The compiled program; arguments as for `jax.stages.Lowered.compile`."""
        return WithFrozen(self._program.compile(*args, **options), self._frozen, self._mesh)

    @functools.cached_property
    def _placed(self) -> tuple[Any, ...]:
        if self._mesh is None:
            return jax.device_put(self._frozen)
        with jax.transfer_guard("allow"):  # once, and in the training loop, which guards against transfers by mistake
            placed: tuple[Any, ...] = place(self._frozen, shardings(self._mesh, self._frozen))
        return placed

    def __call__(self, *args: Any) -> Any:
        """What the program computes of these arguments and the frozen arrays."""
        return self._program(*args, *self._placed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def frozen_shapes(frozen: tuple[Any, ...], mesh: Mesh | None = None) -> tuple[Any, ...]:
    """Shapes, types and, on a mesh, places of an objective's frozen arrays: as of parameters with the same paths."""
    shapes: tuple[Any, ...] = jax.eval_shape(lambda: frozen) if mesh is None else placed_shapes(mesh, frozen)
    return shapes


def state_shapes(
    decoder: Decoder, run: RunConfig, tokenizer: Tokenizer, total_steps: int, mesh: Mesh | None = None
) -> TrainState:
    """Shapes, types and, on a mesh, places of a training state."""
    shapes = jax.eval_shape(lambda: init_state(decoder, run, total_steps, initial_params(decoder, run, tokenizer)))
    return shapes if mesh is None else placed_shapes(mesh, shapes)


def batch_shapes(run: RunConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The same of a global batch, see `mod_star.data.pipeline`."""
    where = None if mesh is None else batch_sharding(mesh)
    shape = (run.train.batch_size, run.model.context)
    types = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in types.items()}


def lower_train_step(
    decoder: Decoder,
    run: RunConfig,
    total_steps: int,
    state: TrainState,
    mesh: Mesh | None = None,
    platforms: tuple[str, ...] | None = None,
    stop_shapes: tuple[jax.ShapeDtypeStruct, ...] = (),
) -> jax.stages.Lowered:
    """The training step `(state, batch, *stop) -> (state, metrics)`, which consumes its state.

    Args:
      decoder: the model.
      run: its configuration; of one stage, where the capacity falls in stages.
      total_steps: length of the learning-rate schedule.
      state: from `state_shapes`.
      mesh: None: one device.
      platforms: what to lower for, such as ("cuda",); None: the platform of the devices.
      stop_shapes: `shapes` of `mod_star.distributed.processes.SharedStop`.
    """
    places = None if mesh is None else (shardings(mesh, state), replicated(mesh))
    objective = objective_of(decoder, run)
    compute, frozen = make_train_step(decoder, run, total_steps, objective), frozen_shapes(objective.frozen, mesh)

    def step(state: TrainState, batch: Any, *others: Any) -> Any:
        stop, frozen = others[: len(others) - len(objective.frozen)], others[len(others) - len(objective.frozen) :]
        state, metrics = compute(state, batch, *frozen)
        if stop:
            metrics = metrics | {"stop": stop[0].max()}
        return state, metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
    with use_mesh(mesh):
        traced = jitted.trace(state, batch_shapes(run, mesh), *stop_shapes, *frozen)
        return _bound(traced.lower(lowering_platforms=platforms), objective, mesh)


def lower_eval_step(
    decoder: Decoder,
    run: RunConfig,
    params: Any,
    mesh: Mesh | None = None,
    platforms: tuple[str, ...] | None = None,
) -> jax.stages.Lowered:
    """The evaluation step `(params, batch, key) -> sums`. Args as for `lower_train_step`; `params` are shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    if mesh is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    objective = objective_of(decoder, run)
    step = jax.jit(objective.eval_step, out_shardings=None if mesh is None else replicated(mesh))
    with use_mesh(mesh):
        traced = step.trace(params, batch_shapes(run, mesh), key, *frozen_shapes(objective.frozen, mesh))
        return _bound(traced.lower(lowering_platforms=platforms), objective, mesh)


def _bound(lowered: jax.stages.Lowered, objective: Objective, mesh: Mesh | None) -> jax.stages.Lowered:
    """The program as it is called with state and batch alone."""
    bound: Any = WithFrozen(lowered, objective.frozen, mesh) if objective.frozen else lowered
    return bound
