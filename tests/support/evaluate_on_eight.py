"""Evaluates a thinking run on meshes of eight CPU devices and on one: `evaluate_on_eight.py RUN OUT PART`.

A process of its own, as `eight_devices.py`. OUT gets the directories of the evaluations, what the harness's adapter
says, and what programs for a batch of texts take on each mesh.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from eight_devices import MESHES, make_run, make_state

from mod_star.cli import main
from mod_star.config import MeshConfig
from mod_star.decoding import Think
from mod_star.decoding.step import unstack
from mod_star.distributed.sharding import batch_sharding, make_mesh, place, shardings, use_mesh
from mod_star.errors import InputError
from mod_star.evaluation.harness import HarnessModel
from mod_star.evaluation.score_batch import THOUGHT_ROWS, ScoreNumbers, TextBatch, score_batch
from mod_star.model import Decoder

MIXED = (2, 2, 2)
QUICK: dict[str, tuple[str, ...]] = {"choice": ("--protocol", "choice")}
"""Options; each on a single device, and on all axes at once."""
NIGHTLY: dict[str, tuple[str, ...]] = {
    "expected-thinking": ("--protocol", "expected", "--think", "always"),
    "cot": ("--decoding", "cot", "--branches", "3", "--new-tokens", "12"),
    "beam": ("--decoding", "beam", "--branches", "2", "--new-tokens", "6"),
}
"""The same for what takes longest."""
COUNT = 10
"""Questions: a full batch and one that is filled up."""


def evaluate(run: Path, out: Path, ways: dict[str, tuple[str, ...]]) -> list[str | Path]:
    """Everything in `ways`, through the command; returns what all of its calls have in common."""
    data = out / "words.jsonl"
    data.write_text("\n".join(json.dumps({"q": f"{n}{'!' * n}?", "a": ("no", "yes")[n % 2]}) for n in range(COUNT)))
    words: list[str | Path] = ["--data", data, "--question", "{q}", "--answer", "{a}", "--kind", "choice"]
    words += ["--choices", "yes", "no"]
    for way, options in ways.items():
        for mesh in ((1, 1, 1), MIXED):
            sizes = [f"--mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
            command(run, *words, *options, *sizes, "--out", out / f"{way}-{'x'.join(map(str, mesh))}")
    return words


def check_meshes(run: Path, out: Path, words: list[str | Path]) -> None:
    """An evaluation that is done already, whatever the mesh, and meshes that don't fit."""
    command(run, *words, *QUICK["choice"], "--out", out / "choice-2x2x2")
    for number, sizes in enumerate((["--mesh.data", "3"], ["--mesh.fsdp", "16"], ["--mesh.tensor", "4"])):
        command(run, *words, *sizes, "--out", out / f"bad-{number}", expected=2)
    try:
        HarnessModel(str(run), batch_size=6, mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
    except InputError as error:
        print(f"error: {error}", flush=True)


def command(*argv: str | Path, expected: int = 0) -> None:
    """`mod-star evaluate`, which must end with this code."""
    try:
        main(["evaluate", *map(str, argv)])
    except SystemExit as end:
        if end.code == expected:
            return
        raise
    raise AssertionError("a command ends with an exit code")


def adapter(run: Path, mesh: tuple[int, int, int]) -> dict[str, Any]:
    """What `lm_eval` would be told."""
    sizes: Any = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh, strict=True))
    model = HarnessModel(str(run), batch_size="auto", max_length=20, **sizes)
    model.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
    tokens = {text: model.tok_encode(text, add_special_tokens=False) for text in ("a", " b", " cd")}
    requests = [(("a", after), tokens["a"], tokens[after]) for after in (" b", " cd")]
    texts = [SimpleNamespace(args=(text, {"max_gen_toks": 5})) for text in ("Q: 0?", "Q: 10?\nA:", "ab", "d")]
    return {
        "loglikelihood": model._loglikelihood_tokens(requests, disable_tqdm=True),
        "rolling": model.loglikelihood_rolling([SimpleNamespace(args=("a b c" * 9,))], disable_tqdm=True),
        "texts": model.generate_until(texts, disable_tqdm=True),
    }


def program(name: str, think: Think) -> dict[str, float]:
    """FLOPs and bytes, on each device, of a batch of eight texts that is scored at all its places."""
    run = make_run("sampled")
    decoder, params = Decoder(run.model, run.routing), make_state(run, "sampled").params
    B, S = 8, 24
    inputs: Any = (np.zeros((B, S), np.int32), np.full(B, S, np.int32))
    mesh = None if name == "one" else make_mesh(MeshConfig(*MESHES[name]))
    if mesh is not None:
        params = place(params, shardings(mesh, params))
        inputs = jax.device_put(inputs, batch_sharding(mesh))
    thinks = think.when != "never"
    groups = unstack(decoder, params)["groups"] if thinks else None
    shares = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    places = (np.zeros((B * S, 2), np.int32), np.zeros((B * S, 1), np.int32), np.zeros(B * S, np.uint32))
    batch = TextBatch(inputs[0], inputs[1], *places, np.int32(B * S))
    numbers = ScoreNumbers(None, np.float32(0), np.int32(0), None)
    with use_mesh(mesh):
        compiled = score_batch.lower(
            decoder, run.thinking if thinks else None, think, THOUGHT_ROWS // shares, params, groups, batch, numbers
        ).compile()  # fmt: skip
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    return {
        "flops": cost["flops"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    run, out = map(Path, sys.argv[1:3])
    if sys.argv[3] == "nightly":
        evaluate(run, out, NIGHTLY)
        for name, mesh in (("one", (1, 1, 1)), ("mixed", MIXED)):
            (out / f"harness-{name}.json").write_text(json.dumps(adapter(run, mesh)))
        plain, thinking = ("one", "fsdp", "tensor", "mixed"), ("one", "mixed")
        programs = {
            "plain": {name: program(name, Think()) for name in plain},
            "thinking": {name: program(name, Think("always")) for name in thinking},
        }
        (out / "programs.json").write_text(json.dumps(programs))
    else:
        check_meshes(run, out, evaluate(run, out, QUICK))
