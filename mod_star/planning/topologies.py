"""Machines to plan for, by name: `v5e:16x16`, `h100:8`, `cpu:8`; and their devices, which need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mod_star.errors import InputError, require
from mod_star.planning.chips import GPUS, TPUS, Chip

if TYPE_CHECKING:
    import jax

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
MOST = {"v4": 4096, "v5p": 6144}
"""Chips of the largest slice there is, for generations whose slices have three dimensions."""
CPUS = 4096


@dataclass(frozen=True)
class Topology:
    """So many chips of one kind, and how they are connected."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    shape: tuple[int, ...]
    """Chips along each dimension of a TPU slice's torus; of other machines just their number."""
    chip: Chip | None
    """Its figures; None for CPUs, of which nothing is known."""

    @property
    def count(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Reads a topology's name.

    Args:
      name: a TPU slice (`v5e:16x16`), GPUs of a node or of several (`h100:8`), or stand-ins on this machine (`cpu:8`).

    Raises:
      InputError: there is no such chip, or no slice of that shape; lists what there is.
    """
    kind, _, size = name.partition(":")
    if kind in TPUS:
        require(_is_slice(kind, size), "--topology", name, f"must be {_slices(kind)}")
        return Topology(name, "tpu", tuple(int(n) for n in size.split("x")), TPUS[kind])
    if kind in GPUS or kind == "cpu":
        count = int(size) if re.fullmatch(r"[1-9]\d{0,4}", size) else 0
        possible = count in (1, 2, 4) or count % 8 == 0 if kind in GPUS else count <= CPUS
        allowed = "1, 2, 4 or a multiple of 8" if kind in GPUS else f"from 1 to {CPUS}"
        require(count > 0 and possible, "--topology", name, f"the number after {kind}: must be {allowed}")
        return Topology(name, "gpu" if kind in GPUS else "cpu", (count,), GPUS.get(kind))
    kinds = ", ".join([*(f"{tpu}:{'4x4' if tpu not in MOST else '4x4x4'}" for tpu in TPUS), *(f"{g}:8" for g in GPUS)])
    raise InputError(f"--topology = {name!r}: must be a chip and a size, such as {kinds} or cpu:8")


def prepare_environment() -> None:
    """Keeps JAX off this machine's accelerators, and libtpu from looking for some. Call it before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing here holds a TPU that two could want
    quiet = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    absent = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, **absent}.items():
        os.environ.setdefault(variable, value)


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """The devices to compile for: a TPU slice's from libtpu; for others this machine's CPU, several times.

    Raises:
      InputError: libtpu is not installed, or JAX has already begun with fewer CPU devices.
    """
    import jax

    if topology.kind == "tpu":
        return _tpu_devices(topology)
    with contextlib.suppress(RuntimeError):  # JAX has begun already
        jax.config.update("jax_num_cpu_devices", topology.count)
    devices = jax.devices("cpu")
    if len(devices) < topology.count:
        raise InputError(
            f"--topology = {topology.name!r}: JAX has begun with {len(devices)} CPU devices in this process; "
            "plan it in a new process"
        )
    return devices[: topology.count]


def _tpu_devices(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology = {topology.name!r}: needs libtpu, the compiler for TPUs, which is not installed: "
            "pip install 'jax[tpu]' (Linux; no TPU is needed). Without it, --topology "
            f"cpu:{topology.count} shows the program as compiled for CPUs"
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as training uses them
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except Exception as error:  # whatever libtpu says
        raise InputError(f"--topology = {topology.name!r}: libtpu refuses it: {str(error).splitlines()[0]}") from error


def _is_slice(kind: str, size: str) -> bool:
    if kind not in MOST:
        return size in FLAT
    if size in DEEP:
        return True
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){2}", size):
        return False
    dimensions = [int(n) for n in size.split("x")]
    fours = all(n % 4 == 0 for n in dimensions)
    return fours and dimensions == sorted(dimensions) and math.prod(dimensions) <= MOST[kind]


def _slices(kind: str) -> str:
    if kind not in MOST:
        return f"one of {', '.join(f'{kind}:{size}' for size in FLAT)}"
    some = ", ".join(f"{kind}:{size}" for size in DEEP)
    return f"one of {some}, or {kind}:AxBxC with A <= B <= C, multiples of 4, at most {MOST[kind]} chips"
