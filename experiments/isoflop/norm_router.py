"""A router that has nothing to learn: a token's score is the norm of its stream. A `Parts` to load with `parts`."""

from __future__ import annotations

import jax.numpy as jnp

from mod_star.parts import Part, Parts

parts = Parts(router=Part(lambda key, config: {}, lambda params, x_SxD: jnp.linalg.norm(x_SxD, axis=-1)))
