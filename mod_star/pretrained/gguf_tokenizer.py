"""The tokenizer inside a GGUF file, as a tokenizer.json that gives the ids of the original.

The format stores a vocabulary and its merges (byte-level BPE, `gpt2`) or its scores (SentencePiece's BPE, `llama`), and
for the former no more than a name for how text is split before the merges. Each name here stands for the pre-tokenizer
and normaliser of the model that it comes from; a name that is not here is refused, for wrong ids would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mod_star.errors import InputError
from mod_star.pretrained.gguf_header import GgufFile
from mod_star.tokenization.special_tokens import SpecialTokens, end_ids
from mod_star.tokenization.tokenizers import HuggingFaceTokenizer, TokenizerFiles

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
_SPACE = "▁"
# Keys that are read below, or that say nothing about the ids of a text.
_KNOWN = {"model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_space_prefix"}
_KNOWN |= {"token_type_count", "add_eos_token", "add_sep_token"}  # our documents end with eos anyway, no prompt does
# May be there with these values only.
_ONLY: dict[str, tuple[Any, ...]] = {
    "remove_extra_whitespaces": (False,), "escape_whitespaces": (True,), "precompiled_charsmap": (None,),
    "normalizer.lowercase": (False,), "normalizer.strip_accents": (False,),
}  # fmt: skip


@dataclass(frozen=True)
class _Split:
    """How a byte-level BPE splits text before it merges."""

    patterns: tuple[str, ...] = ()
    """Regular expressions whose matches, and what is between them, are pieces; one after the other."""
    digits: bool = False
    """Every digit is a piece."""
    gpt2: bool = False
    """GPT-2's expression comes last; otherwise pieces are taken as they are."""
    nfc: bool = False
    """Text is brought into normal form C first."""
    whole_words: bool = False
    """A piece that is in the vocabulary is taken whole, even if no merges lead there."""
    bos: bool = False
    """Texts begin with bos unless the file says otherwise."""


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = _Split(gpt2=True)
_SMOLLM = _Split(digits=True, gpt2=True)
_LLAMA3 = _Split(patterns=(_WORDS.format(digits="{1,3}"),), whole_words=True, bos=True)
_DBRX = _Split(patterns=(_WORDS.format(digits="{1,3}"),))
_QWEN2 = _Split(patterns=(_WORDS.format(digits=""),), nfc=True)
# As llama.cpp groups the names (src/llama-vocab.cpp): those of one group split text alike there. Names of its other
# groups, and its own "default", which it warns of, are refused.
_GROUPS: tuple[tuple[_Split, str], ...] = (
    (_GPT2, "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat mellum a.x-4.0 modern-bert"),
    (_GPT2, "jina-es jina-de jina-v2-es jina-v2-de"),
    (_SMOLLM, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_LLAMA3, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_DBRX, "dbrx smaug-bpe glm4 chatglm-bpe"),
    (_QWEN2, "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2"),
)
_SPLITS = {name: split for split, names in _GROUPS for name in names.split()}


def read_gguf_tokenizer(file: GgufFile, rows: int) -> HuggingFaceTokenizer:
    """The tokenizer and the chat template of a file.

    Args:
      file: opened.
      rows: of the embedding.

    Raises:
      InputError: there is none, it is of an unknown kind, its parts contradict each other, or it hasn't `rows` tokens.
    """
    fields = _Fields(file)
    model = fields.take("model")
    if not isinstance(model, str) or model not in ("gpt2", "llama"):
        raise fields.fail(
            "model", model, "is not supported; must be 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"
        )
    tokens, kinds = fields.strings("tokens"), fields.numbers("token_type")
    if len(tokens) != rows:
        raise InputError(f"{file.path}: the tokenizer has {len(tokens)} tokens, the embedding has {rows} rows")
    fields.require_length("token_type", kinds, len(tokens))
    if len(ids := {token: index for index, token in enumerate(tokens)}) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise fields.fail("tokens", twice, "is there twice")
    fields.check_others()
    if model == "gpt2":
        name = fields.take("pre", None)
        split = _SPLITS.get(name) if isinstance(name, str) else None
        if split is None:
            known = ", ".join(_SPLITS)
            raise fields.fail("pre", name, f"how this model splits text is not known here; there are {known}")
        tokenizer, bos_by_default = _byte_level(fields, ids, split), split.bos
    else:
        tokenizer, bos_by_default = _sentence_piece(fields, tokens, kinds, ids), True
    # Among special tokens the longest that fits is taken; their order here does not matter.
    special = [AddedToken(tokens[i], special=True, normalized=False) for i in np.flatnonzero(kinds == _CONTROL)]
    plain = [AddedToken(tokens[i], special=False, normalized=False) for i in np.flatnonzero(kinds == _USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    name = f"{file.path}: tokenizer"
    ends = _special(fields, tokenizer, bos_by_default, len(tokens))
    bos = "" if ends.bos_id is None else tokens[ends.bos_id]
    if ends.starts_with_bos and not set(bos) & set(":$"):  # so that other libraries know it from an export
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ends.bos_id)]
        )
    files = TokenizerFiles(tokenizer.to_str(), ends, fields.chat_template())
    return HuggingFaceTokenizer(files, name)


