"""XLA's estimates of cycles, added up: hand-made programs with known sums, and one that XLA made for a v5e."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mod_star.planning.chips import GPUS, TPUS
from mod_star.planning.cycles import Cycles, Expected, costliest_loop, program_cycles
from mod_star.planning.hlo import parse

CHIP = replace(TPUS["v5e"], hbm_bandwidth=2e12, flops=8e12, flops_per_cycle=8.0)
"""A clock of 1 THz: 2 bytes and 8 operations in a cycle."""

BODY = """
%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one), backend_config={"window_config":{"estimated_cycles":"3"}}
  %y = f32[8]{0} negate(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (before: (s32[], f32[8])) -> pred[] {
  %before = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%before), index=0
  %limit = s32[]{:S(6)} constant(7)
  ROOT %go = pred[]{:S(6)} compare(%j, %limit), direction=LT, backend_config={"window_config":{"estimated_cycles":"1"}}
}
"""


def cycles_of(entry: str, expected: Expected = Expected(), before: str = BODY, **computation: str) -> Cycles:  # noqa: B008
    cycles = program_cycles(
        parse(f"HloModule test, is_scheduled=true\n{before}\n{entry}"), CHIP, expected, **computation
    )
    assert cycles is not None
    return cycles


LOOP = """
ENTRY %main (n: s32[], x0: f32[8]) -> f32[8] {
  %n = s32[] parameter(0)
  %x0 = f32[8]{0} parameter(1)
  %two = s32[] constant(2)
  %begin = (s32[], f32[8]{0}) tuple(START, %x0)
  %loop = (s32[], f32[8]{0}) while(%begin), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """From 2 to 7: five iterations, and six comparisons."""
    cycles = cycles_of(LOOP.replace("START", "%two"))
    assert cycles.total == cycles.estimated == 5 * 103 + 6
    assert list(cycles.by_opcode) == [("negate", 500), ("add", 15), ("compare", 6)]
    assert cycles.unknown_loops == 0


def test_a_loop_that_data_decide_counts_as_often_as_is_expected() -> None:
    text = LOOP.replace("START", "%n")
    assert cycles_of(text).total == 103 + 2 and cycles_of(text).unknown_loops == 1
    assert cycles_of(text, Expected(trips=2.5)).total == 2.5 * 103 + 3.5
    assert cycles_of(text, computation="body").total == 103
    assert costliest_loop(parse(f"HloModule test\n{BODY}\n{text}"), CHIP) == "body"


def test_a_conditional_counts_its_costliest_branch_as_often_as_is_expected() -> None:
    branches = """
%dear (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %da = f32[8]{0} exponential(%a), backend_config={"window_config":{"estimated_cycles":"400"}}
}

%cheap (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %cb = f32[8]{0} negate(%b), backend_config={"window_config":{"estimated_cycles":"20"}}
}
"""
    entry = """
ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %r = f32[8]{0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}
}"""
    assert cycles_of(entry, before=branches).total == 400
    assert cycles_of(entry, Expected(taken=0.25), before=branches).total == 0.25 * 400 + 0.75 * 20


def test_copies_run_beside_what_is_computed_and_one_after_another() -> None:
    """A copy of 4,000 bytes into VMEM takes 2,000 cycles, a slice of 400 bytes 200 more, both from the first on."""
    cycles = cycles_of(
        """
ENTRY %main (w: f32[1000], x: f32[8]) -> f32[8] {
  %w = f32[1000]{0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %copy = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%w)
  %slice = ((f32[1000]{0}), f32[100]{0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:100]}
  %y = f32[8]{0} negate(%x), backend_config={"window_config":{"estimated_cycles":"1500"}}
  %near = f32[1000]{0:S(1)} copy-done(%copy)
  %z = f32[8]{0} negate(%y), backend_config={"window_config":{"estimated_cycles":"50"}}
  %part = f32[100]{0:S(1)} slice-done(%slice)
  ROOT %r = f32[8]{0} fusion(%z, %near, %part), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"7"}}
}"""  # noqa: E501
    )
    assert (cycles.estimated, cycles.waited, cycles.assumed) == pytest.approx((1557, 500 + 150, 0))
    assert dict(cycles.by_opcode) == pytest.approx({"negate": 1550, "copy-done": 500, "slice-done": 150, "fusion": 7})


def test_kernels_take_what_they_state_and_others_are_told() -> None:
    entry = """
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %mark = f32[100]{0} custom-call(%x), custom_call_target="ConcatBitcast"
  %k = f32[100]{0} custom-call(%mark), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"8000","transcendentals":"0","bytes_accessed":"400"}}}
  %m = f32[100]{0} custom-call(%k), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":8,"bytes_accessed":"400"}}}
  %silent = f32[100]{0} custom-call(%m), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"}}
  %plain = f32[100]{0} negate(%silent)
  ROOT %r = f32[100]{0} negate(%plain), backend_config={"window_config":{"estimated_cycles":"9"}}
}"""  # noqa: E501
    cycles = cycles_of(entry)
    assert cycles.assumed == 1000 + 200 + 2 * 100 * 4 / 2  # by operations, by bytes, a reading and a writing
    assert cycles.estimated == 9 and cycles.unknown_kernels == 1


def test_there_is_no_estimate_without_xlas_or_without_a_clock() -> None:
    without = "HloModule test\nENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}"
    assert program_cycles(parse(without), CHIP) is None
    assert program_cycles(parse(f"HloModule test\n{BODY}\n{LOOP}"), GPUS["h100"]) is None


def test_clocks_of_chips() -> None:
    """What the published peaks and the sizes of the matrix units come to: 1.05, 1.5 and 1.75 GHz."""
    clocks = {name: round((chip.clock or 0) / 1e9, 2) for name, chip in TPUS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


SCRIPT = """
import json
from mod_star.planning.topologies import devices_of, parse_topology, prepare_environment
prepare_environment()
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from mod_star.planning.chips import TPUS
from mod_star.planning.cycles import program_cycles
from mod_star.planning.hlo import parse
where = SingleDeviceSharding(devices_of(parse_topology("v5e:1x1"))[0])
x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in ((2048, 2048), (2048, 2048)))
def loop(x, w, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)
found = []
for n in (3, 12):
    text = jax.jit(loop, static_argnums=2).lower(x, w, n).compile().as_text()
    found.append(program_cycles(parse(text), TPUS["v5e"]).total)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (jax[tpu])")
def test_a_product_in_a_loop_takes_little_more_than_its_operations_at_the_peak() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True)
    few, many = json.loads(done.stdout)
    product = 2 * 2048**3 / (TPUS["v5e"].flops_per_cycle or 0)
    # The loop copies what it carries, too: about two thirds of the product's own cycles.
    assert 1 < (many - few) / 9 / product < 2
