"""How exactly products of float32 operands are computed on accelerators.

Left to itself, a product of float32 operands runs in bfloat16 on a TPU and in TF32 on a GPU: 8 or 11 bits of 24.
Every product of the network therefore says what it asks for. What decides or is compared (router, predictor, mixing
head, LM head, losses) asks for the highest always; linear layers and attention for what `ModelConfig.precision` names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig

HIGHEST = jax.lax.Precision.HIGHEST


def precision_of(dtype: Any, precision: str | None = "highest") -> Any:
    """The `precision` of a product of operands of `dtype`.

    Args:
      dtype: of both operands. Products of 16-bit operands are exact in one pass, and ask for nothing.
      precision: highest, high or default, for float32; None: what `jax.default_matmul_precision` says, else highest.
    """
    if jnp.dtype(dtype).itemsize < 4:
        return jax.lax.Precision.DEFAULT
    if precision is None:
        config: Any = jax.config
        precision = config.jax_default_matmul_precision or "highest"
    return jax.lax.Precision(precision) if precision in ("highest", "high", "default") else precision


def products_of(config: ModelConfig) -> AbstractContextManager[Any]:
    """Context in which a user's part is traced: its products of float32 operands ask for `config.precision`.

    Nothing is changed where the stream is bfloat16: JAX would ask the same of 16-bit operands, which kernels written in
    Pallas don't bear. Such a part says itself what its float32 products ask for.
    """
    return jax.default_matmul_precision(config.precision) if config.dtype == "float32" else nullcontext()


def highest_products() -> AbstractContextManager[Any]:
    """Context in which every product of float32 operands asks for the highest precision unless it says otherwise."""
    return jax.default_matmul_precision("highest")
