"""Reads the config.json of a Hugging Face model: every field is used, known to be harmless, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.pretrained.families import FAMILIES

CONFIG_NAME = "config.json"

# Fields that do not change the logits: where the file came from, what it was trained with, how its outputs are
# packed, special tokens (the tokenizer's business), and defaults of generation (the user's).
_ORIGIN = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "unsloth_version", "unsloth_fixed"}
_ORIGIN |= {"is_llama_config", "transformers.js_config", "name_or_path", "_commit_hash", "finetuning_task"}
_TRAINING = {"initializer_range", "attention_dropout", "pretraining_tp", "gradient_checkpointing", "problem_type"}
_TRAINING |= {"hidden_dropout", "resid_pdrop", "embd_pdrop", "max_sequence_length", "model_max_length"}
_OUTPUTS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "id2label"}
_OUTPUTS |= {"label2id", "chunk_size_feed_forward", "return_dict_in_generate", "output_scores"}
_OUTPUTS |= {"_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled"}
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "prefix"}
_TOKENS |= {"decoder_start_token_id"}
_GENERATION = {"max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"}
_GENERATION |= {"early_stopping", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"}
_GENERATION |= {"num_beam_groups", "diversity_penalty", "num_return_sequences", "encoder_no_repeat_ngram_size"}
_GENERATION |= {"forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"}
_GENERATION |= {"begin_suppress_tokens", "exponential_decay_length_penalty", "task_specific_params"}
HARMLESS = _ORIGIN | _TRAINING | _OUTPUTS | _TOKENS | _GENERATION

# Fields that may be there with this value only; with another the network would be one that this package does not have.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_bfloat16": (False,),
    "tf_legacy_loss": (False,),
}
_REQUIRED: Any = object()


class _Fields:
    """A JSON object whose members are taken one by one; what is left at the end is refused."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where}: must be a JSON object, and is {_short(values)}")
        self._where, self._left = where, {name: value for name, value in values.items() if value is not None}
        self.nulls = values.keys() - self._left.keys()

    def fail(self, name: str, value: object, allowed: str) -> InputError:
        return InputError(f"{self._where}: {name} = {_short(value)}: {allowed}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The member as it is; null counts as absent."""
        if name not in self._left and default is _REQUIRED:
            raise InputError(f"{self._where}: has no {name}")
        return self._left.pop(name, default)

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.take(name, default)
        if value is not default and (type(value) is not int or not 1 <= value < 2**31):
            raise self.fail(name, value, "must be a positive whole number below 2^31")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.take(name, default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not default and not (real and 0 < value <= sys.float_info.max):
            raise self.fail(name, value, "must be a positive number")
        return value if value is default else float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, value, "must be true or false")
        return value

    def only(self, allowed: dict[str, tuple[Any, ...]]) -> None:
        for name, values in allowed.items():
            value = self.take(name, values[0])
            if value not in values:
                raise self.fail(name, value, f"is not supported; must be {' or '.join(map(_short, values))}")

    def finish(self, harmless: set[str]) -> None:
        """Refuses what has not been taken."""
        for name in sorted(self._left.keys() - harmless):
            hint = "if it does not change what the model computes, delete it from the file and import again"
            raise self.fail(name, self._left[name], f"is a field that mod-star does not know; {hint}")


def read_hf_config(directory: Path) -> tuple[str, ModelConfig]:
    """The family (a key of `FAMILIES`) and the network that a Hugging Face directory's config.json describes.

    Raises:
      InputError: the file is missing or damaged, the architecture is unknown, or a field asks for what we don't have.
    """
    path = directory / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory}: is not a Hugging Face model (it has no {CONFIG_NAME})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return parse_hf_config(values, str(path))


