"""Makes the logits that tests/pretrained/test_parity.py compares with: transformers' own, of tiny random models.

transformers and torch stay out of this project's environment. In one of their own:

    python -m venv HF && HF/bin/pip install torch transformers
    PYTHONPATH=.:tests/support HF/bin/python tests/references/make_parity_references.py

It writes tests/support/data/parity.json (configurations, some in the form of transformers 4, some in that of 5) and
parity.npz (tokens and float32 logits). The weights follow from their names (`random_tensor`), so they need no file.
The stored values are of transformers 5.24.0 with torch 2.13.0 on a CPU; seconds.

With the directory of a real model as argument, it writes that model's logits of the same kind of text to a file, to be
compared with those of the imported run:

    PYTHONPATH=.:tests/support HF/bin/python tests/references/make_parity_references.py DIR logits.npz
    PYTHONPATH=.:tests/support python tests/references/make_parity_references.py --compare RUN logits.npz

Measured with SmolLM2-135M-Instruct (float32; imported from its GGUF file, exported, and read by transformers): 720
equal token ids; the logits lie between -28.7 and 47.4 and differ by 1.9e-4 at most; the best token is the same at all
positions.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from parity_weights import random_tensor

DATA = Path(__file__).parents[1] / "support/data"
TOKENS = 24
TEXT = "Janet’s ducks lay 16 eggs per day. naïve 日本語 😀\t\n  1234567890 def f(x):\n    return x\n" * 16

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 30, "factor": 4.0}
# Of the form that config.json had with transformers 4; True: store it as transformers 5 writes it.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, False),
    "llama, one key head, own head width, tied": (
        "llama",
        {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
        True,
    ),
    "llama, as many key heads as query heads": ("llama", {"num_key_value_heads": 4, "rope_scaling": None}, False),
    "llama3": ("llama", {"head_dim": 8, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, False),
    "llama3, newer file": ("llama", {"head_dim": 8, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, True),
    "llama, linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}, False),
    "mistral": ("mistral", {"sliding_window": 5}, False),
    "mistral, no window": ("mistral", {"sliding_window": None}, True),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}, False),
    "qwen2, window, tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, "tie_word_embeddings": True},
        True,
    ),
    "qwen3": ("qwen3", {"head_dim": 6}, False),
    "qwen3, tied": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}, True),
}


def main() -> None:
    """Writes the references."""
    import torch  # type: ignore[import-not-found]
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-not-found]

    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], TOKENS)
    configs: dict[str, Any] = {}
    logits: dict[str, Any] = {"tokens": tokens.astype(np.int32)}
    for case, (family, fields, newer) in CASES.items():
        stored = SMALL | {"model_type": family} | fields
        config = AutoConfig.for_model(**copy.deepcopy(stored))  # it writes into what it is given
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        stored["architectures"] = [type(model).__name__]
        configs[case] = json.loads(model.config.to_json_string(use_diff=True)) if newer else stored
        if newer:
            configs[case]["architectures"] = stored["architectures"]
        state = model.state_dict()
        drawn = {name: torch.from_numpy(random_tensor(name, tuple(old.shape))) for name, old in state.items()}
        if config.tie_word_embeddings:
            drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"]
        model.load_state_dict(drawn)
        with torch.no_grad():
            logits[case] = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        print(f"{case}: {sum(value.numel() for value in model.parameters()):,} parameters, {logits[case].std():.2f}")
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "parity.json").write_text(json.dumps(configs, indent=1) + "\n")
    np.savez_compressed(DATA / "parity.npz", **logits)


def real_model(directory: str, target: str) -> None:
    """Stores token ids and logits of a real model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    with torch.no_grad():
        np.savez_compressed(target, ids=np.array(ids, np.int32), logits=model(torch.tensor([ids])).logits[0].numpy())


def compare(run: str, stored: str) -> None:
    """Prints how far a run's ids and logits are from stored ones."""
    import jax

    from mod_star.data import begin
    from mod_star.model.transformer import head_matrix
    from mod_star.runs.directory import load_run

    loaded, found = load_run(run), np.load(stored)
    ids = begin(loaded.tokenizer, TEXT)
    print(f"{len(ids)} token ids are {'equal' if ids == found['ids'].tolist() else 'different'}")

    @jax.jit
    def apply(params: Any, ids: Any) -> Any:
        output: Any = loaded.decoder.apply({"params": params}, ids)
        return output.hidden @ head_matrix(params).T

    logits = np.asarray(apply(loaded.params, found["ids"]))
    best = (logits.argmax(-1) == found["logits"].argmax(-1)).mean()
    difference = np.abs(logits - found["logits"]).max()
    print(f"logits in [{logits.min():.1f}, {logits.max():.1f}], largest difference {difference:.1e}")
    print(f"the best token is the same at {best:.2%} of the positions")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--compare"]:
        compare(*arguments[1:])
    elif arguments:
        real_model(*arguments)
    else:
        main()
