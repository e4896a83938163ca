"""Text to token ids and back: tokenizers, the files that they come as, chat templates. Reads no training data.

Import `load_tokenizer`, `Tokenizer` and the kinds of tokenizers from here.
"""

from mod_star.tokenization.tokenizers import (
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
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "begin",
    "load_saved_tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "train_bpe",
]
