"""Plans of training steps, in processes of their own: JAX must not have begun before."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from fork_server import shared_server

from mod_star.cli import main
from mod_star.commands.plan import _source
from mod_star.config import RunConfig
from mod_star.flops import parameter_count, scoring_flops, training_step_flops
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.planning.advice import advice
from mod_star.planning.memory import Memory
from mod_star.planning.plan import Plan
from mod_star.planning.plan_training import bytes_needed
from mod_star.planning.topologies import parse_topology
from mod_star.presets import PRESETS, large, large_mod, large_quiet
from mod_star.units import size

SMALL = ("--model.width", "32", "--model.layers", "1", "--model.vocab-size", "320", "--routing.every", "1")

SCRIPT = """
import json, sys
from dataclasses import replace
from mod_star.planning.topologies import parse_topology, prepare_environment
prepare_environment()
from mod_star.errors import InputError
from mod_star.planning.plan_training import plan_training
from mod_star.views.plan import plan_record
from mod_star.presets import tiny
from mod_star.distributed.sharding import MeshConfig

run = tiny()
run = replace(
    run,
    model=replace(run.model, layers=1),
    routing=replace(run.routing, every=1),
    train=replace(run.train, loss_chunk=64),
)
found = {}
for name, topology, mesh, batch in (
    ("uneven", "cpu:4", MeshConfig(fsdp=3), 4),
    ("batch", "cpu:4", MeshConfig(), 6),
    ("heads", "cpu:4", MeshConfig(tensor=4), 4),
    ("data", "cpu:4", MeshConfig(), 4),
    ("fsdp", "cpu:4", MeshConfig(fsdp=4), 4),
    ("gpu", "h100:4", MeshConfig(fsdp=4), 4),
):
    try:
        it = replace(run, train=replace(run.train, batch_size=batch))
        found[name] = plan_record(plan_training(it, parse_topology(topology), mesh), name)
    except InputError as error:
        found[name] = str(error)
