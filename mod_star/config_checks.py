"""What the configuration's dataclasses are checked with."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mod_star.errors import require


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in options
    if origin is UnionType:
        return any(fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, options[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, Integral)
    if hint is float:
        return isinstance(value, Real) and math.isfinite(value)
    return isinstance(value, hint)


def require_types(group: str, config: object) -> None:
    """Raises InputError for a value that is not of its field's type: not every configuration comes by command line."""
    for name, hint in get_type_hints(type(config)).items():
        said = f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else getattr(hint, "__name__", hint)
        require(fits(getattr(config, name), hint), f"{group}.{name}", getattr(config, name), f"must be {said}")
