"""A GGUF file as a source: its network, its tensors by the names of Hugging Face's Llama, its tokenizer."""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mod_star.errors import InputError
from mod_star.pretrained.gguf_config import FREQUENCY_FACTORS, read_gguf_config
from mod_star.pretrained.gguf_header import GgufFile, GgufTensor, read_gguf
from mod_star.pretrained.gguf_tokenizer import read_gguf_tokenizer
from mod_star.pretrained.source import Source, SourceTensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What this format calls things, and Hugging Face's Llama. Other tensors keep their names, and are refused by them."""
_STORED_AS_NUMBERS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ELEMENTS_AT_ONCE = 2**17


def open_gguf(path: str | Path) -> Source:
    """Opens a GGUF file of the architectures llama (also Mistral and SmolLM2), qwen2 or qwen3.

    Raises:
      InputError: it can't be read or is damaged, or a part of it asks for what this package doesn't have: the
        architecture, a field, the type of a tensor's blocks, the tokenizer.
    """
    file = read_gguf(path)
    family, config = read_gguf_config(file)
    tensors = {}
    for tensor in file.tensors.values():
        if tensor.name == FREQUENCY_FACTORS:  # it is in the configuration
            continue
        if not _can_read(tensor.kind):
            allowed = "one of those that the package gguf can read"
            raise InputError(f"{file.path}: tensor {tensor.name!r} has type {tensor.kind.name}: must be {allowed}")
        heads = 0
        if file.metadata["general.architecture"] == "llama":  # the others' rows keep their order
            kind = tensor.name.split(".")[2:3]
            heads = {"attn_q": config.heads, "attn_k": config.key_heads}.get(kind[0] if kind else "", 0)
        if heads and tensor.shape[0] != heads * config.head_size:
            expected = f"{heads} heads of {config.head_size} need {heads * config.head_size}"
            raise InputError(f"{file.path}: tensor {tensor.name!r} has {tensor.shape[0]} rows, and {expected}")
        load = functools.partial(_load, file, tensor, heads)
        tensors[_canonical(tensor.name)] = SourceTensor(tensor.shape, tensor.kind.name, load)
    return Source(file.path, family, config, tensors, read_gguf_tokenizer(file, config.vocab_size))


def dequantised(data: np.ndarray, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a tensor.

    Args:
      data: uint8, its bytes.
      kind: type of its blocks.
      shape: of the result; the last axis is whole blocks.

    Returns:
      A view of `data` where it holds float32, float16 or bfloat16; else float32, made piece by piece, so that what the
      package needs besides the result stays small.
    """
    if number := _STORED_AS_NUMBERS.get(kind.name):
        return data.view(number).reshape(shape)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, block_bytes)
    result = np.empty((len(blocks), block), np.float32)
    step = _ELEMENTS_AT_ONCE // block

    def fill(start: int) -> None:
        result[start : start + step] = gguf.dequantize(blocks[start : start + step], kind)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy works outside of the interpreter's lock
        list(pool.map(fill, range(0, len(blocks), step)))
    return result.reshape(shape)


def _load(file: GgufFile, tensor: GgufTensor, heads: int) -> np.ndarray:
    data = file.data[tensor.start : tensor.start + tensor.size]
    array = dequantised(data, tensor.kind, tensor.shape)
    return halves(array, heads) if heads else array


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * E, ...] of a query or key projection, reordered for rotary positions of the pairs (e, e + E/2).

    The architecture `llama` of this format has those of the pairs (2e, 2e + 1).
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@functools.cache
def _can_read(kind: GGMLQuantizationType) -> bool:
    """Whether `dequantised` knows the type: tried on one block of zeros."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantised(np.zeros(block_bytes, np.uint8), kind, (block,))
    except NotImplementedError:
        return False
    return True


def _canonical(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None or match[2] not in _NAMES:
        return name
    layer, short, kind = match.groups()
    place = "" if layer is None else f"model.layers.{int(layer)}."
    return f"{place}{_NAMES[short]}.{kind}"
