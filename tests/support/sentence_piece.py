"""A tokenizer like SentencePiece's, as `mod_star.pretrained.gguf_tokenizer` makes them, for tests."""

from __future__ import annotations

import string

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from mod_star.tokenization.special_tokens import SpecialTokens
from mod_star.tokenization.tokenizers import HuggingFaceTokenizer, TokenizerFiles

MERGES = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("e", "n"), ("▁", "▁"), ("▁", "S"), ("▁S", "o")]


def sentence_piece(*, starts_with_bos: bool = True, chat_template: str | None = None) -> HuggingFaceTokenizer:
    """<unk>, <s>, </s>, all bytes, printable ASCII without "." and "~", a few merges; a blank before every text.

    Characters outside the vocabulary, a newline among them, are the tokens of their bytes.
    """
    printable = "▁" + "".join(sorted(set(string.printable) - set(string.whitespace) - set("~.")))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *printable]
    tokens += [left + right for left, right in MERGES]
    ids = {token: index for index, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(ids, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    special = SpecialTokens(1, 2, (2,), starts_with_bos)
    return HuggingFaceTokenizer(TokenizerFiles(made.to_str(), special, chat_template), "sentence_piece")
