"""From a Hugging Face directory to a run and back: bit for bit, all or nothing, in little memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from huggingface_hub import ModelCard
from pretrained_models import CONFIGS, NASTY, tensors_of, write_model
from safetensors.numpy import load_file

from mod_star.cli import main
from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.pretrained.build import DENSE
from mod_star.pretrained.byte_tokenizer import byte_tokenizer_json
from mod_star.pretrained.export import export_model
from mod_star.pretrained.importing import import_model, open_source
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.runs.integrity import find_damage
from mod_star.tokenization import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from mod_star.training.train import train


def imported(case: str, directory: Path, **options: Any) -> LoadedRun:
    source = open_source(str(write_model(directory / "source", CONFIGS[case])))
    import_model(source, directory / "run", **options)
    return load_run(directory / "run")


def loaded_run(model: ModelConfig, routing: RoutingConfig = DENSE, tokenizer: Tokenizer | None = None) -> LoadedRun:
    """A run that was never stored, of zeros."""
    decoder = Decoder(model, routing)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), np.zeros(2, np.int32)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return LoadedRun(RunConfig(model, routing), tokenizer or ByteTokenizer(), decoder, params, 0)


@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2, window, tied", "qwen3"])
@pytest.mark.parametrize("shard_bytes", [2**30, 3000])
def test_there_and_back_and_there_again_is_exact(case: str, shard_bytes: int, tmp_path: Path) -> None:
    first = imported(case, tmp_path)
    files = export_model(first, tmp_path / "exported", shard_bytes=shard_bytes)
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 1 if shard_bytes > 3000 else len(weights) > 3
    assert all(file.stat().st_mode & 0o777 == files[0].stat().st_mode & 0o777 for file in files)
    found = {name: value for file in weights for name, value in load_file(file).items()}
    expected = tensors_of(CONFIGS[case])
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    source = open_source(str(tmp_path / "exported"))
    assert source.family == CONFIGS[case]["model_type"]
    import_model(source, tmp_path / "again")
    second = load_run(tmp_path / "again")
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, second.params))
    assert replace(first.config.model, head_dim=first.config.model.head_size) == second.config.model
    assert isinstance(first.tokenizer, HuggingFaceTokenizer) and isinstance(second.tokenizer, HuggingFaceTokenizer)
    assert first.tokenizer.content == second.tokenizer.content
    assert first.tokenizer.special == second.tokenizer.special
    assert first.tokenizer.chat_template == second.tokenizer.chat_template is not None
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_in_the_files(dtype: Any, tmp_path: Path) -> None:
    run = imported("llama", tmp_path)
    export_model(run, tmp_path / "exported", dtype)
    (name,) = {tensor.stored for tensor in open_source(str(tmp_path / "exported")).tensors.values()}
    assert name == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    import_model(open_source(str(tmp_path / "exported")), tmp_path / "again")
    for one, other in zip(
        jax.tree.leaves(run.params), jax.tree.leaves(load_run(tmp_path / "again").params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one).astype(dtype).astype(np.float32), other)


def test_a_run_of_an_import_is_like_any_other(tmp_path: Path) -> None:
    run = imported("mistral", tmp_path, context=32, dtype="bfloat16")
    assert (run.step, run.config.model.context, run.config.model.dtype) == (0, 32, "bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(run.params))
    path = tmp_path / "run"
    assert find_damage(path / "checkpoints/0") is None
    with pytest.raises(InputError, match=r"run: holds a model without the state of a training; .* --init-from "):
        train(run.config, path, quiet=True)
    with pytest.raises(InputError, match="is a run already"):
        import_model(open_source(str(tmp_path / "source")), path)
    file = path / "checkpoints/0/params/params.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged \(params/params\.safetensors has changed since it was written\)"):
        load_run(path)
    file.unlink()
    with pytest.raises(InputError, match="is damaged"):
        load_run(path)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tensors_of(CONFIGS["llama"])
    broken["lm_head.weight"][0, 0] = np.inf
    source = open_source(str(write_model(tmp_path / "source", CONFIGS["llama"], broken)))
    with pytest.raises(InputError, match="not finite"):
        import_model(source, tmp_path / "run")
    run = loaded_run(ModelConfig(vocab_size=260, width=8, layers=1, heads=1, mlp_width=4))
    run.params["embedding"][0, 0] = 1e30
    with pytest.raises(
        InputError, match=r"--dtype = 'float16': tensor model\.embed_tokens\.weight has values out of its range"
    ):
        export_model(run, tmp_path / "float16", "float16")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mod_star.pretrained.export.save_file", full)
    monkeypatch.setattr("mod_star.runs.params_file.save_file", full)
    with pytest.raises(InputError, match="exported: cannot be written: No space left on device"):
        export_model(run, tmp_path / "exported")
    good = open_source(str(write_model(tmp_path / "good", CONFIGS["llama"])))
    with pytest.raises(InputError, match="run: cannot be written: No space left on device"):
        import_model(good, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "source"]


def test_what_no_other_library_has_is_not_exported(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=260, width=8, layers=2, heads=1, mlp_width=4)
    routed = loaded_run(model, RoutingConfig(every=2, predictor_width=4))
    thinking = loaded_run(model)
    thinking.params["thinking"] = {}
    own = replace(thinking, params={}, config=replace(thinking.config, parts="my.py:parts"))
    experts = loaded_run(replace(model, experts=2))
    both = loaded_run(replace(model, qkv_bias=True, qk_norm=True))
    for run, said in (
        (routed, r"^routing\.every = 2: a Mixture-of-Depths model cannot be exported"),
        (experts, r"^model\.experts = 2: a model with experts cannot be exported"),
        (thinking, r"a thinking model cannot be exported"),
        (own, r"^parts = 'my\.py:parts': a model with parts of your own cannot"),
        (both, r"^model\.qkv_bias = True: no family"),
    ):
        with pytest.raises(InputError, match=said):
            export_model(run, tmp_path / "exported")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="is neither empty nor a run"):
        export_model(loaded_run(model), tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_bytes_as_a_tokenizer_json(tmp_path: Path) -> None:
    made, plain = tokenizers.Tokenizer.from_str(byte_tokenizer_json()), ByteTokenizer()
    text = NASTY + "".join(map(chr, range(0x180)))
    assert made.encode(text, add_special_tokens=False).ids == plain.encode(text)
    assert made.encode("a").ids == [plain.bos_id, 97]
    assert made.decode(plain.encode(text)) == text
    export_model(loaded_run(ModelConfig(vocab_size=260, width=8, layers=1, heads=1, mlp_width=4)), tmp_path / "out")
    tokenizer = open_source(str(tmp_path / "out")).tokenizer
    assert (tokenizer.bos_id, tokenizer.end_ids, tokenizer.starts_with_bos) == (256, (257,), True)


MEMORY = """
import re, sys
from pathlib import Path
from mod_star.pretrained.importing import import_model, open_source
def kilobytes(what):  # ru_maxrss would begin with what the parent process had
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def use(source, run):
    import_model(open_source(source), Path(run))
