"""Costs read from the text of compiled programs: hand-made ones with known sums, and one that XLA made here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mod_star.planning.collectives import group_size
from mod_star.planning.hlo import Array, leaves, parse, parse_type
from mod_star.planning.program_cost import Cost, program_cost
from mod_star.planning.trips import trip_count

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def cost_of(body: str, partitions: int = 8) -> Cost:
    return program_cost(parse(f"HloModule test, is_scheduled=true, num_partitions={partitions}\n{ADD}\n{body}"))


def sent(cost: Cost) -> dict[tuple[str, int], tuple[float, float]]:
    """{(kind, devices): (count, bytes that a device sends)}."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for each in cost.collectives:
        count, total = found.get((each.kind, each.group), (0.0, 0.0))
        found[each.kind, each.group] = (count + each.count, total + each.total)
    return found


def test_a_kernel_costs_what_it_states() -> None:
    """XLA's text says nothing else of it. What lies in vector memory costs no traffic."""
    call = (
        'custom-call(%p, %p), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"T(=",'
        '"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"640"}}}'
    )
    body = "ENTRY %main (p: f32[4]) -> f32[8] {{\n  %p = f32[4] parameter(0)\n  ROOT %k = f32[8]{space} {call}\n}}"
    cost = cost_of(body.format(space="{0}", call=call))
    assert (cost.flops, cost.kernel_flops, cost.traffic) == (1000, 1000, 640)
    assert cost_of(body.format(space="{0:S(1)}", call=call)).traffic == 320
    silent = cost_of(body.format(space="{0}", call=call.replace("bytes_accessed", "bytes")))
    assert (silent.flops, silent.traffic) == (0, 64)
    assert cost.times(3).kernel_flops == 3000


def test_what_a_fusion_inside_a_fusion_slices_is_not_read_whole() -> None:
    """As XLA for TPUs reads one group's activations of all groups' in a product."""
    cost = cost_of("""
%inner (all: f32[32,16], at: s32[]) -> f32[1,16] {
  %all = f32[32,16] parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %own = f32[1,16] dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={1,16}
}

%outer (all.1: f32[32,16], at.1: s32[]) -> f32[1,16] {
  %all.1 = f32[32,16] parameter(0)
  %at.1 = s32[] parameter(1)
  %own.1 = f32[1,16] fusion(%all.1, %at.1), kind=kLoop, calls=%inner
  ROOT %twice = f32[1,16] add(%own.1, %own.1)
}

ENTRY %main (p: f32[32,16], i: s32[]) -> f32[1,16] {
  %p = f32[32,16] parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,16] fusion(%p, %i), kind=kOutput, calls=%outer
}
""")
    assert cost.traffic == 64 + 4 + 64  # the slice, the index, the result


def test_types() -> None:
    tiled = parse_type("bf16[3,100]{1,0:T(8,128)(2,1)S(1)}")
    assert tiled == Array("bf16", (3, 100), "1,0:T(8,128)(2,1)S(1)")
    assert isinstance(tiled, Array)
    assert (tiled.bytes, tiled.padded_bytes, tiled.in_hbm) == (600, 8 * 128 * 2, False)
    turned = parse_type("f32[3,100]{0,1:T(8,128)}")
    assert isinstance(turned, Array) and turned.in_hbm
    assert turned.padded_bytes == 104 * 128 * 4  # 3 is the inner dimension, 100 the outer
    nested = parse_type("((f32[2]{0}, pred[]), /*index=1*/u32[]{:S(2)}, token[], f8e4m3fn[5])")
    assert [a.bytes for a in leaves(nested)] == [8, 1, 4, 0, 5]


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}, dimensions={0}", 3),
        ("channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, use_global_device_ids=true", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("replica_groups={}, to_apply=%add", 8),
        ("source_target_pairs={{0,1},{1,0}}", 8),
    ],
)
def test_sizes_of_groups(attributes: str, size: int) -> None:
    assert group_size(attributes, 8) == size


