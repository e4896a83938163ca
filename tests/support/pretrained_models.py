"""Tiny Hugging Face directories that tests import: configurations and weights of the stored references."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from parity_weights import random_tensor
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from mod_star.pretrained.build import param_shapes, places
from mod_star.pretrained.families import FAMILIES
from mod_star.pretrained.hf_config import parse_hf_config

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "parity.json").read_text())
NASTY = "naïve 日本語 😀\t\n  0123 x"


def tensors_of(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The random weights of a configuration, by name."""
    family, model = parse_hf_config(dict(config), "config.json")
    found = list(places(FAMILIES[family].names, param_shapes(model)))
    return {place.tensor: random_tensor(place.tensor, place.source_shape) for place in found}


def write_tokenizer(directory: Path, vocab_size: int = 61) -> None:
    """A byte-level tokenizer of that many ids; 1 is <s>, 2 is </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 3]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    made.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


def write_model(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None, vocab_size: int = 61
) -> Path:
    """A Hugging Face directory with one file of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors_of(config) if tensors is None else tensors), directory / "model.safetensors")
    write_tokenizer(directory, vocab_size)
    return directory
