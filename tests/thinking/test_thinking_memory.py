"""Memory of a training step: linear in thoughts, their length and their places; compiled only."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.thinking.objective import place_count
from mod_star.thinking.parameters import thinking_init
from mod_star.training.objectives.quiet_star import make_quiet_star_loss

S, V = 128, 256
FIELDS: dict[str, Any] = {"thought_length": 8, "n_true": 2, "n_thoughts": 2, "chunk": 8, "think_fraction": 0.5}


@functools.cache
def compiled(**changed: Any) -> tuple[int, int]:
    """Bytes of temporary memory of the gradient of the loss, and elements of its largest array."""
    dtype = changed.pop("dtype", "float32")
    model = ModelConfig(vocab_size=V, width=8, layers=1, heads=1, mlp_width=8, context=S, dtype=dtype)
    train = TrainConfig(objective="quiet_star", batch_size=1, loss_chunk=32)
    run = RunConfig(model, RoutingConfig(every=0), train=train, thinking=ThinkingConfig(**FIELDS | changed))
    decoder = Decoder(model, run.routing)

    def init() -> Any:
        params = init_params(decoder, 0)
        return params | {"thinking": thinking_init(jax.random.key(0), model, params["embedding"], [0], [0])}

    batch = {n: jax.ShapeDtypeStruct((1, S), jnp.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((1, S), jnp.float32)
    loss, total = make_quiet_star_loss(decoder, run), jnp.float32(S)
    gradient = jax.jit(lambda p, b: jax.grad(lambda p: loss(p, b, jax.random.key(0), total, total)[0])(p))
    program = gradient.lower(jax.eval_shape(init), batch).compile()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text() or "")
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes, max(int(np.prod([int(d) for d in dims.split(",")])) for dims in shapes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thought_length", 16),
        ("n_thoughts", 4),
        ("think_fraction", 1.0),
    ],
)
@pytest.mark.nightly
def test_twice_the_thoughts_their_length_or_their_places_take_at_most_twice_the_memory(field: str, value: Any) -> None:
    assert compiled(**{field: value})[0] < 1.15 * 2 * compiled()[0]


@pytest.mark.nightly
def test_neither_attention_nor_logits_of_all_thought_tokens_exist() -> None:
    """The largest array is the logits of one token of every thought at once."""
    assert place_count(ThinkingConfig(**FIELDS | {"think_fraction": 1.0}), S) == S - 1
    _, largest = compiled(think_fraction=1.0)
    assert largest == (S - 1) * 2 * V
    assert largest < min(S * S * 8, (S - 1) * 8 * V)
    assert compiled(think_fraction=1.0, dtype="bfloat16")[1] == largest, "nor where two products' logits are mixed"
