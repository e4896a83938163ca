"""Training a run: checks its inputs, makes or opens its directory, and trains it in a session."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from mod_star.config import MeshConfig, RunConfig
from mod_star.data.identity import changes, identify
from mod_star.distributed.processes import decide_first, is_first
from mod_star.distributed.sharding import make_mesh
from mod_star.errors import InputError, TrainingError, require
from mod_star.runs import checkpoints
from mod_star.runs import directory as run_dir
from mod_star.runs.base_run import load_base
from mod_star.runs.buckets import bring_back, checkpoints_of, copied_from, working_copy
from mod_star.runs.plain_paths import plain_path
from mod_star.runs.resuming import differences, resumed_config
from mod_star.runs.stored_config import change_config, read_data, write_data
from mod_star.runs.summary import SUMMARY_FILE, TrainSummary, describe, read_summary
from mod_star.standard_streams import lasting_output
from mod_star.tokenization import HuggingFaceTokenizer, load_saved_tokenizer, load_tokenizer
from mod_star.training.extension import require_extendable
from mod_star.training.inputs import Inputs, load_inputs
from mod_star.training.interrupt import LostProcess
from mod_star.training.session import CURVES_FILE, TrainingSession, draw_curves

__all__ = ["SUMMARY_FILE", "LostProcess", "TrainSummary", "TrainingError", "describe", "train"]


def train(
    run: RunConfig,
    directory: str | Path,
    *,
    mesh: MeshConfig | None = None,
    resume_from: int | None = None,
    profile: range | None = None,
    quiet: bool = False,
    data_changed: Literal["refuse", "accept"] = "refuse",
    redraw_schedule: bool = False,
) -> TrainSummary:
    """Trains a run to its end, from the start or from where it was interrupted.

    All input is checked before anything is compiled or written. A complete run is left as it is. A run that starts
    from another one (`init_from`) needs it no longer once its own checkpoint 0 is there, which comes first of all.

    Args:
      run: what to train. `model.vocab_size` 0 is filled in from the tokenizer, or from the run that it starts from.
      directory: where the run is kept, see `mod_star.runs.directory`; or gs://BUCKET/NAME, see `mod_star.runs.buckets`.
        It may hold the same run, interrupted, also on another mesh or by another number of processes. All processes
        must see it.
      mesh: how to use several devices; copies of the model on all of them by default.
      resume_from: step of an older checkpoint to go on from; later ones are deleted. None: the newest.
      profile: steps to trace into RUN/profile, for xprof; None: none.
      quiet: print nothing.
      data_changed: accept: go on although the data is not what it was, see `mod_star.data.identity`. What was held out
        may have been trained on then, and the other way round; the data is read from its beginning.
      redraw_schedule: with other `train.steps` than before, go on although the learning rate so far followed the
        schedule of those, see `mod_star.training.extension`.

    Returns:
      The result.

    Raises:
      InputError: a field, the data, the directory or a checkpoint is wrong.
      TrainingError: `train.max_skipped` steps in a row had a non-finite loss or gradient; the disk is full, or the
        bucket can't be written.
      LostProcess: another process is gone.
      Interrupted: SIGTERM, SIGHUP or Ctrl-C (in the main thread); call again to go on.
    """
    path = working_copy(directory)
    if copied_from(path) is None:
        plain_path(checkpoints_of(path))  # refused now, if ever
    name = copied_from(path) or str(path)
    devices = make_mesh(MeshConfig() if mesh is None else mesh)
    printed = lasting_output("training goes on and prints no progress")
    console = Console(file=printed, quiet=quiet or not is_first())
    placed = None if devices.size == 1 else devices
    with ExitStack() as stack:
        if decide_first(lambda: run_dir.is_run(path)):
            decide_first(lambda: stack.enter_context(run_dir.locked(path)))
            checkpoints.require_training(checkpoints_of(path))
            before, stored = run_dir.read_config(path), resumed_config(path, run)
            _require_moved(path, before, stored)
            same_length = before.train == stored.train
            if same_length and resume_from is None and decide_first(lambda: (path / SUMMARY_FILE).is_file()):
                summary = replace(read_summary(path), directory=name)
                said = f"{name}: is complete already\n{describe(summary)}"
                console.print(said, markup=False, highlight=False, soft_wrap=True)
                if is_first() and not (path / CURVES_FILE).is_file():  # its drawing failed, or was interrupted
                    draw_curves(path)
                return summary
            tokenizer = load_saved_tokenizer(path / run_dir.TOKENIZER_DIRECTORY, stored.data.tokenizer)
            begun = decide_first(lambda: checkpoints.saved_steps(checkpoints_of(path)))
            base = None if begun else load_base(stored, tokenizer, placed)
            if not same_length:
                done = resume_from if resume_from is not None else (begun or [0])[-1]
                require_extendable(before, stored, done, redraw_schedule)
            inputs = load_inputs(stored, tokenizer, placed)
            changed = decide_first(lambda: changes(read_data(path) or inputs.data, inputs.data))
            if changed and data_changed == "refuse":
                raise InputError(
                    f"data.source: the data of {name} has changed ({'; '.join(changed)}), and with it which documents "
                    "are held out. Bring the old data back, or go on with the new: --data-changed accept"
                )
            _require_profile(profile, inputs.plan.steps)
            _show_notes((*inputs.notes, *_changed_since(path, stored)), console)
            session = TrainingSession(inputs, path, resume_from, console, base, profile)
            decide_first(lambda: _record_changes(path, inputs, session.start, same_length))
            if changed:
                said = f"{name}: goes on with other data from step {session.start} on ({'; '.join(changed)})"
                console.print(said, markup=False, highlight=False, soft_wrap=True)
            return session.run_to_end()
        if resume_from is not None:
            raise InputError(f"--resume-from = {resume_from}: {name} is not a run yet")
        decide_first(lambda: run_dir.require_creatable(path))
        base = load_base(run, mesh=placed)
        if base is None:
            tokenizer = load_tokenizer(run.data.tokenizer)
            for note in tokenizer.notes if isinstance(tokenizer, HuggingFaceTokenizer) else ():
                console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
            inputs = load_inputs(run, tokenizer, placed)
        else:
            run = replace(run, model=replace(run.model, vocab_size=base.config.model.vocab_size))
            inputs = load_inputs(run, base.tokenizer, placed)
        _require_profile(profile, inputs.plan.steps)
        _show_notes(inputs.notes, console)
        config = None if base is None else base.config

        def create() -> None:
            stack.enter_context(run_dir.created(path, inputs.run, inputs.tokenizer, config, inputs.data))

        decide_first(create)
        return TrainingSession(inputs, path, None, console, base, profile).run_to_end()


def _show_notes(notes: tuple[str, ...], console: Console) -> None:
    """Says on standard error, where `console` isn't quiet, what is read otherwise than one may think."""
    errors = Console(stderr=True, quiet=console.quiet)
    for note in notes:
        errors.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _changed_since(path: Path, run: RunConfig) -> list[str]:
    """What a run that version 0.1 made is trained otherwise from here on, a line each; told once."""
    if read_data(path) is not None:  # as every later version records
        return []
    notes, earlier = [], "version 0.1, which made this run"
    if run.thinks and run.thinking.policy_weight > 0 and run.thinking.n_true > 1:
        n_true = run.thinking.n_true
        notes.append(f"REINFORCE weighs about 1/{n_true} of what it weighed in {earlier}: it is a mean, like the NLL")
    if run.routing.every and not run.data.pack:
        notes.append(f"capacity is a share of the tokens without padding from here on; {earlier}, counted padding in")
    return notes


