"""A plan: what is known of a training step on a machine that is not there. `plan_training` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mod_star.config import RunConfig

if TYPE_CHECKING:
    from mod_star.planning.collectives import Collective
    from mod_star.planning.cycles import Cycles
    from mod_star.planning.memory import Memory
    from mod_star.planning.topologies import Topology


@dataclass(frozen=True)
class Floors:
    """Seconds below which a step cannot take, by what it computes, moves and sends, at the chip's published peaks."""

    flops: float
    """Matrix products at the peak of bfloat16."""
    hbm: float | None
    """Traffic to and from main memory; None where it isn't known."""
    interconnect: float | None
    """Bytes sent, over all of the chip's links at once; None where they aren't known."""

    @property
    def seconds(self) -> float:
        """The highest of them."""
        return max(self.flops, self.hbm or 0.0, self.interconnect or 0.0)


@dataclass(frozen=True)
class Plan:
    """What one training step takes. Figures are of one chip unless they say otherwise; None is not known."""

    topology: Topology
    mesh: dict[str, int]
    """Devices along each axis."""
    run: RunConfig
    """What was planned: at its final capacity, `model.vocab_size` filled in."""
    parameters: int
    """Of the model."""
    trained_parameters: int
    """Of these, how many are trained."""
    step_flops: float
    """Operations of a step on all chips together, by our own count from the configuration (`mod_star.flops`)."""
    compiled_flops: float | None
    """Operations of matrix products in the compiled program; more than a chip's share where work is done twice."""
    kernel_flops: float | None
    """Of these, what attention's kernels state, as if every query saw every key; 0: there are only plain products."""
    xla_flops: float | None
    """XLA's cost analysis of the same, elementwise work included, but with the body of each loop counted once."""
    traffic: float | None
    """Bytes between main memory and cores, estimated from the compiled program's text."""
    collectives: tuple[Collective, ...] | None
    """Communication, what sends most first."""
    unknown_loops: int
    """Loops whose number of iterations depends on data: counted once."""
    cycles: Cycles | None
    """XLA's own estimate of a step's cycles, `mod_star.planning.cycles`; None for all but TPUs."""
    memory: Memory
    """Bytes of main memory by kind."""
    fits: bool | None
    """Whether the compiler found room for it; None where that isn't known."""
    lower_seconds: float
    """Time to trace and lower the step, here."""
    compile_seconds: float | None
    """Time to compile it, here."""
    floors: Floors | None
    """None for CPUs, which have no published figures."""
    notes: tuple[str, ...]
    """What can't be known from this plan."""
    advice: tuple[str, ...]
    """What to change if it doesn't fit, the mildest first."""

    @property
    def tokens(self) -> int:
        """Tokens of text that a step consumes, on all chips together."""
        return self.run.train.batch_size * self.run.model.context

    @property
    def sent(self) -> float | None:
        """Bytes that a chip sends in a step."""
        return None if self.collectives is None else sum(each.total for each in self.collectives)

    @property
    def estimated_seconds(self) -> float | None:
        """Seconds of a step by XLA's estimate of its cycles, collectives left out."""
        chip = self.topology.chip
        if self.cycles is None or chip is None or chip.clock is None:
            return None
        return self.cycles.total / chip.clock

    @property
    def flop_share(self) -> float | None:
        """Share of the estimated time that the compiled program's operations take at the chip's peak."""
        seconds = self.estimated_seconds
        return self.floors.flops / seconds if seconds and self.floors is not None else None

    @property
    def useful(self) -> float | None:
        """Share of the compiled program's operations that our own count asks for."""
        return self.step_flops / (self.compiled_flops * self.topology.count) if self.compiled_flops else None
