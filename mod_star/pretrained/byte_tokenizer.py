"""`ByteTokenizer` as a tokenizer.json, for libraries that read nothing else."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mod_star.tokenization import ByteTokenizer


def byte_tokenizer_json() -> str:
    """A tokenizer.json that gives the ids of `ByteTokenizer`, and bos first."""
    plain = ByteTokenizer()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {plain.token_text(token): token for token in (plain.bos_id, plain.eos_id)}
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    bos = plain.token_text(plain.bos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, plain.bos_id)]
    )
    return tokenizer.to_str(pretty=True)


def _letter(byte: int) -> str:
    """What byte-level BPE writes for a byte: printable Latin-1 as it is, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))
