"""Tokenizers: round trips, specials, streaming, saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from sentence_piece import sentence_piece

from mod_star.errors import InputError
from mod_star.tokenization.special_tokens import SpecialTokens
from mod_star.tokenization.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    TokenizerFiles,
    begin,
    load_saved_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

TEXT = "The naïve café — 日本語, 🙂🙂! 'tis\n\ttabs  and   spaces \ufffd end"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "small.json"
    return train_bpe(["the cat sat on the mat, the end"] * 5 + ["日本 日本"], 280, path)


@pytest.fixture(params=["bytes", "bpe", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest, bpe: HuggingFaceTokenizer) -> Tokenizer:
    if request.param == "byte_fallback":
        return sentence_piece()
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


@pytest.mark.parametrize("text", ["x 😀\nQ: 5", "€€", "😀😀 a", "\n\n€\n", "日本 日本"])
def test_stream_of_characters_in_a_row(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text, "nothing is held back at the end"
    assert stream.flush() == ""


def test_stream_of_any_characters_equals_decode(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    stream = StreamDecoder(tokenizer)
    for _ in range(60):
        text = "".join(random.choice(list("ab the\n\té€😀日本~."), 40))
        assert "".join([stream.push(token) for token in tokenizer.encode(text)]) + stream.flush() == text


def test_stream_of_broken_bytes_keeps_what_was_shown() -> None:
    tokenizer = sentence_piece()
    (first,) = tokenizer.encode("x")[1:]
    broken = [first, *(3 + byte for byte in "€".encode()), 3 + 0xFF, 3 + 0xFF, first]
    assert tokenizer.decode(broken) == "x" + "\ufffd" * 5 + "x", "byte fallback spoils the € as well"
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, broken)) + stream.flush() == "x€" + "\ufffd" * 4 + "x"


def test_stream_settles_what_it_has_shown(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    for token in tokenizer.encode("日本語😀" * 20):
        stream.push(token)
    assert len(stream._ids) <= 4, "or long texts would take quadratic time"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"], indirect=True)
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
    assert tokenizer.token_text(tokenizer.encode("\n")[-1]) == "⏎"


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


def with_special(directory: Path, name: str = "tokenizer.json") -> Path:
    """A directory with a tokenizer of a few words and the special tokens <s>=3, </s>=4, <|im_end|>=5."""
    directory.mkdir(exist_ok=True)
    word_level(directory / name, "<s>", "</s>", "<|im_end|>")
    return directory


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def test_bytes_and_bare_files_start_with_bos_and_end_with_eos(bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert (tokenizer.end_ids, tokenizer.starts_with_bos) == ((tokenizer.eos_id,), True)
        assert tokenizer.chat_template is None
        assert begin(tokenizer, "ab") == [tokenizer.bos_id, *tokenizer.encode("ab")]
        assert begin(tokenizer, "") == [tokenizer.bos_id]
        with pytest.raises(InputError, match="has no chat template"):
            tokenizer.apply_chat([{"role": "user", "content": "a"}])
    # A known end of a turn ends a text too.
    tokenizer = HuggingFaceTokenizer(with_special(tmp_path / "bare"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (3, 4, (4, 5))
    assert tokenizer.decode([0, 5, 1, 4]) == "a b"


@pytest.mark.parametrize(
    ("config", "expected"),  # bos, eos, end_ids, starts_with_bos
    [
        ({"bos_token": "<s>", "eos_token": "<|im_end|>"}, (3, 5, (5, 4), False)),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}, (3, 4, (4, 5), True)),
        ({"bos_token": None, "eos_token": "</s>", "add_bos_token": True}, (4, 4, (4, 5), False)),
        ({}, (3, 4, (4, 5), True)),  # nothing is said: by their spelling
    ],
)
def test_files_of_hugging_face_name_the_special_tokens(
    tmp_path: Path, config: dict[str, object], expected: tuple[object, ...]
) -> None:
    directory = with_special(tmp_path / "hf")
    write_json(directory / "tokenizer_config.json", config)
    tokenizer = HuggingFaceTokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids, tokenizer.starts_with_bos) == expected
    write_json(directory / "generation_config.json", {"eos_token_id": [1, expected[1]]})
    tokenizer = HuggingFaceTokenizer(directory)
    assert tokenizer.end_ids[:2] == (expected[1], 1)
    # A file of another name does not belong to them.
    word_level(directory / "other.json", "<s>", "</s>")
    assert HuggingFaceTokenizer(directory / "other.json").end_ids == (4,)


def test_bos_is_added_where_the_files_own_template_adds_it(tmp_path: Path) -> None:
    directory = with_special(tmp_path / "hf")
    plain = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    plain.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    assert HuggingFaceTokenizer(directory).starts_with_bos


def test_begin_adds_bos_once_and_only_where_it_is_wanted(tmp_path: Path) -> None:
    directory = with_special(tmp_path / "hf")
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    without = HuggingFaceTokenizer(directory)
    assert begin(without, "a b") == [0, 1]
    assert begin(without, "") == [3]
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    wanting = HuggingFaceTokenizer(directory)
    assert begin(wanting, "a b") == [3, 0, 1]
    assert begin(wanting, "<s> a b") == [3, 0, 1]
    assert without.fingerprint != wanting.fingerprint


def test_saved_tokenizer_keeps_special_tokens_and_template(tmp_path: Path) -> None:
    directory = with_special(tmp_path / "hf")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\r\n{% endfor %}é"
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": template}],
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", {"eos_token_id": 0})
    tokenizer = HuggingFaceTokenizer(directory)
    save_tokenizer(tokenizer, tmp_path / "run")
    saved = load_saved_tokenizer(tmp_path / "run", "whatever")
    assert isinstance(saved, HuggingFaceTokenizer)
    assert saved.special == tokenizer.special == SpecialTokens(None, 5, (5, 0, 4), False)
    assert saved.chat_template == tokenizer.chat_template == template
    assert saved.fingerprint == tokenizer.fingerprint
    made = TokenizerFiles(tokenizer.content, tokenizer.special, template)
    assert HuggingFaceTokenizer(made).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<none>"}, "eos_token = '<none>': is not a token of this tokenizer"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template = 3: must be a string"),
        ("tokenizer_config.json", [1], "must hold a JSON object, holds list"),
        ("generation_config.json", {"eos_token_id": "6"}, "eos_token_id = '6': must be an id or a list of ids"),
        ("config.json", {"eos_token_id": 6}, "eos_token_id = 6: must be an id below 6"),
        ("config.json", {"eos_token_id": [4, -1]}, "eos_token_id = [4, -1]: must be an id below 6"),
        ("special_tokens.json", {"bos_id": 3}, "special_tokens.json: eos_id = None: must be an id below 6"),
        (
            "special_tokens.json",
            {"bos_id": 3, "eos_id": 4, "end_ids": [4, True], "starts_with_bos": False},
            "end_ids = [4, True]: must be a list of ids below 6",
        ),
        (
            "special_tokens.json",
            {"bos_id": None, "eos_id": 4, "end_ids": [4], "starts_with_bos": True},
            "starts_with_bos = True: must be false where bos_id is null",
        ),
    ],
)
def test_bad_files_beside_a_tokenizer_are_one_line(tmp_path: Path, name: str, content: object, message: str) -> None:
    directory = with_special(tmp_path / "hf")
    write_json(directory / name, content)
    with pytest.raises(InputError) as error:
        HuggingFaceTokenizer(directory)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
