"""What the products of a mixture of experts cost: `grouped_linear`, `jax.lax.ragged_dot`, and one product of all rows.

    python -m experiments.benchmarks.grouped

Compares, in turns and warm: 8,192 rows of width 256 in 8 groups of random size, hidden width 352, in float32; and
experts as a layer, forward and backward, against the dense layer of as many operations. Prints medians and ratios.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.support.timing import in_turns
from mod_star.config import ModelConfig
from mod_star.model.grouped import grouped_linear, in_blocks, ragged
from mod_star.model.parts import DEFAULT_PARTS


def products() -> None:
    """The product alone."""
    x, weights = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((8192, 256), (8, 256, 352))))
    group = jax.random.categorical(jax.random.key(2), jnp.linspace(0, 1, 8), shape=(8192,)).astype(jnp.int32)
    ways = {"one product": lambda x, weights, _: x @ weights[0], "grouped_linear": grouped_linear}
    for name, way in (("in blocks", in_blocks), ("ragged_dot", ragged)):
        ways[name] = lambda *arrays, way=way: way(*arrays, transposed=False, precision=jax.lax.Precision.HIGHEST)
    _print({name: (jax.jit(way), (x, weights, group)) for name, way in ways.items()}, "one product")


def layers() -> None:
    """A layer and its gradient, vmapped over 16 sequences of 256 tokens."""
    x_BxSxD, calls = jax.random.normal(jax.random.key(1), (16, 256, 256)), {}
    for name, experts in (("dense", 0), ("8 experts, 2 active", 8)):
        config = ModelConfig(width=256, mlp_width=704, experts=experts)
        part = DEFAULT_PARTS.feed_forward_of(config)

        def loss(params: Any, x: jax.Array, part: Any = part) -> jax.Array:
            results = jax.vmap(part.apply, (None, 0))(params, x)
            return jnp.sum((results[0] if isinstance(results, tuple) else results) ** 2)

        calls[name] = jax.jit(jax.grad(loss, (0, 1))), (part.init(jax.random.key(0), config), x_BxSxD)
    _print(calls, "dense")


def _print(calls: dict[str, Any], base: str) -> None:
    """Medians, and the ratios to one of them."""
    times = in_turns({name: functools.partial(call, *operands) for name, (call, operands) in calls.items()}, rounds=9)
    for name, seconds in times.items():
        print(f"{name}: {1000 * seconds:.1f} ms, {seconds / times[base]:.2f} times {base}")


if __name__ == "__main__":
    products()
    layers()
