"""The programs of training, lowered from shapes alone: what the loop runs is what a plan or a test looks at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True, eq=False)
class StageObjective:
    """An objective, made once for all programs of a stage, and its frozen arrays, which lie on the devices once."""

    objective: Objective
    mesh: Mesh | None
    """None: one device."""

    @classmethod
    def of(cls, decoder: Decoder, run: RunConfig, mesh: Mesh | None = None) -> Self:
        """That of `objective_of(decoder, run)`, which calls a user's function and may load a teacher."""
        return cls(objective_of(decoder, run), mesh)

    @property
    def frozen_shapes(self) -> tuple[Any, ...]:
        """Shapes, types and, on a mesh, places of the frozen arrays: as of parameters with the same paths."""
        frozen, mesh = self.objective.frozen, self.mesh
        shapes: tuple[Any, ...] = jax.eval_shape(lambda: frozen) if mesh is None else placed_shapes(mesh, frozen)
        return shapes

    @functools.cached_property
    def frozen(self) -> tuple[Any, ...]:
        """The frozen arrays in their places, put there at the first use: a plan has no devices to put them on."""
        if self.mesh is None:
            return jax.device_put(self.objective.frozen)
        with jax.transfer_guard("allow"):  # once, and in the training loop, which guards against transfers by mistake
            placed: tuple[Any, ...] = place(self.objective.frozen, shardings(self.mesh, self.objective.frozen))
        return placed

    def bind(self, program: Any) -> Any:
        """A program, lowered or compiled, that is called without its last arguments, the frozen arrays."""
        return _WithFrozen(program, self) if self.objective.frozen else program

    def examples(self) -> Callable[..., Any] | None:
        """`Objective.examples` compiled, as a function of (params, batch, key); None: there are no thoughts."""
        return None if self.objective.examples is None else self.bind(jax.jit(self.objective.examples))


@dataclass(frozen=True)
class _WithFrozen:
    """See `StageObjective.bind`."""

    program: Any
    stage: StageObjective

    def compile(self, *args: Any, **options: Any) -> _WithFrozen:
        """The compiled program; arguments as for `jax.stages.Lowered.compile`."""
        return _WithFrozen(self.program.compile(*args, **options), self.stage)

    def __call__(self, *args: Any) -> Any:
        """What the program computes of these arguments and the frozen arrays."""
        return self.program(*args, *self.stage.frozen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def state_shapes(
    decoder: Decoder, run: RunConfig, tokenizer: Tokenizer, total_steps: int, mesh: Mesh | None = None
) -> TrainState:
    """Shapes, types and, on a mesh, places of a training state."""
    shapes = jax.eval_shape(lambda: init_state(decoder, run, total_steps, initial_params(decoder, run, tokenizer)))
    return shapes if mesh is None else placed_shapes(mesh, shapes)


def lower_first_state(
    decoder: Decoder,
    run: RunConfig,
    tokenizer: Tokenizer,
    total_steps: int,
    state: TrainState,
    mesh: Mesh | None = None,
    base: dict[str, Any] | None = None,
) -> jax.stages.Lowered:
    """The program that makes the state before the first step, `(base) -> state`; it consumes what it is given.

    Args:
      decoder: the model.
      run: its configuration.
      tokenizer: as for `mod_star.initial_params.initial_params`.
      total_steps: length of the learning-rate schedule.
      state: from `state_shapes`.
      mesh: None: one device.
      base: parameters of the run to start from, arrays or shapes; None: random ones.
    """

    def first(base: dict[str, Any] | None) -> TrainState:
        return init_state(decoder, run, total_steps, initial_params(decoder, run, tokenizer, base))

    places = None if mesh is None else shardings(mesh, state)
    with use_mesh(mesh):
        lowered: jax.stages.Lowered = jax.jit(first, donate_argnums=0, out_shardings=places).lower(base)
    return lowered


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
    objective: StageObjective | None = None,
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
      objective: that of this decoder, run and mesh; None: it is made here.
    """
    places = None if mesh is None else (shardings(mesh, state), replicated(mesh))
    objective = StageObjective.of(decoder, run, mesh) if objective is None else objective
    compute, stops = make_train_step(decoder, run, total_steps, objective.objective), len(stop_shapes)

    def step(state: TrainState, batch: Any, *others: Any) -> Any:
        stop, frozen = others[:stops], others[stops:]
        state, metrics = compute(state, batch, *frozen)
        if stop:
            metrics = metrics | {"stop": stop[0].max()}
        return state, metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
    with use_mesh(mesh):
        traced = jitted.trace(state, batch_shapes(run, mesh), *stop_shapes, *objective.frozen_shapes)
        lowered: jax.stages.Lowered = objective.bind(traced.lower(lowering_platforms=platforms))
    return lowered


def lower_eval_step(
    decoder: Decoder,
    run: RunConfig,
    params: Any,
    mesh: Mesh | None = None,
    platforms: tuple[str, ...] | None = None,
    objective: StageObjective | None = None,
) -> jax.stages.Lowered:
    """The evaluation step `(params, batch, key) -> sums`. Args as for `lower_train_step`; `params` are shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    if mesh is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    objective = StageObjective.of(decoder, run, mesh) if objective is None else objective
    step = jax.jit(objective.objective.eval_step, out_shardings=None if mesh is None else replicated(mesh))
    with use_mesh(mesh):
        traced = step.trace(params, batch_shapes(run, mesh), key, *objective.frozen_shapes)
        lowered: jax.stages.Lowered = objective.bind(traced.lower(lowering_platforms=platforms))
    return lowered
