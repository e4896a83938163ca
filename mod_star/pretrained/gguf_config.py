"""The network that a GGUF file's metadata describes: every field is used, known to be harmless, or refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.model.layers import rotary_frequencies
from mod_star.pretrained.families import FAMILIES
from mod_star.pretrained.gguf_header import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What `general.architecture` may be. Mistral and SmolLM2 call themselves llama in this format."""
FREQUENCY_FACTORS = "rope_freqs.weight"
"""Tensor [E/2] that rotary frequencies are divided by: how the format stores the scaling of Llama 3.1."""

# Fields that may be there with these values only: others would mean a network that this package does not have.
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "rope.scaling.attn_factor": (1,),
    # How the rows of query and key are ordered: the only way there is.
    "tensor_data_layout": ("Meta AI original pth",),
}
# Whether the scaled frequencies were trained with does not change what is computed.
_HARMLESS = {"rope.scaling.finetuned"}
_REQUIRED: Any = object()


class _Fields:
    """The fields of one architecture, taken one by one; what is left at the end is refused."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._path, self._prefix = file.path, architecture + "."
        named = file.metadata.items()
        self._left = {key.removeprefix(self._prefix): value for key, value in named if key.startswith(self._prefix)}

    def fail(self, name: str, value: object, allowed: str) -> InputError:
        return InputError(f"{self._path}: {self._prefix}{name} = {_short(value)}: {allowed}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        if name not in self._left and default is _REQUIRED:
            raise InputError(f"{self._path}: has no {self._prefix}{name}")
        return self._left.pop(name, default)

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        """A whole number; one for each layer counts if they are all the same."""
        value = self.take(name, default)
        if value is default:
            return value
        number = value
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            number = value[0].item()
        elif isinstance(value, np.ndarray):
            raise self.fail(name, value, "layers that differ are not supported")
        if type(number) is not int or number < least:
            raise self.fail(name, value, f"must be a whole number, at least {least}")
        return number

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive number. The file has float32: 9.9999997e-06 is read as the 1e-05 that was meant."""
        value = self.take(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.fail(name, value, "must be a positive number")
        return float(str(np.float32(value)))

    def only(self, allowed: dict[str, tuple[Any, ...]]) -> None:
        for name, values in allowed.items():
            value = self.take(name, values[0])
            if isinstance(value, np.ndarray) or value not in values:
                raise self.fail(name, value, f"is not supported; must be {' or '.join(map(repr, values))}")

    def finish(self) -> None:
        for name in sorted(self._left.keys() - _HARMLESS):
            raise self.fail(name, self._left[name], "is a field that mod-star does not know")


def read_gguf_config(file: GgufFile) -> tuple[str, ModelConfig]:
    """The family (a key of `FAMILIES`) and the network that a file describes.

    Raises:
      InputError: the architecture is unknown, a field is missing or asks for what we don't have, or the tensors
        contradict the metadata.
    """
    for key, allowed in (("general.type", "model"), ("split.count", 1)):
        value = file.metadata.get(key, allowed)
        if not isinstance(value, str | int) or value not in (allowed, 0):
            hint = "; put its parts together with llama-gguf-split --merge" if key == "split.count" else ""
            raise InputError(f"{file.path}: {key} = {_short(value)}: must be {allowed!r}{hint}")
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        shown, known = _short(architecture), ", ".join(ARCHITECTURES)
        raise InputError(f"{file.path}: general.architecture = {shown}: is not supported; there are {known}")
    fields = _Fields(file, architecture)
    fields.only(_ONLY)
    width, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := fields.integer(name, head_dim)) != head_dim:
            raise fields.fail(name, value, f"must be the width of a query's head, {head_dim}")
    window = fields.integer("attention.sliding_window", 0, least=0) or None
    biases = "blk.0.attn_q.bias" in file.tensors
    family = architecture
    if family == "llama" and window is not None:
        family = "mistral"
    elif family == "llama" and biases:
        family = "qwen2"  # the same network under another name
    kind = FAMILIES[family]
    try:
        config = ModelConfig(
            vocab_size=_vocab_size(file, fields),
            width=width,
            layers=_layers(file, fields),
            heads=heads,
            kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=None if head_dim * heads == width else head_dim,
            mlp_width=fields.integer("feed_forward_length"),
            context=fields.integer("context_length"),
            norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in file.tensors,
            sliding_window=window,
            qkv_bias=kind.qkv_bias,
            qk_norm=kind.qk_norm,
            rope_theta=fields.number("rope.freq_base", 10_000.0),
        )
        config = _rope_scaling(file, fields, config)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(file.path)) else f"{file.path}: {message}") from None
    fields.finish()
    return family, config


