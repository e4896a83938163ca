"""Communication of a compiled program: which collectives, how many, over how many devices, with how many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mod_star.planning.hlo import Array, Computation, Instruction, leaves, split

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One place in the program where devices exchange something."""

    kind: str
    group: int
    """Number of devices that take part in each exchange."""
    size: int
    """Bytes of the whole array on one device: of the result of an all-gather, of what a reduce-scatter starts from."""
    shape: str
    """Its type, such as bf16[4096,14336]."""
    source: str
    """Part of the Python program that it comes from, empty if the compiler doesn't say."""
    count: float = 1.0
    """How often a step runs it."""

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one exchange, by the algorithms that send the least (rings)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.size * factor.get(self.kind, share)

    @property
    def total(self) -> float:
        """Bytes that one device sends in a step."""
        return self.sent * self.count

    def times(self, count: float) -> Collective:
        """The same, run so many times as often."""
        return replace(self, count=self.count * count)


def merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Those that differ in their count alone as one; those that send most come first."""
    counts: dict[Collective, float] = {}
    for each in collectives:
        key = replace(each, count=1.0)
        counts[key] = counts.get(key, 0.0) + each.count
    unique = [replace(key, count=count) for key, count in counts.items()]
    return tuple(sorted(unique, key=lambda each: -each.total))


def kind_of(instruction: Instruction) -> str | None:
    """Which collective an instruction is, or starts; None: none, or the end of one that was started before."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def collective_of(instruction: Instruction, computation: Computation, partitions: int) -> Collective:
    """What an instruction exchanges. Of asynchronous ones (`-start`), which result in more, the results alone count.

    Args:
      instruction: of which `kind_of` is not None.
      computation: where it stands, for the types of its operands.
      partitions: number of devices of the program.
    """
    kind = kind_of(instruction) or ""
    operands = [a for name in instruction.operands for a in operand_arrays(computation, name)]
    results = instruction.arrays
    if instruction.opcode.endswith("-start") and isinstance(instruction.kind, tuple) and kind != "all-reduce":
        results = list(leaves(instruction.kind[1])) if len(instruction.kind) > 1 else results
    arrays = results if kind == "all-gather" else operands or results
    return Collective(
        kind, group_size(instruction.attributes, partitions), sum(a.bytes for a in arrays), describe(arrays),
        instruction.op_name,
    )  # fmt: skip


def operand_arrays(computation: Computation, name: str) -> list[Array]:
    """Arrays of the type of an operand."""
    instruction = computation.instructions.get(name)
    return [] if instruction is None else instruction.arrays


def describe(arrays: list[Array]) -> str:
    """The largest of some arrays in words, and how many more there are."""
    if not arrays:
        return ""
    largest = max(arrays, key=lambda a: a.bytes)
    more = f" and {len(arrays) - 1} more" if len(arrays) > 1 else ""
    return f"{largest.dtype}[{','.join(str(n) for n in largest.dims)}]{more}"


def group_size(attributes: str, partitions: int) -> int:
    """Devices per group, from `replica_groups` in any of its notations, or the devices of a permutation.

    {{0,2},{1,3}} lists the groups; [2,4]<=[8] says 2 groups of 4; mesh['a'=2,'b'=4] {'b'} names the axes. {} means all.
    """
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=@?(?:\w+ ?= ?)?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        # An axis may be used in part: 'x':(1)2 is a piece of it of size 2.
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used) if used else partitions
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(split(match[1]))
    return partitions
