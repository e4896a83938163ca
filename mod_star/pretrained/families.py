"""The families of pretrained models that can be read and written: one table of names each, and what their network has.

A table maps the paths of our parameters to the names of a Hugging Face checkpoint, and says how a tensor there is laid
out. Parameters of blocks are stacked over layers here and one tensor per layer there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mod_star.config import ModelConfig
from mod_star.errors import InputError


@dataclass(frozen=True)
class Name:
    """Where a parameter stands in a checkpoint."""

    template: str
    """Name of the tensor, with {} for the layer where the parameter is one of a block."""
    inputs: int | None = None
    """The tensor is [outputs, inputs], each flattened; so many leading axes of our parameter are inputs, the others
    outputs; without inputs it is [outputs]. None: the tensor is laid out as ours."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor, of one layer, for our parameter of `shape` in one layer."""
        if self.inputs is None:
            return shape
        outputs = math.prod(shape[self.inputs :])
        return (outputs, math.prod(shape[: self.inputs])) if self.inputs else (outputs,)


Names = Mapping[tuple[str, ...], Name]

_LLAMA: Names = {
    ("embedding",): Name("model.embed_tokens.weight"),
    ("final_norm",): Name("model.norm.weight"),
    ("head",): Name("lm_head.weight"),
    ("attention_norm",): Name("model.layers.{}.input_layernorm.weight"),
    ("query",): Name("model.layers.{}.self_attn.q_proj.weight", inputs=1),
    ("key",): Name("model.layers.{}.self_attn.k_proj.weight", inputs=1),
    ("value",): Name("model.layers.{}.self_attn.v_proj.weight", inputs=1),
    ("output",): Name("model.layers.{}.self_attn.o_proj.weight", inputs=2),
    ("feed_forward_norm",): Name("model.layers.{}.post_attention_layernorm.weight"),
    ("feed_forward", "gate"): Name("model.layers.{}.mlp.gate_proj.weight", inputs=1),
    ("feed_forward", "up"): Name("model.layers.{}.mlp.up_proj.weight", inputs=1),
    ("feed_forward", "down"): Name("model.layers.{}.mlp.down_proj.weight", inputs=1),
}
_QWEN2: Names = {
    **_LLAMA,
    ("query_bias",): Name("model.layers.{}.self_attn.q_proj.bias", inputs=0),
    ("key_bias",): Name("model.layers.{}.self_attn.k_proj.bias", inputs=0),
    ("value_bias",): Name("model.layers.{}.self_attn.v_proj.bias", inputs=0),
}
_QWEN3: Names = {
    **_LLAMA,
    ("query_norm",): Name("model.layers.{}.self_attn.q_norm.weight"),
    ("key_norm",): Name("model.layers.{}.self_attn.k_norm.weight"),
}


@dataclass(frozen=True)
class Family:
    """One family: its names in files, and which of the network's options it has."""

    title: str
    """For people."""
    architecture: str
    """Entry of `architectures` in config.json."""
    names: Names
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: bool = False
    """Whether all layers may have one."""


# By `model_type` in config.json. SmolLM2 and TinyLlama call themselves llama.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama", "LlamaForCausalLM", _LLAMA),
    "mistral": Family("Mistral", "MistralForCausalLM", _LLAMA, sliding_window=True),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", _QWEN2, qkv_bias=True, sliding_window=True),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", _QWEN3, qk_norm=True, sliding_window=True),
}


def family_of(config: ModelConfig) -> str:
    """Key of the family whose network a dense model of this configuration is.

    Raises:
      InputError: no family has this combination.
    """
    for key, family in FAMILIES.items():
        same = (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm)
        if same and (config.sliding_window is None or family.sliding_window):
            return key
    raise InputError(
        "model.qkv_bias = True: no family that can be exported has it together with model.qk_norm = True "
        f"(there are {', '.join(family.title for family in FAMILIES.values())})"
    )
