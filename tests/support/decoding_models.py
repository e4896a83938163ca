"""Tiny models to decode with, and what their tokens should be: full forward passes over prompt and new tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_params
from jax.sharding import Mesh

from mod_star.config import ModelConfig, RoutingConfig, ThinkingConfig
from mod_star.decoding import Generator, Sampling, Think, programs
from mod_star.decoding.sampling import compiled_for
from mod_star.loaded_model import Model as LoadedModel
from mod_star.model import Decoder
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import head_matrix
from mod_star.tokenization.tokenizers import ByteTokenizer, Tokenizer

CONTEXT, VOCAB = 48, 29
BYTES = ByteTokenizer()
PROMPT_LENGTHS = (3, 20, 11, 1)
ROUTING_KEY = jax.random.key(11)


@dataclass(frozen=True)
class Teacher:
    """One full forward pass under the causal rule."""

    logits_SxV: np.ndarray
    selected_LxS: np.ndarray
    overflow_LxS: np.ndarray


class Model:
    """A decoder with random weights whose routing really varies from token to token.

    Args:
      routing: changes to the default `RoutingConfig`.
      parts: of the network.
      model: changes to the default `ModelConfig`.
    """

    def __init__(self, routing: dict[str, Any], parts: Parts = DEFAULT_PARTS, **model: Any) -> None:
        sizes: dict[str, Any] = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24}
        self.config = ModelConfig(vocab_size=VOCAB, context=CONTEXT, **(sizes | model))
        self.routing = RoutingConfig(**({"capacity": 0.25, "predictor_width": 8} | routing))
        self.decoder = Decoder(self.config, self.routing, parts)

    @cached_property
    def params(self) -> Any:
        return random_params(self.config, self.routing, self.decoder.parts)

    def generator(self, end_ids: tuple[int, ...] = (), tokenizer: Tokenizer = BYTES) -> Generator:
        return make_generator(self.decoder, self.params, end_ids, tokenizer=tokenizer, routing_key=ROUTING_KEY)

    def teach(self, tokens: list[int]) -> Teacher:
        """The pass over a text: logits after each of its tokens, and the routing of each."""
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(tokens)] = tokens
        logits, trace = self._teach(self.params, padded, np.int32(np.arange(CONTEXT) < len(tokens)))
        none = np.zeros((0, CONTEXT), bool)
        selected, overflow = (none, none) if trace is None else (trace.selected, trace.overflow)
        N = len(tokens)
        return Teacher(np.asarray(logits)[:N], np.asarray(selected)[:, :N], np.asarray(overflow)[:, :N])

    @cached_property
    def _teach(self) -> Any:
        decoder = Decoder(replace(self.config, scan=False), self.routing, self.decoder.parts)

        def run(params: Any, tokens_S: jax.Array, segment_ids_S: jax.Array) -> Any:
            slots = causal_slots(self.routing, CONTEXT)
            output: Any = decoder.apply(
                {"params": params}, tokens_S, None, segment_ids_S, mode="causal", slots=slots, key=ROUTING_KEY
            )
            head = head_matrix(params).astype(output.hidden.dtype)
            return jnp.dot(output.hidden, head.T, preferred_element_type=jnp.float32), output.trace

        return jax.jit(run)


def make_model(
    decoder: Decoder,
    params: Any,
    *,
    tokenizer: Tokenizer = BYTES,
    thinking: ThinkingConfig | None = None,
    routing_key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """A model whose tokenizer matters only where a test gives one."""
    return LoadedModel(decoder, params, tokenizer, thinking, mesh, routing_key)


def make_generator(
    decoder: Decoder,
    params: Any,
    end_ids: tuple[int, ...] = (),
    *,
    tokenizer: Tokenizer = BYTES,
    thinking: ThinkingConfig | None = None,
    routing_key: jax.Array | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Generator:
    """A generator with end tokens that are a test's own, whatever its tokenizer says."""
    model = make_model(decoder, params, tokenizer=tokenizer, thinking=thinking, routing_key=routing_key, mesh=mesh)
    return Generator(model, end_ids, donate)


def program_counts() -> tuple[int, int]:
    """How many programs this process has compiled by now, of prefill (of a group of blocks) and of decoding."""
    prefill: Any = programs.prefill_group
    return prefill._cache_size(), programs.advance_program()._cache_size()


def lowered_advance(
    generator: Generator, state: Any, sampling: Sampling, platforms: tuple[str, ...] | None = None
) -> Any:
    """The program that generates, of a model without thoughts, for a state's shapes; None: for the platform in use."""
    one = np.float32(1)
    bounds = programs.Bounds(np.int32(1), one, one, one, one, np.full(8, -1, np.int32))
    traced = programs.advance_program().trace(
        generator.decoder, None, generator.params, state, bounds, generator.routing_key,
        sampling=compiled_for(sampling), think=Think(),
    )  # fmt: skip
    return traced.lower() if platforms is None else traced.lower(lowering_platforms=platforms)


def make_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - np.max(logits, -1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def restrict_naively(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0
) -> np.ndarray:
    """Top-k, top-p and min-p one token after the other, in float64; -inf for tokens that are out."""
    logits = logits_V.astype(np.float64) / temperature
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    allowed = set(ranked)
    if top_k:
        allowed = {i for i in allowed if logits[i] >= logits[ranked[min(top_k, len(ranked)) - 1]]}
    probabilities = {i: np.exp(logits[i] - logits[ranked[0]]) for i in allowed}
    total, before, last = sum(probabilities.values()), 0.0, np.inf
    for i in ranked:
        if i in allowed and before < top_p * total:
            before += probabilities[i]
            last = logits[i]
    kept = {i for i in allowed if logits[i] >= last and np.exp(logits[i] - logits[ranked[0]]) >= min_p}
    return np.array([logit if i in kept else -np.inf for i, logit in enumerate(logits)])


def draw_naively(key: jax.Array, logits_V: np.ndarray) -> int:
    """The token at which the probabilities, added up in float64, exceed the key's uniform number."""
    probabilities = np.exp(logits_V - np.max(logits_V))
    return int(np.searchsorted(np.cumsum(probabilities / probabilities.sum()), float(jax.random.uniform(key)), "right"))
