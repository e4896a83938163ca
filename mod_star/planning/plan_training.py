"""Planning: compiles a training step for a machine that is not there, and compares it with that machine's figures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from mod_star.config import MeshConfig, RunConfig
from mod_star.distributed.sharding import make_mesh, require_fits
from mod_star.errors import require
from mod_star.flops import parameter_count, training_step_flops
from mod_star.model import Decoder
from mod_star.parts import load_parts
from mod_star.planning.advice import advice
from mod_star.planning.cycles import program_cycles
from mod_star.planning.hlo import parse
from mod_star.planning.memory import Memory, arguments, memory_of, share_bytes
from mod_star.planning.plan import Floors, Plan
from mod_star.planning.program_cost import Cost, program_cost
from mod_star.planning.topologies import Topology, devices_of
from mod_star.stages import plan_stages
from mod_star.tokenization import ByteTokenizer, load_tokenizer
from mod_star.trainable import trained_part
from mod_star.training.lowering import lower_train_step, state_shapes

Watch = Callable[[str], AbstractContextManager[Any]]


def plan_training(run: RunConfig, topology: Topology, mesh: MeshConfig, watch: Watch | None = None) -> Plan:
    """Lowers and, for TPUs and CPUs, compiles a run's training step for a topology, and reads what it takes.

    `mod_star.planning.topologies.prepare_environment` must have been called before JAX was imported.

    Args:
      run: what to train. With capacities in stages, the last stage is planned; with lengths of thoughts
        in stages the first, which needs the most memory.
      topology: the machine.
      mesh: how its chips are arranged.
      watch: context manager that shows what is being done, given its name; None: nothing is shown.

    Raises:
      InputError: a field, the topology or the mesh is out of its range, or they don't fit together.
    """
    watch = watch or (lambda name: nullcontext())
    parts = load_parts(run.parts)
    run, steps = _runnable(run)
    devices = make_mesh(mesh, devices_of(topology))
    require_fits(run, devices)
    decoder = Decoder(run.model, run.routing, parts)
    state = state_shapes(decoder, run, ByteTokenizer(), steps, devices)
    timer = _Timer()
    with watch("tracing"), timer:
        lowered = lower_train_step(
            decoder, run, steps, state, devices, platforms=("cuda",) if topology.kind == "gpu" else None
        )
    unfinished = _Unfinished(topology, devices, run, state, timer.seconds)
    if topology.kind == "gpu":
        return unfinished.lowered_only()  # that it could be lowered shows that every operation has a form for CUDA
    with watch(f"compiling for {topology.name}"), timer:
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return unfinished.too_large(str(error))
    return unfinished.compiled(compiled, timer.seconds)


def _runnable(run: RunConfig) -> tuple[RunConfig, int]:
    """The run as it is compiled, and its number of steps."""
    if run.model.vocab_size == 0:
        tokenizer = load_tokenizer(run.data.tokenizer)
        run = replace(run, model=replace(run.model, vocab_size=64 * math.ceil(tokenizer.vocab_size / 64)))
    if run.thinks:
        least = ByteTokenizer().vocab_size  # which spells the texts that <start> and <end> begin as
        require(run.model.vocab_size >= least, "model.vocab_size", run.model.vocab_size, f"must be at least {least}")
    stages = plan_stages(run)
    last = stages.evaluated(stages.steps)[0]
    return (stages.stages[0] if stages.changes == "thought_length" else last).run, stages.steps


class _Timer:
    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True)
class _Unfinished:
    """What is known before compilation."""

    topology: Topology
    mesh: Mesh
    run: RunConfig
    state: Any
    lower_seconds: float

    def compiled(self, compiled: jax.stages.Compiled, seconds: float) -> Plan:
        """The plan of a program that was compiled."""
        program, chip = parse(compiled.as_text() or ""), self.topology.chip
        cost, cycles = program_cost(program), None if chip is None else program_cycles(program, chip)
        memory = memory_of(compiled.memory_analysis(), self._arguments(), cost.activations)
        analysis: Any = compiled.cost_analysis()
        fits = None if chip is None else True  # else the compiler would have stopped
        plan = self._plan(memory, fits, cost, seconds, float(analysis["flops"]) if analysis else None)
        return replace(plan, cycles=cycles)

    def too_large(self, message: str) -> Plan:
        """The plan of a program that the compiler found no room for; the message says how much it needed."""
        needed = bytes_needed(message)
        memory = self._arguments()
        rest = None if needed is None else max(0.0, needed - memory.total)
        memory = replace(memory, temporaries=rest)
        return self._plan(memory, False, None, None, None, (f"the compiler stopped: {message.splitlines()[0]}",))

    def lowered_only(self) -> Plan:
        """The plan of a program that only a GPU's own compiler could compile."""
        memory = self._arguments()
        notes = [
            "the step was lowered for CUDA, not compiled: activations, temporaries, collectives and memory traffic "
            "are known only to XLA's compiler for GPUs, which needs one. The memory above is what the training state, "
            "the batch and a gradient take: a lower bound",
            f"--topology cpu:{self.topology.count} with the same mesh shows the collectives that the partitioner "
            "puts in, which is the same for all platforms",
        ]
        if self.topology.count > 8:
            notes.append("between nodes of 8 GPUs the network is slower than NVLink, and sets the time")
        memory = replace(memory, temporaries=share_bytes(self._trained()))
        chip = self.topology.chip
        fits = False if chip is not None and memory.total > chip.usable else None
        return self._plan(memory, fits, None, None, None, tuple(notes))

    def _trained(self) -> Any:
        """Shapes and places of what is trained, and so of a gradient."""
        return trained_part(self.run, self.state.params)

    def _arguments(self) -> Memory:
        return arguments(self.state, self.run, self.mesh)

    def _plan(
        self, memory: Memory, fits: bool | None, cost: Cost | None, seconds: float | None, xla_flops: float | None,
        notes: tuple[str, ...] = (),
    ) -> Plan:  # fmt: skip
        flops = training_step_flops(self.run)
        plan = Plan(
            topology=self.topology,
            mesh=dict(self.mesh.shape),
            run=self.run,
            parameters=parameter_count(self.state.params),
            trained_parameters=parameter_count(self._trained()),
            step_flops=flops,
            compiled_flops=None if cost is None else cost.flops,
            kernel_flops=None if cost is None else cost.kernel_flops,
            xla_flops=xla_flops,
            traffic=None if cost is None else cost.traffic,
            collectives=None if cost is None else cost.collectives,
            unknown_loops=0 if cost is None else cost.unknown_loops,
            cycles=None,
            memory=memory,
            fits=fits,
            lower_seconds=self.lower_seconds,
            compile_seconds=seconds,
            floors=None,
            notes=(*notes, *_notes(self.topology, self.run, cost)),
            advice=(),
        )
        plan = replace(plan, floors=_floors(plan))
        return plan if fits is not False else replace(plan, advice=advice(plan))


