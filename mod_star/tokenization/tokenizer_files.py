"""The files that Hugging Face keeps beside a tokenizer.json: which of them wins, and the tokens that only they name.

A tokenizer.json alone is not the tokenizer: `tokenizer_config.json` and the older `added_tokens.json` may hold tokens
that it lacks, and what starts or ends a text stands in five files. Where two files differ, the one that `transformers`
follows is followed, and the difference is told (`notes`). What can't be followed is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mod_star.errors import InputError, require

CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""Name of a chat template, in a run's tokenizer directory as in Hugging Face's."""
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
_DECODER = "added_tokens_decoder"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which transformers gives new tokens their ids; others come after these."""


@dataclass(frozen=True)
class TokenizerDirectory:
    """What lies beside a tokenizer.json. A file that is not there is an empty object."""

    path: Path
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    model_config: dict[str, Any]
    generation_config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What the user should know: one sentence for each difference between files, and for each value that is ignored."""

    def named(self, key: str) -> Any:
        """The value of a field such as `eos_token`, from the file that wins; None if no file has it."""
        return next((value for _, value in self.statements(key)), None)

    def statements(self, key: str) -> list[tuple[str, Any]]:
        """All files that give a field a value, and the values; the one that wins first. An empty text is none.

        As in transformers: with `added_tokens_decoder`, tokenizer_config.json is newer than special_tokens_map.json,
        otherwise it is the other way round.
        """
        pairs = [(TOKENIZER_CONFIG, self.tokenizer_config), (SPECIAL_TOKENS_MAP, self.special_tokens_map)]
        if _DECODER not in self.tokenizer_config:
            pairs.reverse()
        return [(name, values[key]) for name, values in pairs if spelling(values.get(key)) not in (None, "")]


def read_tokenizer_directory(path: Path) -> TokenizerDirectory:
    """Reads the files beside a tokenizer.json.

    Raises:
        InputError: A file can't be read or holds no JSON object, or a field asks for ids that tokenizer.json doesn't
            give.
    """
    directory = TokenizerDirectory(
        path,
        tokenizer_config=_object_if_there(path / TOKENIZER_CONFIG),
        special_tokens_map=_object_if_there(path / SPECIAL_TOKENS_MAP),
        added_tokens=_object_if_there(path / ADDED_TOKENS),
        model_config=_model_config(path / "config.json"),
        generation_config=_object_if_there(path / "generation_config.json"),
    )
    config, file = directory.tokenizer_config, path / TOKENIZER_CONFIG
    split = config.get("split_special_tokens")
    require(split in (None, False), f"{file}: split_special_tokens", split, "is not supported; must be false")
    own = config.get("auto_map")
    own_code = own.get("AutoTokenizer") if isinstance(own, dict) else own
    require(not own_code, f"{file}: auto_map", own, "a tokenizer with Python code of its own is not supported")
    if config.get("add_eos_token") is True:
        directory.notes.append(f"{TOKENIZER_CONFIG}: add_eos_token = true: documents end with eos, prompts never do")
    if config.get("fix_mistral_regex") is True:
        directory.notes.append(
            f"{TOKENIZER_CONFIG}: fix_mistral_regex = true is ignored: tokenizer.json is taken as it is"
        )
    return directory


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: must hold a JSON object, holds {type(values).__name__}")
    return values


def complete(tokenizer: tokenizers.Tokenizer, files: TokenizerDirectory) -> bool:
    """Gives a tokenizer the tokens that only the files beside its tokenizer.json name, with their flags.

    Args:
        tokenizer: As its tokenizer.json describes it; changed in place.
        files: What lies beside it. Gets notes.

    Returns:
        Whether anything was added or changed.

    Raises:
        InputError: A file gives a token another id than tokenizer.json does, or an id that leaves a gap, or no token.
    """
    changed = False
    _note_prefix_space(tokenizer, files)
    for name, index, token in _stated_tokens(files):
        where = f"{files.path / name}: {token.content!r}"
        current = tokenizer.token_to_id(token.content)
        require(current in (None, index), where, index, f"tokenizer.json has this token as {current}")
        other = tokenizer.id_to_token(index)
        require(other in (None, token.content), where, index, f"in tokenizer.json that is {other!r}")
        known = tokenizer.get_added_tokens_decoder().get(index)
        if known is not None:
            if name == ADDED_TOKENS or _flags(known) == _flags(token):
                continue
            differing = ", ".join(flag for flag in _FLAGS if getattr(known, flag) != getattr(token, flag))
            files.notes.append(
                f"{token.content}: {TOKENIZER_CONFIG} and tokenizer.json differ in {differing}; {TOKENIZER_CONFIG} "
                "is followed, as by transformers"
            )
        tokenizer.add_tokens([token])
        now = tokenizer.token_to_id(token.content)
        require(now == index, where, index, f"leaves a gap: the next id after those of tokenizer.json is {now}")
        changed = True
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for name, key, value in _special_names(files):
        token = _added_token(value, f"{files.path / name}: {key}", special=True)
        known_word = tokenizer.token_to_id(token.content) is not None
        if token.content in added or (not known_word and key in ("bos_token", "eos_token")):  # missing: refused later
            continue
        tokenizer.add_tokens([token])
        added.add(token.content)
        changed = True
        what = "becomes a special token" if known_word else f"is new: id {tokenizer.token_to_id(token.content)}"
        files.notes.append(f"{name}: {key} {token.content} {what}; tokenizer.json does not have it as such")
    return changed


