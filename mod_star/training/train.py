"""Training a run: checks all that it is made from, makes or finds its directory, and sits down to it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mod_star.buckets import checkpoints_of, copied_from, working_copy
from mod_star.config import RunConfig
from mod_star.data import load_saved_tokenizer, load_tokenizer
from mod_star.devices_config import MeshConfig
from mod_star.errors import InputError, require
from mod_star.processes import decide_first, is_first
from mod_star.sharding import make_mesh
from mod_star.streams import lasting_output
from mod_star.training import checkpoints, run_dir
from mod_star.training.base_run import load_base
from mod_star.training.inputs import load_inputs
from mod_star.training.interrupt import LostProcess, TrainingError
from mod_star.training.loop import Sitting
from mod_star.training.summary import SUMMARY_FILE, TrainSummary, describe, read_summary

__all__ = ["SUMMARY_FILE", "LostProcess", "TrainSummary", "TrainingError", "describe", "train"]


def train(
    run: RunConfig,
    directory: str | Path,
    *,
    mesh: MeshConfig | None = None,
    resume_from: int | None = None,
    profile: range | None = None,
    quiet: bool = False,
) -> TrainSummary:
    """Trains a run to its end, from the start or from where it was interrupted.

    All input is checked before anything is compiled or written. A complete run is left as it is. A run that starts
    from another one (`init_from`) needs it no longer once its own checkpoint 0 is there, which comes first of all.

    Args:
      run: what to train. `model.vocab_size` 0 is filled in from the tokenizer, or from the run that it starts from.
      directory: where the run is kept, see `mod_star.training.run_dir`; or gs://BUCKET/NAME, see `mod_star.buckets`.
        It may hold the same run, interrupted, also on another mesh or by another number of processes. All processes
        must see it.
      mesh: how to use several devices; copies of the model on all of them by default.
      resume_from: step of an older checkpoint to go on from; later ones are deleted. None: the newest.
      profile: steps to trace into RUN/profile, for xprof; None: none.
      quiet: print nothing.

    Returns:
      The result.

    Raises:
      InputError: a field, the data, the directory or a checkpoint is no good.
      TrainingError: `train.max_skipped` steps in a row had a non-finite loss or gradient; the disk is full, or the
        bucket can't be written.
      LostProcess: another process is gone.
      Interrupted: SIGTERM, SIGHUP or Ctrl-C (in the main thread); call again to go on.
    """
    path = working_copy(directory)
    name = copied_from(path) or str(path)
    devices = make_mesh(MeshConfig() if mesh is None else mesh)
    printed = lasting_output("training goes on and prints no progress")
    console = Console(file=printed, quiet=quiet or not is_first())
    placed = None if devices.size == 1 else devices
    with ExitStack() as stack:
        if decide_first(lambda: run_dir.is_run(path)):
            decide_first(lambda: stack.enter_context(run_dir.locked(path)))
            checkpoints.require_training(checkpoints_of(path))
            stored = run_dir.resumed_config(path, run)
            if resume_from is None and decide_first(lambda: (path / SUMMARY_FILE).is_file()):
                summary = replace(read_summary(path), directory=name)
                said = f"{name}: is complete already\n{describe(summary)}"
                console.print(said, markup=False, highlight=False, soft_wrap=True)
                return summary
            tokenizer = load_saved_tokenizer(path / run_dir.TOKENIZER_DIRECTORY, stored.data.tokenizer)
            begun = decide_first(lambda: checkpoints.saved_steps(checkpoints_of(path)))
            base = None if begun else load_base(stored, tokenizer, placed)
            inputs = load_inputs(stored, tokenizer, placed)
            _require_profile(profile, inputs.plan.steps)
            return Sitting(inputs, path, resume_from, console, base, profile).run_to_end()
        if resume_from is not None:
            raise InputError(f"--resume-from = {resume_from}: {name} is not a run yet")
        decide_first(lambda: run_dir.require_creatable(path))
        base = load_base(run, mesh=placed)
        if base is None:
            inputs = load_inputs(run, load_tokenizer(run.data.tokenizer), placed)
        else:
            run = replace(run, model=replace(run.model, vocab_size=base.config.model.vocab_size))
            inputs = load_inputs(run, base.tokenizer, placed)
        _require_profile(profile, inputs.plan.steps)
        config = None if base is None else base.config

        def create() -> None:
            stack.enter_context(run_dir.created(path, inputs.run, inputs.tokenizer, config))

        decide_first(create)
        return Sitting(inputs, path, None, console, base, profile).run_to_end()


def _require_profile(profile: range | None, steps: int) -> None:
    """Raises InputError if no step of the run is to be traced."""
    if profile is not None:
        shown = f"{profile.start}:{profile.stop - 1}"
        require(profile.start <= steps, "--profile", shown, f"must begin with one of the run's {steps} steps")
