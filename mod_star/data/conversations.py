"""Conversations: records of messages, written by a chat template, of which only the assistant's part is learned.

A conversation becomes the ids that its chat template makes of the messages up to the assistant's last one. Weight 1
have the tokens of the assistant's messages with the token that ends each; all others (other roles, headers, what the
template writes after an end token) have weight 0. Before a message the assistant sees the very ids that the prompt has
when the model is asked for it. (Templates whose prompts and answers would share a token are an exception from the
second answer on: the first is learned as it is given, not as the second prompt would spell it.) A model that learns to
think does so before tokens of weight 1 only, and is rewarded for them alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mod_star.errors import InputError
from mod_star.tokenization.chat import Message
from mod_star.tokenization.tokenizers import Tokenizer, begin
from mod_star.tokenization.unicode_text import unicode_text

FIELDS = ("messages", "conversations")
"""Where a record's messages are looked for without a template."""
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Roles as records of `from` and `value` name them."""
_NOT_READ = ("tools", "functions", "documents")  # fields of a record that a template would write, too
_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # further fields of a message
_ANCHORS = ("\n", ".", "a")


@dataclass(frozen=True)
class Conversation:
    """A document that consists of messages."""

    messages: tuple[Message, ...]
    """With a role of `ROLES` and a content each; the first is not the assistant's, at least one is."""
    where: str
    """Names the record in errors."""

    def __post_init__(self) -> None:
        """Raises InputError if a message has no role or content of these."""
        for index, message in enumerate(self.messages):
            role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
            where = f"{self.where}: messages[{index}]"
            if role not in ROLES:
                raise InputError(f"{where}: role = {role!r}: must be one of {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise InputError(f"{where}: content = {_short(content)}: must be a text")
            unicode_text(content, where)
            if weight not in (0, 1, None):
                raise InputError(f"{where}: weight = {_short(weight)}: must be 0 or 1")
        if not self.learned:
            raise InputError(f"{self.where}: has no message of the assistant to learn")
        if self.messages[0]["role"] == "assistant":
            raise InputError(
                f"{self.where}: begins with a message of the assistant; a message of the user must come before it"
            )

    @property
    def learned(self) -> list[int]:
        """The indices of the assistant's messages, but for those with a field `weight` of 0."""
        spoken = enumerate(self.messages)
        return [i for i, each in spoken if each["role"] == "assistant" and each.get("weight", 1) != 0]


def is_conversation(value: Any) -> bool:
    """Whether a field's value is meant as messages: a list that begins with an object with `role`, or with `from`."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return False
    return isinstance(value[0], Mapping) and ("role" in value[0] or "from" in value[0])


def conversation_of(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], where: str) -> Conversation:
    """The conversation in a record.

    Args:
        record: Its other fields must not change what a template writes.
        messages: For which `is_conversation` holds; objects of `from` and `value` are read as ShareGPT has them.
        where: Names the record in errors.

    Raises:
        InputError: A role or content is not allowed, or a field is there that is not read.
    """
    for field in _NOT_READ:
        if record.get(field):
            raise InputError(f"{where}: field {field!r} is not read with messages, it must be empty")
    return Conversation(tuple(_message(each, f"{where}: messages[{i}]") for i, each in enumerate(messages)), where)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: must be an object with role and content, not {_short(message)}")
    # A column of Parquet has a field in every message, or none.
    stated = {key: value for key, value in message.items() if value is not None}
    if "role" in stated:
        return stated
    role = stated.get("from")
    if role not in SHAREGPT_ROLES:
        raise InputError(f"{where}: from = {role!r}: must be one of {', '.join(SHAREGPT_ROLES)}")
    rest = {key: value for key, value in stated.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[role], "content": stated.get("value")} | rest


@dataclass(frozen=True)
class _Piece:
    """A piece of a conversation's text."""

    start: int
    end: int
    kind: Literal["prompt", "answer", "answer and more"]
    """A prompt ends where an answer begins; an answer is a message to learn, or goes on up to the next answer."""


def check_rendering(tokenizer: Tokenizer, conversation: Conversation) -> None:
    """Raises InputError where `tokenise` would, without making ids."""
    _pieces(tokenizer, conversation)


def tokenise(tokenizer: Tokenizer, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation, int32 [length], and whether each is to be learned, bool [length].

    The last one is: what the template writes after the assistant's last message teaches nothing.

    Raises:
        InputError: The tokenizer has no chat template, it fails on the messages, or it writes a prompt otherwise once
            its answer follows.
    """
    text, pieces = _pieces(tokenizer, conversation)
    ends = set(tokenizer.end_ids)
    ids: list[int] = []
    learned: list[bool] = []
    answers = iter(conversation.learned)
    for piece, new in zip(pieces, _encode_pieces(tokenizer, text, pieces), strict=True):
        count = 0
        if piece.kind != "prompt":
            # What ends an answer is the first end token that isn't part of what was said.
            said = conversation.messages[next(answers)]["content"]
            stops = [n for n, token in enumerate(new) if token in ends]
            stops = stops[sum(said.count(tokenizer.token_text(end)) for end in ends) :]
            if not stops and piece.kind == "answer and more":
                raise InputError(f"{conversation.where}: chat template: writes no token that ends an earlier answer")
            if not stops and piece is pieces[-1]:
                new, stops = [*new, tokenizer.eos_id], [len(new)]
            count = stops[0] + 1 if stops else len(new)
        ids += new
        learned += [n < count for n in range(len(new))]
    length = len(learned) - learned[::-1].index(True)
    return np.array(ids[:length], np.int32), np.array(learned[:length], bool)


def _pieces(tokenizer: Tokenizer, conversation: Conversation) -> tuple[str, list[_Piece]]:
    """The text up to the end of the last message to learn, and the pieces that make it up."""
    where = conversation.where
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: has messages, for which data.tokenizer must have a chat template; "
            "data.template may name fields of text instead"
        )
    try:
        return _rendered(tokenizer, conversation)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _rendered(tokenizer: Tokenizer, conversation: Conversation) -> tuple[str, list[_Piece]]:
    """A template may write an earlier answer otherwise than the last: Qwen3 leaves its thoughts out. Then only the
    prompts tell where it stands, and the token that ends it where it ends.
    """
    messages, learned = conversation.messages, conversation.learned
    for index, message in enumerate(messages):
        for field in _SAID:
            if message.get(field) and field not in (tokenizer.chat_template or ""):
                raise InputError(f"messages[{index}].{field}: is not written by the chat template")
    text = tokenizer.apply_chat(messages[: learned[-1] + 1], add_generation_prompt=False)
    borders: list[tuple[int, int | None]] = []  # of each answer
    for index in learned:
        prompt = tokenizer.apply_chat(messages[:index])
        last = index == learned[-1]
        answer = text if last else tokenizer.apply_chat(messages[: index + 1], add_generation_prompt=False)
        if not text.startswith(prompt) or (borders and len(prompt) < max(borders[-1][0], borders[-1][1] or 0)):
            raise InputError(
                f"chat template: writes messages[:{index}] differently when messages[{index}] follows than when it is "
                "asked for, so a model would learn to answer what it is never asked"
            )
        stable = answer.startswith(prompt) and text.startswith(answer)
        borders.append((len(prompt), len(answer) if stable else None))
    pieces: list[_Piece] = []
    at = 0
    for number, (start, end) in enumerate(borders):
        if start > at:
            pieces.append(_Piece(at, start, "prompt"))
        if end is None:
            at = borders[number + 1][0]  # the last answer is stable
            pieces.append(_Piece(start, at, "answer and more"))
        else:
            at = end
            pieces.append(_Piece(start, end, "answer"))
    return text, pieces


def _encode_pieces(tokenizer: Tokenizer, text: str, pieces: Sequence[_Piece]) -> list[list[int]]:
    """The ids of every piece as part of the text."""
    encoded = [begin(tokenizer, text[: pieces[0].end])]
    encoded += [tokenizer.encode(text[piece.start : piece.end]) for piece in pieces[1:]]
    if list(itertools.chain.from_iterable(encoded)) == begin(tokenizer, text):
        return encoded
    # The text has other ids where pieces meet. A piece has the ids with which it goes on from those before it; where
    # some would span the border, those before it stay, for they are what the model has seen by then.
    encoded = []
    ids: list[int] = []
    for piece in pieces:
        joint = begin(tokenizer, text[: piece.end])
        goes_on = joint[: len(ids)] == ids
        encoded.append(joint[len(ids) :] if goes_on else _encode_after(tokenizer, text[piece.start : piece.end]))
        ids += encoded[-1]
    return encoded


def _encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on from another: without the space that some tokenizers put before every text."""
    for anchor in _ANCHORS:
        before, joint = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
        if joint[: len(before)] == before:
            return joint[len(before) :]
    return tokenizer.encode(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
