"""The training loop: one session of a run, from its start or where it stopped to its end or where it must stop.

The loop never waits for a step it has just started: the numbers of step n−1 are read after step n is on its way.
What belongs to step n (its record, its evaluation) is written before the checkpoint of step n, so that a run that was
interrupted and resumed leaves the same files as one that wasn't.

Several processes go through all of this together. They save one checkpoint, each its part; the first one alone decides
what the files mean, writes all others, and prints.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from rich.console import Console

from mod_star import random_streams
from mod_star.data import Batch, prefetch_to_device
from mod_star.data.identity import fingerprint
from mod_star.distributed.processes import SharedStop, decide_first, is_first
from mod_star.distributed.sharding import batch_sharding, place, shardings, use_mesh
from mod_star.errors import InputError, TrainingError
from mod_star.flops import parameter_count
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.runs import checkpoints
from mod_star.runs.buckets import bring_back, checkpoints_of, copied_from
from mod_star.runs.directory import LoadedRun
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.runs.summary import SUMMARY_FILE, TrainSummary, describe, write_summary
from mod_star.stages import Stage
from mod_star.training.inputs import Inputs
from mod_star.training.interrupt import Interrupted, LostProcess, stop_signals
from mod_star.training.lowering import lower_eval_step, lower_train_step, state_shapes
from mod_star.training.objectives.thoughts_log import ThoughtsLog
from mod_star.training.state import TrainState, init_state
from mod_star.training.step import objective_of
from mod_star.units import short_number
from mod_star.views.pictures import try_to_draw
from mod_star.views.plots import plot_curves
from mod_star.views.progress import TrainingProgress

CURVES_FILE = "curves.png"
PROFILE_DIRECTORY = "profile"

Metrics = dict[str, jax.Array]
StepFn = Callable[..., tuple[TrainState, Metrics]]
EvalFn = Callable[[dict[str, Any], Any, jax.Array], Metrics]


def draw_curves(path: Path) -> bool:
    """Draws a run's curves.png, in its bucket too if it has one; False, and a line of warning, if that can't be."""

    def draw() -> None:
        plot_curves({path.name: path}, path / CURVES_FILE)
        bring_back(path)

    return try_to_draw(f"{copied_from(path) or path}/{CURVES_FILE}", draw) is None


@dataclass(frozen=True)
class _Unread:
    """What a step has to say, to be read when it has been computed."""

    step: int
    metrics: Metrics


class TrainingSession:
    """One training session of a run in its directory."""

    def __init__(
        self,
        inputs: Inputs,
        path: Path,
        resume_from: int | None,
        console: Console,
        base: LoadedRun | None,
        profile: range | None,
    ) -> None:
        self.inputs, self.run, self.path, self.console = inputs, inputs.run, path, console
        self.data = fingerprint(inputs.data)
        self.base = base  # to start from; None also if that is done
        self.profile = range(0) if profile is None else profile
        self.name = copied_from(path) or str(path)  # the run's address, if it is in a bucket
        self.checkpoints = checkpoints_of(path)
        self.last_saved = decide_first(
            lambda: checkpoints.choose_checkpoint(self.checkpoints, resume_from, "--resume-from")
        )
        self.start = self.last_saved or 0
        self.earlier_seconds = self.began = self.paused = self.compile_seconds = 0.0
        self.streak = 0  # of steps that were not finite, up to the last one that was read
        self.stage: Stage | None = None  # that `step_fn` and `eval_fn` are compiled for
        self.step_fn: StepFn
        self.eval_fn: EvalFn
        self.summarise: Callable[[dict[str, Any]], dict[str, Any]]

    def run_to_end(self) -> TrainSummary:
        """Trains what is left to train, evaluates, saves, draws the curves."""
        try:
            return self._run_to_end()
        except OSError as error:  # the disk is full, most likely
            raise TrainingError(
                f"{error.filename or self.path}: {error.strerror or error}; {self._last_good()}. "
                "When that is mended, the same command goes on"
            ) from error

    def _run_to_end(self) -> TrainSummary:
        with ExitStack() as stack:
            mesh = self.inputs.mesh
            self.stop = SharedStop(stack.enter_context(stop_signals()), mesh)
            where = None if mesh is None else batch_sharding(mesh)
            self.batches = iter(prefetch_to_device(self.inputs.batches, where))
            stack.callback(self.batches.close)
            state = self._first_state()
            self.writer = checkpoints.CheckpointWriter(self.checkpoints, self.run.train.keep_checkpoints)
            stack.callback(self.writer.close)
            self.metrics: MetricsWriter | None = None
            if is_first():
                stack.callback(bring_back, self.path)  # when all records are written
                self.metrics = stack.enter_context(MetricsWriter(self.path, self.last_saved))
            self.thoughts = self._thoughts_log(stack)
            self.progress = stack.enter_context(self._progress())
            self._announce(parameter_count(state.params))
            try:
                if self.base is not None:
                    self._save_start(state)
                state = self._loop(state)
                seconds = self._seconds()
                self.writer.wait()
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() == 1:
                    raise
                stack.pop_all()  # closing would wait for the process that is no more
                raise LostProcess(error, self._last_good()) from error
        return self._finish(parameter_count(state.params), int(state.skipped), seconds)

    def _thoughts_log(self, stack: ExitStack) -> ThoughtsLog | None:
        if self.run.train.objective != "quiet_star":
            return None
        log = ThoughtsLog(self.path, self.last_saved, self.inputs.tokenizer, writes=is_first())
        return stack.enter_context(log)

    def _first_state(self) -> TrainState:
        decoder, run, total, mesh = self.inputs.decoder, self.run, self.inputs.plan.steps, self.inputs.mesh

        def first(base: dict[str, Any] | None) -> TrainState:
            return init_state(decoder, run, total, initial_params(decoder, run, self.inputs.tokenizer, base))

        self.shapes = state_shapes(decoder, run, self.inputs.tokenizer, total, mesh)
        if self.last_saved is None:
            places = None if mesh is None else shardings(mesh, self.shapes)
            with use_mesh(mesh):
                make = jax.jit(first, donate_argnums=0, out_shardings=places)
                return make(None if self.base is None else self.base.params)
        state, saved = checkpoints.restore_state(
            self.checkpoints, self.last_saved, self.shapes, self.batches, mesh, self.data
        )
        if is_first():
            # In this order: a run without a summary goes on, one with a summary needs its last checkpoint.
            (self.path / SUMMARY_FILE).unlink(missing_ok=True)
            bring_back(self.path)
            checkpoints.delete_after(self.checkpoints, self.last_saved)
        self.earlier_seconds = saved["seconds"]
        return state

    def _put(self, batch: Batch) -> Any:
        """A whole batch, which every process has, on the devices."""
        mesh = self.inputs.mesh
        return jax.device_put(batch) if mesh is None else place(batch, batch_sharding(mesh))

    def _compile(self, stage: Stage) -> None:
        """Compiles both steps of a stage ahead of time, so that compilation is part of no step's time."""
        with self._pause("compiling"):
            began = time.perf_counter()
            decoder, mesh = Decoder(stage.run.model, stage.run.routing, self.inputs.decoder.parts), self.inputs.mesh
            # From shapes alone: with arrays, a restored state would make another program of it than a new one.
            steps = self.inputs.plan.steps
            lowered = lower_train_step(decoder, stage.run, steps, self.shapes, mesh, asked=self.stop.shapes)
            self.step_fn = lowered.compile()
            self.eval_fn = lower_eval_step(decoder, stage.run, self.shapes.params, mesh).compile()
            self.summarise = objective_of(decoder, stage.run).summarise
            if self.thoughts is not None:
                self.thoughts.compute_with(decoder, stage.run)
            self.stage = stage
            seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        what = f"steps {stage.first} to {stage.last} at capacity {stage.capacity:.4g}: " if self._staged() else ""
        self.progress.say(f"{what}compiled in {seconds:.1f} s")

    def _staged(self) -> bool:
        return len(self.inputs.plan.stages) > 1

    def _loop(self, state: TrainState) -> TrainState:
        plan, total = self.inputs.plan, self.inputs.plan.steps
        unread: _Unread | None = None
        self.began = time.perf_counter()
        owed = bool(self.start) and self._evaluation_due(self.start) and not self._evaluated(self.start)
        self._compile(plan.at(self.start if owed else min(self.start + 1, total)))
        if owed:
            self._evaluate(state, self.start)  # the interruption came between the step and its evaluation
        for step in range(self.start + 1, total + 1):
            if self.stop() is not None:
                self._record(unread)
                self._leave(state)
            if plan.at(step) is not self.stage:
                self._record(unread)
                unread = None
                self._compile(plan.at(step))
            if step == self.profile.start:
                jax.profiler.start_trace(self.path / PROFILE_DIRECTORY)
            # Only batches go in (by the thread that makes them), only metrics come out: both are asked for by name.
            with jax.transfer_guard("disallow"):
                state, metrics = self.step_fn(state, next(self.batches), *self.stop.ask())
                self._record(unread)
            unread = _Unread(step, metrics)
            if step == min(self.profile.stop - 1, total) and self.start < self.profile.start <= step:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                self.progress.say(f"profile of steps {self.profile.start} to {step}: {self.path / PROFILE_DIRECTORY}")
            evaluation_due, checkpoint_due = self._evaluation_due(step), self._checkpoint_due(step)
            if evaluation_due or checkpoint_due:
                self._record(unread)
                unread = None
            if evaluation_due:
                self._evaluate(state, step)
            # A checkpoint in a streak of non-finite steps would not be a good one to go back to: wait for its end.
            if checkpoint_due and (step == total or self.streak == 0):
                self._save(state)
        if not self._evaluated(total):  # a signal cut it short
            self._leave(state)
        return state

    def _record(self, unread: _Unread | None) -> None:
        """Reads a step's numbers (waiting for it, if need be), shows and writes them; stops a run that diverges."""
        if unread is None:
            return
        step = unread.step
        # The last of a stage too: between two records, all steps cost the same.
        due = step % self.run.train.log_every == 0 or step == self.inputs.plan.at(step).last
        left_out = {"finite"} if due else unread.metrics.keys() - {"loss", "streak", "stop"}
        values = jax.device_get({name: value for name, value in unread.metrics.items() if name not in left_out})
        self.stop.read(values.pop("stop", None))
        self.streak = int(values.pop("streak"))
        self.progress.update(step, float(values["loss"]))
        if due:
            if (rate := self.progress.tokens_per_second) is not None:
                values["tokens_per_second"] = rate
            values["train_flops"] = self.inputs.plan.flops_until(step)
            self._write(step, values)
        if self.streak >= self.run.train.max_skipped:
            self.writer.wait()
            raise TrainingError(
                f"loss or gradient was not finite in {self.streak} steps in a row, {step - self.streak + 1} to {step}; "
                f"{self._last_good()}. "
                f"A lower --optimizer.learning-rate (now {self.run.optimizer.learning_rate:g}) in a new run may help"
            )

    def _last_good(self) -> str:
        try:
            saved = checkpoints.saved_steps(self.checkpoints)
        except InputError:  # of the bucket, which is what has failed
            return f"what was saved is in {self.checkpoints}"
        return f"the last good checkpoint is {self.checkpoints / str(saved[-1])}" if saved else "there is no checkpoint"

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates on the held-out batches and records it; a signal in the middle leaves it to the next session."""
        with self._pause("evaluating"):
            sums: list[Any] = []
            for number, batch in enumerate(self.inputs.held_out):
                if self.stop() is not None:
                    return
                key = jax.random.fold_in(self._eval_key(), number)
                sums.append(jax.device_get(self.eval_fn(state.params, self._put(batch), key)))
            added = jax.tree.map(lambda *values: np.sum(np.asarray(values, np.float64), axis=0), *sums)
            self._write(step, self.summarise(added))
            if self.thoughts is not None:
                examples_key = jax.random.fold_in(self._eval_key(), random_streams.EXAMPLES)
                self.thoughts.write(step, state.params, self.inputs.held_out[0], examples_key)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(step, values | self._capacity())

    def _capacity(self) -> dict[str, Any]:
        """The capacity in force, for the records of a run that changes it."""
        return {"capacity": self.stage.capacity} if self.stage is not None and self._staged() else {}

    def _save_start(self, state: TrainState) -> None:
        """Saves what the run starts with: from here on it needs nothing but its own directory."""
        with self.progress.pause("saving"):
            self.writer.save(state, self.batches, {"seconds": 0.0, "data": self.data})
            self.writer.wait()
        self.last_saved, self.base = 0, None

    def _save(self, state: TrainState) -> None:
        seconds = self._seconds()
        with self._pause("saving"):
            if is_first():  # first the records, then the checkpoint: going on, it finds all of them
                bring_back(self.path)
            self.writer.save(state, self.batches, {"seconds": seconds, "data": self.data})
        self.last_saved = int(state.step)

    def _leave(self, state: TrainState) -> NoReturn:
        """Saves what isn't saved yet and raises `Interrupted`."""
        step, number = int(state.step), self.stop()
        if step != (self.last_saved or 0):
            self._save(state)
        self.writer.wait()
        raise Interrupted(number or signal.SIGINT, step, self.inputs.plan.steps)

    def _finish(self, parameters: int, skipped: int, seconds: float) -> TrainSummary:
        steps = self.inputs.plan.steps
        tokens = steps * self.run.train.batch_size * self.run.model.context
        summary = TrainSummary(
            directory=self.name,
            steps=steps,
            parameters=parameters,
            flops=self.inputs.plan.flops,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            compile_seconds=self.compile_seconds,
            skipped=skipped,
            evaluation=decide_first(lambda: self._last_evaluation(steps) or {}),
        )
        if is_first():
            write_summary(self.path, summary)
            bring_back(self.path)
        self.progress.say(describe(summary))
        if is_first() and draw_curves(self.path):
            self.progress.say(f"curves: {self.name}/{CURVES_FILE}")
        return summary

    def _announce(self, parameters: int) -> None:
        begun = "starts" if self.last_saved is None else f"goes on from step {self.start}"
        if self.base is not None:
            begun += f" from {self.run.init_from} (step {self.base.step})"
        steps, flops = self.inputs.plan.steps, short_number(self.inputs.plan.flops)
        self.progress.say(f"{self.name} {begun}: {short_number(parameters)} parameters, {steps} steps, {flops} FLOP")

    def _progress(self) -> TrainingProgress:
        tokens = self.run.train.batch_size * self.run.model.context
        return TrainingProgress(
            self.inputs.plan.steps, tokens, start=self.start, label=self.path.name, console=self.console
        )

    def _evaluation_due(self, step: int) -> bool:
        return self._due(step, self.run.train.eval_every)

    def _checkpoint_due(self, step: int) -> bool:
        return self._due(step, self.run.train.checkpoint_every)

    def _due(self, step: int, every: int) -> bool:
        return step == self.inputs.plan.steps or (every > 0 and step % every == 0)

    def _evaluated(self, step: int) -> bool:
        return bool(decide_first(lambda: self._last_evaluation(step) is not None))

    def _last_evaluation(self, step: int) -> dict[str, Any] | None:
        """What was measured on held-out text after this step, if it was."""
        for record in reversed(read_metrics(self.path)):
            if record["step"] == step and "eval_loss" in record:
                return {name: value for name, value in record.items() if name != "step"}
        return None

    def _eval_key(self) -> jax.Array:
        """Random key of evaluations: the same every time, and apart from training's."""
        return jax.random.fold_in(jax.random.key(self.run.train.seed), random_streams.EVALUATION)

    def _seconds(self) -> float:
        """Time in training steps up to now, over all sessions."""
        return self.earlier_seconds + time.perf_counter() - self.began - self.paused

    @contextmanager
    def _pause(self, what: str) -> Iterator[None]:
        """Shows `what` is being done, and leaves its time out of the run's."""
        began = time.perf_counter()
        with self.progress.pause(what):
            yield
        self.paused += time.perf_counter() - began
