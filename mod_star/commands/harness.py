"""`mod-star harness`: EleutherAI's lm-evaluation-harness, which can then evaluate runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mod_star.commands import keep_compiled_programs


def run(argv: Sequence[str]) -> None:
    """Runs `lm_eval` with these arguments, `--model mod_star` known. Errors are `mod_star.cli`'s to show."""
    from mod_star.evaluation.harness import register

    register()
    keep_compiled_programs()
    sys.argv = ["lm_eval", *argv]  # where it reads its arguments
    importlib.import_module("lm_eval.__main__").cli_evaluate()
