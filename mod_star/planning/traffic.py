"""Bytes that instructions of a compiled program read from and write to a device's main memory.

What lies in another memory space (a TPU's VMEM) costs nothing here. Of an array that is sliced or updated in place,
only the slice counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mod_star.planning.collectives import operand_arrays
from mod_star.planning.hlo import Array, Computation, Instruction, Program, leaves

NO_TRAFFIC = 0.0

# They move nothing: names for what is there, or ends of what was started (and counted) before.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain", "add-dependency",
)  # fmt: skip
SLICING = ("dynamic-slice", "slice", "gather")


def bytes_of(arrays: list[Array]) -> float:
    """Bytes of those that lie in main memory."""
    return float(sum(a.bytes for a in arrays if a.in_hbm))


def plain_traffic(computation: Computation, instruction: Instruction) -> float:
    """Traffic of an instruction that is no fusion and calls nothing."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return NO_TRAFFIC
    read = [a for name in instruction.operands for a in operand_arrays(computation, name)]
    written = _results(instruction)
    kind = instruction.opcode.removesuffix("-start")
    if kind in SLICING:
        whole = operand_arrays(computation, instruction.operands[0])
        return _moved(written, whole) + bytes_of(written)
    if kind == "dynamic-update-slice":
        whole, update = (operand_arrays(computation, name) for name in instruction.operands[:2])
        return bytes_of(update) + _moved(update, whole)
    return bytes_of(read) + bytes_of(written)


def started_traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Traffic of a copy or a slice that an instruction starts, of which another one awaits the end."""
    called = program.computations.get(instruction.attribute("calls") or "")
    return plain_traffic(computation, instruction) if called is None else plain_traffic(called, called.root)


def _results(instruction: Instruction) -> list[Array]:
    """What an instruction writes; the type of one that starts something holds its operands as well."""
    kind, opcode = instruction.kind, instruction.opcode
    if not opcode.endswith("-start") or opcode == "all-reduce-start" or not isinstance(kind, tuple) or len(kind) < 2:
        return instruction.arrays
    return list(leaves(kind[0 if opcode == "copy-start" else 1]))


def _moved(part: list[Array], whole: list[Array]) -> float:
    """Bytes of a part of an array that lies in main memory."""
    return float(sum(a.bytes for a in part)) if any(a.in_hbm for a in whole) else 0.0


def fusion_traffic(
    computation: Computation, instruction: Instruction, inner: Computation, computations: Mapping[str, Computation]
) -> float:
    """Traffic of a fusion: its operands and results, but for what is only sliced, updated in place or handed on.

    Args:
      computation: that the fusion is in.
      instruction: the fusion.
      inner: what it computes.
      computations: of the program, by name, for fusions inside fusions.
    """
    handed_on, results_handed_on = _aliased(instruction)
    traffic = 0.0
    for number, parameter in inner.parameters.items():
        if number not in handed_on and number < len(instruction.operands):
            whole = operand_arrays(computation, instruction.operands[number])
            traffic += min(bytes_of(whole), _read(parameter, inner, bytes_of(whole), computations))
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands if name in inner.instructions]
    parts = instruction.kind if isinstance(instruction.kind, tuple) else (instruction.kind,)
    for number, (root, kind) in enumerate(zip(roots, parts, strict=False)):
        if isinstance(kind, Array) and kind.in_hbm and number not in results_handed_on:
            traffic += _written(root, inner, kind)
    return traffic


def _aliased(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Numbers of the operands and of the results that are one buffer, which a fusion hands on untouched."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", listed[1]) if listed else []
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _read(value: Instruction, inner: Computation, whole: float, computations: Mapping[str, Computation]) -> float:
    """Bytes that are read of a fusion's operand, also by fusions inside it."""
    read = 0.0
    for user in inner.instructions.values():
        if value.name not in user.operands:
            continue
        if user.opcode in ("bitcast", "reshape", "copy") and not user.is_root:
            read += _read(user, inner, whole, computations)
        elif user.opcode in SLICING and user.operands[0] == value.name:
            read += float(sum(a.bytes for a in user.arrays))
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            read += 0.0
        elif user.opcode == "fusion":
            nested = computations[user.attribute("calls") or ""]
            places = [number for number, name in enumerate(user.operands) if name == value.name]
            read += sum(_read(nested.parameters[number], nested, whole, computations) for number in places)
        else:
            return whole
    return read


def _written(root: Instruction, inner: Computation, kind: Array) -> float:
    """Bytes that are written of a fusion's result."""
    root = inner.viewed(root)
    if root.opcode == "dynamic-update-slice":
        return float(sum(a.bytes for a in operand_arrays(inner, root.operands[1])))
    return float(kind.bytes)
