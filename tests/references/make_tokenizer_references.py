"""Makes tests/support/tokenizer_references.json: small vocabularies and the ids that others give to nasty texts.

    python tests/references/make_tokenizer_references.py

Needs transformers, sentencepiece and regex, which the package itself does not; run it in an environment of its own.

Where the ids come from: byte-level BPE from a naive loop over the published expression of each model (written for the
package `regex`), which has to agree with the classes that transformers has for GPT-2 and Qwen2; SentencePiece from that
library itself. (What transformers makes of a GGUF file is no reference: it does not look at how the file says that text
is split, so that SmolLM2's digits are not taken apart.)
"""

from __future__ import annotations

import io
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
import sentencepiece  # type: ignore[import-not-found]
import tokenizers
import transformers  # type: ignore[import-not-found]

REFERENCES = Path(__file__).parents[1] / "support/tokenizer_references.json"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>"]
CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog's 1234567890 bones; they'll cost $3.50, won't they?",
    "A café in Zürich: naïve façade — “quoted”, ½ of 2² is 2.",
    "def f(x):\n    return x + 1\n\n\tif True:\r\n        pass\n",
    "日本語の文章です。中文句子。한국어 문장.",
    "Привет, мир! مرحبا بالعالم שלום",
    "there then this that the other thing in an and on of to it is was he for with as his they be at one have",
] * 3  # fmt: skip
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  three   four    spaces\t\ttabs\n\n\nnewlines\r\n\r\n \n mixed \t\n end   ",
    "digits 1 12 123 1234 12345 3.14159 1,000,000 -7 ٣٤٥ ½ ² Ⅷ 一二三",
    "don't DON'T we'll I'VE it's 's ' 'd they're'm",
    "emoji 🙂🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ☺️",
    "combining e\u0301 a\u030a n\u0303 \u0301alone Å \u212b ﬁ ① \u1e9b\u0323",
    "日本語 中文 한국어 カタカナ 。、",
    "العربية עברית \u200fRTL\u200e mixed ١٢٣",
    "zero\u200bwidth\u00a0nbsp\u2009thin\u3000ideographic\ufeff bom \u2028line",
    "control \x00\x01\x7f\x1b[0m\x85 end",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n<|endoftext|>",
    "<|im_start |> <|im_end <think >< think> <|endoftext|><|endoftext|>",
    "<s> spelled </s> <unk> <0x41> [INST] x [/INST]",
    "snake_case camelCase SCREAMING http://a.b/c?d=e&f=%20 #tag @x $$ ... !!! \\n {}[]()",
    "for i in range(10):\n\tprint(f\"{i:>3}\")  # comment\n",
    "a\u2581b ▁ \ufffd \U0010ffff \ue000",
    "theotherthing unreachable  unreachable",
]  # fmt: skip
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


def byte_letters() -> list[str]:
    """What byte-level BPE writes for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens, special ones first, and merges "left right"; one token that no merges lead to."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [made.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=560, special_tokens=SPECIAL, initial_alphabet=byte_letters(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    state = json.loads(made.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    return [*tokens, *USER_DEFINED, "Ġunreachable"], [" ".join(merge) for merge in state["merges"]]


def naive_bpe(text: str, tokens: list[str], merges: list[str], pre: str) -> list[int]:
    """Ids by a loop that joins the pair of the lowest rank until there is none."""
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    letters, found = byte_letters(), []
    known = "|".join(map(regex.escape, SPECIAL + USER_DEFINED))
    for part in regex.split(f"({known})", text):
        if part in SPECIAL + USER_DEFINED:
            found.append(ids[part])
            continue
        part = unicodedata.normalize("NFC", part) if pre == "qwen2" else part
        pieces = regex.split(r"(\p{N})", part) if pre == "smollm" else [part]
        expression = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}.get(pre, _GPT2)
        for piece in (piece for each in pieces for piece in regex.findall(expression, each)):
            symbols = [letters[byte] for byte in piece.encode()]
            if pre == "llama-bpe" and "".join(symbols) in ids:
                symbols = ["".join(symbols)]
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
                best = min(pairs, key=ranks.__getitem__)
                at = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
                symbols[at : at + 2] = ["".join(best)]
            found += [ids[symbol] for symbol in symbols]
    return found


def check_with_transformers(tokens: list[str], merges: list[str], ids: dict[str, list[list[int]]]) -> None:
    """Raises if a class of transformers gives other ids than the naive loop."""
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pre, kind in (("gpt-2", transformers.GPT2Tokenizer), ("qwen2", transformers.Qwen2Tokenizer)):
        made = kind(
            vocab=vocab, merges=pairs, unk_token=None, bos_token=SPECIAL[0], eos_token=SPECIAL[0], pad_token=None
        )
        made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
        made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in USER_DEFINED])
        for text, expected in zip(TEXTS, ids[pre], strict=True):
            assert made.encode(text, add_special_tokens=False) == expected, (pre, text)


def sentence_piece() -> dict[str, Any]:
    """A small model of SentencePiece's BPE with byte fallback, as the format stores it, and its ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=520, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = made.get_piece_size()
    kinds = [
        2
        if made.is_unknown(i)
        else 3
        if made.is_control(i)
        else 6
        if made.is_byte(i)
        else 5
        if made.is_unused(i)
        else 1
        for i in range(count)
    ]
    # The library never reads special tokens out of a text.
    texts = [text for text in TEXTS if "<s>" not in text]
    return {
        "tokens": [made.id_to_piece(i) for i in range(count)],
        "scores": [made.get_score(i) for i in range(count)],
        "token_type": kinds,
        "texts": texts,
        "ids": [made.encode(text) for text in texts],
    }


def main() -> None:
    """Writes the references."""
    tokens, merges = byte_level_vocabulary()
    pres = ("gpt-2", "smollm", "llama-bpe", "qwen2")
    ids = {pre: [naive_bpe(text, tokens, merges, pre) for text in TEXTS] for pre in pres}
    check_with_transformers(tokens, merges, ids)
    found = {
        "texts": TEXTS,
        "byte_level": {
            "tokens": tokens,
            "merges": merges,
            "special": SPECIAL,
            "user_defined": USER_DEFINED,
            "ids": ids,
        },
        "sentence_piece": sentence_piece(),
    }
    REFERENCES.parent.mkdir(exist_ok=True)
    REFERENCES.write_text(json.dumps(found, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
    print(REFERENCES, REFERENCES.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
