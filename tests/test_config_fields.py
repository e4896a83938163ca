"""Every field of a configuration is alive: another value changes something."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RoutingConfig,
    RunConfig,
    ThinkingConfig,
    TrainConfig,
)
from mod_star.decoding.programs import Prompts, Size, prefill
from mod_star.decoding.step import NewTokens, decode_step, unstack
from mod_star.distributed.sharding import make_mesh, use_mesh
from mod_star.flops import training_step_flops
from mod_star.initial_params import init_params, initial_params
from mod_star.model import Decoder
from mod_star.stages import plan_stages
from mod_star.thinking.parameters import thinking_init
from mod_star.tokenization import ByteTokenizer
from mod_star.training.objectives.next_token import forward, make_loss
from mod_star.training.optimizer import make_optimizer
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step, objective_of

GROUPS: dict[str, Any] = {
    "model": ModelConfig,
    "routing": RoutingConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "thinking": ThinkingConfig,
    "lora": LoraConfig,
}
RUN = RunConfig(
    ModelConfig(vocab_size=13, width=8, layers=1, heads=2, mlp_width=6, context=12),
    RoutingConfig(every=1, capacity=0.25, predictor_width=4),
    optimizer=OptimizerConfig(warmup_steps=2),
    train=TrainConfig(batch_size=2, loss_chunk=12),
    thinking=ThinkingConfig(thought_length=3, n_true=2, chunk=4),
)


def shapes(run: RunConfig) -> tuple[Any, Any]:
    """Of the parameters and of a batch."""
    ids = jax.ShapeDtypeStruct((run.train.batch_size, 12), jnp.int32)
    batch: dict[str, Any] = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["weights"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    return jax.eval_shape(lambda: init_params(Decoder(run.model, run.routing), 0)), batch


def loss_of(run: RunConfig) -> Callable[[Any, Any], Any]:
    """With a key, which only stochastic routing uses."""
    loss, one = make_loss(Decoder(run.model, run.routing), run), jnp.float32(1)
    return lambda params, batch: loss(params, batch, jax.random.key(0), one, one)[0]


def text_of(program: jax.extend.core.ClosedJaxpr) -> str:
    """A program with its constants, and without addresses, with which it would never equal another."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{program} {[np.asarray(values).tolist() for values in program.consts]}")


def program(run: RunConfig) -> str:
    """The loss."""
    return text_of(jax.make_jaxpr(loss_of(run))(*shapes(run)))


def long_program(run: RunConfig) -> str:
    """A forward pass over enough tokens for attention in blocks."""
    decoder = Decoder(run.model, run.routing)
    hidden = lambda params, tokens: decoder.apply({"params": params}, tokens).hidden  # type: ignore[union-attr] # noqa: E731
    return text_of(jax.make_jaxpr(hidden)(shapes(run)[0], jax.ShapeDtypeStruct((256,), jnp.int32)))


def gradient_program(run: RunConfig) -> str:
    return text_of(jax.make_jaxpr(jax.grad(loss_of(run)))(*shapes(run)))


def causal_program(run: RunConfig) -> str:
    decoder = Decoder(run.model, run.routing)
    return text_of(jax.make_jaxpr(lambda p, b: forward(decoder, p, b, None, "causal").hidden)(*shapes(run)))


def step_program(run: RunConfig) -> str:
    decoder = Decoder(run.model, run.routing)
    state = jax.eval_shape(lambda: init_state(decoder, run, 10, initial_params(decoder, run, ByteTokenizer())))
    return text_of(jax.make_jaxpr(make_train_step(decoder, run, 10))(state, shapes(run)[1]))


def updates(run: RunConfig) -> list[float]:
    """What three optimizer steps of a run of twelve, and its last, do to a matrix with large and small gradients."""
    optimizer = make_optimizer(run, 12)
    params = {"embedding": jnp.ones((2, 2)), "thinking": {"start": jnp.ones(2)}}
    state, changes = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for step in range(12):
        grads = {"embedding": jnp.asarray([[3.0, -1.0], [1e-7, 0.5 * step]]), "thinking": {"start": jnp.ones(2)}}
        change, state = update(grads, state, params)
        changes.extend(jnp.concatenate([change["embedding"].ravel(), change["thinking"]["start"]]).tolist())
    return changes


