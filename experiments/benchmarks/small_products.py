"""How fast XLA:CPU multiplies blocks of attention, and how many cores it keeps busy meanwhile.

    python -m experiments.benchmarks.small_products

For blocks of several sizes it multiplies queries by turned keys in a loop, float32, head size 64, and for comparison
rows by a matrix, as a feed-forward layer does. It prints 10^9 operations per second (two per multiply-add) and seconds
of processors per second, warm, medians of nine rounds. Takes half a minute; nothing else should run beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.support.timing import in_turns
from mod_star.views.terminal import result_table

HEAD_SIZE = 64
BLOCKS = ((1, 128, 128), (2, 128, 128), (8, 128, 128), (32, 128, 128), (1, 512, 512), (1, 1024, 1024))
"""Heads, queries, keys."""
ROWS, INPUTS, OUTPUTS = 2048, 512, 1408


class Speed(NamedTuple):
    """Of one product."""

    gflops: float
    """10^9 operations per second."""
    cores: float
    """Seconds of processors per second."""


def repeated(x: jax.Array, y: jax.Array, times: int) -> Callable[[], jax.Array]:
    """A compiled loop of so many products of x and y, each of other inputs."""

    def loop(x: jax.Array, y: jax.Array) -> jax.Array:
        def once(i: jax.Array, total: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_index_in_dim(x, i % len(x), keepdims=False)
            return total + jnp.matmul(own, y, precision="highest")[..., :1, :1]

        return jax.lax.fori_loop(0, times, once, jnp.zeros((*y.shape[:-2], 1, 1)))

    program = jax.jit(loop).lower(x, y).compile()
    return lambda: program(x, y)


def measure(rounds: int = 9, operations: float = 3e9) -> dict[str, Speed]:
    """The speed of each product, named by its shapes; a round of each does about `operations`."""
    shapes = {f"{P} x ({n} x {HEAD_SIZE}) ({HEAD_SIZE} x {m})": (P, n, HEAD_SIZE, m) for P, n, m in BLOCKS}
    shapes[f"({ROWS} x {INPUTS}) ({INPUTS} x {OUTPUTS})"] = (1, ROWS, INPUTS, OUTPUTS)
    functions, done = {}, {}
    for name, (P, n, k, m) in shapes.items():
        own = 2.0 * P * n * k * m
        times = max(1, round(operations / own))
        heads = () if P == 1 else (P,)
        keys = jax.random.split(jax.random.key(0))
        x, y = jax.random.normal(keys[0], (2, *heads, n, k)), jax.random.normal(keys[1], (*heads, k, m))
        functions[name], done[name] = repeated(x, y, times), own * times
    seconds, of_processors = in_turns(functions, rounds), in_turns(functions, rounds, time.process_time)
    return {name: Speed(done[name] / seconds[name] / 1e9, of_processors[name] / seconds[name]) for name in functions}


def main() -> None:
    """Measures and prints."""
    rows = [(name, f"{speed.gflops:.0f}", f"{speed.cores:.2f}") for name, speed in measure().items()]
    Console().print(result_table("Products, float32", ["product", "GFLOP/s", "cores"], rows))


if __name__ == "__main__":
    main()