def test_collectives_and_what_a_device_sends() -> None:
    """Once per kind, on rings: n - 1 of n parts, twice for an all-reduce, all of it for a permutation."""
    cost = cost_of(
        """
ENTRY %main (x: f32[16,4], y: bf16[32]) -> f32[16,4] {
  %x = f32[16,4]{1,0} parameter(0)
  %y = bf16[32]{0} parameter(1)
  %gathered = f32[64,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %scattered = f32[8,4]{1,0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %both = (f32[16,4]{1,0}, bf16[32]{0}) all-reduce(%x, %y), channel_id=3, replica_groups={}, to_apply=%add
  %alone = f32[16,4]{1,0} all-reduce(%x), channel_id=7, replica_groups=[8,1]<=[8], to_apply=%add
  %exchanged = f32[16,4]{1,0} all-to-all(%x), channel_id=4, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %moved = f32[16,4]{1,0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
}"""
    )
    assert sent(cost) == {
        ("all-gather", 4): (1, 64 * 4 * 4 * 3 / 4),
        ("reduce-scatter", 2): (1, 16 * 4 * 4 / 2),
        ("all-reduce", 8): (1, 2 * (16 * 4 * 4 + 32 * 2) * 7 / 8),
        ("all-to-all", 2): (1, 16 * 4 * 4 / 2),
        ("collective-permute", 8): (1, 16 * 4 * 4),
    }
    assert cost.flops == 0 and cost.unknown_loops == 0


def test_asynchronous_ones_count_once() -> None:
    cost = cost_of(
        """
%wrapped (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[4]{0} reduce-scatter(%p), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %permute = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %reduce = f32[8]{0} all-reduce-start(%x), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %async = ((f32[8]{0}), f32[4]{0}, s32[]) async-start(%x), calls=%wrapped
  %end = f32[8]{0} collective-permute-done(%permute)
  %reduced = f32[8]{0} all-reduce-done(%reduce)
  %scattered = f32[4]{0} async-done(%async), calls=%wrapped
  ROOT %done = f32[32]{0} all-gather-done(%start)
}"""
    )
    assert sent(cost) == {
        ("all-gather", 4): (1, 32 * 4 * 3 / 4),
        ("collective-permute", 8): (1, 32),
        ("all-reduce", 8): (1, 2 * 32 * 7 / 8),
        ("reduce-scatter", 2): (1, 16),
    }


def test_fusions_of_tpus() -> None:
    """One all-gather cut up over three fusions counts once; an all-reduce with a slice is a reduce-scatter."""
    cost = cost_of(
        """
%part.1 (p.1: f32[8]) -> f32[16] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %g.1 = f32[16]{0} all-gather(%p.1), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
}

%part.2 (p.2: f32[8]) -> f32[16] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %g.2 = f32[16]{0} all-gather(%p.2), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}
}

%other (p.3: f32[8]) -> f32[16] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %g.3 = f32[16]{0} all-gather(%p.3), channel_id=6, replica_groups=[4,2]<=[8], dimensions={0}
}

%all-reduce-scatter.7 (p.4: f32[16]) -> f32[8] {
  %p.4 = f32[16]{0} parameter(0)
  %reduced = f32[16]{0} all-reduce(%p.4), channel_id=8, replica_groups=[4,2]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = f32[8]{0} dynamic-slice(%reduced, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %first = f32[16]{0} fusion(%x), kind=kCustom, calls=%part.1
  %second = f32[16]{0} fusion(%x), kind=kCustom, calls=%part.2
  %third = f32[16]{0} fusion(%x), kind=kCustom, calls=%other
  ROOT %last = f32[8]{0} fusion(%first), kind=kCustom, calls=%all-reduce-scatter.7
}"""
    )
    assert sent(cost) == {("all-gather", 2): (2, 2 * 64 / 2), ("reduce-scatter", 2): (1, 64 / 2)}


