"""A Hugging Face model's directory, or its name on the hub, opened as a `Source`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mod_star.errors import InputError
from mod_star.pretrained.families import FAMILIES
from mod_star.pretrained.fit_tokenizer import fit_tokenizer
from mod_star.pretrained.hf_config import CONFIG_NAME, read_hf_config
from mod_star.pretrained.safetensors_files import ADAPTER_CONFIG, INDEX_NAME, open_safetensors, require_no_adapter
from mod_star.pretrained.source import Source, SourceTensor
from mod_star.tokenization import HuggingFaceTokenizer
from mod_star.tokenization.tokenizer_files import ADDED_TOKENS, CHAT_TEMPLATE_NAME, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

TOKENIZER_NAME = "tokenizer.json"
# All that is read, so that nothing else is downloaded: no pickles, no second copy of the weights in another format.
_DOWNLOADED: tuple[str, ...] = (CONFIG_NAME, "generation_config.json", "model*.safetensors", INDEX_NAME)
_DOWNLOADED += (TOKENIZER_NAME, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, CHAT_TEMPLATE_NAME)
_DOWNLOADED += (ADAPTER_CONFIG,)
_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")
# Rotary frequencies that old checkpoints carry; they follow from the configuration.
_COMPUTED = ".rotary_emb.inv_freq"


def open_hf(directory: Path) -> Source:
    """Opens a directory with config.json, tokenizer.json and safetensors.

    Raises:
      InputError: something is missing, damaged or not supported; see `read_hf_config` and `open_safetensors`.
    """
    require_no_adapter(directory)
    family, config = read_hf_config(directory)
    tensors, notes = open_safetensors(directory)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COMPUTED)}
    if config.tie_embeddings:
        names = FAMILIES[family].names
        _drop_tied_head(directory, tensors, names["head",].template, names["embedding",].template)
    if not (directory / TOKENIZER_NAME).is_file():
        others = " and ".join(name for name in _OTHER_TOKENIZERS if (directory / name).is_file())
        has = f"has {others}, which cannot be read here, and no" if others else "has no"
        raise InputError(
            f"{directory}: {has} {TOKENIZER_NAME}; AutoTokenizer.from_pretrained(…).save_pretrained(…) of "
            "transformers makes one"
        )
    tokenizer = HuggingFaceTokenizer(directory, str(directory / TOKENIZER_NAME))
    tokenizer = fit_tokenizer(tokenizer, config.vocab_size)
    return Source(directory, family, config, tensors, tokenizer, (*notes, *tokenizer.notes))


def download(name: str) -> Path:
    """Fetches a model from the Hugging Face hub into its cache (files that are there already, not again).

    Raises:
      InputError: there is no such model, no access to it, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # the hub's own, those of its HTTP library, and the operating system's
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: is not a directory here, and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _drop_tied_head(directory: Path, tensors: dict[str, SourceTensor], head: str, embedding: str) -> None:
    """A head that is tied may be stored nevertheless, or alone; it must be the embedding then."""
    if head not in tensors:
        return
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return
    if tensors[head].shape != tensors[embedding].shape or not np.array_equal(
        tensors[head].load(), tensors[embedding].load()
    ):
        raise InputError(
            f"{directory}: tensor {head} differs from {embedding}, but config.json has tie_word_embeddings = true; set "
            "it to false to use both"
        )
    del tensors[head]