def _floors(plan: Plan) -> Floors | None:
    chip = plan.topology.chip
    if chip is None:
        return None
    flops = plan.step_flops / plan.topology.count if plan.compiled_flops is None else plan.compiled_flops
    hbm = None if plan.traffic is None else plan.traffic / chip.hbm_bandwidth
    sent = None if plan.sent is None else plan.sent / chip.interconnect
    return Floors(flops / chip.flops, hbm, sent)


def _notes(topology: Topology, run: RunConfig, cost: Cost | None) -> Iterator[str]:
    if topology.kind == "cpu":
        yield (
            "compiled for CPUs: memory and collectives show how the work is shared out. A TPU or a GPU "
            "takes other temporaries, so that bytes are approximate"
        )
    if topology.kind != "tpu":
        yield "there is no estimate of a step's cycles: XLA makes one for TPUs alone"
    if topology.chip is not None and run.model.dtype == "float32":
        yield "the time floor by FLOPs is for bfloat16 products; those of model.dtype = 'float32' take longer"
    if cost is not None and cost.unknown_loops:
        yield (
            f"{cost.unknown_loops} loops run as often as the data asks for (routed tokens, experts): they are "
            "counted as running once, so FLOPs, traffic and collectives are lower bounds"
        )


def bytes_needed(message: str) -> float | None:
    """Bytes that XLA's message of a program that is too large says it needs; None if it doesn't say."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (rf"Used {number} of", rf"required[^()]*\({number}\)", rf"[Aa]llocat\w* {number}"):
        if match := re.search(pattern, message):
            return float(match[1]) * units[match[2]]
    return None
