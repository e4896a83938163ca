"""Hugging Face directories that are damaged, incomplete or not what they say: one line each, before any allocation."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pretrained_models import CONFIGS, tensors_of, write_model
from safetensors.numpy import save_file

from mod_star.errors import InputError
from mod_star.pretrained.build import build_params, check_source
from mod_star.pretrained.hf_directory import open_hf
from mod_star.pretrained.importing import open_source, run_config

LLAMA = CONFIGS["llama"]
QUERY = "model.layers.1.self_attn.q_proj.weight"


def shards(directory: Path, count: int = 2) -> Path:
    """The model of `write_model` in several files with an index."""
    tensors = tensors_of(LLAMA)
    write_model(directory, LLAMA, tensors)
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(left), leaves(right), strict=True))


def leaves(tree: Any) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def test_shards_are_the_same_as_one_file(tmp_path: Path) -> None:
    one, many = open_hf(write_model(tmp_path / "one", LLAMA)), open_hf(shards(tmp_path / "many", 3))
    assert same(build_params(one), build_params(many))


@pytest.mark.parametrize(("kind", "name"), [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")])
def test_other_types_become_float32(kind: Any, name: str, tmp_path: Path) -> None:
    narrow = {key: value.astype(kind) for key, value in tensors_of(LLAMA).items()}
    source = open_hf(write_model(tmp_path / "narrow", LLAMA, narrow))
    assert {tensor.stored for tensor in source.tensors.values()} == {name}
    wide = {key: value.astype(np.float32) for key, value in narrow.items()}
    assert same(build_params(source), build_params(open_hf(write_model(tmp_path / "wide", LLAMA, wide))))


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    tied = CONFIGS["qwen3, tied"]
    tensors = tensors_of(tied)
    tensors["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    expected = build_params(open_hf(write_model(tmp_path / "a", tied)))
    with_head = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    assert same(build_params(open_hf(write_model(tmp_path / "b", tied, with_head))), expected)
    alone = {name: value for name, value in with_head.items() if name != "model.embed_tokens.weight"}
    assert same(build_params(open_hf(write_model(tmp_path / "d", tied, alone))), expected)
    with_head["lm_head.weight"][3, 3] += 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but"):
        open_hf(write_model(tmp_path / "c", tied, with_head))


def change(what: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if what == "missing":
        del tensors[QUERY]
    elif what == "extra":
        tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((24, 16), np.float32)
    elif what == "shape":
        tensors[QUERY] = tensors[QUERY][:, :15].copy()
    elif what == "type":
        tensors[QUERY] = tensors[QUERY].astype(np.float64)
    elif what == "nan":
        tensors[QUERY][0, 0] = np.nan
    return tensors


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", rf"tensor {QUERY} is missing \(expected shape \[16, 16\]\)"),
        ("extra", r"tensor model\.layers\.2\.mlp\.up_proj\.weight of shape \[24, 16\] has no place in a Llama model"),
        ("shape", rf"tensor {QUERY} has shape \[16, 15\], expected \[16, 16\]"),
        ("type", rf"tensor {QUERY} is of type F64: must be one of F32, F16, BF16"),
        ("nan", rf"tensor {QUERY} holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit(what: str, said: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, LLAMA, change(what, tensors_of(LLAMA)))
    with pytest.raises(InputError, match=said):
        build_params(open_hf(directory))


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_absurd_sizes_in_the_configuration_cost_nothing(field: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, LLAMA)
    for size in (2**31 - 1, 10**30):
        (directory / "config.json").write_text(json.dumps(LLAMA | {field: size}))
        with pytest.raises(InputError, match=r"too few for 2147483647 layers|has shape|must be a positive whole"):
            check_source(open_hf(directory))


def damage(how: str, content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if how == "empty":
        return b""
    if how == "cut":
        return content[:-100]
    if how == "no header":
        return content[:100]
    if how == "absurd length":
        return struct.pack("<Q", 2**62) + content[8:]
    if how == "no json":
        return content[:8] + b"\xff" * length + content[8 + length :]
    if how == "overlap":
        header[QUERY]["data_offsets"] = next(v for k, v in header.items() if k != QUERY)["data_offsets"]
    elif how == "beyond the end":
        header[QUERY]["data_offsets"] = [2**50, 2**50 + 1024]
    elif how == "huge shape":
        header[QUERY]["shape"] = [2**40, 2**40]
    elif how == "unknown type":
        header[QUERY]["dtype"] = "Q4"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "cut",
        "no header",
        "absurd length",
        "no json",
        "overlap",
        "beyond the end",
        "huge shape",
        "unknown type",
    ],
)
def test_a_damaged_file_is_one_line(how: str, tmp_path: Path) -> None:
    file = write_model(tmp_path, LLAMA) / "model.safetensors"
    file.write_bytes(damage(how, file.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors: is not a whole safetensors file: ") as error:
        open_hf(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_shards_and_index_that_differ(tmp_path: Path) -> None:
    directory = shards(tmp_path)
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def fails(weight_map: Any, said: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=said):
            open_hf(directory)

    fails(places | {"extra": "model-0.safetensors"}, r"model-0\.safetensors: has no tensor extra, which model\.safeten")
    fails(places | {"extra": "model-7.safetensors"}, r"model-7\.safetensors: is missing; .*index\.json names it")
    fails(places | {"extra": "../x.safetensors"}, r"names the shard '\.\./x\.safetensors': must be")
    fails(places | {"extra": "model.bin"}, r"names the shard 'model\.bin': must be")
    elsewhere = {"model-0.safetensors": "model-1.safetensors", "model-1.safetensors": "model-0.safetensors"}
    fails(places | {QUERY: elsewhere[places[QUERY]]}, rf"has (no|the) tensor {QUERY}, which .* says")
    fails({k: v for k, v in places.items() if k != QUERY}, rf"has the tensor {QUERY}, of which .* knows nothing")
    fails([], "is not an index of shards")
    (directory / "model-0.safetensors").unlink()
    fails(places, r"model-0\.safetensors: is missing")


def test_a_whole_file_is_read_before_an_index(tmp_path: Path) -> None:
    """As transformers does; the shards of another model beside it are not read, and that is told."""
    directory = shards(tmp_path / "both")
    new = {name: value + 1 for name, value in tensors_of(LLAMA).items()}
    save_file(new, directory / "model.safetensors")
    expected = build_params(open_hf(write_model(tmp_path / "new", LLAMA, new)))
    source = open_hf(directory)
    assert same(build_params(source), expected)
    ignored = "model-0.safetensors, model-1.safetensors, model.safetensors.index.json"
    assert source.notes == (f"weights are read from model.safetensors; ignored: {ignored}",)
    (directory / "model-0.safetensors").write_bytes(b"not even a file of tensors")
    assert same(build_params(open_hf(directory)), expected)
    (directory / "model-0.safetensors").unlink()  # a stale index
    (directory / "model.safetensors.index.json").write_text("{")
    (directory / "pytorch_model.bin").write_bytes(b"")
    (directory / "training_args.bin").write_bytes(b"")
    source = open_hf(directory)
    assert same(build_params(source), expected)
    assert source.notes[0].endswith("model-1.safetensors, model.safetensors.index.json, pytorch_model.bin")
    # Without a whole file the index decides; what it doesn't name is told.
    directory = shards(tmp_path / "left over")
    save_file(new, directory / "model-7.safetensors")
    source = open_hf(directory)
    assert same(build_params(source), build_params(open_hf(write_model(tmp_path / "old", LLAMA))))
    assert source.notes == ("weights are read from model.safetensors.index.json; ignored: model-7.safetensors",)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["model-00001-of-00002.safetensors"],
            r"it has model-00001-of-00002\.safetensors and no model\.safetensors\.ind",
        ),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "and no model.safetensors.index"),
        (["a.safetensors", "b.safetensors"], r"it has a\.safetensors, b\.safetensors and no model"),
        (["consolidated.safetensors"], r"consolidated\.safetensors: has the names of Mistral's own format"),
        (["consolidated.safetensors", "pytorch_model.bin"], "Mistral's own format"),
        (["model.safetensors", "adapter_config.json"], r"adapter_config\.json: is a LoRA adapter, .*merge it into its"),
        (["adapter_model.safetensors"], r"adapter_model\.safetensors: is a LoRA adapter"),
        (["adapter_model.bin"], r"adapter_model\.bin: is a LoRA adapter"),
    ],
)
def test_files_that_are_not_a_whole_model_are_refused_by_name(names: list[str], said: str, tmp_path: Path) -> None:
    file = write_model(tmp_path, LLAMA) / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else content)
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path))
    if "adapter" in names[-1]:  # alone, too
        (tmp_path / "config.json").unlink()
        with pytest.raises(InputError, match=said):
            open_source(str(tmp_path))


def test_eight_bit_weights_are_refused_by_name(tmp_path: Path) -> None:
    narrow = tensors_of(LLAMA) | {QUERY: tensors_of(LLAMA)[QUERY].astype(ml_dtypes.float8_e4m3fn)}
    with pytest.raises(InputError, match=rf"tensor {QUERY} is of type F8_E4M3: must be one of F32, .*quantised"):
        open_hf(write_model(tmp_path, LLAMA, narrow))


def test_a_directory_of_gguf_files(tmp_path: Path) -> None:
    for name in ("b-Q4_0.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has no config\.json, and a-Q8_0\.gguf, b-Q4_0\.gguf; name one \.gguf file"):
        open_source(str(tmp_path))
    (write_model(tmp_path, LLAMA) / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no \.safetensors file; name a-Q8_0\.gguf itself"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_and_never_loaded(name: str, tmp_path: Path) -> None:
    (write_model(tmp_path, LLAMA) / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/mod_star_was_here'\ntR.")
    with pytest.raises(InputError, match=rf"{name}: is a pickle, which can run any code and is never loaded"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=rf"{name}: must be a directory .* \(pickles .* are never loaded\)"):
        open_source(str(tmp_path / name))
    assert not Path("/tmp/mod_star_was_here").exists()


def test_directories_without_weights_or_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is not a Hugging Face model \(it has no config\.json\)"):
        open_source(str(tmp_path / "empty"))
    directory = write_model(tmp_path / "model", LLAMA)
    with pytest.raises(InputError, match="name its directory"):
        open_source(str(directory / "model.safetensors"))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").touch()
    with pytest.raises(InputError, match=r"has tokenizer\.model, which cannot be read here, and no tokenizer\.json"):
        open_source(str(directory))
    (directory / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        open_source(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no weights that can be read \(it has no \.safetensors file\)"):
        open_source(str(directory))
    with pytest.raises(InputError, match=r"there is no such file or directory, and it is not a hub name"):
        open_source(str(tmp_path / "nothing"))


def test_a_tokenizer_that_does_not_fit_and_a_context_that_is_too_long(tmp_path: Path) -> None:
    source = open_hf(write_model(tmp_path / "a", LLAMA, vocab_size=62))
    with pytest.raises(InputError, match=r"model\.vocab_size = 61: the tokenizer has 62 ids"):
        run_config(source, None)
    source = open_hf(write_model(tmp_path / "b", LLAMA))
    with pytest.raises(InputError, match=r"--context = 65: must lie in \[2, 64\], the model's own"):
        run_config(source, 65)
    assert run_config(source, 32).model.context == 32


def test_tokens_without_a_row_that_nobody_trained_are_left_out(tmp_path: Path) -> None:
    directory = write_model(tmp_path, LLAMA)
    config = directory / "tokenizer_config.json"
    names = json.loads(config.read_text())
    extra = {"content": "[PAD]", "special": True, "normalized": False}
    config.write_text(json.dumps(names | {"added_tokens_decoder": {"61": extra}, "pad_token": "[PAD]"}))
    source = open_hf(directory)
    assert run_config(source, None).model.vocab_size == source.tokenizer.vocab_size == 61
    assert source.notes == (
        "the embedding has 61 rows, none for [PAD] (61); text that spells such a token is plain text",
    )
    assert max(source.tokenizer.encode("a [PAD] b")) < 61
    # An end of a text that the model can't give is none.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 61, 5]}))
    assert open_hf(directory).tokenizer.end_ids == (2, 5)
    config.write_text(json.dumps(names | {"added_tokens_decoder": {"61": extra}, "eos_token": "[PAD]"}))
    with pytest.raises(InputError, match=r"the tokenizer has 62 ids, and text can give '\[PAD\]' \(61\)"):
        run_config(open_hf(directory), None)


def test_a_hub_name_is_fetched_without_pickles_and_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, asked = write_model(tmp_path / "hub", LLAMA), {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        if name != "org/name":
            raise ConnectionError("no\nroute")
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_source("org/name").family == "llama"
    assert all(pattern.endswith((".json", ".safetensors", ".jinja")) for pattern in asked["org/name"])
    with pytest.raises(InputError, match=r"^org/other: is not a directory here, .* \(ConnectionError: no route\)$"):
        open_source("org/other")
