"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mod_star.errors import InputError, require
from mod_star.home import expanded
from mod_star.tokenization.chat import Message, render_chat
from mod_star.tokenization.special_tokens import (
    END_OF_TEXT,
    SPECIAL_TOKENS_NAME,
    SpecialTokens,
    special_tokens,
    vocabulary_size,
)
from mod_star.tokenization.tokenizer_files import (
    CHAT_TEMPLATE_NAME,
    chat_template_in,
    chat_template_of,
    complete,
    read_tokenizer_directory,
)
from mod_star.tokenization.unicode_text import unicode_text

SAVED_NAME = "tokenizer.json"
"""Name of a tokenizer inside a run directory."""
_PRINTABLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: every id is below it."""
        ...

    @property
    def bos_id(self) -> int:
        """Id that starts a text made from nothing, and every document if `starts_with_bos`; may equal `eos_id`."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that ends a document; may equal `bos_id`."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text, `eos_id` first."""
        ...

    @property
    def starts_with_bos(self) -> bool:
        """Whether documents and prompts begin with `bos_id` (see `begin`)."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of `apply_chat`; None: the model comes without one."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give the same ids to the same documents."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos and eos. Raises InputError if `text` is no valid Unicode."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special ids and ids outside the vocabulary give nothing, broken UTF-8 gives U+FFFD."""
        ...

    def token_text(self, token: int) -> str:
        """A short printable form of one token, for pictures; never empty."""
        ...

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt that asks a chat model for its next turn, special tokens (bos among them) spelled out.

        Without `add_generation_prompt` it is the text of the messages alone, as it is to be learned.

        Raises:
            InputError: There is no chat template, it fails, or a message is no {"role": text, "content": text}.
        """
        ...


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a document or prompt up to its end: with bos first where the tokenizer wants it.

    A text that spells bos out already, as a chat template may, doesn't get another. An empty text is bos alone,
    whatever the tokenizer wants: a model can only go on from something (where there is no bos, that is eos, the
    separator of documents).
    """
    ids = tokenizer.encode(text)
    lacks_bos = not ids or (tokenizer.starts_with_bos and ids[0] != tokenizer.bos_id)
    return [tokenizer.bos_id, *ids] if lacks_bos else ids


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, bos 256, eos 257."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    end_ids = (257,)
    starts_with_bos = True
    chat_template = None
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` in UTF-8."""
        return list(unicode_text(text, "text").encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids that are bytes."""
        return bytes(token for token in ids if 0 <= token < 256).decode(errors="replace")

    def token_text(self, token: int) -> str:
        """ASCII as it is, other bytes as \\xNN."""
        if 0x20 <= token < 0x7F or token in (9, 10, 13):
            return chr(token).translate(_PRINTABLE)
        names = {self.bos_id: "<bos>", self.eos_id: "<eos>"}
        return f"\\x{token:02x}" if 0 <= token < 256 else names.get(token, f"<{token}>")

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Bytes have no chat template: InputError."""
        raise InputError("data.tokenizer = 'bytes': has no chat template; the model cannot be asked as a chat")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a `HuggingFaceTokenizer` is made from, where it doesn't come as files."""

    content: str
    """Of a tokenizer.json."""
    special: SpecialTokens
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package. Its truncation, padding and template are not applied.

    Tokens that it lacks, what starts and ends a text, and the chat template come from the files beside it: a run's own,
    or those of a Hugging Face model's directory (see `mod_star.tokenization.tokenizer_files` and `special_tokens`).
    """

    notes: tuple[str, ...]
    """What a user should know of the files: where they differ, and what of them is ignored."""

    def __init__(self, source: str | Path | TokenizerFiles, name: str | None = None) -> None:
        """Args:
            source: The file, a directory that holds a `tokenizer.json`, or the contents.
            name: What error messages call it; by default "data.tokenizer = <path>".

        Raises:
            InputError: No such file, not a tokenizer, no special token to start or end a text with, or a file beside it
                is wrong.
        """
        directory = None
        if isinstance(source, TokenizerFiles):
            name = name or "tokenizer.json"
            content = source.content
        else:
            name = name or f"data.tokenizer = {str(source)!r}"
            file = expanded(source)
            file = file / SAVED_NAME if file.is_dir() else file
            # The files beside it belong to the one that has the usual name.
            directory = file.parent if file.name == SAVED_NAME else None
            content = _read(file, name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # The package raises bare Exception.
            raise InputError(f"{name}: not a tokenizer.json ({error})") from None
        self.name = name
        if isinstance(source, TokenizerFiles):
            self.special, self.chat_template, self.notes = source.special, source.chat_template, source.notes
        elif directory is not None and (directory / SPECIAL_TOKENS_NAME).is_file():  # a run's, which are complete
            file, template = directory / SPECIAL_TOKENS_NAME, directory / CHAT_TEMPLATE_NAME
            self.special, self.notes = SpecialTokens.from_json(file, vocabulary_size(self._tokenizer)), ()
            self.chat_template = chat_template_in(template) if template.is_file() else None
        else:
            files = None if directory is None else read_tokenizer_directory(directory)
            if files is not None and complete(self._tokenizer, files):
                content = self._tokenizer.to_str()
            self.special = special_tokens(self._tokenizer, files, name)
            self.chat_template = None if files is None else chat_template_of(files)
            self.notes = () if files is None else tuple(files.notes)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = vocabulary_size(self._tokenizer)
        bos, eos = self.special.bos_id, self.special.eos_id
        self.bos_id: int = eos if bos is None else bos  # type: ignore[assignment]
        self.eos_id: int = bos if eos is None else eos  # type: ignore[assignment]
        self.end_ids = self.special.end_ids
        self.starts_with_bos = self.special.starts_with_bos
        self.content = content
        framing = f"\n{self.bos_id} {self.eos_id} {self.starts_with_bos}"
        self.fingerprint = "tokenizer.json " + hashlib.sha256((content + framing).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled out in it count as such."""
        return self._tokenizer.encode(unicode_text(text, "text"), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, as the file's decoder gives it."""
        special = {self.bos_id, self.eos_id, *self.end_ids}
        known = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in special]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """The token's text, with visible white space; part of a character as the vocabulary spells it."""
        spelling = self._tokenizer.id_to_token(token) if 0 <= token < self.vocab_size else None
        if not spelling:
            return f"<{token}>"
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        # A decoder may drop a text's first space.
        text = spelling if not text or "\ufffd" in text else text
        text = " " + text if spelling.startswith("▁") and not text.startswith((" ", "▁")) else text
        text = text.translate(_PRINTABLE)
        return text if text.isprintable() else ascii(text)[1:-1]

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for the assistant's next turn, or the messages alone, by the chat template; encode it as it is."""
        if self.chat_template is None:
            raise InputError(f"{self.name}: has no chat template; the model cannot be asked as a chat")
        named = {"bos_token": self.special.bos_id, "eos_token": self.special.eos_id}
        spelled = {key: self._tokenizer.id_to_token(token) or "" for key, token in named.items() if token is not None}
        return render_chat(self.chat_template, messages, spelled, add_generation_prompt)


def _read(file: Path, name: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file (allowed: bytes, or a tokenizer.json)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read ({error})") from None


class StreamDecoder:
    """Text as tokens arrive: the pieces, joined, are what `decode` gives for all ids at once.

    A character whose bytes are spread over several tokens is held back until it is complete.

    Example:
        >>> stream = StreamDecoder(ByteTokenizer())
        >>> [stream.push(token) for token in "é!".encode()], stream.flush()
        (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # Ids not yet settled, after one settled piece as context for the decoder.
        self._shown = ""  # What was returned of their text.

    def copy(self) -> StreamDecoder:
        """Another one that goes on from here."""
        other = StreamDecoder(self._tokenizer)
        other._ids, other._shown = list(self._ids), self._shown
        return other

    def push(self, token: int) -> str:
        """The text that id `token` completes, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A trailing U+FFFD may be the start of a character: at most three bytes, so at most three of them.
        pending = min(len(text) - len(text.rstrip("\ufffd")), 3)
        if pending and not text.startswith(self._shown):
            return ""  # Byte fallback spells all bytes in a row as U+FFFD until the last character is complete.
        new = text[len(self._shown) : len(text) - pending]
        if new:
            self._shown = text[: len(text) - pending]
        if new and not pending:
            # Keep the last character: decoders that drop a text's first space need to see that this is not the first.
            for count in range(1, 5):
                last = self._tokenizer.decode(self._ids[-count:])
                if "\ufffd" not in last:
                    self._ids, self._shown = self._ids[-count:], last
                    break
        return new

    def flush(self) -> str:
        """What is still held back, and a fresh start."""
        rest = self._tokenizer.decode(self._ids)[len(self._shown) :]
        self._ids, self._shown = [], ""
        return rest


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names: "bytes", or the path of a `tokenizer.json`.

    Raises:
        InputError: It is neither.
    """
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(spec)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Puts a tokenizer with all that belongs to it into a run directory, which then no longer needs the original.

    Bytes need no file.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / SAVED_NAME).write_text(tokenizer.content, encoding="utf-8")
        (path / SPECIAL_TOKENS_NAME).write_text(tokenizer.special.to_json(), encoding="utf-8")
        if tokenizer.chat_template is not None:
            (path / CHAT_TEMPLATE_NAME).write_text(tokenizer.chat_template, encoding="utf-8", newline="")


def load_saved_tokenizer(directory: str | Path, spec: str) -> Tokenizer:
    """The tokenizer that `save_tokenizer` put into `directory`.

    Args:
        directory: The run directory.
        spec: The run's `DataConfig.tokenizer`.
    """
    return load_tokenizer(spec if spec == "bytes" else str(Path(directory) / SAVED_NAME))


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE tokenizer and writes it as a `tokenizer.json`.

    Args:
        texts: What to train on: training documents only, if held-out loss is to be compared.
        vocab_size: The most ids, with all 256 bytes and <|endoftext|> (its bos and eos); fewer if `texts` has fewer
            pairs to merge.
        path: The file to write.

    Raises:
        InputError: `vocab_size` below 257.
    """
    require(vocab_size >= 257, "vocab_size", vocab_size, "must be at least 257 (all bytes and <|endoftext|>)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return HuggingFaceTokenizer(path)
