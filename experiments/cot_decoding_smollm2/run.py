"""CoT-decoding on a real model: SmolLM2-135M-Instruct on MultiArith, GSM8K and coin flips.

    mod-star import SmolLM2-135M-Instruct.gguf runs/smollm2    # see docs/how-to/get_data_and_models.md
    python -m experiments.cot_decoding_smollm2

Ten branches per question and prompt serve greedy decoding and CoT-decoding with every k up to 10 and every ranking;
ten samples serve sampling and self-consistency. Interrupted, the same command goes on; tasks and prompts take turns, so
that an early --report is balanced. README.md beside this file has the method, what was measured, and how to report on
the records that are kept in this repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from experiments.cot_decoding_smollm2.report import REPORT
from experiments.support.path_report import report
from experiments.support.paths import Asking, Part, Study, Wording, ask, settings
from mod_star.errors import InputError

STUDY = Study(
    parts=(
        Part("multiarith", "multiarith.json", 200, 128),
        Part("gsm8k", "gsm8k_test.jsonl", 200, 128),
        Part("coin_flip", "coin_flip.json", 100, 64),
    ),
    wordings={"plain": Wording(chat=True), "step by step": Wording(chat=True, step_by_step=True)},
)


@dataclass(frozen=True)
class Options(Asking):
    """Asks every question under both prompts, and reports. Interrupted, the same command goes on."""

    run: Path = Path("runs/smollm2")
    """A run directory made by mod-star import."""
    out: Path = Path("runs/cot_decoding_smollm2")
    """Where records, tables and the picture are kept."""


def main() -> None:
    """Asks what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_smollm2")
    console = Console()
    try:
        if not options.report:
            ask(STUDY, options, console, settings(STUDY, options))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        console.print("interrupted; what was asked is kept, the same command goes on")
    report(options.out, console, REPORT)
