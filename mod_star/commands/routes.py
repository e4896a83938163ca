"""`mod-star routes`: shows which tokens each routed block computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options, require_writable
from mod_star.errors import InputError, require

PNG_FILE = "routes.png"


@dataclass(frozen=True)
class RoutesOptions:
    """Shows which tokens of a text each routed block of the model in RUN computes: in the terminal, and as a PNG.

    Examples:
      mod-star routes runs/first --text 'The import statement finds a module.'
      mod-star routes runs/first --text-file notes.txt --mode top_k --png notes.png
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    text: str | None = None
    """The text, at most as long as the model's context."""
    text_file: Path | None = None
    """A file to read it from, in UTF-8."""
    mode: Literal["causal", "top_k"] = "causal"
    """causal: as when sampling, no token sees a later one. top_k: as in training, among all tokens of the text."""
    png: Path | None = None
    """Where to draw the picture. RUN/routes.png if not given."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    capacity: float | None = None
    """One of the model's routing.budgets to use it at. Its routing.capacity if not given."""
    causal_rule: Literal["threshold"] | None = None
    """threshold: routed blocks compute a token if its router score is above the threshold that mod-star calibrate
    chose for the capacity. If not given by the rule that was trained (routing.causal_rule)."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(RoutesOptions, argv, "mod-star routes")) as options:
        _run(options)


def _run(options: RoutesOptions) -> None:
    if (options.text is None) == (options.text_file is None):
        raise InputError("--text: give either --text or --text-file")
    png = options.run / PNG_FILE if options.png is None else options.png
    require(png.suffix == ".png" and not png.is_dir(), "--png", str(png), "must be a file that ends with .png")

    from rich.console import Console

    from mod_star.commands.sample import with_chosen_rule
    from mod_star.data.files import read_text
    from mod_star.inspection.routes import routes_of
    from mod_star.runs.directory import load_run
    from mod_star.views.pictures import try_to_draw
    from mod_star.views.plots import plot_routes
    from mod_star.views.terminal import routes_text

    text = read_text(str(options.text_file)) if options.text is None else options.text
    loaded = load_run(options.run, options.step, capacity=options.capacity)
    if options.mode == "top_k":
        require(options.causal_rule is None, "--causal-rule", options.causal_rule, "needs --mode causal")
    loaded = with_chosen_rule(loaded, options)
    require_writable("--png", png)
    keep_compiled_programs()
    routes = routes_of(loaded, text, options.mode)
    shown = (routes.tokens, routes.routed_LxN, routes.block_names)
    console = Console(highlight=False)
    console.print(routes_text(*shown))
    if routes.overflow:
        console.print(
            f"{routes.overflow} times a token passed by because a block had no room for it (routing.headroom)"
        )
    title = f"Which tokens each routed block computed ({options.mode} routing)"
    failed = try_to_draw(png, lambda: plot_routes(png, *shown, title=title))
    if failed is None:
        console.print(f"picture: {png}", markup=False, soft_wrap=True)
    elif options.png is not None:
        sys.exit(1)  # it was asked for; what the warning says is all there is to say
