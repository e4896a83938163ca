"""Files beside a tokenizer.json: tokens that only they name, which of them wins, and what is told or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.tokenization import HuggingFaceTokenizer, load_saved_tokenizer, save_tokenizer
from mod_star.training.train import train

START, END = "<|im_start|>", "<|im_end|>"


def hf_directory(path: Path, **files: Any) -> Path:
    """A byte-level tokenizer: 256 bytes, <s> = 256, </s> = 257; each file by its name up to the dot."""
    path.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    made.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def entry(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content} | plain | flags


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
DECODER = {"257": entry("</s>"), "258": entry(START), "259": entry(END), "260": entry("<tool>", special=False)}


def test_tokens_of_added_tokens_decoder_alone_are_tokens(tmp_path: Path) -> None:
    config = NAMED | {"eos_token": END, "added_tokens_decoder": DECODER}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path / "hf", tokenizer_config=config))
    plain = HuggingFaceTokenizer(hf_directory(tmp_path / "plain", tokenizer_config=NAMED))
    letters = plain.encode("user hi")
    assert tokenizer.encode(f"{START}user hi{END}<tool>") == [258, *letters, 259, 260]
    assert tokenizer.decode([258, *letters, 259, 260]) == "user hi<tool>"  # special ones give nothing
    assert (tokenizer.eos_id, tokenizer.end_ids, tokenizer.vocab_size) == (259, (259, 257), 261)
    assert plain.encode("user") == tokenizer.encode("user") and plain.fingerprint != tokenizer.fingerprint
    save_tokenizer(tokenizer, tmp_path / "run")
    saved = load_saved_tokenizer(tmp_path / "run", "x")
    assert isinstance(saved, HuggingFaceTokenizer)
    assert (saved.fingerprint, saved.special, saved.notes) == (tokenizer.fingerprint, tokenizer.special, ())
    assert saved.encode(f"a {START}") == [*plain.encode("a "), 258]


def test_flags_of_added_tokens_count(tmp_path: Path) -> None:
    decoder = {
        "258": entry("<l>", lstrip=True),
        "259": entry("<r>", rstrip=True),
        "260": entry("WORD", single_word=True),
    }
    config = NAMED | {"added_tokens_decoder": decoder}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, tokenizer_config=config))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert tokenizer.encode("a  <l>b") == [a, 258, b]
    assert tokenizer.encode("a<r>  b") == [a, 259, b]
    assert 260 in tokenizer.encode("a WORD b") and 260 not in tokenizer.encode("aWORDb")
    # A token that tokenizer.json has with other flags: the newer file's are followed, and it is told.
    config = NAMED | {"added_tokens_decoder": {"257": entry("</s>", rstrip=True)}}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("</s>  b") == [257, b]
    (note,) = tokenizer.notes
    assert "</s>" in note and "differ in rstrip" in note and "tokenizer_config.json is followed" in note


def test_added_tokens_json_and_named_tokens(tmp_path: Path) -> None:
    added, special = {"<a>": 258, "<b>": 259}, {"additional_special_tokens": ["<b>", {"content": "<c>"}]}
    config = NAMED | {"pad_token": "[PAD]"}
    directory = hf_directory(tmp_path, added_tokens=added, special_tokens_map=special, tokenizer_config=config)
    tokenizer = HuggingFaceTokenizer(directory)
    assert tokenizer.encode("<a><b>[PAD]<c>") == [258, 259, 260, 261]
    assert tokenizer.decode([258, 259, 260, 261]) == "<a>"  # only this one is not special
    assert any("pad_token [PAD] is new: id 260" in note for note in tokenizer.notes)
    # A word of the vocabulary that is named special is taken whole and gives no text.
    directory = hf_directory(
        tmp_path, tokenizer_config=NAMED | {"pad_token": "!"}, special_tokens_map={}, added_tokens={}
    )
    tokenizer = HuggingFaceTokenizer(directory)
    bang = tokenizer.encode("!")[0]
    assert tokenizer.encode("a!!")[1:] == [bang, bang] and tokenizer.decode([bang]) == ""


def test_new_tokens_get_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    """The ids are those of transformers 5.24."""
    several = ["unk", "pad", "sep", "mask", "cls", "image"]
    config: dict[str, Any] = (
        NAMED | {f"{name}_token": f"<{name}>" for name in several} | {"extra_special_tokens": ["<x>", "<y>"]}
    )
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, tokenizer_config=config))
    expected = {"<unk>": 258, "<sep>": 259, "<pad>": 260, "<cls>": 261, "<mask>": 262, "<image>": 263}
    expected |= {"<x>": 264, "<y>": 265}
    assert {name: tokenizer.encode(name)[0] for name in expected} == expected
    # With added_tokens_decoder the older map adds nothing; a word that is stated with its id becomes a token.
    config = NAMED | {"added_tokens_decoder": {"258": entry("<A>"), "0": entry("!", special=False)}}
    older = {"pad_token": "<p>", "additional_special_tokens": ["<x>"]}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, tokenizer_config=config, special_tokens_map=older))
    assert (tokenizer.vocab_size, tokenizer.encode("!<A>"), tokenizer.notes) == (259, [0, 258], ())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"258": entry("</s>")}}, "'</s>' = 258: tokenizer.json has this"),
        ("tokenizer_config", {"added_tokens_decoder": {"257": entry("<x>")}}, "'<x>' = 257: in tokenizer.json that is"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"300": entry("<x>")}},
            "'<x>' = 300: leaves a gap: the next id ",
        ),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder = [1]: must be an object of tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": entry("a")}}, "must be a token by its id"),
        ("tokenizer_config", {"added_tokens_decoder": {"258": "<x>"}}, "must be a token by its id"),
        ("tokenizer_config", {"added_tokens_decoder": {"258": {"content": 3}}}, "must be a token, or an object"),
        ("tokenizer_config", {"added_tokens_decoder": {"258": entry("x") | {"lstrip": 1}}}, "lstrip = 1: must be true"),
        ("tokenizer_config", {"split_special_tokens": True}, "split_special_tokens = True: is not supported"),
        ("tokenizer_config", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "with Python code of its own is not"),
        ("tokenizer_config", {"additional_special_tokens": "<x>"}, "must be a list of tokens"),
        ("added_tokens", {"<x>": 257}, "added_tokens.json: '<x>' = 257: in tokenizer.json that is '</s>'"),
        ("added_tokens", {"<x>": "258"}, "added_tokens.json: '<x>' = '258': must be an id of a token"),
        ("special_tokens_map", {"eos_token": "<none>"}, "eos_token = '<none>': is not a token of this tokenizer"),
        ("special_tokens_map", [], "special_tokens_map.json: must hold a JSON object"),
        ("config", {"eos_token_id": [257, 258]}, "config.json: eos_token_id = [257, 258]: must be an id below 258"),
        ("config", {"eos_token_id": True}, "config.json: eos_token_id = True: must be an id below 258"),
        ("generation_config", {"eos_token_id": [1.5]}, "eos_token_id = [1.5]: must be an id or a list of ids"),
    ],
)
def test_what_contradicts_is_refused_by_name(tmp_path: Path, name: str, content: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        HuggingFaceTokenizer(hf_directory(tmp_path, **{name: content}))
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_differ_on_an_id_are_refused(tmp_path: Path) -> None:
    config = NAMED | {"added_tokens_decoder": {"258": entry("<x>"), "259": entry("<y>")}}
    for added in ({"<x>": 259}, {"<z>": 258}):
        with pytest.raises(InputError, match=r"added_tokens\.json: .* tokenizer_config\.json has another token or"):
            HuggingFaceTokenizer(hf_directory(tmp_path, tokenizer_config=config, added_tokens=added))
    same = hf_directory(tmp_path, tokenizer_config=config, added_tokens={"<y>": 259, "<x>": 258})
    assert HuggingFaceTokenizer(same).notes == ()


def test_a_text_ends_with_whatever_any_file_says(tmp_path: Path) -> None:
    decoder = {str(258 + i): entry(name) for i, name in enumerate(["<A>", "<B>", "<C>", "<D>"])}
    config = NAMED | {"added_tokens_decoder": decoder}
    files: dict[str, Any] = {"tokenizer_config": config, "config": {"eos_token_id": [258, 257]}}
    files |= {"generation_config": {"eos_token_id": [259, 999, -1], "pad_token_id": 5000}}
    files |= {"special_tokens_map": {"eos_token": {"content": "<C>"}}}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.end_ids) == (257, (257, 258, 259, 260))
    notes = "\n".join(tokenizer.notes)
    for said in ("eos_token_id = 999 is ignored", "eos_token_id = -1 is ignored", "pad_token_id = 5000 is ignored"):
        assert f"generation_config.json: {said}: the tokenizer has 262 ids" in notes
    assert "special_tokens_map.json: eos_token <C> is not the eos, but ends a text, too" in notes
    # Without added_tokens_decoder the map is the newer file, for transformers as well.
    del config["added_tokens_decoder"]
    files = {
        "tokenizer_config": config,
        "special_tokens_map": {"eos_token": "<s>"},
        "generation_config": {},
        "config": {},
    }
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.end_ids) == (256, (256, 257))


def test_ids_alone_name_bos_and_eos(tmp_path: Path) -> None:
    model = {"eos_token_id": 7, "bos_token_id": 5, "model_type": "llama"}
    tokenizer = HuggingFaceTokenizer(hf_directory(tmp_path, config=model))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (5, 7, (7, 257))
    assert not tokenizer.starts_with_bos  # tokenizer.json does not put one
    others: tuple[Any, ...] = ([], {"data": {"tokenizer": "bytes"}})
    for other in others:  # another program's config.json
        plain = HuggingFaceTokenizer(hf_directory(tmp_path, config=other))
        assert (plain.bos_id, plain.eos_id, plain.starts_with_bos) == (256, 257, True)
    named = HuggingFaceTokenizer(hf_directory(tmp_path, config=model, tokenizer_config=NAMED))
    assert (named.bos_id, named.eos_id, named.end_ids) == (256, 257, (257, 7))
    assert any("bos_token_id = 5 is ignored: the tokenizer's bos is <s> (256)" in note for note in named.notes)


def test_training_tells_it_too(tmp_path: Path, tiny_run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    directory = hf_directory(tmp_path / "hf", tokenizer_config=NAMED | {"pad_token": "[PAD]"})
    data = replace(tiny_run.data, tokenizer=str(directory / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer has 259 ids"):
        train(replace(tiny_run, data=data), tmp_path / "run")
    assert "note: tokenizer_config.json: pad_token [PAD] is new: id 258" in capsys.readouterr().out


def test_what_is_not_followed_is_told(tmp_path: Path) -> None:
    config: dict[str, Any] = NAMED | {"add_prefix_space": True, "add_bos_token": True, "add_eos_token": True}
    config |= {"chat_template": [{"name": "rag", "template": "a"}]}
    directory = hf_directory(tmp_path, tokenizer_config=config)
    plain = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 257)])
    plain.save(str(directory / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(directory)
    assert tokenizer.starts_with_bos and tokenizer.chat_template is None
    notes = "\n".join(tokenizer.notes)
    for said in (
        "add_prefix_space = true, but tokenizer.json puts none",
        "add_bos_token = true is followed; tokenizer.json would not begin a text with <s>",
        "add_eos_token = true: documents end with eos, prompts never do",
        "chat_template: none of rag is called default",
    ):
        assert said in notes, said
    (directory / "chat_template.jinja").write_text("new")
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMED | {"chat_template": "old"}))
    tokenizer = HuggingFaceTokenizer(directory)
    assert tokenizer.chat_template == "new"
    assert any("chat_template.jinja is followed" in note for note in tokenizer.notes)
    harmless = {
        "legacy": True,
        "model_max_length": 1e30,
        "clean_up_tokenization_spaces": True,
        "unk_token": None,
        "pad_token": "",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMED | harmless | {"add_prefix_space": False}))
    assert HuggingFaceTokenizer(directory).notes == ()
