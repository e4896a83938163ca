"""The training loop: step after step, with evaluations and checkpoints where they are due.

The loop never waits for a step it has just started: the numbers of step n−1 are read after step n is on its way.
What belongs to step n (its record, its evaluation) is written before the checkpoint of step n, so that a run that was
interrupted and resumed leaves the same files as one that wasn't.

Several processes go through all of this together. They save one checkpoint, each its part; the first one alone decides
what the files mean, writes all others, and prints.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grain
import jax
import numpy as np

from mod_star import random_streams
from mod_star.data import Batch
from mod_star.distributed.processes import SharedStop, is_first
from mod_star.distributed.sharding import batch_sharding, place
from mod_star.errors import TrainingError
from mod_star.model import Decoder
from mod_star.runs.buckets import bring_back, checkpoints_of
from mod_star.stages import Stage
from mod_star.training.inputs import Inputs
from mod_star.training.interrupt import Interrupted
from mod_star.training.lowering import StageObjective, lower_eval_step, lower_train_step
from mod_star.training.objectives import Metrics
from mod_star.training.recorder import Recorder
from mod_star.training.saver import Saver, last_good
from mod_star.training.state import TrainState

PROFILE_DIRECTORY = "profile"

StepFn = Callable[..., tuple[TrainState, Metrics]]
EvalFn = Callable[[dict[str, Any], Any, jax.Array], Metrics]


@dataclass(frozen=True)
class _Unread:
    """What a step has to say, to be read when it has been computed."""

    step: int
    metrics: Metrics


@dataclass(frozen=True)
class _Programs:
    """What computes the steps of a stage."""

    step: StepFn
    evaluate: EvalFn
    summarise: Callable[[dict[str, Any]], dict[str, Any]]


class TrainingLoop:
    """Steps from where a session begins to the run's last step.

    Args:
      inputs: what the run is made from.
      path: directory of the run.
      batches: the iterator that each step takes a batch from, on the devices already.
      saver: saves checkpoints.
      recorder: writes and shows what is measured; open.
      stop: says whether to stop after the present step.
      profile: steps to trace into RUN/profile; empty: none.
    """

    def __init__(
        self,
        inputs: Inputs,
        path: Path,
        batches: grain.DatasetIterator,
        saver: Saver,
        recorder: Recorder,
        stop: SharedStop,
        profile: range,
    ) -> None:
        self.inputs, self.run, self.path, self.batches = inputs, inputs.run, path, batches
        self.saver, self.recorder, self.stop, self.profile = saver, recorder, stop, profile
        self.start = saver.last_saved or 0
        self.streak = 0  # of steps that were not finite, up to the last one that was read
        self.compile_seconds = 0.0
        self.shapes: TrainState
        self.programs: dict[Stage, _Programs] = {}  # of the present stage, or of all that steps draw from

    def run_steps(self, state: TrainState, shapes: TrainState) -> TrainState:
        """Trains what is left to train, evaluates and saves.

        Args:
          state: to begin with; its buffers are donated.
          shapes: its shapes, from `mod_star.training.lowering.state_shapes`.

        Returns:
          The state after the last step, whose checkpoint may still be on its way to the disk.

        Raises:
          Interrupted: a signal asked to stop; everything is saved.
          TrainingError: too many steps in a row had a non-finite loss or gradient.
          OSError: records or checkpoints can't be written.
        """
        self.shapes = shapes
        plan, total = self.inputs.plan, self.inputs.plan.steps
        unread: _Unread | None = None
        self.recorder.start_clock()
        owed = bool(self.start) and self._evaluation_due(self.start) and not self.recorder.evaluated(self.start)
        for stage in plan.evaluated(self.start if owed else min(self.start + 1, total)):
            self._compile(stage)
        if owed:
            self._evaluate(state, self.start)  # the interruption came between the step and its evaluation
        for step in range(self.start + 1, total + 1):
            if self.stop() is not None:
                self._record(unread)
                self._leave(state)
            if plan.at(step) not in self.programs:
                self._record(unread)
                unread = None
                self.programs.clear()
                self._compile(plan.at(step))
            if step == self.profile.start:
                jax.profiler.start_trace(self.path / PROFILE_DIRECTORY)
            # Only batches go in (by the thread that makes them), only metrics come out: both are asked for by name.
            with jax.transfer_guard("disallow"):
                state, metrics = self.programs[plan.at(step)].step(state, next(self.batches), *self.stop.ask())
                self._record(unread)
            unread = _Unread(step, metrics)
            if step == min(self.profile.stop - 1, total) and self.start < self.profile.start <= step:
                self._end_profile(step, metrics)
            evaluation_due, checkpoint_due = self._evaluation_due(step), self._checkpoint_due(step)
            if evaluation_due or checkpoint_due:
                self._record(unread)
                unread = None
            if evaluation_due:
                self._evaluate(state, step)
            # A checkpoint in a streak of non-finite steps would not be a good one to go back to: wait for its end.
            if checkpoint_due and (step == total or self.streak == 0):
                self._save(state)
        if not self.recorder.evaluated(total):  # a signal cut it short
            self._leave(state)
        return state

    def _compile(self, stage: Stage) -> None:
        """Compiles both steps of a stage ahead of time, so that compilation is part of no step's time."""
        with self.recorder.pause("compiling"):
            began = time.perf_counter()
            decoder, mesh = Decoder(stage.run.model, stage.run.routing, self.inputs.decoder.parts), self.inputs.mesh
            # From shapes alone: with arrays, a restored state would make another program of it than a new one.
            steps = self.inputs.plan.steps
            objective = StageObjective.of(decoder, stage.run, mesh)
            lowered = lower_train_step(
                decoder, stage.run, steps, self.shapes, mesh, stop_shapes=self.stop.shapes, objective=objective
            )
            step_fn = lowered.compile()
            lowered = lower_eval_step(decoder, stage.run, self.shapes.params, mesh, objective=objective)
            if not self.programs:
                self.recorder.begin_stage(stage, objective.examples())
            self.programs[stage] = _Programs(step_fn, lowered.compile(), objective.objective.summarise)
            seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        what = ""
        for name, value in self.inputs.plan.setting_of(stage).items():
            which = "" if self.inputs.plan.drawn is not None else f"steps {stage.first} to {stage.last} at "
            what = f"{which}{name} {value:.4g}: "
        self.recorder.say(f"{what}compiled in {seconds:.1f} s")

    def _record(self, unread: _Unread | None) -> None:
        """Reads and records a step's numbers; stops a run that diverges."""
        if unread is None:
            return
        step = unread.step
        stop, self.streak = self.recorder.read(step, unread.metrics)
        self.stop.read(stop)
        if self.streak >= self.run.train.max_skipped:
            self.saver.wait()
            raise TrainingError(
                f"loss or gradient was not finite in {self.streak} steps in a row, {step - self.streak + 1} to {step}; "
                f"{last_good(checkpoints_of(self.path))}. "
                f"A lower --optimizer.learning-rate (now {self.run.optimizer.learning_rate:g}) in a new run may help"
            )

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates on the held-out batches and records it; a signal in the middle leaves it to the next session.

        Where steps draw their capacity, at each of them: what is measured at others than the run's own is called so.
        """
        measured: dict[str, Any] = {}
        stages = self.inputs.plan.evaluated(step)
        # The same key every time, and apart from training's.
        eval_key = jax.random.fold_in(jax.random.key(self.run.train.seed), random_streams.EVALUATION)
        examples_key = jax.random.fold_in(eval_key, random_streams.EXAMPLES)
        with self.recorder.pause("evaluating"):
            for stage in stages:
                programs = self.programs[stage]
                sums: list[Any] = []
                for number, batch in enumerate(self.inputs.held_out):
                    if self.stop() is not None:
                        return
                    key = jax.random.fold_in(eval_key, number)
                    sums.append(jax.device_get(programs.evaluate(state.params, self._put(batch), key)))
                added = jax.tree.map(lambda *values: np.sum(np.asarray(values, np.float64), axis=0), *sums)
                ending = "" if stage is stages[0] else f"_at_{stage.run.routing.capacity:g}"
                measured |= {f"{name}{ending}": value for name, value in programs.summarise(added).items()}
            self.recorder.evaluation(step, measured, state.params, examples_key)

    def _put(self, batch: Batch) -> Any:
        """A whole batch, which every process has, on the devices."""
        mesh = self.inputs.mesh
        return jax.device_put(batch) if mesh is None else place(batch, batch_sharding(mesh))

    def _end_profile(self, step: int, metrics: Metrics) -> None:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        self.recorder.say(f"profile of steps {self.profile.start} to {step}: {self.path / PROFILE_DIRECTORY}")

    def _save(self, state: TrainState) -> None:
        seconds = self.recorder.seconds()
        with self.recorder.pause("saving"):
            if is_first():  # first the records, then the checkpoint: going on, it finds all of them
                bring_back(self.path)
            self.saver.save(state, seconds)

    def _leave(self, state: TrainState) -> NoReturn:
        """Saves what isn't saved yet and raises `Interrupted`."""
        step, number = int(state.step), self.stop()
        if step != (self.saver.last_saved or 0):
            self._save(state)
        self.saver.wait()
        raise Interrupted(number or signal.SIGINT, step, self.inputs.plan.steps)

    def _evaluation_due(self, step: int) -> bool:
        return self._due(step, self.run.train.eval_every)

    def _checkpoint_due(self, step: int) -> bool:
        return self._due(step, self.run.train.checkpoint_every)

    def _due(self, step: int, every: int) -> bool:
        return step == self.inputs.plan.steps or (every > 0 and step % every == 0)
