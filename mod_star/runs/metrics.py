"""What a run measured: one JSON record per line in metrics.jsonl, and the same numbers as TensorBoard events.

Names of the values in a record (per-layer lists have one entry per routed block; those of a run that learns to think
are listed with `mod_star.training.objectives.quiet_star.quiet_star_metrics` and `summarise_thinking`):

  every `train.log_every` steps   loss, lm_loss, grad_norm, learning_rate, tokens_per_second, train_flops, skipped,
                                  predictor_accuracy, routed_fraction[], gate_mean[], gate_std[], routing_entropy[]
  every evaluation                eval_loss (routing as in training), eval_loss_causal, causal_gap,
                                  eval_predictor_accuracy; a dense model has eval_loss alone
  both, with routing.stages       capacity (in force at that step: an evaluation is at the capacity just trained at)
  both, with thinking.stages      thought_length (the same)

`tokens_per_second` depends on the clock; everything else is the same in a run that was interrupted and resumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from mod_star.atomic_files import write_atomically
from mod_star.errors import InputError
from mod_star.runs.tensorboard import EventFile

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
# JSON has no such numbers; as strings the line stays readable for every parser, and `read_metrics` turns them back.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Value = float | int | bool | list[float] | list[int] | list[bool]
"""What a record holds under a name: a number, or a list with one number per routed block or decile."""


class MetricsWriter:
    """Appends records to `RUN/metrics.jsonl` (flushed line by line) and to the TensorBoard events in `RUN/tensorboard`.

    A context manager. For a resumed run's file to equal an uninterrupted one's, write what belongs to step n before
    the checkpoint of step n is saved: whatever an earlier attempt wrote after step n is dropped here.

    Args:
      run_dir: directory of the run; made if absent.
      resume_step: step of the checkpoint that the run continues from; records of later steps are dropped, and
        TensorBoard is told to forget them. None: the run starts from the beginning, nothing earlier is kept.

    Raises:
      InputError: on resume, a damaged line within the file.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open_records(run_dir / METRICS_FILE, resume_step)
        self._events = EventFile(run_dir / TENSORBOARD_DIRECTORY, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one record and gives it back as plain Python values.

        Args:
          step: the optimizer step the values belong to, counted from 1 (0: before the first).
          values: name -> scalar or one-dimensional list, as Python numbers, NumPy or JAX arrays of any float, integer
            or bool type. JAX arrays are waited for.

        Returns:
          {"step": step, name: number or list, ...}.

        Raises:
          ValueError: a value is not a number or has more than one dimension.
          OSError: it can't be written, because the disk is full for one.
        """
        record: dict[str, Any] = {"step": int(step)}
        for name, value in values.items():
            record[name] = _plain(name, value)
        self._file.write(json.dumps({name: _json(value) for name, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()
        scalars: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, list):
                part = "decile" if name.endswith("_by_decile") else "layer"
                scalars |= {f"{name}/{part}_{layer}": float(entry) for layer, entry in enumerate(value)}
            elif name != "step":
                scalars[name] = float(value)
        self._events.write(record["step"], scalars)
        return record

    def close(self) -> None:
        """Flushes and closes both files. Closing twice is harmless."""
        try:
            self._file.close()
        finally:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:  # on a full disk it fails again; what failed first says more
            if error is None:
                raise


def open_records(path: Path, resume_step: int | None) -> TextIO:
    """Opens a file of JSON records, one a line and each with its "step", to append to.

    Records of steps after `resume_step` are dropped; all of them, if it is None.
    """
    lines = []
    if resume_step is not None and path.exists():
        lines = [line for line, record in _records(path) if record["step"] <= resume_step]
    write_atomically(path, "".join(lines))  # a crash here loses nothing
    return path.open("a", encoding="utf-8")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All records of a run, in the order written; NaN and infinities are floats again.

    A last line that was cut off by a crash is left out.

    Raises:
      InputError: there is no metrics.jsonl, or a line within it is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{run_dir}: is not the directory of a run (it has no {METRICS_FILE})")
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (line with its newline, record); stops before a last line without a newline."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise InputError(f"{path}, line {number}: not a metrics record: {line.strip()[:60]!r}")
            yield line, {name: _number(value) for name, value in record.items()}


def _plain(name: str, value: Any) -> Value:
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and the float8 types
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf" or array.ndim > 1:
        raise ValueError(f"metric {name!r} must be a number or a list of numbers, not {value!r}")
    plain: Value = array.tolist()
    return plain


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