print(json.dumps(found))
raise SystemExit
"""
# The tests may ask for another number of CPU devices than a plan.
OTHER_DEVICES = "os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'"


def call(*words: str, before: str = "") -> str:
    """What a process in which JAX has not begun yet prints; `before` is Python that it runs first."""
    done = shared_server().run(*words, before=f"{OTHER_DEVICES}\n{before}")
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call(before=SCRIPT))
    return result


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused_with_the_numbers(plans: dict[str, Any]) -> None:
    assert "fsdp 3" in plans["uneven"] and "4" in plans["uneven"]
    assert plans["batch"].startswith("train.batch_size = 6: must be a multiple of mesh.data x mesh.fsdp = 4 x 1")
    assert plans["heads"] == "mesh.tensor = 4: must divide model.heads = 2"


@pytest.mark.slow
def test_memory_is_shared_out_as_the_mesh_says(plans: dict[str, Any]) -> None:
    data, fsdp = plans["data"]["memory"], plans["fsdp"]["memory"]
    parameters = plans["data"]["parameters"]
    assert data["parameters"] == 4 * parameters
    assert parameters <= fsdp["parameters"] < 1.1 * parameters  # a quarter of each matrix, all of each vector
    for memory in (data, fsdp):
        assert memory["optimizer"] == 2 * memory["parameters"] + 2 * 4  # two moments, two counters
        assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total" and v is not None))
    assert fsdp["total"] < data["total"]


@pytest.mark.slow
def test_flops_of_the_compiled_program_are_those_counted(plans: dict[str, Any]) -> None:
    for plan in (plans["data"], plans["fsdp"]):
        assert plan["step_flops"] == training_step_flops(run_of(plan))
        assert plan["useful"] == pytest.approx(1, abs=0.05)
        assert plan["flops_per_token"] == plan["step_flops"] / (4 * 64)
        assert plan["fits"] is None and plan["floors"] is None  # CPUs have no figures
        assert plan["cycles"] is plan["flop_share"] is None and "no estimate of a step's cycles" in plan["notes"][1]


@pytest.mark.slow
def test_communication_is_that_of_the_mesh(plans: dict[str, Any]) -> None:
    """Data parallelism all-reduces the gradients: of all parameters, of a tied embedding as embedding and as head.

    Sharded parameters are gathered, forward and backward.
    """
    reduced = sum(c["size"] * c["count"] for c in plans["data"]["collectives"] if c["kind"] == "all-reduce")
    gathered = sum(c["size"] * c["count"] for c in plans["fsdp"]["collectives"] if c["kind"] == "all-gather")
    embedding = 4 * 320 * 32
    assert 4 * plans["data"]["parameters"] < reduced < 4 * plans["data"]["parameters"] + embedding + 1024
    assert gathered > 4 * plans["fsdp"]["parameters"]
    assert not [c for c in plans["data"]["collectives"] if c["kind"] == "all-gather" and c["size"] > 4096]
    assert plans["fsdp"]["sent"] == pytest.approx(sum(c["total"] for c in plans["fsdp"]["collectives"]))


@pytest.mark.slow
def test_gpus_are_lowered_for_and_what_is_unknown_is_said(plans: dict[str, Any]) -> None:
    plan = plans["gpu"]
    assert plan["compiled_flops"] is plan["collectives"] is plan["compile_seconds"] is None
    assert plan["memory"]["activations"] is plan["memory"]["code"] is None
    assert plan["memory"]["temporaries"] == plan["memory"]["parameters"]  # gradients, at least
    assert plan["floors"]["flops"] == plan["step_flops"] / 4 / 989e12
    assert "not compiled" in plan["notes"][0] and "cpu:4" in plan["notes"][1]
    assert plan["cycles"] is None and "no estimate of a step's cycles" in plan["notes"][2]


def run_of(plan: dict[str, Any]) -> RunConfig:
    from mod_star.config import from_dict

    return from_dict(plan["config"])


@pytest.mark.nightly
def test_the_command_shows_tables() -> None:
    shown = call("plan", "--topology", "cpu:1", "tiny", *SMALL, "--batch", "2")
    assert "tiny on cpu:1: 1 x CPU, mesh data 1 x fsdp 1 x tensor 1" in shown
    for row in ("FLOP, counted from the model", "optimizer state", "activations kept for the backward pass"):
        assert row in shown
    assert "\x1b" not in shown


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (jax[tpu])")
def test_a_step_is_compiled_for_a_slice() -> None:
    words = ("--topology", "v5e:2x2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.dtype", "bfloat16", "--json")
    plan = json.loads(call("plan", "tiny", *SMALL, *words))
    assert plan["fits"] is True
    assert plan["useful"] == pytest.approx(1, abs=0.1)
    assert plan["kernel_flops"] == 0, "64 tokens are too few for a kernel"
    assert plan["chip"]["hbm"] == 16 * 2**30
    assert 0 < plan["floors"]["interconnect"] <= plan["floors"]["seconds"] < 1
    assert {c["group"] for c in plan["collectives"]} <= {2, 4}
    assert plan["cycles"]["estimated"] > 0.5 * plan["cycles"]["total"]
    assert plan["estimated_seconds"] > plan["floors"]["flops"]
    assert plan["flop_share"] == plan["floors"]["flops"] / plan["estimated_seconds"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (jax[tpu])")
def test_a_step_for_a_slice_computes_attention_in_kernels_and_says_so() -> None:
    """On a mesh, of the 128 tokens that a routed block computes; nothing is as large as their scores."""
    words = ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.context", "256", "--routing.capacity", "0.5")
    plan = json.loads(call("plan", "tiny", *SMALL, *words, "--topology", "v5e:2x2", "--json"))
    rows, heads, tokens, head_size, chips = 4, 2, 128, 16, 4
    product = 2 * rows * heads * tokens**2 * head_size / chips
    assert plan["kernel_flops"] == 9 * product  # two for the result, three for the queries, four for keys and values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "--topology is missing"),
        (["tinny", "--topology", "cpu:1"], "PRESET = 'tinny': must be the name of a preset, or the directory of a run"),
        (["tiny", "--topology", "v5e:5x5"], "--topology = 'v5e:5x5': must be one of v5e:1x1, v5e:2x2"),
        (["tiny", "--topology", "cpu:2", "--batch", "0"], "train.batch_size = 0: must be at least 1"),
        (["tiny", "--topology", "cpu:2", "--model.widht", "64"], "unknown option --model.widht"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.slow
def test_defaults_are_those_of_the_preset_or_run(trained_run: Path) -> None:
    assert _source(["--topology", "cpu:1", "7b-mod"]) == ("7b-mod", large_mod())
    assert _source(["--json", "base", "--data.tokenizer", "tiny"])[0] in ("base", "tiny")
    assert _source([str(trained_run), "--topology", "cpu:1"])[1].model.layers == 2
    assert _source(["--topology", "cpu:1"]) == (None, RunConfig())


def test_the_large_presets_have_the_shape_of_mistral() -> None:
    """7,241,732,096 parameters are those of Mistral 7B v0.1; nothing is allocated."""
    for preset in (large(), large_quiet()):
        count = parameter_count(jax.eval_shape(lambda run=preset: init_params(Decoder(run.model, run.routing), 0)))
        assert count == 7_241_732_096
    routed = large_mod()
    extra = parameter_count(jax.eval_shape(lambda: init_params(Decoder(routed.model, routed.routing), 0)))
    assert extra == 7_241_732_096 + 16 * (4096 + 4096 * 256 + 256 + 256 + 1)
    assert large_quiet().thinking.thought_length == 12 and large_quiet().model.context == 256
    assert {large().train.batch_size, routed.train.batch_size, large_quiet().train.batch_size} == {256}


def test_a_thinking_model_is_counted_with_what_it_recomputes() -> None:
    """Every product of the blocks once more, but for the last of each: a third of a feed-forward layer's."""
    run = large_quiet()
    none = scoring_flops(replace(run, model=replace(run.model, remat="none")), 256)
    dots, full = (scoring_flops(replace(run, model=replace(run.model, remat=remat)), 256) for remat in ("dots", "full"))
    assert dots.total - none.total == none.attention / 3
    again = none.projections / 3 + none.attention / 3 + none.mlp / 3 * 2 / 3
    assert full.total - none.total == pytest.approx(again)
    assert (full.head, full.mixing) == (none.head, none.mixing)


