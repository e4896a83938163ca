"""The picture of a run's curves, without drawing it: that takes longer than a hundred steps of a tiny run.

Most tests need no more of it than that it is there. What is drawn is for tests/views to say, and for runs that
`really_drawn` is for.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mod_star.atomic_files import write_atomically
from mod_star.training import session
from mod_star.views.plots import plot_curves

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""One pixel."""


def draw_quickly() -> None:
    """From now on training sessions of this process write one pixel; it fails where a picture would."""
    vars(session)["plot_curves"] = _one_pixel


@contextlib.contextmanager
def really_drawn() -> Iterator[None]:
    """Within it they draw."""
    before = vars(session)["plot_curves"]
    vars(session)["plot_curves"] = plot_curves
    try:
        yield
    finally:
        vars(session)["plot_curves"] = before


def _one_pixel(runs: Any, path: Path) -> None:
    write_atomically(path, lambda beside: beside.write_bytes(PNG))
