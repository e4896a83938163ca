"""`mod-star export`: writes a dense model as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mod_star.commands import parse_options, with_working_copy


@dataclass(frozen=True)
class ExportOptions:
    """Writes the dense model in RUN as a Hugging Face directory DIR, which transformers loads with the same logits.

    Examples:
      mod-star export runs/fine models/fine
      mod-star export runs/fine models/fine --dtype bfloat16

    Mixture-of-Depths models, thinking models and models with parts of your own have no equal there and are refused.
    README.md there is the model card: what the run's files say of the model, its training data and its evaluations.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Where to write: absent or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in the files."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    options = with_working_copy(parse_options(ExportOptions, argv, "mod-star export"))

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from mod_star.flops import parameter_count
    from mod_star.pretrained.export import export_model, require_exportable
    from mod_star.pretrained.families import FAMILIES
    from mod_star.runs.directory import load_run, require_creatable
    from mod_star.views.terminal import result_table, short_number

    require_creatable(options.directory)
    loaded = load_run(options.run, options.step)
    family = FAMILIES[require_exportable(loaded)]
    count = parameter_count(loaded.params)
    console = Console(stderr=True)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing weights", total=count)
        files = export_model(
            loaded, options.directory, options.dtype, progress=lambda done: bar.advance(task, done), run=options.run
        )
    rows = [(file.name, short_number(file.stat().st_size)) for file in files]
    console = Console(highlight=False)
    title = f"{family.architecture}, {short_number(count)} parameters in {options.dtype}, of step {loaded.step}"
    console.print(title, soft_wrap=True)
    console.print(result_table("", ("file", "bytes"), rows))
    console.print(f"written: {options.directory}", markup=False, soft_wrap=True)
