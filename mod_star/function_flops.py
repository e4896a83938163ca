"""Floating-point operations of any JAX function, from its shapes: XLA's count, with loops counted as often as they run.

XLA's analysis of a lowered program counts the body of a loop once, and a call of something that isn't XLA's own not at
all. The first is made good from the function's jaxpr, where a `scan` says how often it runs; what can't be is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from mod_star.errors import InputError
from mod_star.model.attention_primitive import attention_flops, attention_p, gradient_p

OPAQUE = ("pallas_call", "pure_callback", "io_callback", "ffi_call")
LINEAR_ALGEBRA = (
    "cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product", "lu", "qr",
    "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve",
)  # fmt: skip
UNKNOWN = {
    "while": "jax.lax.while_loop, which runs an unknown number of times (jax.lax.scan and jax.lax.fori_loop with fixed "
    "bounds are counted)",
    **{name: f"{name}, which XLA does not look into" for name in OPAQUE},
    **{name: f"{name} of jax.lax.linalg, which XLA does not count" for name in LINEAR_ALGEBRA},
}
"""Primitives whose operations nobody can tell, and how an error calls them."""


def function_flops(name: str, function: Callable[..., Any], *shapes: Any) -> float:
    """Operations of one call; elementwise ones included, of a `cond` those of its costliest branch.

    Args:
      name: what an error calls the function.
      function: any.
      shapes: its arguments, as pytrees of `jax.ShapeDtypeStruct`.

    Raises:
      InputError: it calls something whose operations can't be counted.
    """
    closed = jax.make_jaxpr(function)(*shapes)
    if unknown := next(_unknown(closed), None):
        said = UNKNOWN[unknown]
        raise InputError(
            f"{name}: its FLOPs cannot be counted, because it calls {said}; give them as Part(init, apply, flops=...)"
        )
    return _once(function, *shapes) + _missed(closed)


def _once(function: Callable[..., Any], *shapes: Any) -> float:
    """XLA's count, which takes the body of a loop once."""
    analysis: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(analysis.get("flops", 0.0))  # no entry where there is nothing to count


def _missed(jaxpr: Any) -> float:
    """What XLA's count of a jaxpr leaves out: all but the first run of every loop."""
    missed = 0.0
    for equation in _used(jaxpr):
        name, inner = equation.primitive.name, list(_inner(equation.params.values()))
        if equation.primitive in (attention_p, gradient_p):  # in blocks, on a CPU: loops
            whole = attention_flops(
                equation.primitive, _shapes(v.aval for v in equation.invars), equation.params["count"]
            )
            missed += max(0.0, whole - _once_of(equation))
        elif name == "scan":
            missed += equation.params["length"] * _whole(equation.params["jaxpr"]) - _once_of(equation)
        elif name != "cond":
            missed += sum(map(_missed, inner))
        elif any(map(_missed, inner)):
            missed += max(map(_whole, inner)) - _once_of(equation)
    return missed


def _whole(closed: Any) -> float:
    """Operations of a closed jaxpr, loops included."""
    return _once(jaxpr_as_fun(closed), *_shapes(closed.in_avals)) + _missed(closed)


def _once_of(equation: Any) -> float:
    """XLA's count of one equation."""
    bind = lambda *values: equation.primitive.bind(*values, **equation.params)  # noqa: E731
    return _once(bind, *_shapes(variable.aval for variable in equation.invars))


def _shapes(avals: Iterable[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


def _unknown(jaxpr: Any) -> Iterator[str]:
    """Names of the primitives in `UNKNOWN` that are called, however deep."""
    for equation in _used(jaxpr):
        if equation.primitive.name in UNKNOWN:
            yield equation.primitive.name
        else:
            for inner in _inner(equation.params.values()):
                yield from _unknown(inner)


def _used(jaxpr: Any) -> list[Any]:
    """The equations whose results are used; the others `jax.jit` leaves out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    needed, used = {id(variable) for variable in jaxpr.outvars}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            used.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return used[::-1]


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)