LOOPS = """
%inner_body (state.1: (s32[], f32[4,8], f32[8,8], s32[])) -> (s32[], f32[4,8], f32[8,8], s32[]) {
  %state.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %h.1 = f32[4,8]{1,0} get-tuple-element(%state.1), index=1
  %w.1 = f32[8,8]{1,0} get-tuple-element(%state.1), index=2
  %n.1 = s32[] get-tuple-element(%state.1), index=3
  %two = s32[] constant(2)
  %copied = s32[] copy(%i.1)
  %next.1 = s32[] add(%copied, %two)
  %new = f32[4,8]{1,0} dot(%h.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, s32[]) tuple(%next.1, %new, %w.1, %n.1)
}

%compared (left: s32[], right: s32[]) -> pred[] {
  %left = s32[] parameter(0)
  %right = s32[] parameter(1)
  ROOT %less = pred[] compare(%left, %right), direction=LT
}

%inner_condition (state.2: (s32[], f32[4,8], f32[8,8], s32[])) -> pred[] {
  %state.2 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %n.2 = s32[] get-tuple-element(%state.2), index=3
  ROOT %go = pred[] fusion(%i.2, %n.2), kind=kLoop, calls=%compared
}

%outer_body (state.3: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %state.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%state.3), index=0
  %h.3 = f32[4,8]{1,0} get-tuple-element(%state.3), index=1
  %w.3 = f32[8,8]{1,0} get-tuple-element(%state.3), index=2
  %from = s32[] constant(1)
  %to = s32[] constant(8)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, s32[]) tuple(%from, %h.3, %w.3, %to)
  %run = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, s32[]) while(%start), condition=%inner_condition, body=%inner_body
  %h.4 = f32[4,8]{1,0} get-tuple-element(%run), index=1
  %everyone = f32[4,8]{1,0} all-reduce(%h.4), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %next.3 = s32[] add(%i.3, %one)
  ROOT %tuple.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%next.3, %everyone, %w.3)
}

%outer_condition (state.5: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %state.5 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.5 = s32[] get-tuple-element(%state.5), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %go.5 = pred[] compare(%limit, %i.5), direction=GT
}

ENTRY %main (h: f32[4,8], w: f32[8,8], start_at: s32[]) -> f32[4,8] {
  %h = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %start_at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(BEGIN, %h, %w)
  %loop = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%begin), condition=%outer_condition, body=%outer_bodyKNOWN
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}"""


def test_loops_multiply_what_is_in_them() -> None:
    """The inner loop counts 1, 3, 5, 7 (limit handed down in its state), the outer 0 to 4, comparing backwards."""
    cost = cost_of(LOOPS.replace("LIMIT", "5").replace("BEGIN", "%zero").replace("KNOWN", ""))
    assert cost.flops == 5 * 4 * (2 * 4 * 8 * 8)
    assert sent(cost) == {("all-reduce", 2): (5, 5 * 2 * 4 * 8 * 4 / 2)}
    assert cost.unknown_loops == 0


def test_a_written_trip_count_is_believed_and_an_unknown_one_reported() -> None:
    written = ', backend_config={"known_trip_count":{"n":"9"},"known_init_step":{"init":"0","step":"1"}}'
    known = cost_of(LOOPS.replace("LIMIT", "5").replace("BEGIN", "%start_at").replace("KNOWN", written))
    assert sent(known)["all-reduce", 2][0] == 9 and known.unknown_loops == 0
    unknown = cost_of(LOOPS.replace("LIMIT", "5").replace("BEGIN", "%start_at").replace("KNOWN", ""))
    assert sent(unknown)["all-reduce", 2][0] == 1 and unknown.unknown_loops == 1


