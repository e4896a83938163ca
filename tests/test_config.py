"""Configurations: every bad value is one clear line that names its field, and what is stored comes back."""

import dataclasses
import json
import re
from dataclasses import replace
from typing import Any, get_type_hints

import jax.numpy as jnp
import pytest

from mod_star import presets
from mod_star.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessesConfig,
    RoutingConfig,
    RunConfig,
    ThinkingConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from mod_star.config_checks import Interval, NotEmpty, above, at_least, between, field_ranges
from mod_star.errors import InputError

RUN = RunConfig(ModelConfig(vocab_size=13), RoutingConfig(capacity=0.25), thinking=ThinkingConfig(n_true=2))
GROUPS: dict[str, Any] = {
    "model": ModelConfig,
    "routing": RoutingConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "thinking": ThinkingConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "mesh": MeshConfig,
    "processes": ProcessesConfig,
}
FIELDS = [f"{group}.{field.name}" for group, kind in GROUPS.items() for field in dataclasses.fields(kind)]

INVALID: dict[str, list[Any]] = {
    "model.vocab_size": [-1, 2.5, None],
    "model.width": [0, -8, 8.0, "8", True],
    "model.layers": [0],
    "model.heads": [0, 3],
    "model.kv_heads": [0, 3, -1],
    "model.head_dim": [0, 3, -2],
    "model.mlp_width": [0],
    "model.experts": [-1, 2.5],
    "model.experts_active": [0, 1.5],
    "model.experts_width": [0, "8"],
    "model.experts_null": [-1, 2],  # 2: without experts
    "model.experts_null_kind": ["constant"],
    "model.experts_balance": ["loss", None],
    "model.experts_weight": [-0.1, float("nan"), float("inf")],
    "model.context": [1, 0],
    "model.rope_theta": [1.0, float("nan"), float("inf")],
    "model.rope_scaling": ["yarn", "dynamic", None],
    "model.rope_factor": [0.5, 2.0, float("inf")],  # 2: without rope_scaling
    "model.rope_low_freq_factor": [0.0, -1.0, float("nan")],
    "model.rope_high_freq_factor": [1.0, 0.5],
    "model.rope_original_context": [0, 8192.0],
    "model.sliding_window": [0, -1, 2.5],
    "model.qkv_bias": [1, None],
    "model.qk_norm": ["yes"],
    "model.norm_eps": [0.0, 1.0, float("nan")],
    "model.tie_embeddings": [1, "yes"],
    "model.dtype": ["float16", jnp.float32],
    "model.precision": ["bfloat16", "HIGHEST"],
    "model.attention": ["flash", "fused"],
    "model.remat": ["some"],
    "model.scan": [None],
    "routing.every": [-1, 1.5],
    "routing.first": [0, 3, 1.5],
    "routing.router_norm": [1],
    "routing.keep_key_values": [1],
    "routing.adapter_rank": [-1, 1.5],
    "routing.capacity": [0.0, -0.1, 1.01, float("nan"), "0.5"],
    "routing.capacity_tokens": [0, 3.0],
    "routing.gate": ["relu"],
    "routing.causal_rule": ["none"],
    "routing.predictor_width": [0],
    "routing.auxiliary_weight": [-0.1, float("nan"), float("inf")],
    "routing.selection": ["random"],
    "routing.decoded_rows": ["some"],
    "routing.headroom": [0.9, float("nan"), float("inf")],
    "routing.stages": [(1.5,), (0.5, 0.5), (0.1,), (0.125,), (0.5, 0.8), (1.0, float("nan")), [0.5], 0.5],
    "routing.stage_fraction": [0.0, 1.0, float("nan")],
    "routing.noise": [-0.1, float("nan"), float("inf")],
    "routing.explore": [-0.1, 1.1, float("nan")],
    "routing.explore_steps": [-1, 1.5],
    "routing.budgets": [(1.5,), (0.5, 0.5), (0.25, 0.125, 0.5), (0.25,), [0.125], 0.125],
    "optimizer.learning_rate": [0.0, -1.0, float("nan"), float("inf")],
    "optimizer.schedule": ["linear"],
    "optimizer.warmup_steps": [-1, 0.5],
    "optimizer.decay_fraction": [0.0, 1.1],
    "optimizer.final_fraction": [-0.1, 1.1],
    "optimizer.weight_decay": [-0.1, float("inf")],
    "optimizer.b1": [-0.1, 1.0],
    "optimizer.b2": [-0.1, 1.0, float("nan")],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.clip": [-1.0, float("nan")],
    "train.objective": ["mlm", 1],
    "train.steps": [0, 1.5],
    "train.flops": [0.0, -1.0, float("nan"), float("inf")],
    "train.batch_size": [0],
    "train.accumulation": [0, 3],
    "train.seed": [-1],
    "train.trainable": ["router", ["router"], (1,), None],
    "lora.rank": [-1, 2.0, None],
    "lora.alpha": [0.0, -1.0, float("inf")],
    "lora.targets": [(), "query", (1,)],
    "train.loss_chunk": [0],
    "train.log_every": [0],
    "train.eval_every": [-1],
    "train.eval_batches": [0],
    "train.checkpoint_every": [-1],
    "train.keep_checkpoints": [0],
    "train.max_skipped": [0],
    "thinking.thought_length": [-1, 1.5],
    "thinking.n_true": [0, -3],
    "thinking.n_thoughts": [0, 1],  # 1: with REINFORCE the reward would always be zero
    "thinking.kind": ["silent"],
    "thinking.think_fraction": [0.0, -0.5, 1.5, float("nan")],
    "thinking.think_where": ["everywhere"],
    "thinking.decider_width": [-1, 0.5],
    "thinking.base_weight": [-1.0, float("inf")],
    "thinking.talk_weight": [-1.0],
    "thinking.policy_weight": [-1.0, float("nan")],
    "thinking.baseline": ["none"],
    "thinking.mixing": ["base"],
    "thinking.drop_negative": [1],
    "thinking.temperature": [-0.1, float("inf")],
    "thinking.policy_temperature": [0.0],
    "thinking.start_text": ["", None],
    "thinking.end_text": [""],
    "thinking.embedding_rate": [0.0, float("nan")],
    "thinking.chunk": [0],
    "thinking.gather": ["layer"],
    "thinking.stages": [(0,), (8,), (9, 9), (9, 12), (12, 4), (12.5,), [12], 12],
    "thinking.stage_fraction": [0.0, 1.0, float("nan")],
    "data.source": [(), "python-docs", (1,)],
    "data.weights": [(0.0,), (-1.0,), (1.0, 1.0), (float("nan"),), 1.0],  # two: for one source
    "data.template": [1],
    "data.separator": ["", 0],
    "data.tokenizer": [None],
    "data.held_out": [0.0, 1.0, float("nan")],
    "data.pack": [1],
    "data.seed": [-1, 0.5],
    "mesh.data": [-1, None],
    "mesh.fsdp": [0, 1.5],
    "mesh.tensor": [0, True],
    "processes.coordinator": [1],
    "processes.count": [0, 2.0],
    "processes.index": [-1, "0"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_value_is_an_error_that_names_field_value_and_what_is_allowed(name: str) -> None:
    group, field = name.split(".")
    for value in INVALID[name]:
        with pytest.raises(InputError) as error:
            GROUPS[group](**{field: value})
        message = str(error.value)
        assert message.startswith(f"{name} = {value!r}: "), message
        assert len(message.split(": ", 1)[1]) > 5 and "\n" not in message


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (at_least(2), (2, 2.5, 1e30, (3, 2)), (1.999, -5, (3, 1)), "at least 2"),
        (above(0), (1e-30, 7, ()), (0, -1e-30, (1.0, 0.0)), "above 0"),
        (between(0, 1), (0.001, 0.999), (0, 1, -1, 2), "in (0, 1)"),
        (between(0, 1, "[)"), (0, 0.5), (1, -0.1), "in [0, 1)"),
        (between(0, 1, "(]"), (0.5, 1, (1.0, 0.5)), (0, 1.01, (0.5, 1.5)), "in (0, 1]"),
        (between(-1, 0.5, "[]"), (-1, 0, 0.5), (-1.1, 0.6), "in [-1, 0.5]"),
        (NotEmpty(), ("a", ("",)), ("", ()), "not empty"),
    ],
)
def test_ranges(allowed: Any, inside: tuple[Any, ...], outside: tuple[Any, ...], text: str) -> None:
    assert [allowed.holds(value) for value in inside] == [True] * len(inside)
    assert [allowed.holds(value) for value in outside] == [False] * len(outside)
    assert allowed.text == text
    if isinstance(allowed, Interval):
        assert not allowed.holds(float("nan"))