def objective_program(run: RunConfig) -> str:
    """The loss of the run's objective. Without its gradient, which would tell no more and be twice as long."""
    decoder = Decoder(run.model, run.routing)
    params, batch = shapes(run)
    params["thinking"] = jax.eval_shape(
        lambda embedding: thinking_init(jax.random.key(0), run.model, embedding, [1], [1], thinking=run.thinking),
        params["embedding"],
    )
    return text_of(jax.make_jaxpr(objective_of(decoder, run).loss)(params, batch, jax.random.key(0), 1.0, 1.0))


def decoding_program(run: RunConfig) -> str:
    """A step of two rows."""
    decoder = Decoder(run.model, run.routing)

    def step(params: Any) -> Any:
        own, ids_B = unstack(decoder, params), jnp.ones(2, jnp.int32)
        prompts = Prompts(ids_B[:, None], ids_B, jnp.uint32(ids_B), 2, 4, jax.random.key(0))
        caches = prefill(decoder, None, own, prompts, None, size=Size(4, 4)).caches
        return decode_step(decoder, own, caches, NewTokens(ids_B, ids_B, jnp.int32(0), ids_B > 0))

    return text_of(jax.make_jaxpr(step)(shapes(run)[0]))


def thinking_program(run: RunConfig) -> str:
    """The Quiet-STaR loss of one block without routing."""
    run = with_fields(with_fields(run, "train", objective="quiet_star"), "routing", every=0)
    return objective_program(with_fields(run, "model", layers=1))


def thinking_program_on_a_mesh(run: RunConfig) -> str:
    """The same, on a mesh of one device: as it is written, with the places of arrays."""
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        return thinking_program(run)


def first_thinking(run: RunConfig) -> list[float]:
    """<start> and <end> before the first step, of a model whose embedding tells all bytes apart."""
    run = with_fields(run, "train", objective="quiet_star")
    base = {"embedding": jnp.broadcast_to(jnp.arange(256.0)[:, None], (256, run.model.width))}
    thinking = initial_params(Decoder(run.model, run.routing), run, ByteTokenizer(), base)["thinking"]
    return [*thinking["start"].tolist(), *thinking["end"].tolist()]


def adapted_program(run: RunConfig) -> str:
    """The loss of the run's objective with its adapters, if it has any."""
    decoder = Decoder(run.model, run.routing)
    params = jax.eval_shape(lambda: initial_params(decoder, run, ByteTokenizer()))
    batch = shapes(run)[1]
    return text_of(jax.make_jaxpr(objective_of(decoder, run).loss)(params, batch, jax.random.key(0), 1.0, 1.0))


def optimizer_state(run: RunConfig) -> str:
    """What the optimizer keeps."""
    return str(jax.eval_shape(lambda: init_state(Decoder(run.model, run.routing), run, 10).opt_state))


def first_key(run: RunConfig) -> list[int]:
    key: Any = jax.jit(lambda: init_state(Decoder(run.model, run.routing), run, 10).key)()
    return jax.random.key_data(key).tolist()


def with_fields(run: RunConfig, group: str, **fields: Any) -> RunConfig:
    return replace(run, **{group: replace(getattr(run, group), **fields)})


Observed = Callable[[RunConfig], Any]

LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original_context": 10}
EXPERTS: dict[str, Any] = {"model": {"experts": 2, "experts_null": 2}}
# For each field another value, where to see that it matters, and what else to set for it to matter.
ALIVE: dict[str, tuple[Any, Observed, dict[str, Any]]] = {
    "model.vocab_size": (14, program, {}),
    "model.width": (16, program, {}),
    "model.layers": (4, program, {}),
    "model.heads": (4, program, {}),
    "model.kv_heads": (1, program, {}),
    "model.head_dim": (6, program, {}),
    "model.mlp_width": (5, program, {}),
    "model.experts": (3, program, {}),
    "model.experts_active": (1, program, EXPERTS),
    "model.experts_width": (5, program, EXPERTS),
    "model.experts_null": (1, program, EXPERTS),
    "model.experts_null_kind": ("copy", program, EXPERTS),
    "model.experts_balance": ("bias", program, EXPERTS),
    "model.experts_weight": (0.5, program, EXPERTS),
    "model.context": (10, training_step_flops, {}),
    "model.rope_theta": (20.0, program, {}),
    "model.rope_scaling": ("linear", program, {"model": {"rope_scaling": "llama3", "rope_factor": 2.0}}),
    "model.rope_factor": (3.0, program, {"model": {"rope_scaling": "linear"}}),
    "model.rope_low_freq_factor": (0.5, program, {"model": LLAMA3}),
    "model.rope_high_freq_factor": (3.0, program, {"model": LLAMA3}),
    "model.rope_original_context": (5, program, {"model": LLAMA3}),
    "model.sliding_window": (3, program, {}),
    "model.qkv_bias": (True, program, {}),
    "model.qk_norm": (True, program, {}),
    "model.norm_eps": (0.01, program, {}),
    "model.tie_embeddings": (False, program, {}),
    "model.dtype": ("bfloat16", program, {}),
    "model.precision": ("default", program, {}),
    "model.attention": ("plain", long_program, {}),
    "model.remat": ("dots", gradient_program, {}),
    "model.scan": (False, program, {}),
    "routing.every": (2, program, {"model": {"layers": 2}}),
    "routing.first": (1, program, {"model": {"layers": 2}, "routing": {"every": 2}}),
    "routing.router_norm": (True, program, {}),
    "routing.keep_key_values": (True, program, {}),
    "routing.adapter_rank": (2, program, {}),
    "routing.capacity": (0.5, program, {}),
    "routing.capacity_tokens": (5, program, {}),
    "routing.gate": ("tanh", program, {}),
    "routing.causal_rule": ("router", program, {}),
    "routing.predictor_width": (5, program, {}),
    "routing.auxiliary_weight": (0.5, program, {}),
    "routing.selection": ("stochastic", program, {}),
    "routing.headroom": (2.0, causal_program, {}),
    "routing.decoded_rows": ("fixed", decoding_program, {}),
    "routing.stages": ((1.0, 0.5), plan_stages, {}),
    "routing.stage_fraction": (0.25, plan_stages, {"routing": {"stages": (1.0,)}}),
    "routing.budgets": ((1.0, 0.25), plan_stages, {}),
    "routing.noise": (0.5, program, {}),
    "routing.explore": (0.5, program, {}),
    "routing.explore_steps": (7, step_program, {"routing": {"explore": 0.5}}),
    "optimizer.learning_rate": (0.1, updates, {}),
    "optimizer.schedule": ("wsd", updates, {}),
    "optimizer.warmup_steps": (4, updates, {}),
    "optimizer.decay_fraction": (0.5, updates, {"optimizer": {"schedule": "wsd"}}),
    "optimizer.final_fraction": (0.5, updates, {}),
    "optimizer.weight_decay": (0.0, updates, {}),
    "optimizer.b1": (0.5, updates, {}),
    "optimizer.b2": (0.5, updates, {}),
    "optimizer.eps": (1e-3, updates, {}),
    "optimizer.clip": (0.0, updates, {}),
    "train.objective": ("quiet_star", objective_program, {}),
    "train.batch_size": (4, training_step_flops, {}),
    "train.accumulation": (2, step_program, {}),
    "train.seed": (1, first_key, {}),
    "train.trainable": (("router", "embedding"), optimizer_state, {}),
    "train.loss_chunk": (4, program, {}),
    "lora.rank": (2, adapted_program, {}),
    "lora.alpha": (5.0, adapted_program, {"lora": {"rank": 2}}),
    "lora.targets": (("query",), adapted_program, {"lora": {"rank": 2}}),
    "thinking.thought_length": (2, thinking_program, {}),
    "thinking.n_true": (3, thinking_program, {}),
    "thinking.n_thoughts": (3, thinking_program, {}),
    "thinking.kind": ("pause", thinking_program, {"thinking": {"n_thoughts": 1, "policy_weight": 0.0}}),
    "thinking.think_fraction": (0.5, thinking_program, {}),
    "thinking.think_where": ("entropy", thinking_program, {"thinking": {"think_fraction": 0.5}}),
    "thinking.decider_width": (4, thinking_program, {}),
    "thinking.base_weight": (0.5, thinking_program, {}),
    "thinking.talk_weight": (0.5, thinking_program, {}),
    "thinking.policy_weight": (0.5, thinking_program, {}),
    "thinking.baseline": ("leave_one_out", thinking_program, {}),
    "thinking.mixing": ("thought", thinking_program, {}),
    "thinking.drop_negative": (False, thinking_program, {}),
    "thinking.temperature": (0.5, thinking_program, {}),
    "thinking.policy_temperature": (3.0, thinking_program, {}),
    "thinking.start_text": ("#", first_thinking, {}),
    "thinking.end_text": ("#", first_thinking, {}),
    "thinking.embedding_rate": (10.0, updates, {}),
    "thinking.chunk": (3, thinking_program, {}),
    "thinking.gather": ("step", thinking_program_on_a_mesh, {}),
    "thinking.stages": ((8, 4), plan_stages, {"train": {"objective": "quiet_star"}}),
    "thinking.stage_fraction": (
        0.25,
        plan_stages,
        {"train": {"objective": "quiet_star"}, "thinking": {"stages": (8,)}},
    ),
}
# The loop's: tests/training/test_loop.py tests what they do.
OF_THE_LOOP = {"steps", "flops", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"}
OF_THE_LOOP |= {"max_skipped"}
FIELDS = [f"{group}.{field.name}" for group, kind in GROUPS.items() for field in dataclasses.fields(kind)]


@pytest.fixture(scope="module")
def before() -> Callable[[Observed, RunConfig], Any]:
    """What is observed of a run with the field unchanged; each computed once."""
    seen: dict[Any, Any] = {}

    def look(observe: Observed, run: RunConfig) -> Any:
        if (observe, run) not in seen:
            seen[observe, run] = observe(run)
        return seen[observe, run]

    return look


LOWERED = [name for name in FIELDS if name.removeprefix("train.") not in OF_THE_LOOP]


def test_every_field_is_looked_at() -> None:
    assert {*LOWERED} == {*ALIVE}, "a field is new: say here what it changes"


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.nightly
def test_every_field_changes_something(name: str, before: Callable[[Observed, RunConfig], Any]) -> None:
    value, observe, others = ALIVE[name]
    run = RUN
    for group, fields in others.items():
        run = with_fields(run, group, **fields)
    group, field = name.split(".")
    assert getattr(getattr(run, group), field) != value
    assert observe(with_fields(run, group, **{field: value})) != before(observe, run)


@pytest.mark.parametrize(
    "observe",
    [program, gradient_program, causal_program, step_program, objective_program, thinking_program, updates],
)
def test_what_is_observed_is_the_same_when_nothing_changes(
    observe: Observed, before: Callable[[Observed, RunConfig], Any]
) -> None:
    """Or the test above could not fail: no addresses, no counters in it."""
    assert observe(replace(RUN, parts=None)) == before(observe, RUN)


def test_the_loop_reads_its_fields() -> None:
    package = Path(__file__).parent.parent / "mod_star"
    places = (
        "stages.py",
        *(f"training/{name}.py" for name in ("train", "session", "loop", "recorder", "saver", "inputs")),
    )
    loop = "".join((package / name).read_text() for name in places)
    assert {name for name in OF_THE_LOOP if not re.search(rf"\btrain\.{name}\b", loop)} == set()
    assert {f"train.{name}" for name in OF_THE_LOOP} <= set(FIELDS)
