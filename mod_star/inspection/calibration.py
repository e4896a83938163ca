"""Where to think: the score above which a model thinks, so that a given share of the tokens has a thought.

The score is the entropy of the prediction without a thought, or the gain that the model's decider expects. The
threshold, kept in RUN/thinking.json, is a quantile of the scores of the first half of the run's held-out text; what
share of the other half lies above it tells how well it carries over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from mod_star.atomic_files import write_atomically
from mod_star.data import Batch, held_out_batches
from mod_star.decoding.think import BY, WHEN, By, Think
from mod_star.errors import InputError, require
from mod_star.model.cross_entropy import token_entropy
from mod_star.model.transformer import head_matrix
from mod_star.runs.directory import LoadedRun
from mod_star.thinking.decider import decider_of, expected_gain
from mod_star.training.objectives.next_token import forward

CALIBRATION_FILE = "thinking.json"
BELOW_EVERYTHING = {"entropy": -1.0, "decider": -1e30}  # an entropy is never negative


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it is worth."""

    threshold: float
    """In nats; the model is to think where the score is above."""
    share: float
    """The share of the tokens that was asked for."""
    achieved_share: float
    """The share that the threshold gives on held-out text that it was not chosen by."""
    step: int
    """Step of the checkpoint."""
    tokens: int
    """Predicted tokens of held-out text, both halves."""
    by: By = "entropy"
    """The score, see `mod_star.decoding.think.Think.by`."""


def calibration_batches(run: LoadedRun) -> list[Batch]:
    """The held-out batches that the run is evaluated on.

    Raises:
      InputError: the model has not learned to think, or its data cannot be read.
    """
    objective = run.config.train.objective
    require(
        "thinking" in run.params, "train.objective", objective, "must be quiet_star: the model has not learned to think"
    )
    return evaluation_batches(run)


def evaluation_batches(run: LoadedRun) -> list[Batch]:
    """The held-out batches that the run is evaluated on. Raises InputError if its data cannot be read."""
    config = run.config
    batches = held_out_batches(config.data, run.tokenizer, config.model.context, config.train.batch_size)
    return list(itertools.islice(batches, config.train.eval_batches))


def scores(run: LoadedRun, batches: list[Batch], by: By = "entropy") -> Iterator[npt.NDArray[np.float32]]:
    """For each batch the scores of all its predictions, routed causally, in the order of the text.

    Raises:
      InputError: the model has no decider, and that is to be the score.
    """
    decider = decider_of(run.params) if by == "decider" else None

    @jax.jit
    def of_batch(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        hidden = forward(run.decoder, params, batch, None, "causal").hidden
        if decider is not None:
            return jax.vmap(functools.partial(expected_gain, decider))(hidden)
        return token_entropy(hidden, head_matrix(params), run.config.train.loss_chunk)

    for batch in batches:
        yield np.asarray(of_batch(run.params, batch))[batch["weights"] > 0]


def calibrated(scores_N: npt.NDArray[np.float32], share: float, step: int, by: By = "entropy") -> Calibration:
    """The threshold that `share` of the first half of the predictions lies above.

    Args:
      scores_N: in the order of the text; the halves then have hardly a document in common.
      share: of the tokens to think before; 1: all.
      step: of the checkpoint.
      by: what the scores are.

    Raises:
      InputError: the share is not in (0, 1], or there are fewer than two predictions.
    """
    require_share(share)
    N = len(scores_N)
    require(N >= 2, "held-out predictions", N, "must be at least 2")
    first, second = scores_N[: (N + 1) // 2], scores_N[(N + 1) // 2 :]
    threshold = BELOW_EVERYTHING[by] if share == 1 else float(np.quantile(first, 1 - share))
    return Calibration(threshold, share, float(np.mean(second > threshold)), step, N, by)


def require_share(share: float) -> None:
    """Raises InputError for a share that can't be."""
    require(0 < share <= 1, "--share", share, "must lie in (0, 1]")


def write_calibration(directory: Path, calibration: Calibration) -> Path:
    """Writes RUN/thinking.json, or leaves what was there. Raises InputError if it can't be written."""
    return write_record(directory / CALIBRATION_FILE, dataclasses.asdict(calibration))


def write_record(path: Path, record: dict[str, Any]) -> Path:
    """Writes a file of JSON, or leaves what was there. Raises InputError if it can't be written."""
    try:
        write_atomically(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def read_calibration(directory: Path) -> Calibration | None:
    """What `write_calibration` wrote; None if there is nothing. Raises InputError if it is something else."""
    path = directory / CALIBRATION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        calibration = Calibration(
            float(values["threshold"]), float(values["share"]), float(values["achieved_share"]),
            int(values["step"]), int(values["tokens"]), values.get("by", "entropy"),
        )  # fmt: skip
        require(calibration.by in BY, "by", calibration.by, f"must be one of {', '.join(BY)}")
        require_share(calibration.share)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: cannot be read; mod-star calibrate {directory} writes it anew") from None
    return calibration


def chosen_think(
    run: LoadedRun, directory: Path, when: str, temperature: float, option: str, tell: Callable[[str], None]
) -> Think:
    """How a model thinks that is to think never, always, or where its calibration says.

    Args:
      run: the model.
      directory: of the run, where its calibration is.
      when: never, always or auto.
      temperature: of the draws of thought tokens; 0: greedy.
      option: what the user calls `when`, for the error message.
      tell: is given a line if the calibration is of another step.

    Raises:
      InputError: `when` is something else; the model has not learned to think, or is not calibrated.
    """
    require(when in WHEN, option, when, f"must be one of {', '.join(WHEN)}")
    if when == "never":
        return Think()
    objective = f"has train.objective = {run.config.train.objective!r} and has not learned to think"
    require("thinking" in run.params, option, when, f"must be never: {directory} {objective}")
    if when == "always":
        return Think("always", temperature=temperature)
    calibration = read_calibration(directory)
    if calibration is None:
        raise InputError(f"{option} = 'auto': needs a threshold; run mod-star calibrate {directory} first")
    if calibration.step != run.step:
        of_steps = f"the threshold was calibrated at step {calibration.step}, this is step {run.step}"
        tell(f"{of_steps}: mod-star calibrate {directory} renews it")
    return Think("auto", calibration.threshold, calibration.share, temperature, calibration.by)
