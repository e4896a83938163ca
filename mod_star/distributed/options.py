"""Which devices and processes a command uses: options of commands, not fields of a run, which may go on with others.

Free of JAX, so that commands can read their options before they import it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mod_star.config_checks import require_types
from mod_star.errors import require


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; not a part of a run, which may go on with another one."""

    data: int = 0
    """Copies of the model, each with its own sequences. 0: as many as there are devices for."""
    fsdp: int = 1
    """Devices that parameters and optimizer state of a copy are cut up among; they have their own sequences too."""
    tensor: int = 1
    """Devices that every matrix product is cut up among (heads, hidden width, vocabulary)."""

    def __post_init__(self) -> None:
        require_types("mesh", self)
        require(self.data >= 0, "mesh.data", self.data, "must be 0 (all devices that are left) or positive")
        require(self.fsdp >= 1, "mesh.fsdp", self.fsdp, "must be at least 1")
        require(self.tensor >= 1, "mesh.tensor", self.tensor, "must be at least 1")


@dataclass(frozen=True)
class ProcessesConfig:
    """For machines that JAX doesn't know as a cluster; on Cloud TPU, GKE, Slurm and Open MPI nothing is needed."""

    coordinator: str | None = None
    """HOST:PORT of the first process, a free port there. None: found by JAX, or there is only one process."""
    count: int | None = None
    """How many processes there are, with a coordinator given."""
    index: int | None = None
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        require_types("processes", self)
        is_set = [value is not None for value in (self.coordinator, self.count, self.index)]
        require(
            len(set(is_set)) == 1,
            "processes",
            (self.coordinator, self.count, self.index),
            "coordinator, count and index must be given together, or none of them",
        )
        if self.coordinator is None or self.count is None or self.index is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        require(bool(host) and port.isdecimal(), "processes.coordinator", self.coordinator, "must be HOST:PORT")
        require(self.count >= 1, "processes.count", self.count, "must be at least 1")
        require(0 <= self.index < self.count, "processes.index", self.index, f"must lie in [0, {self.count})")
