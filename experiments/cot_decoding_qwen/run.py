"""CoT-decoding on a model that can do arithmetic: Qwen2.5-Coder-0.5B-Instruct on four tasks under four prompts.

    mod-star import qwen2.5-coder-0.5b-instruct-q4_k_m.gguf runs/qwen    # see docs/how-to/get_data_and_models.md
    python -m experiments.cot_decoding_qwen --minutes 40

Ten branches per question and prompt serve greedy decoding and CoT-decoding with every k up to 10 and every ranking; ten
samples serve sampling and self-consistency. Interrupted or out of time, the same command goes on from the records in
this folder; tasks and prompts take turns, so that the records are a balanced sample at any time. README.md beside this
file has the method and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from experiments.cot_decoding_qwen import year_parity
from experiments.cot_decoding_qwen.report import REPORT
from experiments.support.path_report import report
from experiments.support.paths import Asking, Part, Study, Wording, ask, settings
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.errors import InputError
from mod_star.evaluation.tasks import CustomTask

EVEN_OR_ODD = CustomTask("{question}", "{answer}", "choice", ("even", "odd"))
STUDY = Study(
    parts=(
        Part("multiarith", "multiarith.json", 200, 256),
        Part("gsm8k", "gsm8k_test.jsonl", 200, 400),
        Part("coin_flip", "coin_flip.json", 100, 256),
        Part("year_parity", year_parity.FILE, 100, 256, EVEN_OR_ODD),
    ),
    wordings={
        "plain": Wording(),
        "plain, step by step": Wording(step_by_step=True),
        "chat": Wording(None, chat=True),
        "chat, step by step": Wording(None, chat=True, step_by_step=True),
    },
    confidence=ConfidenceConfig(),
    with_texts=20,
)


@dataclass(frozen=True)
class Options(Asking):
    """Asks every question under four prompts, and reports. Interrupted or out of time, the same command goes on."""

    run: Path = Path("runs/qwen")
    """A run directory made by mod-star import."""
    out: Path = Path("experiments/cot_decoding_qwen/records")
    """Where records are kept, and gone on from."""
    tables: Path = Path("runs/cot_decoding_qwen")
    """Where tables and the picture are written."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of the model; logits, Δ and log-probabilities are float32 whatever it is."""
    questions: int = 10
    """Questions at a time, ten rows each; changes speed and memory."""


def main() -> None:
    """Asks what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_qwen")
    console = Console()
    try:
        if not options.report:
            if not (options.data / year_parity.FILE).exists():
                year_parity.write_questions(options.data)
            ask(STUDY, options, console, settings(STUDY, options))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        console.print("interrupted; what was asked is kept, the same command goes on")
    report(options.out, console, REPORT, options.tables)
