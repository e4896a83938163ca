"""How often the loops of a compiled program run.

XLA for CPUs and GPUs writes it down (`known_trip_count`). XLA for TPUs doesn't: there it follows from the loop's
condition (a counter against a constant), what the counter starts at and what the body adds to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mod_star.planning.hlo import Computation, Instruction, Program

# What hands its operand on, as far as a number in it is concerned.
SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")
DEEP = 64


@dataclass(frozen=True)
class _Carried:
    """What the loop carries at `index`, plus a number."""

    index: int
    plus: int = 0


_Value = int | _Carried | None
_Places = dict[str, _Value]


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Number of iterations of a `while` instruction; None where it depends on data, or is not to be found out."""
    known = re.search(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (program.computations[loop.attribute(name) or ""] for name in ("condition", "body"))
    compared = _comparison(program, condition)
    if compared is None:
        return None
    left, right, direction = compared
    if not isinstance(left, _Carried):
        left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
    if not isinstance(left, _Carried):
        return None
    limit = right if isinstance(right, int) else _constant(program, caller, loop, body, right)
    start = _initial(program, caller, loop, left.index)
    after = _evaluate(program, body, f"{body.root.name}[{left.index}]", {})
    if limit is None or start is None or not isinstance(after, _Carried) or after.index != left.index:
        return None
    return _count(start + left.plus, limit, after.plus, direction)


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    distance = limit - start
    if not step or (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
        return None
    if direction == "NE" and (distance % step or distance // step < 0):
        return None
    return max(0, -(-distance // step))


def _comparison(program: Program, condition: Computation) -> tuple[_Value, _Value, str] | None:
    """Both sides and the direction of the comparison that a condition is."""
    places: _Places = {}
    computation, root = condition, condition.root
    while root.opcode in ("fusion", "call") or root.opcode in SAME:
        if root.opcode in SAME:
            root = computation.instructions[root.operands[0]]
            continue
        inner = program.computations[root.attribute("calls") or root.attribute("to_apply") or ""]
        places = _arguments(program, computation, root, inner, places)
        computation, root = inner, inner.root
    direction = root.attribute("direction")
    if root.opcode != "compare" or direction is None:
        return None
    left, right = (_evaluate(program, computation, name, places) for name in root.operands)
    return left, right, direction


def _arguments(
    program: Program, caller: Computation, call: Instruction, called: Computation, places: _Places
) -> _Places:
    values = [_evaluate(program, caller, name, places) for name in call.operands]
    return {parameter.name: values[number] for number, parameter in called.parameters.items()}


def _evaluate(program: Program, computation: Computation, name: str, places: _Places, deep: int = 0) -> _Value:
    """The number that an instruction results in, in a loop's body or condition; "name[i]" is a tuple's element."""
    if deep > DEEP:
        return None
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    element = int(match[2]) if match else None
    name = match[1] if match else name
    if name in places:
        return places[name]
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    again = lambda at: _evaluate(program, computation, at, places, deep + 1)  # noqa: E731
    if instruction.opcode == "constant":
        return int(instruction.text) if re.fullmatch(r"-?\d+", instruction.text) else None
    if instruction.opcode == "parameter":
        return None if element is None else _Carried(element)
    if instruction.opcode == "get-tuple-element" and element is None:
        return again(f"{instruction.operands[0]}[{instruction.attribute('index')}]")
    if instruction.opcode == "tuple" and element is not None:
        return again(instruction.operands[element])
    if instruction.opcode in SAME:
        return again(instruction.operands[0] if element is None else f"{instruction.operands[0]}[{element}]")
    if instruction.opcode in ("add", "subtract") and element is None:
        left, right = (again(operand) for operand in instruction.operands)
        return _add(left, right, 1 if instruction.opcode == "add" else -1)
    if instruction.opcode in ("fusion", "call"):
        inner = program.computations[instruction.attribute("calls") or instruction.attribute("to_apply") or ""]
        at = inner.root.name if element is None else f"{inner.root.name}[{element}]"
        return _evaluate(program, inner, at, _arguments(program, computation, instruction, inner, places), deep + 1)
    return None


def _add(left: _Value, right: _Value, sign: int) -> _Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.plus + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign > 0:
        return _Carried(right.index, right.plus + left)
    return None


def _initial(program: Program, caller: Computation, loop: Instruction, index: int) -> int | None:
    """What a loop starts with at an index, if it is a constant, be it one that outer loops hand down."""
    value = _evaluate(program, caller, f"{loop.operands[0]}[{index}]", {})
    if isinstance(value, _Carried) and not value.plus:
        for outer in program.computations.values():
            for above in outer.instructions.values():
                if above.opcode == "while" and above.attribute("body") == caller.name:
                    return _constant(program, outer, above, caller, value)
    return value if isinstance(value, int) else None


def _constant(
    program: Program, caller: Computation, loop: Instruction, body: Computation, carried: _Value
) -> int | None:
    """The number that a loop carries at an index, if no iteration changes it."""
    if not isinstance(carried, _Carried):
        return None
    after = _evaluate(program, body, f"{body.root.name}[{carried.index}]", {})
    if after != _Carried(carried.index):
        return None
    start = _initial(program, caller, loop, carried.index)
    return None if start is None else start + carried.plus
