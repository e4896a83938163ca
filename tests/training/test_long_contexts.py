"""Whole programs at long contexts: nothing in them has an element for each pair of tokens, for whatever platform."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.model import Decoder
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.lowering import lower_eval_step, lower_train_step, state_shapes

LONG = 4096
KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
"""How a platform's kernels are called in lowered programs."""


def make_run(context: int, dtype: Any = "float32") -> RunConfig:
    """A full and a routed block, as narrow as can be: what is large has grown with the context."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=64, width=16, layers=2, heads=2, mlp_width=32, context=context, remat="full", dtype=dtype
        ),
        routing=RoutingConfig(capacity=0.125, predictor_width=8),
        train=TrainConfig(batch_size=1, loss_chunk=128),
    )


def lowered(program: str, context: int, platforms: tuple[str, ...] | None = None, dtype: Any = "float32") -> Any:
    """A training step, a step that scores held-out text, or the reading of a prompt."""
    run = make_run(context, dtype)
    decoder = Decoder(run.model, run.routing)
    state = state_shapes(decoder, run, ByteTokenizer(), 100)
    if program == "training":
        return lower_train_step(decoder, run, 100, state, platforms=platforms)
    if program == "scoring":
        return lower_eval_step(decoder, run, state.params, platforms=platforms)
    prefill = jax.jit(lambda params, tokens: decoder.apply({"params": params}, tokens, keep_keys_values=True))
    return prefill.trace(state.params, jax.ShapeDtypeStruct((context,), jnp.int32)).lower(lowering_platforms=platforms)


def sizes(text: str, shape: str) -> list[int]:
    """Numbers of elements of all arrays."""
    found = [re.findall(r"\d+", dims) for dims in re.findall(shape, text)]
    assert len(found) > 100, "the program is not written as this test reads it"
    return [int(np.prod([int(n) for n in dims], dtype=np.int64)) for dims in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "platform"),
    [("training", "tpu"), ("training", "cuda"), ("scoring", "cpu"), ("prefill", "tpu"), ("prefill", "cuda")],
)
def test_no_program_has_an_array_of_all_pairs_of_tokens(program: str, platform: str) -> None:
    """A mask included, for all heads or for one."""
    text = lowered(program, LONG, (platform,), "float32" if platform == "cpu" else "bfloat16").as_text()
    assert [name for name, call in KERNELS.items() if call in text] == [name for name in KERNELS if name == platform]
    assert max(sizes(text, r"tensor<((?:\d+x)+)")) < LONG**2


@pytest.mark.nightly
@pytest.mark.parametrize("program", ["training", "scoring", "prefill"])
def test_temporaries_grow_as_the_tokens_do(program: str) -> None:
    """From 1,024 to 16,384 tokens: 16 times as many. All pairs of tokens would be 256 times as many."""
    short, long = (
        lowered(program, context).compile(AS_SHIPPED).memory_analysis().temp_size_in_bytes for context in (1024, 16384)
    )
    assert short > 1 << 16 and long < 1.2 * 16 * short
