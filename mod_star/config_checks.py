"""What the fields of a configuration allow: type and range, stated at the field and checked when it is made.

    width: Annotated[int, at_least(1)] = 256

The range also appears in the field's help and on the documentation's page of all fields. Rules between fields are code.
Types are checked here and not by typeguard, which takes True for an int, NaN for a float, and no integer of NumPy's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mod_star.errors import require


@dataclass(frozen=True)
class Interval:
    """A range of numbers. A tuple is in it if each of its items is."""

    low: float
    """Lower bound."""
    high: float = math.inf
    """Upper bound; infinity: there is none."""
    has_low: bool = True
    """Whether the lower bound is in the range."""
    has_high: bool = False
    """Whether the upper bound is in the range."""
    note: str = ""
    """What a bound means, or why it is there; for errors."""

    def holds(self, value: Any) -> bool:
        """Whether a number, or each number of a tuple, is in the range."""
        numbers = value if isinstance(value, tuple) else (value,)
        over = all(self.low < number or (self.has_low and number == self.low) for number in numbers)
        return over and all(number < self.high or (self.has_high and number == self.high) for number in numbers)

    @property
    def text(self) -> str:
        """The range in words, such as "at least 1" or "in (0, 1]"."""
        if self.high == math.inf:
            return f"{'at least' if self.has_low else 'above'} {self.low:g}"
        return f"in {'[' if self.has_low else '('}{self.low:g}, {self.high:g}{']' if self.has_high else ')'}"

    @property
    def rule(self) -> str:
        """What an error says, such as "must be at least 1"."""
        note = f" ({self.note})" if self.note else ""
        return f"must {'be' if self.high == math.inf else 'lie'} {self.text}{note}"


@dataclass(frozen=True)
class NotEmpty:
    """All strings and tuples but the empty one."""

    text: str = "not empty"
    """The range in words."""
    rule: str = "must not be empty"
    """What an error says."""

    def holds(self, value: Any) -> bool:
        """Whether there is something in the value."""
        return len(value) > 0


Range = Interval | NotEmpty


def at_least(low: float, note: str = "") -> Interval:
    """Numbers from `low` on."""
    return Interval(low, note=note)


def above(low: float) -> Interval:
    """Numbers greater than `low`."""
    return Interval(low, has_low=False)


def between(low: float, high: float, ends: Literal["()", "[)", "(]", "[]"] = "()") -> Interval:
    """Numbers from `low` to `high`; a square bracket in `ends` says that this bound is in the range."""
    return Interval(low, high, has_low=ends[0] == "[", has_high=ends[1] == "]")


def check_fields(config: Any, group: str = "") -> None:
    """Checks every field's type and range: not every configuration comes by command line.

    Args:
      config: an instance of a dataclass.
      group: its name in a run, which errors put before the field's; empty for the run itself.

    Raises:
      InputError: a value is not of its field's type, or not in its field's range.
    """
    kind: type = type(config)
    ranges = field_ranges(kind)
    for name, hint in _field_types(kind).items():
        value, path = getattr(config, name), f"{group}.{name}" if group else name
        require(has_type(value, hint), path, value, f"must be {type_text(hint)}")
        if name in ranges and value is not None:
            require(ranges[name].holds(value), path, value, ranges[name].rule)


@functools.cache
def field_ranges(kind: type) -> dict[str, Range]:
    """The range of each field of a dataclass that has one; None, where the type allows it, needs to be in none."""
    hints = get_type_hints(kind, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: each for name, extras in metadata.items() for each in extras if isinstance(each, Range)}


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass, without its range."""
    return get_type_hints(kind)


def has_type(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in options
    if origin is UnionType:
        return any(has_type(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(item, options[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, Integral)
    if hint is float:
        return isinstance(value, Real) and math.isfinite(value)
    return isinstance(value, hint)


def type_text(hint: Any) -> str:
    """A field's type in words, such as "an integer or None"."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin is UnionType:
        return " or ".join(map(type_text, options))
    if origin is tuple:
        return f"a tuple, each item {type_text(options[0])}"
    words = {int: "an integer", float: "a finite number", bool: "True or False", NoneType: "None"}
    return words.get(hint, f"a {hint.__name__}")
