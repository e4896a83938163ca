"""Small GGUF files for tests, written by the package `gguf`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

REFERENCES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "tokenizer_references.json").read_text(encoding="utf-8")
)
"""From tests/references/make_tokenizer_references.py."""
WIDTH, HEADS, KEY_HEADS, HIDDEN, LAYERS = 32, 4, 2, 64, 2
HEAD = WIDTH // HEADS


def byte_level_metadata(pre: str = "smollm") -> dict[str, Any]:
    """The tokenizer of a file, as llama.cpp's converter writes a byte-level BPE."""
    found = REFERENCES["byte_level"]
    kinds = [3 if t in found["special"] else 4 if t in found["user_defined"] else 1 for t in found["tokens"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": found["tokens"],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": found["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def sentence_piece_metadata() -> dict[str, Any]:
    """The same of SentencePiece's BPE."""
    found = REFERENCES["sentence_piece"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": found["tokens"],
        "tokenizer.ggml.scores": [float(score) for score in found["scores"]],
        "tokenizer.ggml.token_type": found["token_type"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def network_metadata(architecture: str = "llama") -> dict[str, Any]:
    """The fields of a small network."""
    fields = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0,
        "rope.dimension_count": HEAD,
    }
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def network_tensors(rows: int, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Random float32 tensors of that network, by their names in the format; head untied."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (rows, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (rows, WIDTH),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (WIDTH, WIDTH),
            "attn_k.weight": (KEY_HEADS * HEAD, WIDTH),
            "attn_v.weight": (KEY_HEADS * HEAD, WIDTH),
            "attn_output.weight": (WIDTH, WIDTH),
            "ffn_norm.weight": (WIDTH,),
            "ffn_gate.weight": (HIDDEN, WIDTH),
            "ffn_up.weight": (HIDDEN, WIDTH),
            "ffn_down.weight": (WIDTH, HIDDEN),
        }
        if architecture == "qwen2":
            block |= {f"attn_{name}.bias": (size * HEAD,) for name, size in zip("qkv", (4, 2, 2), strict=True)}
        if architecture == "qwen3":
            block |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """Writes a file; `kinds` names the tensors that are quantised."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        data = tensor if kind is None else gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A whole small model; `metadata` and `tensors` change it, None there leaves something out."""
    pre = {"llama": "smollm"}.get(architecture, "qwen2")
    fields = network_metadata(architecture) | byte_level_metadata(pre) | dict(metadata or {})
    arrays = network_tensors(len(REFERENCES["byte_level"]["tokens"]), architecture) | dict(tensors or {})
    kept = {name: array for name, array in arrays.items() if array is not None}
    return write_gguf(path, {k: v for k, v in fields.items() if v is not None}, kept, kinds, architecture)
