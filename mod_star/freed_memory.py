"""Memory that was freed and is still held for later by the C library."""

from __future__ import annotations

import ctypes
import gc


def give_back_freed_memory() -> None:
    """Collects garbage and has glibc give all free pages back to the system; another C library keeps them.

    Compiling a program takes hundreds of MB for a moment, which glibc would hold beside what is allocated next.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
