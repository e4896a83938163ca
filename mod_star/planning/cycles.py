"""A clock for TPUs without a TPU: XLA's own estimates of a compiled program's cycles, as often as its loops run.

XLA for TPUs writes beside an instruction how many cycles it expects it to take (`estimated_cycles`), by which it chose
between forms of it. It says nothing of three things, which are counted here at the chip's published peaks:

  - copies between memories that are started early and waited for later: they run one after another, beside what the
    core computes meanwhile, and what is left of them when their result is needed is waited for;
  - kernels (`custom-call`), at the operations and bytes that they state (`pl.CostEstimate`);
  - instructions without an estimate, at their bytes.

Collectives are left out: `mod_star.planning.collectives` has their bytes. What comes out is a model of XLA's, not a
measurement. It serves to compare two programs that were compiled for the same chip.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from mod_star.planning.chips import Chip
from mod_star.planning.collectives import kind_of
from mod_star.planning.hlo import Computation, Instruction, Program
from mod_star.planning.program_cost import branches_of, stated_cost
from mod_star.planning.traffic import FREE, fusion_traffic, plain_traffic, started_traffic
from mod_star.planning.trips import trip_count


@dataclass(frozen=True)
class Expected:
    """What only the data decide, as it is on average."""

    trips: float = 1.0
    """Iterations of a loop whose number depends on data."""
    inner_trips: float = 1.0
    """Iterations of such a loop inside of such a loop."""
    taken: float = 1.0
    """How often a conditional takes its costliest branch; else it takes its cheapest."""


@dataclass(frozen=True)
class Cycles:
    """Cycles of one execution on one device."""

    estimated: float = 0.0
    """By XLA's estimates."""
    waited: float = 0.0
    """For copies between memories, at the peak bandwidth."""
    assumed: float = 0.0
    """Of kernels and of instructions that XLA writes no estimate beside, at the peaks."""
    by_opcode: tuple[tuple[str, float], ...] = ()
    """All of them by the instruction they are spent in, most first."""
    unknown_loops: int = 0
    """Loops whose number of iterations depends on data: counted as `Expected` says."""
    unknown_kernels: int = 0
    """Kernels that state no cost: they count as no cycles at all."""

    @property
    def total(self) -> float:
        """All together."""
        return self.estimated + self.waited + self.assumed


_EXPECTED = Expected()


def program_cycles(
    program: Program, chip: Chip, expected: Expected = _EXPECTED, computation: str | None = None
) -> Cycles | None:
    """Cycles of a program that XLA compiled for a TPU.

    Args:
      program: with its schedule, as compiled.
      chip: what it was compiled for; its `clock` must be known.
      expected: what the data decide.
      computation: the name of one of its computations, such as a loop's body, to count that alone; None: all.

    Returns:
      None where XLA writes no estimates (CPUs, GPUs) or the chip's clock isn't known.
    """
    if chip.clock is None or not _has_estimates(program):
        return None
    return _Clock(program, chip, chip.clock, expected).computation(computation or program.entry)


def costliest_loop(program: Program, chip: Chip) -> str | None:
    """Name of the body of the loop in the entry computation that takes most cycles per iteration; None: no loop."""
    entry = program.computations[program.entry]
    bodies = [i.attribute("body") or "" for i in entry.instructions.values() if i.opcode == "while"]
    clock = _Clock(program, chip, chip.clock or 1.0, _EXPECTED)
    return max(bodies, key=lambda name: clock.computation(name).total, default=None)


def _has_estimates(program: Program) -> bool:
    everything = (i for c in program.computations.values() for i in c.instructions.values())
    return any(_estimate(instruction) is not None for instruction in everything)


def _estimate(instruction: Instruction) -> float | None:
    written = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return float(written[1]) if written else None


