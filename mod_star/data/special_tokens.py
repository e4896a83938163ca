"""Which tokens start and end a text: stored with a run, named by Hugging Face's files, or known by their spelling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from mod_star.errors import InputError, require

SPECIAL_TOKENS_NAME = "special_tokens.json"
"""Name of stored `SpecialTokens` inside a run's tokenizer directory."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""Name of a chat template, in a run's tokenizer directory as in Hugging Face's."""
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


def special_tokens(tokenizer: tokenizers.Tokenizer, directory: Path | None, where: str) -> SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: As its tokenizer.json describes it.
        directory: Where that lies: what else is there is read, in this order: our own `special_tokens.json`; Hugging
            Face's `tokenizer_config.json` and `special_tokens_map.json`, with further end ids from
            `generation_config.json`. None, or none of these: well-known spellings decide, and texts begin with bos.
        where: Start of error messages, "<field> = <value>" or a path.

    Raises:
        InputError: One of these files is no good, or there is no token to start or end a text with.
    """
    vocab_size = vocabulary_size(tokenizer)
    if directory is not None and (directory / SPECIAL_TOKENS_NAME).is_file():
        return SpecialTokens.from_json(directory / SPECIAL_TOKENS_NAME, vocab_size)
    config = {} if directory is None else _hugging_face_config(directory)
    named = {key: _named_token(tokenizer, config.get(key), f"{where}: {key}") for key in ("bos_token", "eos_token")}
    bos, eos = named["bos_token"], named["eos_token"]
    starts_with_bos = bos is not None and _adds_bos(tokenizer, bos, config.get("add_bos_token"))
    if bos is None and eos is None:
        bos, eos = _first(tokenizer, _BOS_NAMES), _first(tokenizer, _EOS_NAMES)
        starts_with_bos = True
        if bos is None and eos is None:
            names = ", ".join(dict.fromkeys(_BOS_NAMES + _EOS_NAMES))
            raise InputError(f"{where}: has no special token to start or end a text (one of {names})")
        bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    further = [] if directory is None else _generation_end_ids(directory / "generation_config.json", vocab_size)
    return SpecialTokens(bos, eos, end_ids(tokenizer, eos if eos is not None else bos, further), starts_with_bos)


def end_ids(tokenizer: tokenizers.Tokenizer, eos_id: int | None, further: Iterable[int | None] = ()) -> tuple[int, ...]:
    """`eos_id`, then `further`, then the special tokens of `tokenizer` that are known to end a turn or a text."""
    added = tokenizer.get_added_tokens_decoder()
    spelled = {token.content: index for index, token in added.items() if token.special}
    found = [eos_id, *further, *(spelled.get(name) for name in _END_NAMES)]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the greatest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: must hold a JSON object, holds {type(found).__name__}")
    return found


def chat_template_of(directory: Path) -> str | None:
    """The chat template beside a tokenizer.json: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    Raises:
        InputError: A file can't be read, or holds something else in that place.
    """
    file = directory / CHAT_TEMPLATE_NAME
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error})") from None
    file = directory / "tokenizer_config.json"
    template = read_json_object(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):  # several, each with a name
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    allowed = "must be a string, or a list of templates with names"
    require(template is None or isinstance(template, str), f"{file}: chat_template", template, allowed)
    return template


def _hugging_face_config(directory: Path) -> dict[str, Any]:
    files = [directory / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    merged: dict[str, Any] = {}
    for file in files:
        found = read_json_object(file) if file.is_file() else {}
        merged |= {key: value for key, value in found.items() if value is not None}
    return merged


def _named_token(tokenizer: tokenizers.Tokenizer, named: Any, where: str) -> int | None:
    """The id of a token that a Hugging Face file names: as a string, or an object with `content`."""
    spelling = named.get("content") if isinstance(named, dict) else named
    if spelling is None:
        return None
    found = tokenizer.token_to_id(spelling) if isinstance(spelling, str) else None
    require(found is not None, where, spelling, "is not a token of this tokenizer")
    return found


def _adds_bos(tokenizer: tokenizers.Tokenizer, bos_id: int, stated: Any) -> bool:
    """Whether texts begin with bos: as stated, else as the tokenizer.json's own template for a text has it."""
    if isinstance(stated, bool):
        return stated
    return tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def _generation_end_ids(file: Path, vocab_size: int) -> list[int]:
    stated = read_json_object(file).get("eos_token_id") if file.is_file() else None
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    allowed = f"must be an id below {vocab_size} or a list of such"
    require(all(_is_id(token, vocab_size) for token in listed), f"{file}: eos_token_id", stated, allowed)
    return listed


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _first(tokenizer: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in found if token is not None), None)
