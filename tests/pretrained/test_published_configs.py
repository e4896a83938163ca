"""The published configurations of the families that can be imported: each is accepted, and gives the published sizes.

Facts only: the fields of each model's config.json, and its number of parameters (a tied head counts once). Nothing is
allocated: shapes are evaluated.
"""

import math
from typing import Any

import jax
import pytest

from mod_star.pretrained.build import param_shapes
from mod_star.pretrained.hf_config import hf_config, parse_hf_config


def sizes(
    width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **fields: Any
) -> dict[str, Any]:
    """The fields that every config.json has."""
    common = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "tie_word_embeddings": False,
    }
    return common | fields


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "pretraining_tp": 1}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "rope_scaling": None}
LLAMA3 = LLAMA | {"bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0, "attention_bias": False}
LLAMA3 |= {"attention_dropout": 0.0, "mlp_bias": False, "transformers_version": "4.45.0.dev0"}
SMOLLM2 = LLAMA | {"bos_token_id": 0, "eos_token_id": 0, "attention_bias": False, "mlp_bias": False}
SMOLLM2 |= {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True, "attention_dropout": 0.0}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rms_norm_eps": 1e-5}
MISTRAL |= {"bos_token_id": 1, "eos_token_id": 2}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "rms_norm_eps": 1e-6}
QWEN2 |= {"bos_token_id": 151643, "eos_token_id": 151643, "rope_theta": 1000000.0, "use_sliding_window": False}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
QWEN3 |= {"eos_token_id": 151645, "head_dim": 128, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None}


def scaled(factor: float) -> dict[str, Any]:
    """Llama 3's scaling of rotary frequencies."""
    inner = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    return {"rope_scaling": inner | {"original_max_position_embeddings": 8192}}


def qwen2_window(window: int, layers: int, **fields: Any) -> dict[str, Any]:
    """A window that is switched off."""
    return QWEN2 | {"sliding_window": window, "max_window_layers": layers} | fields


