"""What one execution of a compiled program costs a device: operations, memory traffic, communication.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs, and a loop over blocks or
over chunks is what training consists of. Counted from the text of the compiled program (`mod_star.planning.hlo`), so
that what the compiler added, or computes on several devices alike, is in it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from mod_star.planning.collectives import Collective, collective_of, describe, kind_of, merged, operand_arrays
from mod_star.planning.hlo import Array, Computation, Instruction, Program
from mod_star.planning.traffic import NO_TRAFFIC, bytes_of, fusion_traffic, plain_traffic
from mod_star.planning.trips import trip_count

SCATTERED = "all-reduce-scatter"
"""XLA for TPUs writes a reduce-scatter as a fusion of this name, of an all-reduce and a slice."""


@dataclass(frozen=True)
class Cost:
    """What one execution costs one device."""

    flops: float = 0.0
    """Floating-point operations of matrix products, two per multiply-add; those that kernels state included."""
    traffic: float = 0.0
    """Bytes read from and written to its main memory, as far as the program's text shows."""
    collectives: tuple[Collective, ...] = ()
    """Communication; those that differ only in how often they run as one."""
    activations: float = 0.0
    """Bytes that the loops of the forward pass leave for the backward pass: the activations."""
    unknown_loops: int = 0
    """Loops whose number of iterations depends on data; they count as one iteration."""
    kernel_flops: float = 0.0
    """Operations that kernels written in Pallas state of themselves."""

    def times(self, count: float) -> Cost:
        """So many runs one after the other; memory is used again."""
        collectives = tuple(each.times(count) for each in self.collectives)
        return replace(
            self,
            flops=self.flops * count,
            traffic=self.traffic * count,
            collectives=collectives,
            kernel_flops=self.kernel_flops * count,
        )


def total(costs: Iterable[Cost]) -> Cost:
    """One after the other."""
    costs = list(costs)
    return Cost(
        sum(each.flops for each in costs),
        sum(each.traffic for each in costs),
        merged(collective for each in costs for collective in each.collectives),
        sum(each.activations for each in costs),
        sum(each.unknown_loops for each in costs),
        sum(each.kernel_flops for each in costs),
    )


def program_cost(program: Program) -> Cost:
    """The cost of one execution of a program on one device."""
    return _Counter(program).computation(program.entry)


@dataclass
class _Counter:
    program: Program
    done: dict[str, Cost] = field(default_factory=dict)

    def computation(self, name: str) -> Cost:
        """One run of a computation, with all that it calls."""
        if name not in self.done:
            computation = self.program.computations[name]
            # XLA for TPUs cuts an asynchronous collective up over several fusions, each with a copy of it.
            seen: set[tuple[str, str]] = set()
            self.done[name] = total(self._cost(computation, i, seen) for i in computation.instructions.values())
        return self.done[name]

    def _cost(self, computation: Computation, instruction: Instruction, seen: set[tuple[str, str]]) -> Cost:
        if instruction.opcode == "while":
            return self._loop(computation, instruction)
        if instruction.opcode == "conditional":
            return max((self.computation(branch) for branch in branches_of(instruction)), key=lambda cost: cost.flops)
        if instruction.opcode == "call" or (instruction.opcode == "async-start" and instruction.attribute("calls")):
            return self.computation(instruction.attribute("to_apply") or instruction.attribute("calls") or "")
        if instruction.opcode == "fusion":
            return self._fusion(computation, instruction, seen)
        if instruction.opcode == "custom-call" and (stated := stated_cost(computation, instruction)) is not None:
            return stated
        traffic = plain_traffic(computation, instruction)
        if kind_of(instruction) is not None:
            return Cost(0.0, traffic, self._exchange(computation, instruction))
        return Cost(matrix_flops(computation, instruction), traffic)

    def _loop(self, computation: Computation, instruction: Instruction) -> Cost:
        body = self.computation(instruction.attribute("body") or "")
        trips = trip_count(self.program, computation, instruction)
        cost = body.times(1 if trips is None else trips)
        activations = cost.activations + (0 if trips is None else activation_bytes(self.program, instruction, trips))
        return replace(cost, activations=activations, unknown_loops=cost.unknown_loops + (trips is None))

    def _exchange(self, computation: Computation, instruction: Instruction) -> tuple[Collective, ...]:
        collective = collective_of(instruction, computation, self.program.partitions)
        return (collective,) if collective.group > 1 else ()

    def _fusion(self, computation: Computation, fusion: Instruction, seen: set[tuple[str, str]]) -> Cost:
        name = fusion.attribute("calls") or ""
        inner = self.program.computations[name]
        costs = []
        for instruction in inner.instructions.values():
            if instruction.opcode == "fusion":
                nested = self._fusion(inner, instruction, seen)
                # What it reads and gives lies in no memory: what it reads of this fusion's operands is counted below.
                costs.append(nested if nested.collectives else replace(nested, traffic=NO_TRAFFIC))
            elif (kind := kind_of(instruction)) is None:
                costs.append(Cost(matrix_flops(inner, instruction)))
            elif (key := (kind, instruction.attribute("channel_id") or instruction.name)) not in seen:
                seen.add(key)
                exchanged = self._exchange(inner, instruction)
                if name.startswith(SCATTERED):
                    exchanged = tuple(_scattered(each, inner) for each in exchanged)
                costs.append(Cost(0.0, plain_traffic(inner, instruction), exchanged))
        cost = total(costs)
        traffic = NO_TRAFFIC
        if not name.startswith(SCATTERED):
            traffic = fusion_traffic(computation, fusion, inner, self.program.computations)
        return Cost(cost.flops, cost.traffic + traffic, cost.collectives)


