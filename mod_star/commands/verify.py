"""`mod-star verify`: compares every file of a run's checkpoints with its checksum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mod_star.commands import on_working_copy, parse_options
from mod_star.errors import InputError


@dataclass(frozen=True)
class VerifyOptions:
    """Reads every file of RUN's checkpoints and compares it with the checksum that was written beside it.

    Example:
      mod-star verify runs/first

    Other commands compare what they read themselves: to sample, the parameters; to go on training, everything. The exit
    code is 0 if every checkpoint is whole, else 2.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(VerifyOptions, argv, "mod-star verify")) as options:
        _run(options)


def _run(options: VerifyOptions) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from mod_star.runs.buckets import checkpoints_of
    from mod_star.runs.checkpoints import saved_steps
    from mod_star.runs.integrity import checkpoint_bytes, damages, has_checksums
    from mod_star.runs.stored_config import read_config
    from mod_star.storage import is_address
    from mod_star.units import short_number
    from mod_star.views.terminal import result_table

    read_config(options.run)
    directory = checkpoints_of(options.run)
    paths = {step: directory / str(step) for step in saved_steps(directory)}
    if not paths:
        raise InputError(f"{options.run}: has no checkpoint yet")
    sizes = {step: None if is_address(path) else checkpoint_bytes(path) for step, path in paths.items()}
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    rows: list[tuple[str, str | None, str]] = []
    damaged: dict[int, list[str]] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=sum(size or 0 for size in sizes.values()))
        for step, path in paths.items():
            progress.update(task, description=f"checkpoint {step}")
            damage_here = list(damages(path, read=lambda count: progress.advance(task, count)))
            if not path.exists():
                state = "deleted meanwhile"  # by a training that goes on
            elif damage_here:
                state = "damaged"
                damaged[step] = damage_here
            else:
                state = "whole" if has_checksums(path) else "not read, no checksums"
            size = sizes[step]
            rows.append((str(step), None if size is None else f"{short_number(size)}B", state))
    table = result_table("", ("checkpoint", "size", "files"), rows)
    table.columns[-1].justify = "left"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for step, damage_here in damaged.items():
        for damage in damage_here:
            console.print(f"checkpoint {step}: {damage}")
    if damaged:
        which = f"checkpoint{'s' * (len(damaged) > 1)} {', '.join(map(str, damaged))}"
        raise InputError(f"{options.run}: {which} of {len(rows)} {'are' if len(damaged) > 1 else 'is'} damaged")
