"""Published figures of accelerators, per chip.

TPUs: Google's "System architecture" pages, docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. The inter-chip
bandwidth there is bidirectional (v5e: 400 GB/s, which older pages call 1600 Gbps); here it is what a chip can send,
over all of its links together. `usable` is what the compiler in libtpu 0.0.42 leaves to a program.

GPUs: NVIDIA's data sheets of the SXM modules, dense (not sparse) bfloat16; NVLink, one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. All figures are peaks: no program goes beyond them, and few come near."""

    name: str
    hbm: float
    """Bytes of high-bandwidth memory (HBM)."""
    usable: float
    """Bytes of it that a program may have."""
    hbm_bandwidth: float
    """Bytes per second between HBM and the cores."""
    flops: float
    """Floating-point operations per second of bfloat16 matrix products."""
    interconnect: float
    """Bytes per second that the chip can send to others of its slice or node."""
    flops_per_cycle: float | None = None
    """Operations that its matrix units do in a cycle; None where nothing is counted in cycles."""

    @property
    def clock(self) -> float | None:
        """Cycles per second."""
        return None if self.flops_per_cycle is None else self.flops / self.flops_per_cycle


MATRIX_UNIT = 2.0 * 128 * 128
"""Operations of a matrix unit of 128 x 128 in a cycle. v4 and v5p: two cores of four units each. v5e: one core of four.
v6e: four of 256 x 256."""

TPUS = {
    "v4": Chip("TPU v4", 32 * GIB, 30.75 * GIB, 1.2e12, 275e12, 300e9, 8 * MATRIX_UNIT),
    "v5e": Chip("TPU v5e", 16 * GIB, 15.75 * GIB, 819e9, 197e12, 200e9, 4 * MATRIX_UNIT),
    "v5p": Chip("TPU v5p", 96 * GIB, 95.74 * GIB, 2.765e12, 459e12, 600e9, 8 * MATRIX_UNIT),
    "v6e": Chip("TPU v6e", 32 * GIB, 31.25 * GIB, 1.64e12, 918e12, 400e9, 16 * MATRIX_UNIT),
}
GPUS = {
    "a100": Chip("A100 SXM 80 GB", 80e9, 80e9, 2.039e12, 312e12, 300e9),
    "h100": Chip("H100 SXM", 80e9, 80e9, 3.35e12, 989e12, 450e9),
    "h200": Chip("H200 SXM", 141e9, 141e9, 4.8e12, 989e12, 450e9),
}
