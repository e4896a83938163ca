"""config.json: every field is used, harmless, or refused by name."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pretrained_models import CONFIGS

from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.pretrained.families import FAMILIES, family_of
from mod_star.pretrained.hf_config import hf_config, parse_hf_config, read_hf_config

LLAMA = CONFIGS["llama"]


def parsed(base: str = "llama", **fields: Any) -> ModelConfig:
    return parse_hf_config(CONFIGS[base] | fields, "config.json")[1]


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_written_reads_as_the_same(case: str) -> None:
    family, config = parse_hf_config(CONFIGS[case], "config.json")
    assert family == CONFIGS[case]["model_type"]
    written = hf_config(family, config)
    assert parse_hf_config(written, "config.json") == (family, replace(config, head_dim=config.head_size))
    assert parse_hf_config(json.loads(json.dumps(written)), "") == parse_hf_config(written, "")
    # A Mistral model without its window is a Llama.
    assert family_of(config) == ("llama" if case == "mistral, no window" else family)


@pytest.mark.parametrize(
    ("base", "fields", "said"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = true: is not supported; must be false"),
        ("llama", {"mlp_bias": True}, "mlp_bias = true: is not supported"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act = "gelu": is not supported; must be "silu"'),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_scaling: rope_type = "yarn"'),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling: rope_type = "dynamic"'),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, 'rope_parameters: rope_type = "longrope"'),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor = 0.5"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters: full_attention = ",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta = 100.0: does not go with rope_parameters"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: has no factor"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling: must be a JSON object"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling: has no low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = true"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .*quantised checkpoints"),
        ("llama", {"logit_scale": 0.1}, "logit_scale = 0.1: is a field that mod-star does not know; if it does not"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("llama", {"sliding_window": 8}, "sliding_window = 8"),
        ("llama", {"auto_map": {"AutoModel": "x.py"}}, "auto_map = "),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ("llama", {"num_key_value_heads": 3}, "model.kv_heads = 3: must be a divisor"),
        ("llama", {"hidden_size": -16}, "hidden_size = -16: must be a positive whole number"),
        ("llama", {"hidden_size": "16"}, 'hidden_size = "16": must be a positive whole number'),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN: must be a positive number"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps = 1000.*: must be a positive number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ("llama", {"vocab_size": None}, "has no vocab_size"),
        ("mistral", {"num_key_value_heads": None}, "has no num_key_value_heads"),
        ("llama", {"architectures": ["GemmaForCausalLM"]}, 'architectures = "GemmaForCausalLM": is not supported'),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures = .* is not supp",
        ),
        ("llama", {"architectures": ["MistralForCausalLM"]}, 'model_type = "llama": does not go with'),
        ("llama", {"architectures": None, "model_type": "gpt2"}, 'model_type = "gpt2": is not supported'),
        ("qwen2", {"use_sliding_window": True}, "max_window_layers = 1: must be 0 or 2: all layers alike"),
        ("qwen2", {"use_sliding_window": True, "layer_types": {"a": 1}}, 'layer_types = {"a": 1}: must be "full_'),
        ("qwen2", {"use_sliding_window": True, "layer_types": 3}, 'layer_types = 3: must be "full_attention"'),
        ("qwen3", {"attention_bias": True}, "attention_bias = true"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(base: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^config.json: {said}") as error:
        parsed(base, **fields)
    assert "\n" not in str(error.value)


def test_what_is_harmless_is_taken() -> None:
    plain = parsed()
    assert parsed(torch_dtype="bfloat16", use_cache=True, rope_scaling=None, logit_scale=None, do_sample=True) == plain
    assert parsed(layer_types=["full_attention"] * 2, transformers_version="9") == plain
    assert parsed(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}, rope_theta=None) == plain
    assert parsed("qwen2", max_window_layers=2, use_sliding_window=True).sliding_window is None
    assert parsed("qwen2", max_window_layers=0, use_sliding_window=True).sliding_window == 5
    kinds = {"layer_types": ["sliding_attention"] * 2}
    assert parsed("qwen2", use_sliding_window=True, **kinds).sliding_window == 5


def test_old_files_lack_fields_that_have_defaults() -> None:
    old = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta", "architectures")}
    config = parse_hf_config(old, "config.json")[1]
    assert (config.key_heads, config.rope_theta) == (4, 10_000.0)
    mistral = copy.deepcopy(CONFIGS["mistral"])
    del mistral["sliding_window"]
    assert parse_hf_config(mistral, "config.json")[1].sliding_window == 4096


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, "null"])
def test_a_damaged_file_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_no_family_has_both_biases_and_norms() -> None:
    with pytest.raises(InputError, match=r"model\.qkv_bias = True: no family"):
        family_of(ModelConfig(qkv_bias=True, qk_norm=True))
    assert {family_of(parse_hf_config(c, "")[1]) for c in CONFIGS.values()} == set(FAMILIES)
    assert json.dumps(hf_config("llama", ModelConfig(vocab_size=8)))
