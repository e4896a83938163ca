"""What an import reads from, whatever the format: a configuration, tensors that are loaded one by one, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mod_star.config import ModelConfig
from mod_star.tokenization import Tokenizer


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a source, not yet in memory."""

    shape: tuple[int, ...]
    """In the layout of Hugging Face's Llama: a projection is [out, in], the embedding VxD."""
    stored: str
    """What the file calls its type, such as "BF16" or "Q4_1"."""
    load: Callable[[], np.ndarray]
    """Reads it: an array of `shape`, of any real floating-point type (also ml_dtypes.bfloat16), which may be a
    read-only view of a mapped file. Called once; raises InputError if the file cannot be read there."""


@dataclass(frozen=True)
class Source:
    """A pretrained model, opened and checked: nothing of the weights has been read yet."""

    path: Path
    """Directory or file, for messages."""
    family: str
    """A key of `mod_star.pretrained.families.FAMILIES`."""
    config: ModelConfig
    """The network: `vocab_size` is the rows of the embedding, `context` the longest that the model was made for."""
    tensors: Mapping[str, SourceTensor]
    """By the names of Hugging Face's Llama, "model.layers.0.self_attn.q_proj.weight". A tensor that a family does not
    have (a tied head, a rotary table) is left out by whoever opens the source, if it is known to be redundant."""
    tokenizer: Tokenizer
    """Ready to be saved with the run: with the source's special tokens and chat template."""
    notes: tuple[str, ...] = ()
    """What the user should know: files that differ, what is ignored. One sentence each."""
