"""A plan to look at in a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from mod_star.config import to_dict
from mod_star.units import duration, short_number, size
from mod_star.views.terminal import Cell, result_table

if TYPE_CHECKING:
    from mod_star.planning.collectives import Collective
    from mod_star.planning.plan import Plan


def plan_report(plan: Plan, name: str) -> Group:
    """Tables of a plan, a verdict and what to do about it, to print with rich.

    Args:
      plan: what was found.
      name: what the user calls the run.
    """
    chip = plan.topology.chip
    mesh = " x ".join(f"{axis} {count}" for axis, count in plan.mesh.items())
    what = f"{plan.topology.count} x {chip.name if chip else 'CPU'}"
    parts: list[RenderableType] = [Text(f"{name} on {plan.topology.name}: {what}, mesh {mesh}\n", style="bold")]
    parts.append(result_table("one training step", ("", "all chips", "per chip"), _work_rows(plan)))
    parts.append(_memory_table(plan))
    if plan.collectives is not None:
        parts.append(_collectives_table(plan.collectives))
    if plan.floors is not None:
        parts.append(_floors_table(plan))
    parts.append(_verdict(plan))
    parts += [Text(f"to change: {each}") for each in plan.advice]
    parts += [Text(f"note: {each}", style="dim") for each in plan.notes]
    return Group(*parts)


def _work_rows(plan: Plan) -> list[tuple[Cell, ...]]:
    chips = plan.topology.count
    number = lambda value: None if value is None else short_number(value)  # noqa: E731
    compiled, frozen = plan.compiled_flops, plan.trained_parameters < plan.parameters
    rows: list[tuple[Cell, ...]] = [
        ("parameters", number(plan.parameters), None),
        *([("of these, trained", number(plan.trained_parameters), None)] if frozen else []),
        ("sequences", plan.run.train.batch_size, None),
        ("tokens of text", number(plan.tokens), number(plan.tokens / chips)),
        ("FLOP, counted from the model", number(plan.step_flops), number(plan.step_flops / chips)),
        ("FLOP per token of text", number(plan.step_flops / plan.tokens), None),
    ]
    if compiled is not None:
        rows.append(("FLOP of the compiled products", number(compiled * chips), number(compiled)))
        if plan.kernel_flops:
            rows.append(
                ("of these, in attention's kernels", number(plan.kernel_flops * chips), number(plan.kernel_flops))
            )
        else:
            rows.append(("attention", "plain products", None))
        rows.append(("XLA's count, loops once", None, number(plan.xla_flops)))
        rows.append(("memory traffic, about", None, None if plan.traffic is None else size(plan.traffic)))
    rows.append(("time to trace it here", duration(plan.lower_seconds), None))
    if plan.compile_seconds is not None:
        rows.append(("time to compile it here", duration(plan.compile_seconds), None))
    return rows


def _memory_table(plan: Plan) -> RenderableType:
    memory, chip = plan.memory, plan.topology.chip
    limit = chip.usable if chip else None
    share = lambda value: None if limit is None else f"{value / limit:.1%}"  # noqa: E731
    gpu = plan.topology.kind == "gpu"
    named = (
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("batch and the rest of the input", memory.batch),
        ("activations kept for the backward pass", memory.activations),
        ("gradients, at least" if gpu else "other temporaries", memory.temporaries),
        ("results not in place", memory.results),
        ("program", memory.code),
    )
    rows: list[tuple[Cell, ...]] = [
        (name, None if value is None else size(value), None if value is None else share(value)) for name, value in named
    ]
    rows.append(("together, at least" if gpu else "together", size(memory.total), share(memory.total)))
    if limit is not None and chip is not None:
        rows.append((f"there is, on a {chip.name}", size(limit), "100.0%"))
    return result_table("memory of one chip", ("", "bytes", "share"), rows)


def _collectives_table(collectives: tuple[Collective, ...]) -> RenderableType:
    groups: dict[tuple[str, int], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, each.group), []).append(each)
    rows: list[tuple[Cell, ...]] = []
    for (kind, group), own in sorted(groups.items(), key=lambda item: -sum(each.total for each in item[1])):
        total, count = sum(each.total for each in own), sum(each.count for each in own)
        largest = max(own, key=lambda each: each.total)
        rows.append((kind, group, round(count), size(total), f"{largest.shape} x {largest.count:,.0f}"))
    rows.append(
        ("together", None, round(sum(c.count for c in collectives)), size(sum(c.total for c in collectives)), "")
    )
    columns = ("collective", "devices", "per step", "a chip sends", "most of it")
    return result_table("communication", columns, rows)


def _floors_table(plan: Plan) -> RenderableType:
    floors, chip = plan.floors, plan.topology.chip
    assert floors is not None and chip is not None
    seconds = lambda value: None if value is None else f"{value * 1e3:,.3g} ms"  # noqa: E731
    rows: list[tuple[Cell, ...]] = [
        ("FLOPs", f"{short_number(chip.flops)}FLOP/s", seconds(floors.flops)),
        ("memory bandwidth", f"{short_number(chip.hbm_bandwidth)}B/s", seconds(floors.hbm)),
        ("interconnect", f"{short_number(chip.interconnect)}B/s", seconds(floors.interconnect)),
        ("a step, at least", None, seconds(floors.seconds)),
        ("tokens of text per second, at most", None, short_number(plan.tokens / floors.seconds)),
    ]
    if plan.flop_share is not None and chip.clock is not None:
        rows.append(("by XLA's estimate of cycles", f"{chip.clock / 1e9:.2f} GHz", seconds(plan.estimated_seconds)))
        rows.append(("of which FLOPs, at the peak", None, f"{plan.flop_share:.0%}"))
    return result_table("time at the chip's published peaks", ("", "peak", "floor"), rows)


def _verdict(plan: Plan) -> Text:
    if plan.fits is None:
        return Text("whether it fits is not known" if plan.topology.chip else "", style="bold")
    if plan.fits:
        return Text("fits", style="bold green")
    return Text("does not fit", style="bold red")


def plan_record(plan: Plan, name: str) -> dict[str, Any]:
    """A plan as JSON-able values. Bytes, FLOPs and seconds; null is not known."""
    chip, floors = plan.topology.chip, plan.floors
    flops = ("step_flops", "compiled_flops", "kernel_flops", "xla_flops")
    shown = ("parameters", "trained_parameters", "tokens", *flops, "useful", "traffic", "sent")
    collectives = None
    if plan.collectives is not None:
        collectives = [asdict(each) | {"sent": each.sent, "total": each.total} for each in plan.collectives]
    return {
        "name": name,
        "topology": plan.topology.name,
        "chips": plan.topology.count,
        "chip": None if chip is None else asdict(chip),
        "mesh": plan.mesh,
        **{field: getattr(plan, field) for field in shown},
        "flops_per_token": plan.step_flops / plan.tokens,
        "unknown_loops": plan.unknown_loops,
        "cycles": None if plan.cycles is None else asdict(plan.cycles) | {"total": plan.cycles.total},
        "estimated_seconds": plan.estimated_seconds,
        "flop_share": plan.flop_share,
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "fits": plan.fits,
        "collectives": collectives,
        "lower_seconds": plan.lower_seconds,
        "compile_seconds": plan.compile_seconds,
        "floors": None if floors is None else asdict(floors) | {"seconds": floors.seconds},
        "notes": list(plan.notes),
        "advice": list(plan.advice),
        "config": to_dict(plan.run),
    }
