"""`mod-star calibrate`: chooses thresholds on held-out text, above which a model thinks, or routed blocks compute."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options
from mod_star.errors import InputError, require

if TYPE_CHECKING:
    from rich.table import Table

    from mod_star.inspection.routing_calibration import RoutingCalibration
    from mod_star.runs.directory import LoadedRun

DEFAULT_SHARE = 0.25
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class CalibrateOptions:
    """Chooses where the model in RUN thinks, for --think auto, or what its routed blocks compute, for --causal-rule.

    Examples:
      mod-star calibrate runs/thinking --share 0.1
      mod-star sample runs/thinking --prompt 'Q: 2 + 3 = ?' --think auto
      mod-star calibrate runs/any --what routing
      mod-star sample runs/any --prompt 'Q: 2 + 3 = ?' --capacity 0.25 --causal-rule threshold

    It reads the run's held-out text without thoughts and writes RUN/thinking.json. Where the model generates, its text
    may be surer or less sure than that, and the share another: mod-star sample says what it was. With --what routing it
    writes RUN/routing.json: for each of the model's capacities, the router score above which each block computes.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    what: Literal["thinking", "routing"] = "thinking"
    """thinking: before which tokens to think. routing: which tokens routed blocks compute."""
    by: Literal["entropy", "decider"] | None = None
    """entropy: think where the prediction without a thought is least certain. decider: where the model's decider
    expects most of a thought; for a model that was trained with thinking.decider_width. If not given entropy."""
    share: float | None = None
    """Share of the tokens to think before, in (0, 1]; 1: all. If not given 0.25."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """accept: read the run's data although it has changed; what is held out now may have been trained on."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(CalibrateOptions, argv, "mod-star calibrate")) as options:
        _run(options)


def _run(options: CalibrateOptions) -> None:
    share = DEFAULT_SHARE if options.share is None else options.share
    if options.what == "routing":
        for name in ("by", "share"):
            value = getattr(options, name)
            require(value is None, f"--{name}", value, "cannot be combined with --what routing")

    from mod_star.inspection.calibration import require_share
    from mod_star.runs.directory import load_run

    require_share(share)
    loaded = load_run(options.run, options.step)
    if options.what == "routing":
        _calibrate_routing(options, loaded)
    else:
        _calibrate_thinking(options, loaded, share)


def _require_same_data(options: CalibrateOptions, loaded: LoadedRun) -> None:
    """Raises InputError if the run's data has changed, unless that was accepted."""
    from mod_star.data.identity import changes, identify
    from mod_star.runs.stored_config import read_data

    recorded = read_data(options.run)
    changed = [] if recorded is None else changes(recorded, identify(loaded.config.data))
    if changed and options.data_changed == "refuse":
        raise InputError(
            f"data.source: the data of {options.run} has changed ({'; '.join(changed)}). What is held out now may have "
            "been trained on. Bring the old data back, or accept the new: --data-changed accept"
        )


def _calibrate_thinking(options: CalibrateOptions, loaded: LoadedRun, share: float) -> None:
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from mod_star.inspection.calibration import calibrated, calibration_batches, scores, write_calibration

    by = options.by or "entropy"
    batches = calibration_batches(loaded)
    _require_same_data(options, loaded)
    keep_compiled_programs()
    progress = Console(stderr=True)
    parts = track(
        scores(loaded, batches, by), "reading held-out text", len(batches), console=progress, transient=True,
        disable=not progress.is_terminal,
    )  # fmt: skip
    scores_N = np.concatenate(list(parts))
    calibration = calibrated(scores_N, share, loaded.step, by)
    path = write_calibration(options.run, calibration)
    console = Console(highlight=False)
    console.print(quantile_table(scores_N, by))
    console.print(
        f"threshold {calibration.threshold:.4g} nats, chosen by the first half of the text: {share:.1%} of its "
        f"tokens lie above. Of the second half, {calibration.achieved_share:.1%} do",
        soft_wrap=True,
    )
    console.print(f"written: {path}", markup=False, soft_wrap=True)


def _calibrate_routing(options: CalibrateOptions, loaded: LoadedRun) -> None:
    from rich.console import Console
    from rich.progress import track

    from mod_star.inspection.calibration import evaluation_batches
    from mod_star.inspection.routing_calibration import calibrated_routing, require_router, write_routing

    require_router(loaded, "--what", options.what)
    batches = evaluation_batches(loaded)
    _require_same_data(options, loaded)
    keep_compiled_programs()
    progress = Console(stderr=True)
    shown = functools.partial(
        track, description="reading held-out text", console=progress, transient=True, disable=not progress.is_terminal
    )
    calibration = calibrated_routing(loaded, batches, shown)
    path = write_routing(options.run, calibration)
    console = Console(highlight=False)
    console.print(routing_table(calibration))
    console.print(f"written: {path}", markup=False, soft_wrap=True)


def routing_table(calibration: RoutingCalibration) -> Table:
    """What the second half of the text gives each budget's blocks to compute."""
    import numpy as np

    from mod_star.views.terminal import result_table

    rows = [
        (
            f"{each.capacity:g}",
            f"{np.mean(each.achieved_shares):.3f} ({min(each.achieved_shares):.3f} to {max(each.achieved_shares):.3f})",
            f"{np.mean(each.overflow):.3f}",
        )
        for each in calibration.budgets
    ]
    title = f"Shares of the second half of {calibration.tokens:,} tokens, by thresholds from the first half"
    return result_table(title, ("capacity", "computed (by block)", "no slot left"), rows)


def quantile_table(scores_N: Any, by: str) -> Table:
    """The scores that given shares of the predictions lie above."""
    import numpy as np

    from mod_star.views.terminal import result_table

    rows = [(f"{share:.0%}", f"{np.quantile(scores_N, 1 - share):.3f}") for share in QUANTILES]
    title = {"entropy": "Entropy", "decider": "Gain that the decider expects"}[by]
    title += f" of {len(scores_N):,} predictions without a thought"
    return result_table(title, ("share of tokens", "above, nats"), rows)
