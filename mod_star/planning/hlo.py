"""Reads the text of a compiled program (optimised HLO), as `jax.stages.Compiled.as_text` gives it.

Only what plans need of it: computations, their instructions with types, operands and attributes, and how often a loop
runs. The text of XLA for TPUs, GPUs and CPUs has one grammar.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16,
    "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """Type of an array: its element type, dimensions and where it lies."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without what a layout's tiles add. Tokens and other opaque things have none."""
        bits = 8 if self.dtype.startswith("f8") else BITS.get(self.dtype, 0)
        return -(-self.size * bits // 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes with the tiles of its layout filled up: what it takes of a TPU's memory."""
        order = re.match(r"[\d,]+", self.layout)
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not (order and tile and self.size):
            return self.bytes
        sizes = [self.dims[int(n)] for n in order[0].split(",")]  # the innermost first
        for place, length in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // length) * length
        return self.bytes * math.prod(sizes) // self.size

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the main memory, not in a memory space of its own such as a TPU's VMEM."""
        return re.search(r"S\(([1-9]\d*)\)", self.layout) is None


Type = Array | tuple["Type", ...]


def leaves(kind: Type) -> Iterator[Array]:
    """All arrays of a type."""
    if isinstance(kind, Array):
        yield kind
    else:
        for part in kind:
            yield from leaves(part)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    kind: Type
    opcode: str
    operands: tuple[str, ...]
    text: str
    """What stands between the parentheses: of a constant, its value."""
    attributes: str
    """What follows the parentheses."""
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """Arrays of its result."""
        return list(leaves(self.kind))

    def attribute(self, name: str) -> str | None:
        """An attribute's value up to the next comma or space, such as a computation's name without %."""
        match = re.search(rf"(?:^|[ ,]){name}=%?([^, ]+)", self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Which part of the Python program it comes from, such as jit(train_step)/jvp(...)/while/body/dot_general."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """A list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)

    def viewed(self, instruction: Instruction) -> Instruction:
        """The instruction whose result this one is, seen through bitcasts and reshapes, which move nothing."""
        while instruction.opcode in ("bitcast", "reshape") and instruction.operands[0] in self.instructions:
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.text): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclass(frozen=True)
class Program:
    """A compiled program: what one device runs."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    """Number of devices that it was cut up for."""


def parse(text: str) -> Program:
    """Reads a program's text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := _instruction(line.strip())) is not None:
                current.instructions[instruction.name] = instruction
        elif line.endswith("{") and (head := re.match(r"(ENTRY )?%?([^\s(]+)", line)) and line[:9] != "HloModule":
            current = computations[head[2]] = Computation(head[2])
            entry = head[2] if head[1] else entry
        else:
            current = None
    if entry is None:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text[:1_000_000].split("\n\n", 1)[0])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.partition(" = ")
    if not equals:
        return None
    kind_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode, parenthesis, _ = rest[kind_end:].lstrip().partition("(")
    if not parenthesis or not re.fullmatch(r"[a-z][\w-]*", opcode):
        return None
    start = rest.index("(", kind_end)
    end = _closing(rest, start)
    inside = re.sub(r"/\*.*?\*/", "", rest[start + 1 : end])  # every fifth of many operands has its number before it
    operands = tuple(part.split()[-1].lstrip("%") for part in split(inside) if part.strip())
    own = name.removeprefix("ROOT ").lstrip("%")
    kind = parse_type(rest[:kind_end])
    return Instruction(own, kind, opcode, operands, inside, rest[end + 1 :].lstrip(", "), name.startswith("ROOT "))


def parse_type(text: str) -> Type:
    """A type as HLO writes it: `f32[2,4]{1,0:T(8,128)S(1)}`, or a tuple of such in parentheses."""
    text = re.sub(r"/\*.*?\*/", "", text).strip()
    if text.startswith("("):
        return tuple(parse_type(part) for part in split(text[1:-1]) if part.strip())
    match = re.match(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?", text)
    if match is None:  # a token, or something opaque
        return Array(text, (), "")
    dims = tuple(int(n.strip().removeprefix("<=")) for n in match[2].split(",") if n.strip())
    return Array(match[1], dims, match[3] or "")


def split(text: str) -> list[str]:
    """Splits at commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text) - 1