def parse_hf_config(values: Any, where: str) -> tuple[str, ModelConfig]:
    """As `read_hf_config`, of the JSON value; `where` begins the error messages."""
    fields = _Fields(where, values)
    if (quantised := fields.take("quantization_config", None)) is not None:
        raise fields.fail(
            "quantization_config", quantised, "quantised checkpoints are not supported; take the original one"
        )
    family = _family(fields)
    kind = FAMILIES[family]
    fields.only(_ONLY)
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    context = fields.integer("max_position_embeddings")
    head_dim = fields.integer("head_dim", 128 if family == "qwen3" else None)
    # Llama's first configurations had no such field; in the others its default is a number of one model.
    kv_heads = fields.integer("num_key_value_heads", heads if family == "llama" else _REQUIRED)
    try:
        config = ModelConfig(
            vocab_size=fields.integer("vocab_size"),
            width=fields.integer("hidden_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=fields.integer("intermediate_size"),
            context=context,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            sliding_window=_sliding_window(fields, family, layers),
            qkv_bias=kind.qkv_bias,
            qk_norm=kind.qk_norm,
            **_rope(fields, where),
        )
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None
    fields.finish(HARMLESS)
    return family, config


def _family(fields: _Fields) -> str:
    architectures, kind = fields.take("architectures", []), fields.take("model_type", None)
    known = {family.architecture: key for key, family in FAMILIES.items()}
    if not isinstance(architectures, list) or len(architectures) > 1:
        raise fields.fail("architectures", architectures, f"must be one of {', '.join(known)}")
    if architectures and (not isinstance(architectures[0], str) or architectures[0] not in known):
        raise fields.fail("architectures", architectures[0], f"is not supported; there are {', '.join(known)}")
    if kind is None and architectures:
        kind = known[architectures[0]]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise fields.fail("model_type", kind, f"is not supported; there are {', '.join(FAMILIES)}")
    if architectures and known[architectures[0]] != kind:
        raise fields.fail("model_type", kind, f"does not go with architectures = {_short(architectures)}")
    return kind


def _sliding_window(fields: _Fields, family: str, layers: int) -> int | None:
    """The window of all layers. Layers of different kinds are refused."""
    kinds = fields.take("layer_types", None)
    window: int | None = None
    absent = None if "sliding_window" in fields.nulls else 4096
    if family == "mistral":
        window = fields.integer("sliding_window", absent)
    elif family == "llama":
        used = fields.take("use_sliding_window", None)
        if used is False:  # other families' fields, left over and switched off
            fields.take("sliding_window", None)
            fields.take("max_window_layers", None)
        elif used is not None:
            raise fields.fail("use_sliding_window", used, "is not supported in a Llama; must be false")
    elif family in ("qwen2", "qwen3"):
        used = fields.flag("use_sliding_window", False)
        size, first = fields.integer("sliding_window", absent), fields.take("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool):
            raise fields.fail("max_window_layers", first, "must be a whole number")
        if used and kinds is None:  # layers from this one on have the window
            if 0 < first < layers:
                raise fields.fail("max_window_layers", first, f"must be 0 or {layers}: all layers alike")
            window = size if first <= 0 else None
        elif used:
            window = size if isinstance(kinds, list) and kinds[:1] == ["sliding_attention"] else None
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and kinds != [expected] * layers:
        raise fields.fail("layer_types", kinds, f'must be "{expected}" for all {layers} layers')
    return window


def _rope(fields: _Fields, where: str) -> dict[str, Any]:
    """Fields of `ModelConfig`, from `rope_theta` and `rope_scaling` (older files) or `rope_parameters` (newer)."""
    theta = fields.number("rope_theta", None)
    scaling, parameters = fields.take("rope_scaling", None), fields.take("rope_parameters", None)
    older = None if scaling is None else _rope_of(_Fields(f"{where}: rope_scaling", scaling))
    newer = None if parameters is None else _rope_of(_Fields(f"{where}: rope_parameters", parameters))
    thetas = {"rope_theta": theta}
    thetas |= {name: each.pop("rope_theta", None) for name, each in _named(older, newer).items()}
    stated = [(name, value) for name, value in thetas.items() if value is not None]
    for name, value in stated:
        if value != stated[0][1]:
            raise fields.fail(stated[0][0], stated[0][1], f"does not go with {name}, which has {value}")
    if older is not None and newer is not None and older != newer:
        raise fields.fail("rope_scaling", scaling, f"does not go with rope_parameters = {_short(parameters)}")
    rope = older if newer is None else newer
    return {"rope_theta": stated[0][1] if stated else 10_000.0} | (rope or {})


def _named(older: dict[str, Any] | None, newer: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    pairs = (("rope_scaling", older), ("rope_parameters", newer))
    return {name: each for name, each in pairs if each is not None}


def _rope_of(inner: _Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` that one of the two objects gives: `rope_theta` only where it states one."""
    rope: dict[str, Any] = {}
    if (theta := inner.number("rope_theta", None)) is not None:
        rope["rope_theta"] = theta
    kind, old_kind = inner.take("rope_type", None), inner.take("type", None)
    if None not in (kind, old_kind) and kind != old_kind:
        raise inner.fail("type", old_kind, f"does not go with rope_type = {_short(kind)}")
    kind = kind or old_kind or "default"
    if kind not in ("default", "linear", "llama3"):
        raise inner.fail("rope_type", kind, "is not supported; must be default, linear or llama3")
    if kind != "default":
        rope |= {"rope_scaling": kind, "rope_factor": inner.number("factor")}
    else:
        inner.only({"factor": (1, 1.0)})
    if kind == "llama3":
        rope["rope_low_freq_factor"] = inner.number("low_freq_factor")
        rope["rope_high_freq_factor"] = inner.number("high_freq_factor")
        rope["rope_original_context"] = inner.integer("original_max_position_embeddings")
    inner.only({"partial_rotary_factor": (1, 1.0)})
    inner.finish({"original_max_position_embeddings"})  # means something to llama3 only
    return rope


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def hf_config(family: str, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a dense model, as `read_hf_config` and transformers (4 and 5) read it."""
    values: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if config.rope_scaling != "none":
        values["rope_scaling"] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        values["rope_scaling"] |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    if family in ("llama", "qwen3"):
        values["attention_bias"] = False
    if family == "llama":
        values["mlp_bias"] = False
    if family == "mistral":
        values["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        values["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            values |= {"sliding_window": config.sliding_window, "max_window_layers": 0}
    return values
