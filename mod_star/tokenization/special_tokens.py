"""Which tokens start and end a text: stored with a run, named by Hugging Face's files, or known by their spelling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from mod_star.errors import InputError, require
from mod_star.tokenization.tokenizer_files import TokenizerDirectory, read_json_object, spelling

SPECIAL_TOKENS_NAME = "special_tokens.json"
"""Name of stored `SpecialTokens` inside a run's tokenizer directory."""
END_OF_TEXT = "<|endoftext|>"
# Most specific first; a bare tokenizer.json does not say which special token starts or ends a text.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", END_OF_TEXT, "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", END_OF_TEXT, "[EOS]", "[SEP]")
# Spellings that end a turn or a text in the models of the families that we read, whichever of them is the eos.
_END_NAMES = (
    "<|im_end|>", END_OF_TEXT, "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "</s>"
)  # fmt: skip


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that start and end texts."""

    bos_id: int | None
    """Starts a text; None: the tokenizer has no such token. At least one of bos and eos is there."""
    eos_id: int | None
    """Ends a text; None: the tokenizer has no such token."""
    end_ids: tuple[int, ...]
    """Every id that ends a generated text, `eos_id` first."""
    starts_with_bos: bool
    """Whether documents and prompts begin with `bos_id`."""

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, file: Path, vocab_size: int) -> SpecialTokens:
        """Reads and checks a stored file. Raises InputError: it can't be read, or a field is missing or no id."""
        stored = read_json_object(file)
        bos, eos, ends, starts = (stored.get(name) for name in ("bos_id", "eos_id", "end_ids", "starts_with_bos"))
        allowed = f"must be an id below {vocab_size}"
        for name, token in (("bos_id", bos), ("eos_id", eos)):
            require(name in stored and (token is None or _is_id(token, vocab_size)), f"{file}: {name}", token, allowed)
        require(bos is not None or eos is not None, f"{file}: eos_id", eos, "must be an id where bos_id is null")
        fits = isinstance(ends, list) and bool(ends) and all(_is_id(token, vocab_size) for token in ends)
        require(fits, f"{file}: end_ids", ends, f"must be a list of ids below {vocab_size}")
        require(isinstance(starts, bool), f"{file}: starts_with_bos", starts, "must be true or false")
        require(bos is not None or not starts, f"{file}: starts_with_bos", starts, "must be false where bos_id is null")
        return cls(bos, eos, tuple(ends), starts)  # type: ignore[arg-type]


def special_tokens(tokenizer: tokenizers.Tokenizer, files: TokenizerDirectory | None, where: str) -> SpecialTokens:
    """The special tokens of a tokenizer.

    `tokenizer_config.json` and `special_tokens_map.json` name bos and eos; where they don't, the ids in `config.json`
    and `generation_config.json` do, and without those well-known spellings. A text ends with every id that any of
    these files calls eos.

    Args:
        tokenizer: As its files describe it.
        files: What lies beside its tokenizer.json; gets notes. None, or nothing there: well-known spellings decide, and
            texts begin with bos.
        where: Start of error messages, "<field> = <value>" or a path.

    Raises:
        InputError: One of these files is wrong, or there is no token to start or end a text with.
    """
    vocab_size = vocabulary_size(tokenizer)
    if files is None:
        return _by_spelling(tokenizer, where)
    bos = _named_token(tokenizer, files.named("bos_token"), f"{where}: bos_token")
    eos = _named_token(tokenizer, files.named("eos_token"), f"{where}: eos_token")
    further = [*_model_end_ids(files, vocab_size), *_generation_end_ids(files, vocab_size)]
    for name, named in files.statements("eos_token")[1:]:
        other = _named_token(tokenizer, named, f"{files.path / name}: eos_token")
        if other not in (None, eos):
            files.notes.append(f"{name}: eos_token {spelling(named)} is not the eos, but ends a text, too")
            further.append(other)
    config_bos = files.model_config.get("bos_token_id")
    if bos is None and eos is None:
        if not further:
            guess = _by_spelling(tokenizer, where)
            if not files.model_config:
                return guess
            starts = guess.bos_id is not None and _adds_bos(tokenizer, guess.bos_id)
            return SpecialTokens(guess.bos_id, guess.eos_id, guess.end_ids, starts)
        bos, eos = _first(tokenizer, _BOS_NAMES), _first(tokenizer, _EOS_NAMES)
        bos = config_bos if _is_id(config_bos, vocab_size) else bos
        eos = eos if eos in further else further[0]
        if not files.model_config:
            return SpecialTokens(bos, eos, end_ids(tokenizer, eos, further), bos is not None)
    elif bos is not None and config_bos not in (None, bos):
        first = tokenizer.id_to_token(bos)
        files.notes.append(
            f"config.json: bos_token_id = {config_bos} is ignored: the tokenizer's bos is {first} ({bos})"
        )
    starts_with_bos = bos is not None and _starts_with_bos(tokenizer, bos, files)
    return SpecialTokens(bos, eos, end_ids(tokenizer, eos if eos is not None else bos, further), starts_with_bos)


