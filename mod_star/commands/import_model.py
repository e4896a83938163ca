"""`mod-star import`: makes a run of a pretrained model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mod_star.commands import parse_options

if TYPE_CHECKING:
    from rich.table import Table

    from mod_star.config import RunConfig
    from mod_star.pretrained.source import Source


@dataclass(frozen=True)
class ImportOptions:
    """Makes the run directory RUN of a pretrained model: Llama, Mistral, SmolLM2, Qwen2 or Qwen3.

    Examples:
      mod-star import models/SmolLM2-135M-Instruct runs/smollm2
      mod-star import SmolLM2-135M-Instruct-Q8_0.gguf runs/smollm2 --context 2048
      mod-star import HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2

    RUN can be sampled from like any run; mod-star train NEW --init-from RUN trains it on, and mod-star upcycle makes a
    Mixture-of-Depths model of it. Weights that are pickles are never loaded.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A Hugging Face directory (config.json, tokenizer.json, .safetensors), a .gguf file, or a name on the hub."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the new run: absent or empty."""
    context: int | None = None
    """Longest sequence of the run, in tokens. What the model was made for if not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products. Parameters are float32 always."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    options = parse_options(ImportOptions, argv, "mod-star import")

    import math

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from mod_star.pretrained.importing import import_model, open_source
    from mod_star.pretrained.params_run import require_free

    require_free(options.run)
    source = open_source(options.source)
    total = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    console = Console(stderr=True)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading weights", total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            if bar.tasks[task].finished:
                bar.update(task, description="writing the checkpoint")

        config = import_model(source, options.run, options.context, options.dtype, advance)
    for note in source.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    console = Console(highlight=False)
    console.print(import_table(source, config))
    console.print(f"written: {options.run}", markup=False, soft_wrap=True)


def import_table(source: Source, config: RunConfig) -> Table:
    """What was imported."""
    import math

    from mod_star.pretrained.families import FAMILIES
    from mod_star.units import short_number
    from mod_star.views.terminal import result_table

    model, tokenizer = config.model, source.tokenizer
    count = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    kinds = Counter(tensor.stored for tensor in source.tensors.values())
    extras = [f"sliding window {model.sliding_window:,}"] if model.sliding_window else []
    extras += [f"{model.rope_scaling} RoPE scaling by {model.rope_factor:g}"] if model.rope_scaling != "none" else []
    extras += ["tied embeddings"] if model.tie_embeddings else []
    heads = f"{model.heads} query and {model.key_heads} key/value heads of {model.head_size}"
    ends = ", ".join(f"{tokenizer.token_text(token)} ({token})" for token in tokenizer.end_ids)
    rows = [
        ("family", FAMILIES[source.family].title),
        ("network", f"{model.layers} layers of width {model.width:,}, {heads}, feed-forward {model.hidden_width:,}"),
        *([("", ", ".join(extras))] if extras else []),
        ("parameters", f"{short_number(count)} ({count:,}), in float32"),
        ("stored as", ", ".join(f"{number} tensors {kind}" for kind, number in kinds.most_common())),
        ("context", f"{model.context:,} of {source.config.context:,} tokens"),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids of {model.vocab_size:,}"),
        ("a text ends with", ends),
        ("chat template", "none" if tokenizer.chat_template is None else "yes"),
    ]  # fmt: skip
    table = result_table(f"Imported {source.path.name}", ("", ""), rows)
    table.columns[1].justify = "left"
    table.show_header = False
    return table