def _require_moved(path: Path, stored: RunConfig, run: RunConfig) -> None:
    """Raises InputError if other files are asked for than those that the run was made with, wherever they were."""
    if stored.data.source == run.data.source:
        return
    recorded = read_data(path)
    try:
        if recorded is not None and not changes(recorded, identify(run.data)):
            return
    except InputError:  # they are not there
        pass
    differing = "; ".join(differences(asdict(stored.data), asdict(run.data), "data."))
    raise InputError(f"{path}: holds a run of another configuration: {differing}")


def _record_changes(path: Path, inputs: Inputs, step: int, same_length: bool) -> None:
    """Writes what is another value from here on into the run's files. A run that goes on has no result any more."""
    try:
        if not same_length:  # first of all: the result would be taken for that of the new number of steps
            (path / SUMMARY_FILE).unlink(missing_ok=True)
            bring_back(path)
        change_config(path, inputs.run, step)
        recorded = read_data(path)
        if recorded is None or changes(recorded, inputs.data):
            write_data(path, inputs.data, step)
        bring_back(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error


def _require_profile(profile: range | None, steps: int) -> None:
    """Raises InputError if no step of the run is to be traced."""
    if profile is not None:
        shown = f"{profile.start}:{profile.stop - 1}"
        require(profile.start <= steps, "--profile", shown, f"must begin with one of the run's {steps} steps")
