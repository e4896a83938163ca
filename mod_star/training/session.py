"""One training session of a run: from its start, or where it stopped, until it ends or must stop.

The session sets up and ends: it makes or restores the state, opens what records and saves, and writes the result. The
steps are `mod_star.training.loop`, what is said of them `mod_star.training.recorder`.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import grain
import jax
from rich.console import Console

from mod_star.data import prefetch_to_device
from mod_star.data.identity import fingerprint
from mod_star.distributed.processes import SharedStop, decide_first, is_first
from mod_star.distributed.sharding import batch_sharding
from mod_star.errors import TrainingError
from mod_star.flops import parameter_count
from mod_star.runs import checkpoints
from mod_star.runs.buckets import bring_back, checkpoints_of, copied_from
from mod_star.runs.directory import LoadedRun
from mod_star.runs.summary import SUMMARY_FILE, TrainSummary, describe, write_summary
from mod_star.trainable import trained_part
from mod_star.training.inputs import Inputs
from mod_star.training.interrupt import LostProcess, stop_signals
from mod_star.training.loop import TrainingLoop
from mod_star.training.lowering import lower_first_state, state_shapes
from mod_star.training.recorder import Recorder
from mod_star.training.saver import Saver, last_good
from mod_star.training.state import TrainState
from mod_star.units import short_number
from mod_star.views.pictures import try_to_draw
from mod_star.views.plots import plot_curves

CURVES_FILE = "curves.png"


def draw_curves(path: Path) -> bool:
    """Draws a run's curves.png, in its bucket too if it has one; False, and a line of warning, if that can't be."""

    def draw() -> None:
        plot_curves({path.name: path}, path / CURVES_FILE)
        bring_back(path)

    return try_to_draw(f"{copied_from(path) or path}/{CURVES_FILE}", draw) is None


class TrainingSession:
    """One training session of a run in its directory.

    Args:
      inputs: what the run is made from.
      path: its directory, locked by this process.
      resume_from: step of the checkpoint to go on from; None: the newest, or the beginning where there is none.
      console: where progress is shown.
      base: the run to start from; None: there is none, or that has been done.
      profile: steps to trace; None: none.

    Raises:
      InputError: the checkpoint doesn't exist, or is damaged.
    """

    def __init__(
        self,
        inputs: Inputs,
        path: Path,
        resume_from: int | None,
        console: Console,
        base: LoadedRun | None,
        profile: range | None,
    ) -> None:
        self._inputs, self._run, self._path, self._console = inputs, inputs.run, path, console
        self._data = fingerprint(inputs.data)
        self._base = base
        self._profile = range(0) if profile is None else profile
        self._name = copied_from(path) or str(path)  # the run's address, if it is in a bucket
        self._checkpoints = checkpoints_of(path)
        self._resume_step: int | None = decide_first(
            lambda: checkpoints.choose_checkpoint(self._checkpoints, resume_from, "--resume-from")
        )

    @property
    def start(self) -> int:
        """Step of the checkpoint that the session goes on from; 0: it starts from the beginning."""
        return self._resume_step or 0

    def run_to_end(self) -> TrainSummary:
        """Trains what is left to train, evaluates, saves, draws the curves.

        Raises:
          TrainingError: too many steps in a row were not finite, or files can't be written.
          LostProcess: another process is gone.
          Interrupted: a signal asked to stop; everything is saved.
        """
        try:
            return self._run_to_end()
        except OSError as error:  # the disk is full, most likely
            raise TrainingError(
                f"{error.filename or self._path}: {error.strerror or error}; {last_good(self._checkpoints)}. "
                "When that is mended, the same command goes on"
            ) from error

    def _run_to_end(self) -> TrainSummary:
        inputs, run, path, mesh = self._inputs, self._run, self._path, self._inputs.mesh
        with ExitStack() as stack:
            stop = SharedStop(stack.enter_context(stop_signals()), mesh)
            batches = iter(prefetch_to_device(inputs.batches, None if mesh is None else batch_sharding(mesh)))
            stack.callback(batches.close)
            shapes = state_shapes(inputs.decoder, run, inputs.tokenizer, inputs.plan.steps, mesh)
            state, earlier_seconds = self._first_state(shapes, batches)
            saver = Saver(path, run.train.keep_checkpoints, batches, self._data, self._resume_step)
            stack.callback(saver.close)
            recorder = Recorder(inputs, path, self._resume_step, earlier_seconds, self._console)
            stack.enter_context(recorder)
            parameters = parameter_count(state.params)
            trained = parameter_count(trained_part(run, state.params))
            self._announce(recorder, parameters, trained)
            try:
                if self._base is not None:  # from here on the run needs nothing but its own directory
                    with recorder.pause("saving"):
                        saver.save(state, seconds=0.0)
                        saver.wait()
                    self._base = None  # frees its parameters
                loop = TrainingLoop(inputs, path, batches, saver, recorder, stop, self._profile)
                state = loop.run_steps(state, shapes)
                seconds = recorder.seconds()
                saver.wait()
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() == 1:
                    raise
                stack.pop_all()  # closing would wait for the process that is no more
                raise LostProcess(error, last_good(self._checkpoints)) from error
        steps = inputs.plan.steps
        tokens = steps * run.train.batch_size * run.model.context
        summary = TrainSummary(
            directory=self._name,
            steps=steps,
            parameters=parameters,
            trained_parameters=trained,
            flops=inputs.plan.flops,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            compile_seconds=loop.compile_seconds,
            skipped=int(state.skipped),
            evaluation=recorder.last_evaluation(steps),
        )
        self._finish(summary, recorder)
        return summary

    def _first_state(self, shapes: TrainState, batches: grain.DatasetIterator) -> tuple[TrainState, float]:
        """The state to go on from, `batches` set to its place, and the time in training steps that went before."""
        inputs, mesh = self._inputs, self._inputs.mesh
        if self._resume_step is None:
            base = None if self._base is None else self._base.params
            steps = inputs.plan.steps
            lowered = lower_first_state(inputs.decoder, self._run, inputs.tokenizer, steps, shapes, mesh, base=base)
            return lowered.compile()(base), 0.0
        state, saved = checkpoints.restore_state(
            self._checkpoints, self._resume_step, shapes, batches, mesh, self._data
        )
        if is_first():
            # In this order: a run without a summary goes on, one with a summary needs its last checkpoint.
            (self._path / SUMMARY_FILE).unlink(missing_ok=True)
            bring_back(self._path)
            checkpoints.delete_after(self._checkpoints, self._resume_step)
        return state, saved["seconds"]

    def _announce(self, recorder: Recorder, parameters: int, trained: int) -> None:
        begun = "starts" if self._resume_step is None else f"goes on from step {self.start}"
        if self._base is not None:
            begun += f" from {self._run.init_from} (step {self._base.step})"
        steps, flops = self._inputs.plan.steps, short_number(self._inputs.plan.flops)
        frozen = "" if trained == parameters else f", {short_number(trained)} of them trained"
        counts = f"{short_number(parameters)} parameters{frozen}"
        recorder.say(f"{self._name} {begun}: {counts}, {steps} steps, {flops} FLOP")

    def _finish(self, summary: TrainSummary, recorder: Recorder) -> None:
        """Writes and shows the result."""
        if is_first():
            write_summary(self._path, summary)
            bring_back(self._path)
        recorder.say(describe(summary))
        if is_first() and draw_curves(self._path):
            recorder.say(f"curves: {self._name}/{CURVES_FILE}")
