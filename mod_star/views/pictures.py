"""How pictures are drawn: by matplotlib as shipped, on Agg, in any environment. A failure costs only the picture.

The environment is `MPLBACKEND`, a matplotlibrc, a directory for its settings that can't be written. Nothing here
imports `matplotlib.pyplot`, and what is set for a picture is set back after it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mod_star.atomic_files import write_atomically

Args = ParamSpec("Args")
Result = TypeVar("Result")


def as_shipped(draw: Callable[Args, Result]) -> Callable[Args, Result]:
    """Makes a function draw with matplotlib's own defaults, not with those of the user's matplotlibrc."""

    @functools.wraps(draw)
    def drawing(*args: Args.args, **options: Args.kwargs) -> Result:
        _import_matplotlib()
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **options)

    return drawing


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Writes a `matplotlib.figure.Figure` into a file, all of it or nothing; its directory is made if absent.

    Args:
      figure: the figure.
      path: the file; its ending names the format.
      options: of `Figure.savefig`.

    Raises:
      OSError: the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # makes itself the figure's canvas
    write_atomically(
        path, lambda beside: figure.savefig(beside, format=path.suffix.removeprefix(".") or "png", **options)
    )


def try_to_draw(path: str | Path, draw: Callable[[], None]) -> str | None:
    """Draws a picture, or prints a line of warning on standard error.

    Args:
      path: the picture's file, for the warning.
      draw: draws it.

    Returns:
      None, or why there is no picture: one line, which is what was printed after "warning: ".
    """
    try:
        draw()
    except Exception as error:  # whatever it is, the results don't depend on a picture
        where, what = f"{path}: cannot be drawn", str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            what = error.strerror
        reason = f"{where}: {' '.join(what.split())[:200]}"
        print(f"warning: {reason}", file=sys.stderr, flush=True)
        return reason
    return None


def _import_matplotlib() -> None:
    """Imports matplotlib, which refuses to be imported where `MPLBACKEND` names a backend that isn't installed.

    Where it is installed, `matplotlib.pyplot` will have it, as ever.
    """
    if "matplotlib" in sys.modules:
        return
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a temporary directory of settings is no news
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