use(sys.argv[1], sys.argv[2] + "/small")
now = kilobytes("VmRSS")
use(sys.argv[3], sys.argv[2] + "/large")
print((kilobytes("VmHWM") - now) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.nightly
def test_peak_memory_is_little_more_than_the_model(tmp_path: Path) -> None:
    """Reading, building and writing the checkpoint, beyond what a tiny import leaves in use."""
    small = write_model(tmp_path / "s", CONFIGS["llama"])
    fields = {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 6, "vocab_size": 8192}
    config = CONFIGS["llama"] | fields | {"tie_word_embeddings": True}
    large = write_model(tmp_path / "l", config)
    size = (large / "model.safetensors").stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", MEMORY, str(small), str(tmp_path), str(large)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1.3 * size, f"{int(result.stdout) / size:.2f} x"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        shown = capsys.readouterr()
        return int(stop.value.code or 0), " ".join(shown.out.split()), shown.err

    source, run, exported = (str(tmp_path / name) for name in ("source", "run", "exported"))
    write_model(Path(source), CONFIGS["qwen3, tied"])
    code, shown, _ = call("import", source, run, "--context", "48")
    assert code == 0
    for said in ("Qwen3", "tied embeddings", "(7,240), in float32", "tensors F32", "48 of 64 tokens", "61 ids of 61"):
        assert said in shown, said
    code, shown, _ = call("export", run, exported, "--dtype", "bfloat16")
    assert code == 0 and "Qwen3ForCausalLM" in shown and "model.safetensors" in shown
    assert json.loads((tmp_path / "exported/config.json").read_text())["max_position_embeddings"] == 48
    code, _, error = call("import", source, str(tmp_path / "long"), "--context", "65")
    assert (code, error) == (2, "error: --context = 65: must lie in [2, 64], the model's own\n")
    assert not (tmp_path / "long").exists()


@pytest.mark.nightly
def test_the_model_card_says_what_the_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the commands; the hub's own reader of cards takes the front matter apart."""

    def call(*words: str | Path) -> None:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert not stop.value.code, capsys.readouterr().err

    text = tmp_path / "private/notes.txt"
    text.parent.mkdir()
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    base = tmp_path / "base"
    sizes = ["--model.width", "8", "--model.layers", "1", "--model.heads", "1", "--model.context", "32"]
    batches = ["--train.batch-size", "2", "--train.eval-batches", "1", "--data.source", str(text), "--quiet"]
    call("train", base, *sizes, *batches, "--routing.every", "0", "--train.steps", "2")
    call("train", tmp_path / "fine", "--init-from", base, *batches, "--train.steps", "1")
    results = {"task": "gsm8k", "items": 5, "measures": {"accuracy": {"value": 0.2, "low": 0.036, "high": 0.624}}}
    for step in (1, 9):
        folder = tmp_path / f"fine/evaluations/gsm8k-{step}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results | {"items": step, "config": {"step": step}}))

    call("export", tmp_path / "fine", tmp_path / "card")
    card = ModelCard((tmp_path / "card/README.md").read_text(encoding="utf-8"))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mod_star", "jax", "llama"],
    }  # neither a licence nor a language: the run doesn't know them
    loss = json.loads((tmp_path / "fine/summary.json").read_text())["evaluation"]["eval_loss"]
    for said in (
        "# card\n",
        "LlamaForCausalLM",
        "- Base model: the run `base`.",
        "- Training data: `notes.txt`.",
        "- 1 step of 2 × 32 tokens.",
        f"Held-out loss: {loss:.4f} nats per token.",
        "| gsm8k | 1 | accuracy | 20.0 % | 3.6 to 62.4 |",
        "mod-star export fine card --dtype float32 --step 1\n",
    ):
        assert said in card.text, said
    assert "| gsm8k | 9 |" not in card.text, "that is another step's"
    assert "private" not in card.content and str(tmp_path) not in card.content

    call("export", base, tmp_path / "first", "--step", "2")
    assert "Base model" not in (tmp_path / "first/README.md").read_text(encoding="utf-8")
    write_model(tmp_path / "source", CONFIGS["llama"])
    call("import", tmp_path / "source", tmp_path / "imported")
    call("export", tmp_path / "imported", tmp_path / "unchanged")
    imported = ModelCard((tmp_path / "unchanged/README.md").read_text(encoding="utf-8"))
    assert "No training step of mod_star is in these weights." in imported.text
    assert "Training data" not in imported.text and "## Evaluation" not in imported.text