def _scattered(collective: Collective, inner: Computation) -> Collective:
    arrays = [a for parameter in inner.parameters.values() for a in parameter.arrays]
    size = sum(a.bytes for a in arrays)
    return Collective("reduce-scatter", collective.group, size, describe(arrays), collective.source)


def branches_of(instruction: Instruction) -> list[str]:
    """Names of the computations that a conditional chooses from."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = (
        listed[1].split(",") if listed else re.findall(r"(?:true|false)_computation=([^, ]+)", instruction.attributes)
    )
    return [name.strip().lstrip("%") for name in names]


def stated_cost(computation: Computation, call: Instruction) -> Cost | None:
    """What a kernel for TPUs says of itself (`pallas.CostEstimate`), of which XLA sees nothing; None: it says nothing.

    Of its bytes those count that lie in main memory: as many of what it states as of its operands and results.
    """
    stated = dict(re.findall(r'"(flops|bytes_accessed)":"?(\d+)', call.attributes))
    if len(stated) < 2:
        return None
    arrays = [a for name in call.operands for a in operand_arrays(computation, name)] + call.arrays
    share = bytes_of(arrays) / max(1, sum(a.bytes for a in arrays))
    flops = float(stated["flops"])
    return Cost(flops, float(stated["bytes_accessed"]) * share, kernel_flops=flops)


def activation_bytes(program: Program, loop: Instruction, trips: int) -> float:
    """Bytes in main memory of what a loop of the forward pass stacks up, slice by slice, for the backward pass.

    A loop is of the forward pass if JAX's names say so: under `jvp`, not under `transpose`.
    """
    if trips < 2 or "jvp(" not in loop.op_name or "transpose(" in loop.op_name:
        return 0.0
    body = program.computations[loop.attribute("body") or ""]
    if body.root.opcode != "tuple" or not isinstance(loop.kind, tuple):
        return 0.0
    total = 0.0
    for number, (kind, name) in enumerate(zip(loop.kind, body.root.operands, strict=False)):
        stacked = isinstance(kind, Array) and kind.in_hbm and kind.dims[:1] == (trips,)
        if isinstance(kind, Array) and stacked and not _handed_on(body, name, number):
            total += kind.padded_bytes
    return total


def _handed_on(body: Computation, name: str, number: int) -> bool:
    """Whether an element of the body's result is that of its argument, as it was."""
    instruction = body.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = body.instructions.get(instruction.operands[0])
    return (
        instruction is not None
        and instruction.opcode == "get-tuple-element"
        and instruction.attribute("index") == str(number)
    )


def matrix_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of a `dot` or a `convolution`, which is how XLA for TPUs writes a matrix product; else 0."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (operand_arrays(computation, name)[0] for name in instruction.operands[:2])
    result = instruction.arrays[0]
    if instruction.opcode == "dot":
        listed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [left.dims[int(n)] for n in listed[1].split(",") if n] if listed else []
        return 2.0 * result.size * float(np.prod(contracted, dtype=float))
    return 2.0 * _convolution_products(instruction, left, right, result)


def _convolution_products(instruction: Instruction, left: Array, right: Array, result: Array) -> float:
    """Multiply-adds of a convolution: those of places beyond the input, or between dilated elements, are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    of_left, of_right, of_result = labels[1], labels[2], labels[3]
    products = float(result.dims[of_result.index("b")] * result.dims[of_result.index("f")])
    products *= right.dims[of_right.index("i")]
    window_text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(re.findall(r"(\w+)=([\w\-]+)", window_text[1])) if window_text else {}
    for place in range(len(labels[1]) - 2):
        letter = str(place)
        products *= _taps(
            left.dims[of_left.index(letter)],
            result.dims[of_result.index(letter)],
            right.dims[of_right.index(letter)],
            *(_setting(settings, name, place) for name in ("stride", "lhs_dilate", "rhs_dilate")),
            low=int(settings["pad"].split("x")[place].split("_")[0]) if "pad" in settings else 0,
        )
    return products


def _setting(settings: dict[str, str], name: str, place: int) -> int:
    return int(settings[name].split("x")[place]) if name in settings else 1


@functools.cache
def _taps(size: int, results: int, kernel: int, stride: int, dilation: int, kernel_dilation: int, low: int) -> int:
    """How many pairs of a result and an element of the kernel meet an element of the input, along one dimension."""
    count = 0
    for start in range(0, results, 4096):  # a kernel may be as long as a sequence
        at = np.arange(start, min(results, start + 4096))[:, None] * stride
        at = at + np.arange(kernel) * kernel_dilation - low
        count += int(np.sum((at >= 0) & (at % dilation == 0) & (at < (size - 1) * dilation + 1)))
    return count
