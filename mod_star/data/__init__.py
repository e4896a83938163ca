"""Text from many sources as packed, batched, resumable streams of tokens. Needs neither TensorFlow nor PyTorch."""

from mod_star.data.pipeline import Batch, held_out_batches, merge_states, prefetch_to_device, train_batches
from mod_star.data.sources import read_sources
from mod_star.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    begin,
    load_saved_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "begin",
    "held_out_batches",
    "load_saved_tokenizer",
    "load_tokenizer",
    "merge_states",
    "prefetch_to_device",
    "read_sources",
    "save_tokenizer",
    "train_batches",
    "train_bpe",
]