def _by_spelling(tokenizer: tokenizers.Tokenizer, where: str) -> SpecialTokens:
    bos, eos = _first(tokenizer, _BOS_NAMES), _first(tokenizer, _EOS_NAMES)
    if bos is None and eos is None:
        names = ", ".join(dict.fromkeys(_BOS_NAMES + _EOS_NAMES))
        raise InputError(f"{where}: has no special token to start or end a text (one of {names})")
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    return SpecialTokens(bos, eos, end_ids(tokenizer, eos), True)


def end_ids(tokenizer: tokenizers.Tokenizer, eos_id: int | None, further: Iterable[int | None] = ()) -> tuple[int, ...]:
    """`eos_id`, then `further`, then the special tokens of `tokenizer` that are known to end a turn or a text."""
    added = tokenizer.get_added_tokens_decoder()
    spelled = {token.content: index for index, token in added.items() if token.special}
    candidates = [eos_id, *further, *(spelled.get(name) for name in _END_NAMES)]
    return tuple(dict.fromkeys(token for token in candidates if token is not None))


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the greatest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _named_token(tokenizer: tokenizers.Tokenizer, named: Any, where: str) -> int | None:
    """The id of a token that a Hugging Face file names: as a string, or an object with `content`."""
    spelled = spelling(named)
    if spelled is None:
        return None
    token_id = tokenizer.token_to_id(spelled) if isinstance(spelled, str) else None
    require(token_id is not None, where, spelled, "is not a token of this tokenizer")
    return token_id


def _adds_bos(tokenizer: tokenizers.Tokenizer, bos_id: int) -> bool:
    """Whether the tokenizer.json's own template for a text begins with bos."""
    return tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def _starts_with_bos(tokenizer: tokenizers.Tokenizer, bos_id: int, files: TokenizerDirectory) -> bool:
    """Whether texts begin with bos: as stated, else as tokenizer.json has it."""
    stated, own = files.tokenizer_config.get("add_bos_token"), _adds_bos(tokenizer, bos_id)
    if not isinstance(stated, bool):
        return own
    if stated != own and tokenizer.post_processor is not None:
        files.notes.append(
            f"tokenizer_config.json: add_bos_token = {json.dumps(stated)} is followed; tokenizer.json would "
            f"{'' if own else 'not '}begin a text with {tokenizer.id_to_token(bos_id)}"
        )
    return stated


def _listed(stated: Any) -> list[Any]:
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def _model_end_ids(files: TokenizerDirectory, vocab_size: int) -> list[int]:
    """The eos of config.json: an id or a list of ids."""
    stated = files.model_config.get("eos_token_id")
    allowed = f"must be an id below {vocab_size}, the tokenizer's number of ids, or a list of such"
    fits = all(_is_id(token, vocab_size) for token in _listed(stated))
    require(fits, f"{files.path / 'config.json'}: eos_token_id", stated, allowed)
    return _listed(stated)


def _generation_end_ids(files: TokenizerDirectory, vocab_size: int) -> list[int]:
    """The eos of generation_config.json. Ids that are out of range are published there now and then: ignored, told."""
    name = "generation_config.json"
    stated = files.generation_config.get("eos_token_id")
    numbers = all(type(token) is int for token in _listed(stated))
    require(numbers, f"{files.path / name}: eos_token_id", stated, "must be an id or a list of ids")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in _listed(files.generation_config.get(key)):
            if not _is_id(token, vocab_size):
                files.notes.append(f"{name}: {key} = {token!r} is ignored: the tokenizer has {vocab_size} ids")
    return [token for token in _listed(stated) if _is_id(token, vocab_size)]


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _first(tokenizer: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in ids if token is not None), None)
