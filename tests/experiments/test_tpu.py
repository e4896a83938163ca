"""Four programs compiled for one v5e chip: operations, bytes, copies, precision. Skipped where libtpu is not there.

`make tpu` runs them with the compiler in a directory of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.tpu import entries, expected_chunks, run_of, table_rows, token_bytes
from experiments.benchmarks.tpu_programs import cache_writes
from mod_star.config import ModelConfig
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.planning.hlo import Instruction, Program, parse
from mod_star.planning.program_cost import program_cost

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (jax[tpu])")

SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from mod_star.planning.topologies import devices_of, parse_topology, prepare_environment
prepare_environment()
from experiments.benchmarks import tpu_programs
from experiments.benchmarks.tpu import run_of
from mod_star.config import ModelConfig, ThinkingConfig
from mod_star.flops import training_step_flops
from mod_star.planning.chips import TPUS
from mod_star.planning.cycles import costliest_loop
from mod_star.planning.hlo import parse
from mod_star.planning.memory import share_bytes

device = devices_of(parse_topology("v5e:1x1"))[0]
model = ModelConfig(vocab_size=512, width=256, layers=2, heads=2, mlp_width=512, context=256, dtype="bfloat16")
dense, mod = (run_of(model, arm, 4) for arm in ("dense", "mod"))
quiet = run_of(replace(model, context=128), "dense", 2)
quiet = replace(
    quiet,
    train=replace(quiet.train, objective="quiet_star"),
    thinking=ThinkingConfig(thought_length=4, n_true=2, chunk=32),
)
decoding, caches = tpu_programs.decode(mod, 16, device)
lowered = {
    "train_dense": tpu_programs.train_step(dense, device),
    "train_mod": tpu_programs.train_step(mod, device),
    "decode_mod": decoding,
    "sampling": tpu_programs.sampling(quiet, device),
}
# Half the time to compile: less is overlapped. What is said of decoding is said of the program that users get.
quick = {"exec_time_optimization_effort": -1.0}
compile_one = lambda name: lowered[name].compile(None if name == "decode_mod" else quick)
with ThreadPoolExecutor(2) as pool:
    compiled = dict(zip(lowered, pool.map(compile_one, lowered)))
program = parse(compiled["decode_mod"].as_text())
copies = tpu_programs.cache_writes(program, costliest_loop(program, TPUS["v5e"]), caches)
found = {"cache_bytes": share_bytes(caches), "copies": [each.name for each in copies]}
found["flops"] = {"train_dense": training_step_flops(dense), "train_mod": training_step_flops(mod)}
found["temporaries"] = {name: each.memory_analysis().temp_size_in_bytes for name, each in compiled.items()}
for name, each in compiled.items():
    (Path(sys.argv[1]) / name).write_text(each.as_text())
(Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Texts of the four programs, as users get them: without the flags that the tests compile by."""
    folder = tmp_path_factory.mktemp("programs")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=1500)
    programs = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".json"}
    assert len(programs) == 4
    return {**json.loads((folder / "found.json").read_text()), "texts": programs}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_step_computes_what_is_counted_and_routing_saves_operations_bytes_and_memory(
    compiled: dict[str, Any],
) -> None:
    costs = {name: program_cost(parse(compiled["texts"][name])) for name in ("train_dense", "train_mod")}
    for name, cost in costs.items():
        # Kernels compute nine products where six are counted: their gradient computes the scores again, twice.
        assert cost.kernel_flops > 0 and cost.unknown_loops == 0
        assert cost.flops - cost.kernel_flops / 3 == pytest.approx(compiled["flops"][name], rel=0.06)
    assert costs["train_mod"].traffic < 0.85 * costs["train_dense"].traffic
    assert compiled["temporaries"]["train_mod"] < compiled["temporaries"]["train_dense"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_decoding_holds_no_second_set_of_caches(compiled: dict[str, Any]) -> None:
    """At most keys and values of one block are written as wholes for a token: docs/results/speed_tpu.md counts them."""
    assert compiled["temporaries"]["decode_mod"] < compiled["cache_bytes"]
    assert len(compiled["copies"]) <= 2, compiled["copies"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_products_of_float32_ask_for_the_highest_precision_in_the_compiled_program_too(
    compiled: dict[str, Any],
) -> None:
    for name, text in compiled["texts"].items():
        products = list(float32_products(parse(text)))
        assert products or name in ("train_dense", "sampling"), "router and predictor are float32"
        assert all("operand_precision={highest,highest}" in product.attributes for product in products), name


def float32_products(program: Program) -> Iterator[Instruction]:
    """Convolutions, which is how XLA for TPUs writes products, of two float32 arrays."""
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("convolution", "dot"):
                types = [computation.instructions[name].arrays[0].dtype for name in instruction.operands[:2]]
                if types == ["f32", "f32"]:
                    yield instruction


BODY = """
HloModule test, is_scheduled=true

%moved (p: bf16[2,3,8,4]) -> bf16[2,8,3,4] {
  %p = bf16[2,3,8,4]{3,2,1,0} parameter(0)
  ROOT %turned = bf16[2,8,3,4]{3,2,1,0} transpose(%p), dimensions={0,2,1,3}
}

%put (q: bf16[2,3,8,4], new: bf16[2,3,1,4], at: s32[]) -> bf16[2,3,8,4] {
  %q = bf16[2,3,8,4]{3,2,1,0} parameter(0)
  %new = bf16[2,3,1,4]{3,2,1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %updated = bf16[2,3,8,4]{3,2,1,0} dynamic-update-slice(%q, %new, %at, %at, %at, %at)
}

%inner (r: bf16[2,3,8,4]) -> bf16[2,3,8,4] {
  %r = bf16[2,3,8,4]{3,2,1,0} parameter(0)
  ROOT %within = bf16[2,3,8,4]{0,1,2,3} copy(%r)
}

ENTRY %body (x: bf16[2,3,8,4], y: bf16[2,3,1,4], i: s32[]) -> bf16[2,3,8,4] {
  %x = bf16[2,3,8,4]{3,2,1,0} parameter(0)
  %y = bf16[2,3,1,4]{3,2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %small = bf16[2,3,1,4]{0,1,2,3} copy(%y)
  %in_place = bf16[2,3,8,4]{3,2,1,0} fusion(%x, %y, %i), kind=kLoop, calls=%put
  %read = (bf16[2,3,8,4]{3,2,1,0:S(1)}, bf16[2,3,8,4]{3,2,1,0}, u32[]{:S(2)}) copy-start(%x)
  %near = bf16[2,3,8,4]{3,2,1,0:S(1)} copy-done(%read)
  %back = (bf16[2,3,8,4]{3,2,1,0}, bf16[2,3,8,4]{3,2,1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  %far = bf16[2,3,8,4]{3,2,1,0} copy-done(%back)
  %other = bf16[2,8,3,4]{3,2,1,0} fusion(%far), kind=kLoop, calls=%moved
  ROOT %called = bf16[2,3,8,4]{0,1,2,3} call(%in_place), to_apply=%inner
}
"""


def test_copies_of_caches_are_told_from_reading_them_and_from_updates_in_place() -> None:
    """In any order of their dimensions; what is called is searched as well."""
    program = parse(BODY)
    caches = [jax.ShapeDtypeStruct((2, 3, 8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((2, 8), jnp.int32)]
    assert [each.name for each in cache_writes(program, program.entry, caches)] == ["back", "other", "within"]


@pytest.mark.parametrize(("rows", "share"), [(1, 0.25), (8, 0.25), (16, 0.125), (64, 0.125)])
def test_expected_chunks_are_the_mean_of_draws(rows: int, share: float) -> None:
    chunk = min(rows, int(np.ceil(1.5 * share * rows)) + 1)
    wanted = np.random.default_rng(0).binomial(rows, share, 200_000)
    assert expected_chunks(rows, share) == pytest.approx(np.mean(np.ceil(wanted / chunk)), abs=0.01)


def test_bytes_of_a_token_are_those_of_weights_and_caches() -> None:
    model = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, context=40)
    run = run_of(model, "dense", 3)
    params = jax.eval_shape(lambda: init_params(Decoder(run.model, run.routing), 0))
    matrices = [leaf.size for leaf in jax.tree.leaves(params["groups"]) if leaf.ndim > 2]  # without the norms
    weights = sum(matrices) + params["embedding"].size
    keys_values = 2 * 3 * 2 * model.head_size * 40
    assert token_bytes(run, 3) == (2 * weights, 2 * 2 * keys_values)
    routed = run_of(model, "mod", 3)
    slots = 8  # 1.5 times an eighth of 40
    assert token_bytes(routed, 3)[1] == 2 * (keys_values + keys_values / 40 * slots / 8)
    block = (weights - 64 * 32) / 2
    expected = 64 * 32 + block + (1 - 0.875**3) * block + 32 * (routed.routing.predictor_width + 1)
    assert token_bytes(routed, 3)[0] == pytest.approx(2 * expected)


def test_programs_and_their_limits() -> None:
    every, some = entries(False), entries(True)
    assert set(some) < set(every) and len(every) == 42
    for name, entry in every.items():
        assert entry.base is None or (entry.base in every and entry.limit is not None)
        if name.endswith("_mod"):
            assert 0.5 < (entry.limit or 0) < 1, name
    results: dict[str, dict[str, Any]] = {
        "a": {"microseconds": 12.0, "ratio": 0.5, "limit": 0.4, "over_limit": 1.25},
        "b": {"error": "too large"},
    }
    assert table_rows(results) == [
        ("a", "12", "0.50", "0.40", "1.25", None, None), ("b", "no room on the chip", *[None] * 5),
    ]  # fmt: skip