def test_the_need_of_a_program_that_is_too_large_is_read_from_the_compilers_message() -> None:
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.00G) "
        "exceeds available HBM (15.75G)."
    )
    assert bytes_needed(text) == 28 * 2**30
    assert bytes_needed("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.") == (
        20.5 * 2**30
    )
    assert bytes_needed("RESOURCE_EXHAUSTED: no more") is None


def test_advice_names_options_that_exist_and_would_help() -> None:
    run = replace(large_quiet(), train=replace(large_quiet().train, batch_size=8192, loss_chunk=512))
    run = replace(run, model=replace(run.model, remat="none"))
    plan = Plan(
        parse_topology("v5e:16x16"), {"data": 4, "fsdp": 64, "tensor": 1}, run, 7 * 10**9, 7 * 10**9, 1e18, None, None,
         None, None, None, 0, None, Memory(1e9, 2e9, 1e6, None, 3e10), False, 1.0, None, None, (), (),
    )  # fmt: skip
    said = advice(plan)
    options = [each.partition(":")[0].split(" ")[0] for each in said]
    assert options[0] == "--mesh.fsdp" and "715 MiB per chip instead of 2.79 GiB" in said[0]
    assert {"--model.remat", "--train.loss-chunk", "--thinking.chunk", "--train.accumulation"} <= set(options)
    assert "--train.loss-chunk 64:" in " ".join(said)  # of sequences of 256
    assert "--train.accumulation 4: 8 of the 32 sequences per chip" in " ".join(said)  # 30 GB, where 13.9 are left
    tiny = PRESETS["tiny"]()
    last = replace(tiny, model=replace(tiny.model, remat="full", heads=1))
    exhausted = replace(plan, mesh={"data": 1, "fsdp": 256, "tensor": 1}, run=last)
    assert advice(exhausted) == ("more chips, or a smaller --train.batch-size, --model.context or model",)


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 1000, 1024, 1023 * 2**10, 1.5 * 2**30)] == [
        "0 B", "1000 B", "1.00 KiB", "1023 KiB", "1.50 GiB",
    ]  # fmt: skip
