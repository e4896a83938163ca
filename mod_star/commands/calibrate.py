"""`mod-star calibrate`: chooses the entropy or expected gain above which `mod-star sample --think auto` thinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class CalibrateOptions:
    """Chooses where the model in RUN thinks, for mod-star sample --think auto.

    Examples:
      mod-star calibrate runs/thinking --share 0.1
      mod-star sample runs/thinking --prompt 'Q: 2 + 3 = ?' --think auto

    It reads the run's held-out text without thoughts and writes RUN/thinking.json. Where the model generates, its text
    may be surer or less sure than that, and the share another: mod-star sample says what it was.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    by: Literal["entropy", "decider"] = "entropy"
    """entropy: think where the prediction without a thought is least certain. decider: where the model's decider
    expects most of a thought; for a model that was trained with thinking.decider_width."""
    share: float = 0.25
    """Share of the tokens to think before, in (0, 1]; 1: all."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """accept: read the run's data although it has changed; what is held out now may have been trained on."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(CalibrateOptions, argv, "mod-star calibrate")) as options:
        _run(options)


def _run(options: CalibrateOptions) -> None:
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from mod_star.data.identity import changes, identify
    from mod_star.errors import InputError
    from mod_star.inspection.calibration import (
        calibrated,
        calibration_batches,
        require_share,
        scores,
        write_calibration,
    )
    from mod_star.runs.directory import load_run
    from mod_star.runs.stored_config import read_data

    require_share(options.share)
    loaded = load_run(options.run, options.step)
    batches = calibration_batches(loaded)
    recorded = read_data(options.run)
    changed = [] if recorded is None else changes(recorded, identify(loaded.config.data))
    if changed and options.data_changed == "refuse":
        raise InputError(
            f"data.source: the data of {options.run} has changed ({'; '.join(changed)}). What is held out now may have "
            "been trained on. Bring the old data back, or accept the new: --data-changed accept"
        )
    keep_compiled_programs()
    progress = Console(stderr=True)
    parts = track(
        scores(loaded, batches, options.by), "reading held-out text", len(batches), console=progress, transient=True,
        disable=not progress.is_terminal,
    )  # fmt: skip
    scores_N = np.concatenate(list(parts))
    calibration = calibrated(scores_N, options.share, loaded.step, options.by)
    path = write_calibration(options.run, calibration)
    console = Console(highlight=False)
    console.print(quantile_table(scores_N, options.by))
    console.print(
        f"threshold {calibration.threshold:.4g} nats, chosen by the first half of the text: {options.share:.1%} of its "
        f"tokens lie above. Of the second half, {calibration.achieved_share:.1%} do",
        soft_wrap=True,
    )
    console.print(f"written: {path}", markup=False, soft_wrap=True)


def quantile_table(scores_N: Any, by: str) -> Table:
    """The scores that given shares of the predictions lie above."""
    import numpy as np

    from mod_star.views.terminal import result_table

    rows = [(f"{share:.0%}", f"{np.quantile(scores_N, 1 - share):.3f}") for share in QUANTILES]
    title = {"entropy": "Entropy", "decider": "Gain that the decider expects"}[by]
    title += f" of {len(scores_N):,} predictions without a thought"
    return result_table(title, ("share of tokens", "above, nats"), rows)
