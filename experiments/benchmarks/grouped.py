"""What the products of a mixture of experts cost: `grouped_linear`, `jax.lax.ragged_dot`, and one product of all rows.

    python -m experiments.benchmarks.grouped

Compares, in turns and warm: 8,192 rows of width 256 in 8 groups of random size, hidden width 352, in float32; and
experts as a layer, forward and backward, against the dense layer of as many operations; and 64 tokens generated for one
prompt by models of 4 layers of width 512. Prints medians and ratios.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.support.timing import in_turns
from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.initial_params import init_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.grouped import grouped_linear, in_blocks, ragged
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.tokenization import ByteTokenizer


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


def decoding() -> None:
    """Tokens of a single row, which reads the weights of its own experts alone."""
    tokens, calls = 64, {}
    for name, fields in {
        "dense, hidden width 2816": {"mlp_width": 2816},
        "2 of 2 experts of 1408": {"experts": 2, "experts_width": 1408},
        "2 of 16": {"experts": 16, "experts_width": 1408},
        "2 of 16 and 16 null ones": {"experts": 16, "experts_null": 16, "experts_width": 1408},
    }.items():
        sizes: dict[str, Any] = {"vocab_size": 320, "width": 512, "layers": 4, "heads": 8, "context": 128}
        decoder = Decoder(ModelConfig(**sizes | fields), RoutingConfig(every=0))
        generator = Generator(Model(decoder, init_params(decoder, 0), ByteTokenizer(), None, None), end_ids=())
        calls[name] = generator.generate, ([[1, 2, 3]], GenerationConfig(tokens, Sampling(0)))
    _print(calls, "dense, hidden width 2816", tokens)


def _print(calls: dict[str, Any], base: str, each: int = 1) -> None:
    """Medians of each of so many results of a call, and the ratios to one of them."""
    times = in_turns({name: functools.partial(call, *operands) for name, (call, operands) in calls.items()}, rounds=9)
    for name, seconds in times.items():
        print(f"{name}: {1000 * seconds / each:.2f} ms, {seconds / times[base]:.2f} times {base}")


if __name__ == "__main__":
    products()
    layers()
    decoding()