def test_activations_are_what_forward_loops_stack() -> None:
    """A slice per iteration, in main memory, under jvp: not what is handed on, carried, or in VMEM."""
    text = """
%body (state: (s32[], f32[6,8], f32[6,4,8], f32[6,4], f32[6,2])) -> (s32[], f32[6,8], f32[6,4,8], f32[6,4], f32[6,2]) {
  %state = (s32[], f32[6,8]{1,0}, f32[6,4,8]{2,1,0}, f32[6,4]{1,0:S(1)}, f32[6,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[6,8]{1,0} get-tuple-element(%state), index=1
  %a = f32[6,4,8]{2,1,0} get-tuple-element(%state), index=2
  %b = f32[6,4]{1,0:S(1)} get-tuple-element(%state), index=3
  %c = f32[6,2]{1,0} get-tuple-element(%state), index=4
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %kept = f32[6,4,8]{2,1,0} negate(%a)
  %fast = f32[6,4]{1,0:S(1)} negate(%b)
  %same = f32[6,2]{1,0} copy(%c)
  ROOT %t = (s32[], f32[6,8]{1,0}, f32[6,4,8]{2,1,0}, f32[6,4]{1,0:S(1)}, f32[6,2]{1,0}) tuple(%next, %w, %kept, %fast, %same)
}

%condition (s: (s32[], f32[6,8], f32[6,4,8], f32[6,4], f32[6,2])) -> pred[] {
  %s = (s32[], f32[6,8]{1,0}, f32[6,4,8]{2,1,0}, f32[6,4]{1,0:S(1)}, f32[6,2]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %six = s32[] constant(6)
  ROOT %go = pred[] compare(%j, %six), direction=LT
}

ENTRY %main (z: s32[], w0: f32[6,8], a0: f32[6,4,8], b0: f32[6,4], c0: f32[6,2]) -> f32[6,8] {
  %zero = s32[] constant(0)
  %w0 = f32[6,8]{1,0} parameter(1)
  %a0 = f32[6,4,8]{2,1,0} parameter(2)
  %b0 = f32[6,4]{1,0:S(1)} parameter(3)
  %c0 = f32[6,2]{1,0} parameter(4)
  %begin = (s32[], f32[6,8]{1,0}, f32[6,4,8]{2,1,0}, f32[6,4]{1,0:S(1)}, f32[6,2]{1,0}) tuple(%zero, %w0, %a0, %b0, %c0)
  %loop = (s32[], f32[6,8]{1,0}, f32[6,4,8]{2,1,0}, f32[6,4]{1,0:S(1)}, f32[6,2]{1,0}) while(%begin), condition=%condition, body=%body, metadata={op_name="jit(step)/NAME/while"}
  ROOT %r = f32[6,8]{1,0} get-tuple-element(%loop), index=1
}"""  # noqa: E501
    assert cost_of(text.replace("NAME", "jvp(vmap(Decoder))")).activations == 6 * 4 * 8 * 4
    assert cost_of(text.replace("NAME", "transpose(jvp(vmap(Decoder)))")).activations == 0
    assert cost_of(text.replace("NAME", "sample")).activations == 0


def test_products_that_tpus_write_as_convolutions() -> None:
    """A plain product, and a batch of products written as a dilated convolution: as many operations as the dots."""
    cost = cost_of(
        """
ENTRY %main (a: f32[10,6], b: f32[6,7], c: f32[4,5,6], d: f32[4,6,3]) -> f32[4,5,3] {
  %a = f32[10,6]{1,0} parameter(0)
  %b = f32[6,7]{1,0} parameter(1)
  %c = f32[4,5,6]{2,1,0} parameter(2)
  %d = f32[4,6,3]{2,1,0} parameter(3)
  %plain = f32[10,7]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %batch = f32[4,5,3]{2,1,0} convolution(%c, %d), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}"""
    )
    assert cost.flops == 2 * 10 * 6 * 7 + 2 * 4 * 5 * 6 * 3


