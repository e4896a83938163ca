"""Runs of tests draw curves.png only where they are asked to: it takes a short run as long as all else that it does."""

from __future__ import annotations

import os
from pathlib import Path

from mod_star.training import session

CURVES = "MOD_STAR_TEST_CURVES"
"""The variable that asks for it."""


def draw_where_asked() -> None:
    """From now on the runs of this process, and of its forks, draw only with `CURVES` in their environment."""
    draw = session.draw_curves

    def draw_if_asked(path: Path) -> bool:
        return CURVES in os.environ and draw(path)

    session.draw_curves = draw_if_asked
