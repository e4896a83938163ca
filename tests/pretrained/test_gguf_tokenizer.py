"""Tokenizers inside GGUF files against the ids that others give (see tests/references)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_files import REFERENCES, byte_level_metadata, sentence_piece_metadata, write_gguf

from mod_star.data import HuggingFaceTokenizer, begin, load_saved_tokenizer, save_tokenizer
from mod_star.errors import InputError
from mod_star.pretrained.gguf_header import read_gguf
from mod_star.pretrained.gguf_tokenizer import read_gguf_tokenizer


def tokenizer_of(path: Path, metadata: dict[str, Any], rows: int | None = None) -> HuggingFaceTokenizer:
    file = read_gguf(write_gguf(path / "vocabulary.gguf", metadata, {}))
    return read_gguf_tokenizer(file, len(metadata["tokenizer.ggml.tokens"]) if rows is None else rows)


@pytest.mark.parametrize("pre", REFERENCES["byte_level"]["ids"])
def test_byte_level_ids_are_the_originals(tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level_metadata(pre))
    found = [tokenizer.encode(text) for text in REFERENCES["texts"]]
    assert found == REFERENCES["byte_level"]["ids"][pre]
    others = [other for other in REFERENCES["byte_level"]["ids"] if other != pre]
    assert all(found != REFERENCES["byte_level"]["ids"][other] for other in others)  # the texts tell them apart


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("deepseek-r1-qwen", "qwen2"), ("megrez", "qwen2"), ("stablelm2", "qwen2"), ("falcon3", "llama-bpe"),
        ("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("smaug-bpe", "llama-bpe"), ("a.x-4.0", "gpt-2"),
        ("mellum", "gpt-2"), ("exaone", "smollm"), ("starcoder", "smollm"),
    ],
)  # fmt: skip
def test_names_of_one_group_split_alike(tmp_path: Path, name: str, same_as: str) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level_metadata(name))
    found = [tokenizer.encode(text) for text in REFERENCES["texts"]]
    if name != "smaug-bpe":
        assert found == REFERENCES["byte_level"]["ids"][same_as]
        assert tokenizer.starts_with_bos is (same_as == "llama-bpe")
        return
    # Words of the vocabulary to which no merges lead aren't taken whole, and texts don't begin with bos.
    content = json.loads(tokenizer_of(tmp_path, byte_level_metadata(same_as)).content)
    assert content["model"].pop("ignore_merges") is True
    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert found == [plain.encode(text, add_special_tokens=False).ids for text in REFERENCES["texts"]]
    assert not tokenizer.starts_with_bos


def test_byte_level_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level_metadata("gpt-2"))
    for text in REFERENCES["texts"]:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>a <think> b<|im_end|>")) == "a <think> b"


def test_sentence_piece_ids_are_the_originals(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, sentence_piece_metadata())
    found = REFERENCES["sentence_piece"]
    for text, expected in zip(found["texts"], found["ids"], strict=True):
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text.replace("▁", " ")  # as the library itself
    assert tokenizer.encode("<s>")[:1] == [1]
    assert begin(tokenizer, "the") == [1, *tokenizer.encode("the")]
    without = tokenizer_of(tmp_path, sentence_piece_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    assert without.encode(" the") == tokenizer.encode("the")
    assert without.decode(without.encode("the")) == "the"


def test_special_tokens_and_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level_metadata())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids, tokenizer.starts_with_bos) == (1, 2, (2, 0), False)
    assert begin(tokenizer, "a") == tokenizer.encode("a")
    assert tokenizer.apply_chat([{"role": "user", "content": "hi"}]) == "<|im_start|>hi<|im_end|>"
    save_tokenizer(tokenizer, tmp_path / "run")
    saved = load_saved_tokenizer(tmp_path / "run", "model.gguf")
    assert (saved.fingerprint, saved.end_ids) == (tokenizer.fingerprint, tokenizer.end_ids)
    assert saved.chat_template == tokenizer.chat_template
    starting = tokenizer_of(tmp_path, byte_level_metadata("llama-bpe"))
    assert starting.starts_with_bos
    # A tokenizer.json says so itself: transformers 5 reads nothing else.
    assert tokenizers.Tokenizer.from_str(starting.content).encode("a").ids == begin(starting, "a")
    assert tokenizers.Tokenizer.from_str(tokenizer.content).encode("a").ids == tokenizer.encode("a")
    stated = byte_level_metadata() | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 5}
    assert tokenizer_of(tmp_path, stated).starts_with_bos
    assert tokenizer_of(tmp_path, stated).end_ids == (2, 5, 0)


def changed(base: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    metadata = base | {f"tokenizer.ggml.{name}": value}
    return {key: value for key, value in metadata.items() if value is not None}


BYTE_LEVEL, SENTENCE_PIECE = byte_level_metadata(), sentence_piece_metadata()
TOKENS = BYTE_LEVEL["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("base", "name", "value", "message"),
    [
        (BYTE_LEVEL, "model", None, "has no tokenizer.ggml.model"),
        (BYTE_LEVEL, "model", "t5", "tokenizer.ggml.model = 't5': is not supported; must be 'gpt2'"),
        (BYTE_LEVEL, "model", [1, 2], "tokenizer.ggml.model = array([1, 2], dtype=int32): is not supported; must be"),
        (BYTE_LEVEL, "pre", [1, 2], "tokenizer.ggml.pre = array([1, 2], dtype=int32): how this model splits text is"),
        (BYTE_LEVEL, "pre", ["gpt-2"], "tokenizer.ggml.pre = ['gpt-2']: how this model splits text is not known"),
        (BYTE_LEVEL, "pre", None, "tokenizer.ggml.pre = None: how this model splits text is not known here"),
        (BYTE_LEVEL, "pre", "falcon", "tokenizer.ggml.pre = 'falcon': how this model splits text is not known here"),
        (BYTE_LEVEL, "merges", ["a zz"], "tokenizer.ggml.merges = 'a zz': must be two tokens"),
        (BYTE_LEVEL, "merges", ["ab"], "tokenizer.ggml.merges = 'ab': must be two tokens"),
        (BYTE_LEVEL, "merges", 3, "tokenizer.ggml.merges = 3: must be an array of strings"),
        (BYTE_LEVEL, "tokens", TOKENS[:-1] + TOKENS[:1], "tokenizer.ggml.tokens = '<|endoftext|>': is there twice"),
        (
            BYTE_LEVEL,
            "token_type",
            [1, 2],
            f"tokenizer.ggml.token_type has 2 entries, the vocabulary has {len(TOKENS)}",
        ),
        (BYTE_LEVEL, "token_type", None, "has no tokenizer.ggml.token_type"),
        (BYTE_LEVEL, "eos_token_id", 10**6, "tokenizer.ggml.eos_token_id = 1000000: must be an id below"),
        (BYTE_LEVEL, "add_bos_token", "yes", "tokenizer.ggml.add_bos_token = 'yes': must be a bool"),
        (BYTE_LEVEL, "lowercase", True, "tokenizer.ggml.lowercase = True: is a field that mod-star does not know"),
        (SENTENCE_PIECE, "scores", [1.0], "tokenizer.ggml.scores has 1 entries"),
        (SENTENCE_PIECE, "remove_extra_whitespaces", True, "remove_extra_whitespaces = True: is not supported"),
        (SENTENCE_PIECE, "precompiled_charsmap", [1, 2], "tokenizer.ggml.precompiled_charsmap = "),
    ],
)
def test_bad_vocabularies_are_one_line(
    tmp_path: Path, base: dict[str, Any], name: str, value: Any, message: str
) -> None:
    metadata = changed(base, name, value)
    with pytest.raises(InputError) as error:
        tokenizer_of(tmp_path, metadata)
    assert str(error.value).startswith(f"{tmp_path / 'vocabulary.gguf'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_does_not_fit_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"the tokenizer has {len(TOKENS)} tokens, the embedding has 7 rows"):
        tokenizer_of(tmp_path, BYTE_LEVEL, 7)
