"""`mod-star upcycle`: makes a dense model a Mixture-of-Depths model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options

if TYPE_CHECKING:
    from rich.table import Table

    from mod_star.config import RunConfig
    from mod_star.pretrained.upcycle import Skipping


@dataclass(frozen=True)
class UpcycleOptions:
    """Makes the dense model in RUN a Mixture-of-Depths model, as a new run RUN2.

    Examples:
      mod-star upcycle runs/dense runs/upcycled --capacity 0.125
      mod-star train runs/mod --init-from runs/upcycled --optimizer.learning-rate 1e-4
      mod-star upcycle runs/dense runs/kept --capacity 0.25 --every 3 --text 'notes/*.txt' --blocks least-changed
        --keep-key-values --adapter-rank 32

    RUN2 computes what RUN computes: its routed blocks take every token, until training lowers their capacity in stages
    (1, then halved, in the first half of the steps), which the second command does. --routing.stages and
    --routing.stage-fraction set another plan there. With a text, the third command, RUN2 starts at the capacity at
    once: its routers and adapters are fitted to what the blocks of RUN do to the text.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the dense run."""
    run2: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN2")]
    """Directory of the new run: absent or empty."""
    capacity: float
    """Share of the tokens that routed blocks are to compute in the end, in (0, 1]."""
    every: int = 2
    """Every n-th block is routed; a divisor of the number of blocks."""
    blocks: Literal["last", "least-changed"] = "last"
    """Which block of each n. last: the last one. least-changed: of the places that leave out the first and the last
    block of the model, the one whose blocks change the text the least (1 - cos of input and output)."""
    keep_key_values: bool = False
    """Tokens that pass by a routed block still give keys and values in it."""
    adapter_rank: int = 0
    """Rank of a linear map that stands in for a routed block where tokens pass by; 0: none."""
    text: tuple[str, ...] = ()
    """Text to fit routers and adapters to: files, patterns or names as for data.source. None: they start at zero."""
    template: str | None = None
    """What makes a text of a record, as data.template, if the text is of records. That of RUN if not given."""
    tokens: int = 8192
    """Tokens of the text to read."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(UpcycleOptions, argv, "mod-star upcycle")) as options:
        _run(options)


def _run(options: UpcycleOptions) -> None:
    from rich.console import Console

    from mod_star.pretrained.upcycle import upcycle

    keep_compiled_programs()
    config = upcycle(options.run, options.run2, options.capacity, options.every, options.step, skipping_of(options))
    console = Console(highlight=False)
    console.print(stage_table(config))
    console.print(
        f"written: {options.run2}. Train it with: mod-star train NEW --init-from {options.run2}",
        markup=False,
        soft_wrap=True,
    )


def skipping_of(options: UpcycleOptions) -> Skipping:
    """What the options say of tokens that pass by; the text is read as data of the dense run."""
    from dataclasses import replace

    from mod_star.pretrained.upcycle import Skipping
    from mod_star.runs.directory import read_config

    text = None
    if options.text:
        text = replace(read_config(options.run).data, source=options.text, weights=())
        text = text if options.template is None else replace(text, template=options.template)
    return Skipping(options.blocks, options.keep_key_values, options.adapter_rank, text, options.tokens)


def stage_table(run: RunConfig) -> Table:
    """The capacities that training will go through, and what a forward pass costs at each."""
    from dataclasses import replace

    from mod_star.flops import forward_flops
    from mod_star.parts import load_parts
    from mod_star.presets import dense
    from mod_star.stages import stage_configs
    from mod_star.units import short_number
    from mod_star.views.terminal import result_table

    tokens, parts = run.model.context, load_parts(run.parts)
    cost = lambda at: forward_flops(at.model, at.routing, tokens, parts).total / tokens  # noqa: E731
    dense_cost = cost(dense(replace(run, routing=replace(run.routing, stages=()))))
    configs = stage_configs(run)
    share = run.routing.stage_fraction / max(1, len(configs) - 1)
    shares = [share] * (len(configs) - 1) + [1 - share * (len(configs) - 1)]
    rows = [
        (f"{at.routing.capacity:.2%}", f"{part:.1%}", short_number(cost(at)), f"{cost(at) / dense_cost:.1%}")
        for at, part in zip(configs, shares, strict=True)
    ]
    routed = run.model.layers // run.routing.every
    title = f"{routed} of {run.model.layers} blocks are routed"
    title += "; training lowers their capacity" if run.routing.stages else ""
    return result_table(title, ("capacity", "of the steps", "FLOP per token, forward", "of the dense model's"), rows)
