"""Types are said, never left to a default, and no NaN stands for "none": JAX may be told to be strict about both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import random_params
from decoding_models import make_generator
from fork_server import succeed
from thinking_models import thinking_params

from mod_star.config import RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.think import Think
from mod_star.model import Decoder
from mod_star.training.lowering import lower_train_step
from mod_star.training.state import init_state

STRICT = "import jax; jax.config.update('jax_enable_x64', True); jax.config.update('jax_debug_nans', True)"


@pytest.mark.nightly
def test_training_to_think_and_thinking_work_where_jax_is_strict(thinking_run: Path, tmp_path: Path) -> None:
    model = "--preset tiny --model.width 16 --model.layers 1 --model.heads 2 --model.mlp-width 16 --routing.every 1"
    fields = "--train.objective quiet_star --train.steps 2 --train.batch-size 2 --train.log-every 1 --model.context 24"
    thinking = ["--thinking.thought-length", "2", "--thinking.n-true", "2", "--thinking.think-fraction", "0.1"]
    succeed("train", tmp_path / "run", *model.split(), *fields.split(), *thinking, "--quiet", before=STRICT)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2], (
        "the second takes the first one's state"
    )
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()

    sample: list[str | Path] = ["sample", thinking_run, "--prompt", "A", "--new-tokens", "5", "--temperature", "0.8"]
    sample += ["--json", "--think", "always"]  # which has a plain step's program in it
    found, expected = (json.loads(succeed(*sample, before=before).out) for before in (STRICT, ""))
    assert found["tokens"] == expected["tokens"], "draws are those of float32"
    assert found["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-4)


@pytest.mark.nightly
def test_no_program_computes_in_64_bits_because_jax_could(tiny_run: RunConfig) -> None:
    """But for scalars of Optax: its bias corrections and the learning rate."""
    thinking = ThinkingConfig(thought_length=2, n_true=2, chunk=8, think_fraction=0.5)
    routing = replace(tiny_run.routing, selection="learned")
    model, train = replace(tiny_run.model, layers=2), replace(tiny_run.train, objective="quiet_star")
    run = replace(tiny_run, model=model, routing=routing, thinking=thinking, train=train)
    params = thinking_params(run, random_params(run.model, run.routing))
    decoder = Decoder(run.model, run.routing)
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda p: init_state(decoder, run, 10, p), params)
        assert not wide(jax.tree.leaves(state))
        text = lower_train_step(decoder, run, 10, state).as_text()
        generator = make_generator(decoder, params, thinking=thinking)
        started = generator.start([[1, 2, 3]], GenerationConfig(4))
        assert not wide(jax.tree.leaves(started))
        assert not wide(jax.tree.leaves(generator.advance(started, 2, Sampling(top_k=3), Think("always"))))
    assert not set(re.findall(r"tensor<\d[\dx]*xf64>", text))


def wide(leaves: list[Any]) -> list[str]:
    arrays = [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [str(leaf.dtype) for leaf in arrays if leaf.dtype.itemsize > 4]