class _Fields:
    """The metadata about the tokenizer."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def fail(self, name: str, value: object, allowed: str) -> InputError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        return InputError(f"{self._file.path}: {_PREFIX}{name} = {shown}: {allowed}")

    def take(self, name: str, *default: Any) -> Any:
        value = self._file.metadata.get(_PREFIX + name, *default)
        if value is None and not default:
            raise InputError(f"{self._file.path}: has no {_PREFIX}{name}")
        return value

    def strings(self, name: str) -> list[str]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self.fail(name, value, "must be an array of strings")
        return value

    def numbers(self, name: str) -> np.ndarray:
        value = self.take(name)
        if not isinstance(value, np.ndarray):
            raise self.fail(name, value, "must be an array of numbers")
        return value

    def require_length(self, name: str, values: Sequence[Any] | np.ndarray, length: int) -> None:
        if len(values) != length:
            raise InputError(
                f"{self._file.path}: {_PREFIX}{name} has {len(values)} entries, the vocabulary has {length}"
            )

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, value, "must be a bool")
        return value

    def token(self, name: str, count: int) -> int | None:
        value = self.take(name, None)
        if value is not None and not (type(value) is int and 0 <= value < count):
            raise self.fail(name, value, f"must be an id below {count}")
        return value

    def check_others(self) -> None:
        """Refuses what would change ids and isn't known."""
        for key in self._file.metadata:
            name = key.removeprefix(_PREFIX)
            if name == key or name in _KNOWN or name.endswith(("_token_id", "_token_ids")):
                continue
            value = self.take(name)
            allowed = _ONLY.get(name)
            if allowed is None:
                raise self.fail(name, value, "is a field that mod-star does not know")
            if isinstance(value, np.ndarray) or value not in allowed:
                raise self.fail(name, value, "is not supported")

    def chat_template(self) -> str | None:
        template = self._file.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise InputError(f"{self._file.path}: tokenizer.chat_template: must be a string")
        return template


def _byte_level(fields: _Fields, ids: dict[str, int], split: _Split) -> tokenizers.Tokenizer:
    pairs = []
    for merge in fields.strings("merges"):
        left, space, right = merge[:1], *merge[1:].partition(" ")[1:]
        left += merge[1:].partition(" ")[0]
        if not space or left not in ids or right not in ids or left + right not in ids:
            raise fields.fail("merges", merge, "must be two tokens of the vocabulary that give a third")
        pairs.append((left, right))
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, pairs, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.gpt2)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(fields: _Fields, tokens: list[str], kinds: np.ndarray, ids: dict[str, int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE joins, of all neighbours that give a token, those that give the one with the best score.

    As merges in order of the scores of what they give, with all ways to split each token, that is the BPE of
    `tokenizers`. Characters outside the vocabulary become the tokens of their bytes.
    """
    scores = fields.numbers("scores")
    fields.require_length("scores", scores, len(tokens))
    normal = {tokens[i] for i in np.flatnonzero(kinds == _NORMAL)}
    unknown = [tokens[i] for i in np.flatnonzero(kinds == _UNKNOWN)]
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if missing or len(unknown) != 1:
        raise fields.fail("tokens", (missing or unknown)[:3], "must have all 256 bytes and one unknown token")
    for i in np.flatnonzero(kinds == _USER_DEFINED):
        if _SPACE in tokens[i] or " " in tokens[i]:
            raise fields.fail("tokens", tokens[i], "white space in a token that the user defined is not supported")
    merges = []
    for index in np.flatnonzero(kinds == _NORMAL):
        token = tokens[index]
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in normal and right in normal:
                merges.append((-float(scores[index]), ids[left], ids[right], left, right))
    merges.sort()
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, [merge[3:] for merge in merges], unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    )
    spaces, prefix = normalizers.Replace(" ", _SPACE), fields.flag("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _special(fields: _Fields, tokenizer: tokenizers.Tokenizer, bos_by_default: bool, count: int) -> SpecialTokens:
    bos, eos = fields.token("bos_token_id", count), fields.token("eos_token_id", count)
    if bos is None and eos is None:
        raise fields.fail("eos_token_id", None, "a bos or an eos is needed to start or end a text with")
    further = [fields.token(name, count) for name in ("eot_token_id", "eom_token_id")]
    starts = bos is not None and fields.flag("add_bos_token", bos_by_default)
    return SpecialTokens(bos, eos, end_ids(tokenizer, bos if eos is None else eos, further), starts)
