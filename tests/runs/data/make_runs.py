"""Makes the runs of an earlier version that tests/runs/test_earlier_versions.py loads: see README.md beside it.

Uses nothing of tests or of later versions: it runs at the commit whose files it keeps.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from mod_star import presets
from mod_star.training.interrupt import Interrupted
from mod_star.training.train import train

run_dir: Any = importlib.import_module("mod_star.training.run_dir")  # modules that have moved since
MetricsWriter: Any = importlib.import_module("mod_star.training.metrics").MetricsWriter

HERE = Path(__file__).absolute().parent
TEXTS = "".join(json.dumps({"text": f"{a} and {b} are {a + b}."}) + "\n" for a in range(40) for b in range(3))


def digest(params: Any) -> str:
    """Of paths, types, shapes and bytes of all parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = []
    for path, leaf in leaves:
        array = np.asarray(leaf)
        name = "/".join(entry.key for entry in path)
        lines.append(f"{name} {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def trained(objective: Literal["next_token", "quiet_star"]) -> Any:
    run = presets.tiny()
    return replace(
        run,
        model=replace(run.model, width=8, heads=2, layers=2, mlp_width=8, context=32),
        data=replace(run.data, source=("texts.jsonl",), held_out=0.2),
        optimizer=replace(run.optimizer, warmup_steps=1),
        train=replace(
            run.train, objective=objective, steps=3, batch_size=2, eval_batches=1, eval_every=0, checkpoint_every=0,
            log_every=1, keep_checkpoints=1,
        ),
    )  # fmt: skip


def stop_in_step_2(run: Any, path: Path) -> None:
    """Trains 2 of 3 steps: SIGTERM comes with the first record."""
    write = MetricsWriter.write

    def stopping(self: Any, step: int, values: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, step, values)

    MetricsWriter.write = stopping
    try:
        train(run, path, quiet=True)
    except Interrupted as error:
        step = error.step
    finally:
        MetricsWriter.write = write
    assert step == 2, step
    shutil.rmtree(path / "tensorboard")


def write_pretrained(directory: Path) -> None:
    """A Llama with random weights, as Hugging Face would write it."""
    directory.mkdir()
    V, D, H = 64, 8, 16
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D,
        "intermediate_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    shapes = {"embed_tokens": (V, D), "norm": (D,)}
    layer = {
        "self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 2, D), "self_attn.v_proj": (D // 2, D),
        "self_attn.o_proj": (D, D), "mlp.gate_proj": (H, D), "mlp.up_proj": (H, D), "mlp.down_proj": (D, H),
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    tensors = {
        f"model.{name}.weight": random.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:61]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


def command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mod_star", *words], capture_output=True, text=True, check=True)
    return done.stdout


def sample(run: str) -> Any:
    """What greedy decoding gives."""
    said = command("sample", run, "--prompt", "1 and 2", "--new-tokens", "6", "--decoding", "greedy", "--json")
    return {name: json.loads(said)[name] for name in ("tokens", "log_probs")}


def main() -> None:
    """Writes NAME.tar.xz of each run and expected.json."""
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("texts.jsonl").write_text(TEXTS)
        runs = {"routed": trained("next_token"), "thinking": trained("quiet_star")}
        for name, run in runs.items():
            stop_in_step_2(run, Path(name))
        write_pretrained(Path("pretrained"))
        command("import", "pretrained", "imported")
        for name in (*runs, "imported"):
            loaded = run_dir.load_run(Path(name))
            expected[name] = {"step": loaded.step, "params": digest(loaded.params), "sample": sample(name)}
            with tarfile.open(HERE / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(name)
        for name, run in runs.items():  # the run as it goes on
            evaluation = train(run, Path(name), quiet=True).evaluation
            expected[name]["eval_loss"] = evaluation["eval_loss"]
        (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
