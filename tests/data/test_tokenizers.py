"""Tokenizers: round trips, specials, streaming, saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from mod_star.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from mod_star.errors import InputError

TEXT = "The naïve café — 日本語, 🙂🙂! 'tis\n\ttabs  and   spaces \ufffd end"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "small.json"
    return train_bpe(["the cat sat on the mat, the end"] * 5 + ["日本 日本"], 280, path)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: HuggingFaceTokenizer) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_round_trip_without_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("") == []


def test_decode_skips_special_and_unknown_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    framed = [tokenizer.bos_id, ids[0], tokenizer.vocab_size, 10**6, -1, *ids[1:], tokenizer.eos_id]
    assert tokenizer.decode(np.array(framed)) == "ab"


def test_invalid_unicode_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="text: character 1 is an unpaired surrogate"):
        tokenizer.encode("a\udcff")


def test_stream_equals_decode(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode(TEXT)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == TEXT
    # It streams: nothing but a character in parts is held back.
    for count in range(1, len(ids)):
        shown = "".join(pieces[:count])
        assert TEXT.startswith(shown)
        assert len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) <= len(shown)


def test_stream_of_anything_equals_decode(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    stream = StreamDecoder(tokenizer)
    for _ in range(60):
        ids = random.integers(0, tokenizer.vocab_size + 2, 40).tolist()  # mostly broken UTF-8
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_back_no_more_than_a_character() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(0xFF) for _ in range(6)] == ["", "", "", "\ufffd", "\ufffd", "\ufffd"]
    assert stream.flush() == "\ufffd" * 3
    assert stream.flush() == ""


def test_token_text_is_printable_and_never_empty(tokenizer: Tokenizer) -> None:
    for token in range(-1, tokenizer.vocab_size + 2):
        text = tokenizer.token_text(token)
        assert text
        assert text.isprintable()
    assert tokenizer.token_text(tokenizer.encode("\n")[0]) == "⏎"


def test_byte_tokenizer_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    shown = [tokenizer.token_text(token) for token in (65, 32, 0xC3, 256, 257, 300)]
    assert shown == ["A", "␣", "\\xc3", "<bos>", "<eos>", "<300>"]


def test_trained_bpe(bpe: HuggingFaceTokenizer) -> None:
    assert 257 < bpe.vocab_size <= 280
    assert bpe.bos_id == bpe.eos_id
    assert len(bpe.encode("the cat")) < len("the cat")
    assert bpe.token_text(bpe.encode(" the")[0]) == "␣the"
    assert bpe.token_text(bpe.bos_id) == "<|endoftext|>"
    with pytest.raises(InputError, match="vocab_size = 256: must be at least 257"):
        train_bpe(["x"], 256, "unused")


def test_saved_tokenizer_needs_no_original(bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    original = tmp_path / "original.json"
    original.write_text(bpe.content, encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    tokenizer = load_tokenizer(str(original))
    save_tokenizer(tokenizer, run)
    original.unlink()
    saved = load_saved_tokenizer(run, str(original))
    assert saved.fingerprint == tokenizer.fingerprint == bpe.fingerprint
    assert saved.encode(TEXT) == tokenizer.encode(TEXT)


def test_bytes_are_saved_without_a_file(tmp_path: Path) -> None:
    save_tokenizer(load_tokenizer("bytes"), tmp_path)
    assert not list(tmp_path.iterdir())
    assert load_saved_tokenizer(tmp_path, "bytes").fingerprint == "bytes"


def word_level(path: Path, *special: str, length: int | None = None) -> Path:
    """A tokenizer of a few words that has the given special tokens and possibly cuts its input."""
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    if length:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [(("<s>", "</s>"), 3, 4), (("</s>",), 3, 3), (("[BOS]",), 3, 3), (("<bos>", "[SEP]"), 3, 4)],
)
def test_bos_and_eos_fall_back_to_each_other(tmp_path: Path, special: tuple[str, ...], bos: int, eos: int) -> None:
    tokenizer = HuggingFaceTokenizer(word_level(tmp_path / "t.json", *special))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (bos, eos, 3 + len(special))


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(word_level(tmp_path / "t.json", "</s>", length=2))
    assert tokenizer.encode("a") == [0]
    assert tokenizer.encode("a b a") == [0, 1, 0]


def test_bad_tokenizers_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"a": 1}))
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    plain = word_level(tmp_path / "plain.json")
    for path, reason in [
        (tmp_path / "none.json", "no such file (allowed: bytes, or a tokenizer.json)"),
        (tmp_path, "no such file"),
        (broken, "not a tokenizer.json"),
        (binary, "cannot be read"),
        (plain, "has no special token to start or end a text (one of <s>, "),
    ]:
        with pytest.raises(InputError) as error:
            load_tokenizer(str(path))
        assert str(error.value).startswith(f"data.tokenizer = {str(path)!r}: {reason}")
        assert "\n" not in str(error.value)
