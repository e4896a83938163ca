"""What `mod_star.model.linear` saves in the gradient of a feed-forward layer written for one sequence and vmapped.

    python -m experiments.benchmarks.linear

Compares, in turns and warm, the layer with `linear` against the same layer with `@`, at 8 sequences of 256 tokens,
width 512, hidden width 1,408, in float32; prints the medians and their ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.support.timing import in_turns
from mod_star.config import ModelConfig
from mod_star.model.layers import Params, swiglu, swiglu_init


def plain(params: Params, x_NxD: jax.Array) -> jax.Array:
    """`swiglu` with `@` instead of `linear`."""
    return (jax.nn.silu(x_NxD @ params["gate"]) * (x_NxD @ params["up"])) @ params["down"]


def gradient(layer: Callable[[Params, jax.Array], jax.Array]) -> Callable[..., tuple[Params, jax.Array]]:
    """Compiled gradient of the squared outputs of a batch, by parameters and inputs."""
    return jax.jit(jax.grad(lambda params, x: jnp.sum(jax.vmap(layer, (None, 0))(params, x) ** 2), (0, 1)))


def main() -> None:
    """Measures and prints."""
    config = ModelConfig(width=512, mlp_width=1408)
    params = swiglu_init(jax.random.key(0), config)
    x_BxSxD = jax.random.normal(jax.random.key(1), (8, 256, config.width))
    with_linear, with_matmul = gradient(swiglu), gradient(plain)
    times = in_turns(
        {"linear": lambda: with_linear(params, x_BxSxD), "@": lambda: with_matmul(params, x_BxSxD)}, rounds=15
    )
    print({name: f"{1000 * seconds:.0f} ms" for name, seconds in times.items()})
    print(f"@ over linear: {times['@'] / times['linear']:.2f}")


if __name__ == "__main__":
    main()
