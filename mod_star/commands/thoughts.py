"""`mod-star thoughts`: shows what a model thinks before every token of a text, and what that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options, require_writable
from mod_star.errors import InputError, require, writing

HTML_FILE = "thoughts.html"


@dataclass(frozen=True)
class ThoughtsOptions:
    """Shows the thoughts of the model in RUN before every token of a text, and where they help: in the terminal, and as
    an HTML page in which a click on a token shows its thought.

    Examples:
      mod-star thoughts runs/thinking --text 'Q: Tom has 3 apples and buys 2 more. How many? A: 5'
      mod-star thoughts runs/thinking --text-file notes.txt --html notes.html
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    text: str | None = None
    """The text, at most as long as the model's context."""
    text_file: Path | None = None
    """A file to read it from, in UTF-8."""
    html: Path | None = None
    """Where to write the page. RUN/thoughts.html if not given."""
    temperature: float = 0.0
    """Temperature of the thoughts; 0: always their most probable token."""
    seed: int = 0
    """The same seed draws the same thoughts."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(ThoughtsOptions, argv, "mod-star thoughts")) as options:
        _run(options)


def _run(options: ThoughtsOptions) -> None:
    if (options.text is None) == (options.text_file is None):
        raise InputError("--text: give either --text or --text-file")
    page = options.run / HTML_FILE if options.html is None else options.html
    require(page.suffix == ".html" and not page.is_dir(), "--html", str(page), "must be a file that ends with .html")
    require(0 <= options.seed < 2**32, "--seed", options.seed, "must lie in [0, 2^32)")

    from rich.console import Console

    from mod_star.data.files import read_text
    from mod_star.inspection.thoughts import thoughts_of
    from mod_star.runs.directory import load_run
    from mod_star.views.thoughts import thoughts_html, thoughts_text

    text = read_text(str(options.text_file)) if options.text is None else options.text
    loaded = load_run(options.run, options.step)
    require_writable("--html", page)
    keep_compiled_programs()
    with Console(stderr=True).status("thinking"):
        thoughts = thoughts_of(loaded, text, options.temperature, options.seed)
    console = Console(highlight=False)
    console.print(thoughts_text(thoughts))
    title = f"Thoughts of {options.run.absolute().name}, step {loaded.step}"
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(thoughts_html(thoughts, title), encoding="utf-8")
    console.print(f"page: {page}", markup=False, soft_wrap=True)
