"""The logits of an imported Qwen2 model beside those of its GGUF file in NumPy, in float64 and without this package.

    python -m experiments.cot_decoding_qwen.reference --gguf qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --run runs/qwen

The package `gguf` reads and dequantises the file; the rest is written from the description of the architecture (Qwen2
Technical Report, arXiv 2407.10671, section 2.2.1: RMSNorm, rotary positions, grouped queries, biases of queries, keys
and values, SwiGLU). Prints one JSON object: the largest difference of logits for float32, bfloat16 and int8 weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tyro

from mod_star.loaded_model import Model
from mod_star.model.layers import lookup
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks, logits_of

PROMPT = (
    "Q: A chef needs to cook 16 potatoes. He has already cooked 7. If each potato takes 5 minutes to cook, how long "
    "will it take him to cook the rest?\nA: 9 potatoes are left. 9 × 5 = 45. The answer is 45."
)


@dataclass(frozen=True)
class Options:
    """Compares the logits of a run with those of its GGUF file."""

    gguf: Path
    """The file that the run was imported from."""
    run: Path = Path("runs/qwen")
    """A run directory made by mod-star import."""


class Reference:
    """A Qwen2 model of a GGUF file; weights are dequantised one tensor at a time."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        number = lambda name: float(reader.fields[f"qwen2.{name}"].contents())  # noqa: E731
        self._layers, self._heads = int(number("block_count")), int(number("attention.head_count"))
        self._key_heads, self._base = int(number("attention.head_count_kv")), number("rope.freq_base")
        self._epsilon = number("attention.layer_norm_rms_epsilon")

    def weight(self, name: str) -> np.ndarray:
        """A tensor in float64; of a matrix the outputs come first."""
        tensor = self._tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, V] in float64."""
        x = self.weight("token_embd.weight")[tokens]
        for layer in range(self._layers):
            of = f"blk.{layer}."
            x = x + self._attention(self._normed(x, of + "attn_norm.weight"), of)
            inputs = self._normed(x, of + "ffn_norm.weight")
            gate, up = inputs @ self.weight(of + "ffn_gate.weight").T, inputs @ self.weight(of + "ffn_up.weight").T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(of + "ffn_down.weight").T
        return self._normed(x, "output_norm.weight") @ self.weight("output.weight").T

    def _normed(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._epsilon) * self.weight(name)

    def _attention(self, x: np.ndarray, of: str) -> np.ndarray:
        """Token by token and head by head, over the keys up to the token's own."""
        T = len(x)
        q, k, v = (
            (x @ self.weight(f"{of}attn_{name}.weight").T + self.weight(f"{of}attn_{name}.bias")).reshape(T, heads, -1)
            for name, heads in (("q", self._heads), ("k", self._key_heads), ("v", self._key_heads))
        )
        q, k = self._rotated(q), self._rotated(k)
        result = np.empty_like(q)
        for head in range(self._heads):
            shared = head * self._key_heads // self._heads
            for t in range(T):
                scores = k[: t + 1, shared] @ q[t, head] / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max())
                result[t, head] = weights @ v[: t + 1, shared] / weights.sum()
        return result.reshape(T, -1) @ self.weight(of + "attn_output.weight").T

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Rotates the pair (e, e + E/2) of each head by position / base^(2e/E)."""
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] / self._base ** (np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)


def logits_by(model: Model, tokens: list[int]) -> np.ndarray:
    """The logits [T, V] of a run's model, in float64."""
    ids_T = jnp.asarray(tokens, jnp.int32)
    x_TxD = lookup(model.params["embedding"], ids_T).astype(model.decoder.config.dtype)
    text = Tokens(x_TxD, jnp.arange(len(tokens), dtype=jnp.int32), jnp.ones(len(tokens), jnp.int32))
    hidden_TxD = apply_blocks(model.decoder, model.params, text, RoutingCall()).hidden
    return np.asarray(logits_of(model.params, hidden_TxD), np.float64)


def difference(reference: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """How far logits are from the reference's."""
    return {
        "largest_difference": float(np.abs(logits - reference).max()),
        "mean_difference": float(np.abs(logits - reference).mean()),
        "same_best_token": int((logits.argmax(-1) == reference.argmax(-1)).sum()),
    }


def main() -> None:
    """Compares and prints."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_qwen.reference")
    model = Model.load(options.run)
    tokens = model.tokenizer.encode(PROMPT)
    reference = Reference(options.gguf).logits(tokens)
    figures: dict[str, Any] = {
        "tokens": len(tokens),
        "least_logit": float(reference.min()),
        "largest_logit": float(reference.max()),
        "float32": difference(reference, logits_by(model, tokens)),
    }
    decoder = replace(model.decoder, config=replace(model.decoder.config, dtype="bfloat16"))
    figures["bfloat16"] = difference(reference, logits_by(replace(model, decoder=decoder), tokens))
    figures["int8"] = difference(reference, logits_by(Model.load(options.run, weights="int8"), tokens))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
