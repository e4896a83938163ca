"""A tokenizer with more ids than the embedding has rows: tokens without a row are taken out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tokenizers

from mod_star.tokenization.tokenizers import HuggingFaceTokenizer, TokenizerFiles


def fit_tokenizer(tokenizer: HuggingFaceTokenizer, rows: int) -> HuggingFaceTokenizer:
    """Takes added tokens out whose ids have no row in the embedding, so that no text gives an id without a row.

    Published tokenizers may have a token, such as [PAD], that was added without making the embedding longer. Text that
    spells it is read as plain text then, and no text ends with it; a note tells so.

    Args:
      tokenizer: as its files describe it.
      rows: of the embedding.

    Returns:
      `tokenizer` itself if all its ids have rows, or if one that has none can't be taken out: it is the bos or the
      eos, or ordinary text can give it.
    """
    ids = tokenizers.Tokenizer.from_str(tokenizer.content).get_vocab(with_added_tokens=True)
    beyond = {token: index for token, index in ids.items() if index >= rows}
    special = tokenizer.special
    if not beyond or {special.bos_id, special.eos_id} & set(beyond.values()):
        return tokenizer
    content = json.loads(tokenizer.content)
    added = {each["content"] for each in content.get("added_tokens", [])}
    words = content["model"]["vocab"]
    in_model = beyond.keys() & (words.keys() if isinstance(words, Mapping) else {word for word, _ in words})
    if beyond.keys() - added or (in_model and not _only_as_added(content["model"], in_model)):
        return tokenizer
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] not in beyond]
    for word in in_model:
        del words[word]
    shown = ", ".join(f"{token} ({index})" for token, index in sorted(beyond.items(), key=lambda item: item[1])[:5])
    more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
    note = f"the embedding has {rows} rows, none for {shown}{more}; text that spells such a token is plain text"
    notes = (*tokenizer.notes, note)
    special = replace(special, end_ids=tuple(end for end in special.end_ids if end < rows))
    files = TokenizerFiles(json.dumps(content, ensure_ascii=False), special, tokenizer.chat_template, notes)
    return HuggingFaceTokenizer(files, tokenizer.name)


def token_without_row(tokenizer: HuggingFaceTokenizer, rows: int) -> str:
    """For messages: one of the tokens whose ids have no row."""
    return f"{tokenizer.token_text(rows)!r} ({rows})"


def _only_as_added(model: Mapping[str, Any], words: set[str]) -> bool:
    """Whether a byte-pair vocabulary gives none of `words` itself: no pair is merged into it, no letter is it."""
    if model.get("type") != "BPE" or model.get("ignore_merges") or not isinstance(model["vocab"], Mapping):
        return False
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    merged = {"".join(pair) for pair in pairs}
    return all(len(word) > 1 and word not in merged and word != model.get("unk_token") for word in words)