def test_every_number_states_its_range() -> None:
    """Or what is allowed would be known to the code alone."""
    for kind in GROUPS.values():
        numbers = {name for name, hint in get_type_hints(kind).items() if re.search(r"\b(int|float)\b", str(hint))}
        assert numbers == {name for name, each in field_ranges(kind).items() if isinstance(each, Interval)}


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        (ModelConfig, {"vocab_size": -1}, "model.vocab_size = -1: must be at least 0 (0: from the tokenizer)"),
        (ModelConfig, {"context": 1}, "model.context = 1: must be at least 2 (a token and its successor)"),
        (ModelConfig, {"kv_heads": "4"}, "model.kv_heads = '4': must be an integer or None"),
        (ModelConfig, {"rope_theta": float("inf")}, "model.rope_theta = inf: must be a finite number"),
        (ModelConfig, {"scan": 1}, "model.scan = 1: must be True or False"),
        (ModelConfig, {"norm_eps": 1}, "model.norm_eps = 1: must lie in (0, 1)"),
        (RoutingConfig, {"stages": [0.5]}, "routing.stages = [0.5]: must be a tuple, each item a finite number"),
        (RoutingConfig, {"capacity_tokens": 0}, "routing.capacity_tokens = 0: must be at least 1"),
        (OptimizerConfig, {"eps": 0}, "optimizer.eps = 0: must be above 0"),
        (DataConfig, {"separator": ""}, "data.separator = '': must not be empty"),
        (RunConfig, {"model": None}, "model = None: must be a ModelConfig"),
        (RunConfig, {"parts": 1}, "parts = 1: must be a str or None"),
    ],
)
def test_an_error_says_what_is_allowed(group: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        group(**fields)
    assert str(error.value) == message


def test_choices_are_named() -> None:
    with pytest.raises(InputError, match=r"^routing\.gate = 'relu': must be one of sigmoid, identity, tanh$"):
        RoutingConfig(gate="relu")  # type: ignore[arg-type]


def test_numbers_of_other_kinds_are_numbers() -> None:
    assert RoutingConfig(capacity=1).capacity == 1
    assert ModelConfig(width=jnp.int32(8).item(), rope_theta=500).rope_theta == 500


@pytest.mark.parametrize(
    ("model", "routing", "name"),
    [
        (ModelConfig(layers=3), RoutingConfig(every=2), "model.layers = 3"),
        (ModelConfig(layers=2), RoutingConfig(every=4), "model.layers = 2"),
        (ModelConfig(context=64), RoutingConfig(capacity_tokens=65), "routing.capacity_tokens = 65"),
    ],
)
def test_fields_that_do_not_fit_each_other(model: ModelConfig, routing: RoutingConfig, name: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(name)}: must be"):
        RunConfig(model, routing)
    RunConfig(model, replace(routing, every=0))


def test_stages_are_shares() -> None:
    RoutingConfig(stages=(1.0, 0.5))
    with pytest.raises(InputError, match=r"^routing\.capacity_tokens = 3: must be None with routing\.stages"):
        RoutingConfig(stages=(1.0, 0.5), capacity_tokens=3)
    with pytest.raises(InputError, match=r"^routing\.stages = \(1\.0, 0\.5\): .* above routing\.capacity = 0\.5$"):
        RoutingConfig(stages=(1.0, 0.5), capacity=0.5)


@pytest.mark.parametrize("name", ["noise", "explore"])
def test_chance_explores_where_scores_select_and_the_next_token_is_the_objective(name: str) -> None:
    fields: dict[str, Any] = {name: 0.5}
    message = rf"^routing\.{name} = 0\.5: must be 0 with routing\.selection = 'stochastic'"
    with pytest.raises(InputError, match=message):
        RoutingConfig(selection="stochastic", **fields)
    with pytest.raises(InputError, match=rf"^routing\.{name} = 0\.5: must be 0 with train\.objective = 'quiet_star'"):
        RunConfig(routing=RoutingConfig(**fields), train=TrainConfig(objective="quiet_star"))
    RunConfig(routing=RoutingConfig(every=0, **fields), train=TrainConfig(objective="quiet_star"))


def test_a_model_that_keeps_key_values_does_not_learn_to_think() -> None:
    with pytest.raises(InputError, match=r"^routing\.keep_key_values = True: must be False to think"):
        RunConfig(routing=RoutingConfig(keep_key_values=True), train=TrainConfig(objective="quiet_star"))


def test_sizes_that_follow_from_others() -> None:
    config = ModelConfig(width=96, heads=6)
    assert (config.head_size, config.key_heads, config.hidden_width) == (16, 6, 256)
    config = ModelConfig(width=96, heads=5, head_dim=20, kv_heads=1, mlp_width=7)
    assert (config.head_size, config.key_heads, config.hidden_width) == (20, 1, 7)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_preset_survives_json(preset: str) -> None:
    run = presets.PRESETS[preset]()
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run
    dense = presets.dense(run)
    assert dense.routing.every == 0 and replace(dense, routing=run.routing) == run


def test_a_stored_configuration_has_no_unknown_field() -> None:
    stored = to_dict(RUN)
    for broken, message in [
        ({**stored, "modle": {}}, "config: unknown fields.*modle"),
        ({**stored, "model": {**stored["model"], "depth": 3}}, r"config\.model: unknown fields.*depth"),
    ]:
        with pytest.raises(InputError, match=message):
            from_dict(broken)


def test_fields_that_an_older_version_did_not_store_take_their_defaults() -> None:
    stored = to_dict(RUN)
    del stored["thinking"], stored["train"]["objective"], stored["parts"]
    assert from_dict(stored) == replace(RUN, thinking=ThinkingConfig())


def test_what_thinking_cannot_do_is_refused() -> None:
    quiet_star = TrainConfig(objective="quiet_star")
    with pytest.raises(InputError, match=r"^thinking\.n_true = 64: must be below model\.context = 64$"):
        RunConfig(ModelConfig(context=64), train=quiet_star, thinking=ThinkingConfig(n_true=64))
    with pytest.raises(InputError, match=r"^routing\.selection = 'stochastic': must be learned"):
        RunConfig(routing=RoutingConfig(selection="stochastic"), train=quiet_star)
    with pytest.raises(InputError, match=r"^thinking\.n_thoughts = 1: must be at least 2: .* reward is always zero"):
        ThinkingConfig(n_thoughts=1)
    ThinkingConfig(n_thoughts=1, policy_weight=0)
    with pytest.raises(InputError, match=r"^thinking\.policy_weight = 1.0: must be 0 with thinking\.kind = 'pause'"):
        ThinkingConfig(kind="pause")
    with pytest.raises(InputError, match=r"^thinking\.n_thoughts = 2: must be 1 with thinking\.kind = 'latent'"):
        ThinkingConfig(kind="latent", policy_weight=0)