TIED = {"tie_word_embeddings": True}
MROPE = {"use_mrope": False}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (sizes(4096, 11008, 32, 32, 32, 32000, 4096) | LLAMA, 6_738_415_616),
    "Llama-2-13b": (sizes(5120, 13824, 40, 40, 40, 32000, 4096) | LLAMA, 13_015_864_320),
    "Meta-Llama-3-8B": (sizes(4096, 14336, 32, 32, 8, 128256, 8192) | LLAMA3, 8_030_261_248),
    "Llama-3.1-8B": (sizes(4096, 14336, 32, 32, 8, 128256, 131072) | LLAMA3 | scaled(8.0), 8_030_261_248),
    "Llama-3.2-1B": (
        sizes(2048, 8192, 16, 32, 8, 128256, 131072) | LLAMA3 | scaled(32.0) | TIED | {"head_dim": 64},
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        sizes(3072, 8192, 28, 24, 8, 128256, 131072) | LLAMA3 | scaled(32.0) | TIED | {"head_dim": 128},
        3_212_749_824,
    ),
    "TinyLlama-1.1B": (sizes(2048, 5632, 22, 32, 4, 32000, 2048) | LLAMA, 1_100_048_384),
    "SmolLM2-135M": (sizes(576, 1536, 30, 9, 3, 49152, 8192) | SMOLLM2 | {"rope_theta": 100000}, 134_515_008),
    "SmolLM2-360M": (sizes(960, 2560, 32, 15, 5, 49152, 8192) | SMOLLM2 | {"rope_theta": 100000}, 361_821_120),
    "SmolLM2-1.7B": (sizes(2048, 8192, 24, 32, 32, 49152, 8192) | SMOLLM2 | {"rope_theta": 130000}, 1_711_376_384),
    "Mistral-7B-v0.1": (
        sizes(4096, 14336, 32, 32, 8, 32000, 32768) | MISTRAL | {"sliding_window": 4096, "rope_theta": 10000.0},
        7_241_732_096,
    ),
    "Mistral-7B-v0.2": (
        sizes(4096, 14336, 32, 32, 8, 32000, 32768) | MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        sizes(4096, 14336, 32, 32, 8, 32768, 32768) | MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0},
        7_248_023_552,
    ),
    "Qwen2-0.5B": (sizes(896, 4864, 24, 14, 2, 151936, 131072) | qwen2_window(131072, 24) | TIED, 494_032_768),
    "Qwen2-1.5B": (sizes(1536, 8960, 28, 12, 2, 151936, 131072) | qwen2_window(131072, 28) | TIED, 1_543_714_304),
    "Qwen2-7B-Instruct": (
        sizes(3584, 18944, 28, 28, 4, 152064, 32768) | QWEN2 | {"rope_scaling": None, "sliding_window": None},
        7_615_616_512,
    ),
    "Qwen2.5-0.5B": (sizes(896, 4864, 24, 14, 2, 151936, 32768) | qwen2_window(32768, 24) | TIED | MROPE, 494_032_768),
    "Qwen2.5-1.5B": (
        sizes(1536, 8960, 28, 12, 2, 151936, 131072) | qwen2_window(131072, 28) | TIED | MROPE,
        1_543_714_304,
    ),
    "Qwen2.5-3B": (
        sizes(2048, 11008, 36, 16, 2, 151936, 32768) | qwen2_window(32768, 36) | TIED | MROPE,
        3_085_938_688,
    ),
    "Qwen2.5-7B": (sizes(3584, 18944, 28, 28, 4, 152064, 131072) | qwen2_window(131072, 28) | MROPE, 7_615_616_512),
    "Qwen2.5-14B": (
        sizes(5120, 13824, 48, 40, 8, 152064, 131072) | qwen2_window(131072, 48, rms_norm_eps=1e-5),
        14_770_033_664,
    ),
    "Qwen2.5-32B": (
        sizes(5120, 27648, 64, 40, 8, 152064, 131072) | qwen2_window(131072, 64, rms_norm_eps=1e-5),
        32_763_876_352,
    ),
    "Qwen2.5-Coder-1.5B": (sizes(1536, 8960, 28, 12, 2, 151936, 32768) | QWEN2 | TIED, 1_543_714_304),
    "Qwen2.5-Coder-7B": (sizes(3584, 18944, 28, 28, 4, 152064, 32768) | QWEN2, 7_615_616_512),
    "Qwen2.5-Math-1.5B": (
        sizes(1536, 8960, 28, 12, 2, 151936, 4096) | QWEN2 | TIED | {"rope_theta": 10000},
        1_543_714_304,
    ),
    "Qwen2.5-Math-7B": (sizes(3584, 18944, 28, 28, 4, 152064, 4096) | QWEN2 | {"rope_theta": 10000}, 7_615_616_512),
    "Qwen3-0.6B": (sizes(1024, 3072, 28, 16, 8, 151936, 40960) | QWEN3 | TIED | {"max_window_layers": 28}, 596_049_920),
    "Qwen3-1.7B": (
        sizes(2048, 6144, 28, 16, 8, 151936, 40960) | QWEN3 | TIED | {"max_window_layers": 28},
        1_720_574_976,
    ),
    "Qwen3-4B": (
        sizes(2560, 9728, 36, 32, 8, 151936, 40960) | QWEN3 | TIED | {"max_window_layers": 36, "attention_dropout": 0},
        4_022_468_096,
    ),
    "Qwen3-8B": (sizes(4096, 12288, 36, 32, 8, 151936, 40960) | QWEN3 | {"max_window_layers": 36}, 8_190_735_360),
    "Qwen3-14B": (sizes(5120, 17408, 40, 40, 8, 151936, 40960) | QWEN3 | {"max_window_layers": 40}, 14_768_307_200),
}


def newer(values: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers 5 writes it: rope_parameters, dtype, a kind for each layer."""
    values = dict(values)
    inner = {"rope_theta": values.pop("rope_theta", 10000.0)} | (values.pop("rope_scaling", None) or {})
    values |= {"rope_parameters": {"rope_type": "default"} | inner, "dtype": values.pop("torch_dtype")}
    if values["model_type"].startswith("qwen"):
        values |= {"layer_types": ["full_attention"] * values["num_hidden_layers"], "sliding_window": None}
    return values | {"output_hidden_states": False, "return_dict": True, "chunk_size_feed_forward": 0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_accepted_and_has_the_published_sizes(name: str) -> None:
    values, count = PUBLISHED[name]
    family, config = parse_hf_config(values, "config.json")
    assert family == values["model_type"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config))) == count
    found = (config.width, config.hidden_width, config.layers, config.heads, config.key_heads, config.vocab_size)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert found == tuple(values[field] for field in (*names, "vocab_size"))
    assert config.head_size == values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    assert (config.context, config.norm_eps) == (values["max_position_embeddings"], values["rms_norm_eps"])
    assert (config.rope_theta, config.tie_embeddings) == (
        values.get("rope_theta", 10000.0),
        values["tie_word_embeddings"],
    )
    assert config.sliding_window == (4096 if name == "Mistral-7B-v0.1" else None)
    scaling = values.get("rope_scaling")
    assert config.rope_scaling == ("llama3" if scaling else "none")
    assert scaling is None or config.rope_factor == scaling["factor"]
    assert parse_hf_config(newer(values), "config.json") == (family, config)
    both = newer(values) | {"rope_scaling": scaling, "rope_theta": values.get("rope_theta", 10000.0)}
    assert parse_hf_config(both, "config.json") == (family, config)  # old and new fields side by side
    assert parse_hf_config(hf_config(family, config), "")[1].rope_factor == config.rope_factor