@dataclass
class _Run:
    """One execution of a computation, as far as it has come. Instructions stand in the order they run in."""

    now: float = 0.0
    copied: float = 0.0
    """When the last copy that was started ends."""
    ends: dict[str, float] = field(default_factory=dict)
    """When each copy ends, by the instruction that started it."""
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_opcode: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def spend(self, part: str, opcode: str, cycles: float) -> None:
        self.now += cycles
        self.parts[part] += cycles
        self.by_opcode[opcode] += cycles

    def add(self, other: Cycles, times: float = 1.0) -> None:
        """Runs something else in between."""
        self.now += other.total * times
        for part in ("estimated", "waited", "assumed"):
            self.parts[part] += getattr(other, part) * times
        for opcode, cycles in other.by_opcode:
            self.by_opcode[opcode] += cycles * times
        self.parts["unknown_loops"] += other.unknown_loops
        self.parts["unknown_kernels"] += other.unknown_kernels

    def cycles(self) -> Cycles:
        """What it took."""
        spent = [(opcode, cycles) for opcode, cycles in self.by_opcode.items() if cycles]
        parts, most_first = self.parts, tuple(sorted(spent, key=lambda each: -each[1]))
        loops, kernels = int(parts["unknown_loops"]), int(parts["unknown_kernels"])
        return Cycles(parts["estimated"], parts["waited"], parts["assumed"], most_first, loops, kernels)


@dataclass
class _Clock:
    program: Program
    chip: Chip
    hertz: float
    expected: Expected
    done: dict[str, Cycles] = field(default_factory=dict)
    inside: bool = False
    """Whether what is counted now is inside of a loop whose number of iterations depends on data."""

    def computation(self, name: str) -> Cycles:
        """One run of a computation, with all that it calls."""
        if name not in self.done:
            run, computation = _Run(), self.program.computations[name]
            for instruction in computation.instructions.values():
                self._step(run, computation, instruction)
            self.done[name] = run.cycles()
        return self.done[name]

    def _step(self, run: _Run, computation: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            self._loop(run, computation, instruction)
        elif opcode == "conditional":
            ways = sorted((self.computation(name) for name in branches_of(instruction)), key=lambda each: each.total)
            run.add(ways[0], 1 - self.expected.taken)
            run.add(ways[-1], self.expected.taken)
        elif opcode == "call":
            run.add(self.computation(instruction.attribute("to_apply") or ""))
        elif opcode.endswith("-done"):
            started = instruction.operands[0]
            run.spend("waited", opcode, max(0.0, run.ends.pop(started, 0.0) - run.now))
        elif opcode.endswith("-start") and kind_of(instruction) is None:
            run.copied = max(run.now, run.copied) + self._moving(
                started_traffic(self.program, computation, instruction)
            )
            run.ends[instruction.name] = run.copied
        elif (estimate := _estimate(instruction)) is not None:
            run.spend("estimated", opcode, estimate)
        elif opcode == "custom-call":
            self._kernel(run, computation, instruction)
        elif kind_of(instruction) is None and opcode not in FREE:
            run.spend("assumed", opcode, self._moving(self._traffic(computation, instruction)))

    def _loop(self, run: _Run, computation: Computation, instruction: Instruction) -> None:
        trips = trip_count(self.program, computation, instruction)
        run.parts["unknown_loops"] += trips is None
        unknown = self.expected.inner_trips if self.inside else self.expected.trips
        count = unknown if trips is None else trips
        run.add(self.computation(instruction.attribute("condition") or ""), count + 1)
        around, self.inside = self.inside, self.inside or trips is None
        run.add(self.computation(instruction.attribute("body") or ""), count)
        self.inside = around

    def _kernel(self, run: _Run, computation: Computation, instruction: Instruction) -> None:
        if instruction.attribute("custom_call_target") != '"tpu_custom_call"':
            return  # a mark or a buffer, which computes nothing
        stated = stated_cost(computation, instruction)
        if stated is None:
            run.parts["unknown_kernels"] += 1
            return
        cycles = max(stated.flops / self.chip.flops * self.hertz, self._moving(stated.traffic))
        run.spend("assumed", instruction.opcode, cycles)

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode != "fusion":
            return plain_traffic(computation, instruction)
        computations = self.program.computations
        return fusion_traffic(
            computation, instruction, computations[instruction.attribute("calls") or ""], computations
        )

    def _moving(self, size: float) -> float:
        """Cycles to move so many bytes."""
        return size / self.chip.hbm_bandwidth * self.hertz