def test_what_the_files_say_of_tokens_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the commands: a token and two ends of a text that only other files name than tokenizer.json."""
    source = write_model(tmp_path / "source", CONFIGS["llama"] | {"eos_token_id": [2, 7]}, vocab_size=59)
    config = json.loads((source / "tokenizer_config.json").read_text())
    plain = {"special": True, "normalized": False}
    config["added_tokens_decoder"] = {
        "59": plain | {"content": "<a>", "rstrip": True},
        "60": plain | {"content": "<b>"},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, 61], "bos_token_id": 1}))

    def call(*words: str | Path) -> tuple[str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert not stop.value.code
        shown = capsys.readouterr()
        return " ".join(shown.out.split()), shown.err

    out, err = call("import", source, tmp_path / "run")
    assert "a text ends with </s> (2), " in out and " (7), <b> (60) " in out and "61 ids of 61" in out
    assert err == "note: generation_config.json: eos_token_id = 61 is ignored: the tokenizer has 61 ids\n"
    call("export", tmp_path / "run", tmp_path / "exported")
    out, err = call("import", tmp_path / "exported", tmp_path / "again")
    assert " (7), <b> (60) " in out and not err
    first, second = load_run(tmp_path / "run").tokenizer, load_run(tmp_path / "again").tokenizer
    assert isinstance(first, HuggingFaceTokenizer) and isinstance(second, HuggingFaceTokenizer)
    assert first.special == second.special and first.content == second.content
    assert first.end_ids == (2, 7, 60)
    assert first.encode("<a>  <b>") == second.encode("<a>  <b>") == [59, 60]