def chat_template_of(files: TokenizerDirectory) -> str | None:
    """The chat template beside a tokenizer.json: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    Raises:
        InputError: A file can't be read, or holds something else in that place.
    """
    stated = files.tokenizer_config.get("chat_template")
    template = stated
    if isinstance(stated, list):  # several, each with a name
        named = [each for each in stated if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    allowed = "must be a string, or a list of templates with names"
    where = f"{files.path / TOKENIZER_CONFIG}: chat_template"
    require(template is None or isinstance(template, str), where, template, allowed)
    file = files.path / CHAT_TEMPLATE_NAME
    if file.is_file():
        own = chat_template_in(file)
        if template not in (None, own):
            files.notes.append(f"{CHAT_TEMPLATE_NAME} and {TOKENIZER_CONFIG} differ; {CHAT_TEMPLATE_NAME} is followed")
        return own
    if template is None and stated:
        names = ", ".join(str(each.get("name")) for each in stated if isinstance(each, dict))
        files.notes.append(f"{TOKENIZER_CONFIG}: chat_template: none of {names} is called default; none is used")
    return template


def chat_template_in(file: Path) -> str:
    """The text of a chat_template.jinja. Raises InputError if it can't be read."""
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def spelling(named: Any) -> Any:
    """How a file spells a token that it names: as a string, or in an object with `content`."""
    return named.get("content") if isinstance(named, dict) else named


def _object_if_there(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _model_config(file: Path) -> dict[str, Any]:
    """A model's config.json. Other programs' files may have that name: they say nothing here."""
    try:
        config = _object_if_there(file)
    except InputError:  # whoever reads the model refuses it
        return {}
    return config if config.keys() & {"model_type", "architectures", "eos_token_id", "bos_token_id"} else {}


def _stated_tokens(files: TokenizerDirectory) -> Iterator[tuple[str, int, AddedToken]]:
    """File, id and token of all that the files state with an id, in order of the ids."""
    stated: dict[int, tuple[str, AddedToken]] = {}
    where = f"{files.path / TOKENIZER_CONFIG}: {_DECODER}"
    decoder = files.tokenizer_config.get(_DECODER)
    if decoder is not None:
        require(isinstance(decoder, dict), where, decoder, "must be an object of tokens by their ids")
        for key, value in decoder.items():
            require(key.isdecimal() and isinstance(value, dict), where, {key: value}, "must be a token by its id")
            stated[int(key)] = (TOKENIZER_CONFIG, _added_token(value, f"{where}: {key}"))
    by_content = {token.content: index for index, (_, token) in stated.items()}
    named = {spelling(value) for _, _, value in _special_names(files)}
    for content, index in files.added_tokens.items():
        where = f"{files.path / ADDED_TOKENS}: {content!r}"
        require(type(index) is int and index >= 0 and content != "", where, index, "must be an id of a token")
        if content in by_content or index in stated:
            same = by_content.get(content) == index
            require(same, where, index, f"{TOKENIZER_CONFIG} has another token or another id here")
            continue
        token = AddedToken(content, special=content in named, normalized=content not in named)
        stated[index] = (ADDED_TOKENS, token)
    for index in sorted(stated):
        yield stated[index][0], index, stated[index][1]


def _special_names(files: TokenizerDirectory) -> Iterator[tuple[str, str, Any]]:
    """File, field and value of every special token that is named without an id, from the file that wins.

    Where tokenizer_config.json states tokens with their ids, special_tokens_map.json adds none.
    """
    older: Mapping[str, Any] = {} if _DECODER in files.tokenizer_config else files.special_tokens_map
    others = [key for key in [*files.tokenizer_config, *older] if key.endswith("_token") and key not in _NAMES]
    for key in dict.fromkeys([*_NAMES, *others, *_LISTS]):
        stated = [(name, value) for name, value in files.statements(key) if name == TOKENIZER_CONFIG or older]
        for name, value in stated[:1]:
            if key not in _LISTS:
                if isinstance(value, str | dict):  # others are switches, such as add_bos_token
                    yield name, key, value
                continue
            several = list(value.values()) if isinstance(value, dict) else value
            require(isinstance(several, list), f"{files.path / name}: {key}", value, "must be a list of tokens")
            for each in several:
                yield name, key, each


def _added_token(value: Any, where: str, special: bool | None = None) -> AddedToken:
    values = {"content": value} if isinstance(value, str) else value
    content = values.get("content") if isinstance(values, dict) else None
    require(isinstance(content, str) and content != "", where, value, "must be a token, or an object with its content")
    flags = {flag: values[flag] for flag in _FLAGS if values.get(flag) is not None}
    for flag, setting in flags.items():
        require(isinstance(setting, bool), f"{where}: {flag}", setting, "must be true or false")
    if special is not None:
        flags["special"] = special
    return AddedToken(content, **flags)


def _flags(token: AddedToken) -> list[bool]:
    return [getattr(token, flag) for flag in _FLAGS]


def _note_prefix_space(tokenizer: tokenizers.Tokenizer, files: TokenizerDirectory) -> None:
    """`add_prefix_space` is what tokenizer.json does, whatever tokenizer_config.json says; told if it differs."""
    stated = files.tokenizer_config.get("add_prefix_space")
    if not isinstance(stated, bool):
        return
    state = json.loads(tokenizer.to_str())
    steps = [*_steps(state.get("normalizer")), *_steps(state.get("pre_tokenizer"))]
    does = any(
        step.get("add_prefix_space", False) or step.get("prepend_scheme", "never") != "never" or "prepend" in step
        for step in steps
    )
    if stated != does:
        said, has = json.dumps(stated), "puts one" if does else "puts none"
        files.notes.append(
            f"{TOKENIZER_CONFIG}: add_prefix_space = {said}, but tokenizer.json {has} before a text; tokenizer.json is "
            "followed"
        )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normaliser or pre-tokenizer and all that it is made of."""
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers"):
            for inner in part.get(key) or []:
                yield from _steps(inner)