def _vocab_size(file: GgufFile, fields: _Fields) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{file.path}: has no tensor 'token_embd.weight'")
    rows = embedding.shape[0]
    if (stated := fields.integer("vocab_size", rows)) != rows:
        raise fields.fail("vocab_size", stated, f"token_embd.weight has {rows} rows")
    return rows


def _layers(file: GgufFile, fields: _Fields) -> int:
    """The number of blocks, held against the tensors before anything is made for each of them."""
    stated = fields.integer("block_count")
    present = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if stated != len(present):
        raise fields.fail("block_count", stated, f"the file has tensors of {len(present)} blocks")
    return stated


def _rope_scaling(file: GgufFile, fields: _Fields, config: ModelConfig) -> ModelConfig:
    """`config` with the file's scaling of rotary frequencies."""
    kind = fields.take("rope.scaling.type", "none")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise fields.fail("rope.scaling.type", kind, "is not supported; must be 'none' or 'linear'")
    older = fields.number("rope.scale_linear", 1.0)
    factor = fields.number("rope.scaling.factor", older)
    original = fields.integer("rope.scaling.original_context_length", None)
    factors = file.tensors.get(FREQUENCY_FACTORS)
    if kind == "none" and older == 1 and factor != 1:
        raise fields.fail("rope.scaling.factor", factor, "must be 1 with rope.scaling.type = 'none'")
    if factor != 1:
        config = dataclasses.replace(config, rope_scaling="linear", rope_factor=factor)
    if factors is None:
        return config
    if factor != 1:
        raise fields.fail("rope.scaling.factor", factor, f"does not go with the tensor {FREQUENCY_FACTORS}")
    if factors.kind.name != "F32" or factors.shape != (config.head_size // 2,):
        expected = f"must be F32 of shape {(config.head_size // 2,)}"
        raise InputError(
            f"{file.path}: {FREQUENCY_FACTORS} is {factors.kind.name} of shape {factors.shape}: {expected}"
        )
    divisors = file.data[factors.start : factors.start + factors.size].view(np.float32).astype(np.float64)
    scaled = llama3_scaling(divisors, config, 8192 if original is None else original)
    if scaled is None:
        shown = ", ".join(f"{value:g}" for value in divisors[:: max(1, len(divisors) // 6)])
        raise InputError(
            f"{file.path}: {FREQUENCY_FACTORS} is not the scaling of Llama 3 but {shown}, …: not supported"
        )
    return scaled


def llama3_scaling(divisors: np.ndarray, config: ModelConfig, original: int) -> ModelConfig | None:
    """The configuration whose Llama 3 scaling divides each rotary frequency by `divisors`, float64 E/2.

    Where a frequency turns t times in the original context, the share of it that is not divided by the factor is
    (t - low) / (high - low), cut to [0, 1]: a straight line in t, which two frequencies on its slope determine. Only
    its place counts, so that for another `original` context low and high would be other multiples of the same numbers.

    Returns:
      None: there is no such configuration.
    """
    if not np.isfinite(divisors).all() or (divisors < 1).any():
        return None
    factor = float(f"{divisors.max():.6g}")
    if factor == 1:
        return config
    whole = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    turns = original * rotary_frequencies(config).astype(np.float64) / (2 * np.pi)
    slope = (whole > 1e-3) & (whole < 1 - 1e-3)
    candidates = [(1.0, 4.0)]  # those of all of Meta's models
    if slope.sum() >= 2:
        steepness, start = np.polyfit(turns[slope], whole[slope], 1)
        if steepness > 0:
            candidates.append((float(f"{-start / steepness:.4g}"), float(f"{(1 - start) / steepness:.4g}")))
    for low, high in candidates:
        if not 0 < low < high:
            continue
        scaled = dataclasses.replace(
            config, rope_scaling="llama3", rope_factor=factor, rope_low_freq_factor=low, rope_high_freq_factor=high,
            rope_original_context=original,
        )  # fmt: skip
        if np.allclose(rotary_frequencies(config) / divisors, rotary_frequencies(scaled), rtol=1e-5, atol=0):
            return scaled
    return None


def _short(value: object) -> str:
    """For messages: on one line, and not the whole of an array."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else shown[:59] + "…"