def test_traffic_counts_slices_and_updates_as_what_they_move() -> None:
    cost = cost_of(
        """
%sliced (whole: f32[100,8], at: s32[], more: f32[8]) -> f32[8] {
  %whole = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %more = f32[8]{0} parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%whole, %at, %zero.1), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  ROOT %sum.1 = f32[8]{0} add(%flat, %more)
}

%updated (old: f32[100,8], new: f32[8], at.2: s32[]) -> f32[100,8] {
  %old = f32[100,8]{1,0} parameter(0)
  %new = f32[8]{0} parameter(1)
  %at.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %shaped = f32[1,8]{1,0} bitcast(%new)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%old, %shaped, %at.2, %zero.2)
}

ENTRY %main (x: f32[100,8], i: s32[], y: f32[8]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[8]{0} parameter(2)
  %read = f32[8]{0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced
  %near = f32[8]{0:S(1)} negate(%read)
  ROOT %written = f32[100,8]{1,0} fusion(%x, %near, %i), kind=kLoop, calls=%updated
}"""
    )
    row, index = 8 * 4, 4
    assert cost.traffic == (row + index + row + row) + row + (index + row)


def test_traffic_of_what_is_started_is_what_it_reads_and_writes_of_main_memory() -> None:
    """A copy into VMEM reads, one out of it writes; a slice into VMEM reads the slice, not the whole array."""
    cost = cost_of(
        """
ENTRY %main (x: f32[100,8]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %in = (f32[100,8]{1,0:S(1)}, f32[100,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[100,8]{1,0:S(1)} copy-done(%in)
  %slice = ((f32[100,8]{1,0}), f32[25,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:25], [0:8]}
  %part = f32[25,8]{1,0:S(1)} slice-done(%slice)
  %row = f32[1,8]{1,0:S(1)} dynamic-slice(%x, %zero, %zero), dynamic_slice_sizes={1,8}
  %within = f32[1,8]{1,0:S(1)} dynamic-slice(%near, %zero, %zero), dynamic_slice_sizes={1,8}
  %put = f32[100,8]{1,0} dynamic-update-slice(%x, %row, %zero, %zero)
  %out = (f32[100,8]{1,0}, f32[100,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  ROOT %far = f32[100,8]{1,0} copy-done(%out)
}"""
    )
    whole, row = 100 * 8 * 4, 8 * 4
    assert cost.traffic == whole + whole / 4 + row + row + whole


def test_traffic_without_loops_is_what_xla_counts() -> None:
    """XLA's own analysis of bytes, which counts loops once and slices as here."""

    def function(x: jax.Array, w: jax.Array, row: jax.Array) -> jax.Array:
        hidden = jax.nn.softmax(x @ w, -1)
        return jax.lax.dynamic_update_slice(x, (hidden @ w.T)[:1], (row, 0)).T @ hidden

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 64), (64, 128))]
    compiled = jax.jit(function).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    analysis: Any = compiled.cost_analysis()
    cost = program_cost(parse(compiled.as_text() or ""))
    assert cost.traffic == pytest.approx(analysis["bytes accessed"], rel=0.15)


def test_a_program_of_this_machine_costs_what_it_computes() -> None:
    """Compiled by XLA for CPUs: a scan of 7 products inside a scan of 3, and one product outside."""

    def function(x: jax.Array, weights: jax.Array) -> jax.Array:
        inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, weights)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=3)[0] @ weights[0]

    shapes = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)
    program = parse(jax.jit(function).lower(*shapes).compile().as_text() or "")
    cost = program_cost(program)
    assert cost.flops == (3 * 7 + 1) * 2 * 16 * 32 * 32
    assert cost.collectives == () and cost.unknown_loops == 0
    loops = [
        (computation, made)
        for computation in program.computations.values()
        for made in computation.instructions.values()
        if made.opcode == "while"
    ]
    assert {trip_count(program, *loop) for loop in loops} == {3, 7}


def test_operands_are_read_without_the_numbers_that_long_lists_have() -> None:
    names = ", ".join(f"/*index={n}*/%a" if n % 5 == 0 and n else "%a" for n in range(7))
    lines = ["HloModule m", "", "ENTRY %e (a: f32[2]) -> f32[2] {", "  %a = f32[2]{0} parameter(0)"]
    lines += [f"  ROOT %t = (f32[2]{{0}}) tuple({names})", "}"]
    assert parse("\n".join(lines)).computations["e"].root.operands == ("a",) * 7
