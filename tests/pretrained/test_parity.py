"""Logits against transformers' own, stored by tests/references, and what comes of an import."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained_models import CONFIGS, DATA, write_model

from mod_star.config import ModelConfig
from mod_star.decoding.generate import Generator
from mod_star.decoding.sampling import Sampling
from mod_star.model import Decoder
from mod_star.model.transformer import head_matrix
from mod_star.pretrained.build import DENSE, build_params
from mod_star.pretrained.hf_directory import open_hf

REFERENCES = np.load(DATA / "parity.npz")
TOKENS = jnp.asarray(REFERENCES["tokens"])


def logits_of(config: ModelConfig, params: Any) -> np.ndarray:
    decoder = Decoder(config, DENSE)
    apply = jax.jit(lambda p: decoder.apply({"params": p}, TOKENS).hidden @ head_matrix(p).T)  # type: ignore[union-attr]
    return np.asarray(apply(params))


def difference(config: ModelConfig, params: Any, case: str) -> float:
    return float(np.abs(logits_of(config, params) - REFERENCES[case]).max())


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    source = open_hf(write_model(tmp_path, CONFIGS[case]))
    params = build_params(source)
    assert difference(source.config, params, case) < 2e-5
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == np.float32


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 6}),
        ("llama3", {"rope_high_freq_factor": 4.0}),
        ("llama, linear", {"rope_factor": 2.0}),
    ],
)
def test_the_references_would_notice(case: str, changed: dict[str, Any], tmp_path: Path) -> None:
    source = open_hf(write_model(tmp_path, CONFIGS[case]))
    assert difference(replace(source.config, **changed), build_params(source), case) > 2e-4


def test_decoding_with_caches_equals_the_whole_text_every_time(tmp_path: Path) -> None:
    """With window and biases, past the window, in a batch of unequal prompts."""
    source = open_hf(write_model(tmp_path, CONFIGS["qwen2, window, tied"]))
    params = build_params(source)
    decoder = Decoder(source.config, DENSE)
    prompts = [TOKENS[:9].tolist(), TOKENS[9:12].tolist()]
    generated = Generator(decoder, jax.tree.map(jnp.asarray, params), ()).generate(prompts, 8, Sampling(temperature=0))

    @jax.jit
    def best(text: jax.Array, length: jax.Array) -> jax.Array:
        hidden = decoder.apply({"params": params}, text).hidden[length - 1]  # type: ignore[union-attr]
        return jnp.argmax(hidden @ head_matrix(params).T)

    for prompt, found in zip(prompts, generated, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(best(jnp.asarray(text + [0] * (20 - len(text))), len(text))))  # type: ignore[arg-type]
        assert found.tokens == text[len(prompt) :]
