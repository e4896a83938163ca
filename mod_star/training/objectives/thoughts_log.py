"""Thoughts to read: at every evaluation a few of them, decoded, go to RUN/thoughts.jsonl.

A record is one place of a held-out text: step, before and after (the text around it), thoughts, rewards (of each, less
the mean), gains (nats by which each improved the prediction of the next token).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from mod_star.data import Batch
from mod_star.runs.metrics import open_records
from mod_star.tokenization import Tokenizer
from mod_star.training.objectives.quiet_star import describe_examples

THOUGHTS_FILE = "thoughts.jsonl"


class ThoughtsLog:
    """Appends to RUN/thoughts.jsonl; a context manager.

    Args:
      run_dir: directory of the run.
      resume_step: as for `MetricsWriter`.
      tokenizer: to decode thoughts with.
      writes: False: only compute, where another process writes.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, tokenizer: Tokenizer, writes: bool = True) -> None:
        self._file = open_records(run_dir / THOUGHTS_FILE, resume_step) if writes else None
        self._tokenizer = tokenizer

    def compute_with(self, examples: Callable[..., Any] | None, n_true: int) -> None:
        """Sets what samples the thoughts from here on; call it before `write`.

        Args:
          examples: (params, batch, key) -> `quiet_star.Examples`, compiled; None: there are none.
          n_true: tokens of the text after a thought to show.
        """
        self._examples, self._n_true = examples, n_true

    def write(self, step: int, params: dict[str, Any], batch: Batch, key: jax.Array) -> None:
        """Samples thoughts in the first sequence of a batch and writes them down, if the objective has any."""
        if self._examples is None:
            return
        examples = jax.device_get(self._examples(params, {name: values[:1] for name, values in batch.items()}, key))
        if self._file is None:
            return
        for record in describe_examples(examples, np.asarray(batch["tokens"][0]), self._tokenizer, self._n_true):
            self._file.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError:  # on a full disk it fails again; what failed first says more
            if error is None:
                raise
