"""One context of MLIR for many programs.

JAX 0.10 makes a new one, with all dialects, for every program that it lowers. That takes as long as lowering and
compiling the smallest programs together. JAX 0.12 keeps contexts itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from jax._src.interpreters import mlir

PROGRAMS = 200
"""Whatever is said in a context, constants too, stays as long as the context. So a new one comes after so many."""


def keep_contexts() -> None:
    """From now on a thread of this process lowers `PROGRAMS` programs in one context, unless JAX does so itself."""
    if not hasattr(mlir, "_thread_local_context"):
        mlir.make_ir_context = _kept(mlir.make_ir_context)


def _kept(make: Callable[[], Any]) -> Callable[[], Any]:
    mine = threading.local()

    def context() -> Any:
        if getattr(mine, "left", 0) == 0:
            mine.context, mine.left = make(), PROGRAMS
        mine.left -= 1
        return mine.context

    return context
