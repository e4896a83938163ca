"""A run that was not trained here: a directory like any other, whose checkpoint 0 holds parameters only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.runs.checkpoints import save_params
from mod_star.runs.directory import (
    CHECKPOINTS_DIRECTORY,
    LOCK_FILE,
    created,
    is_run,
    place_beside,
    read_config,
    require_creatable,
)
from mod_star.tokenization import Tokenizer


def require_free(path: Path) -> None:
    """Raises InputError unless a new run can be made there, see `require_creatable`; a run is named as what it is."""
    if is_run(path):
        raise InputError(f"{path}: is a run already; choose another directory")
    require_creatable(path)
    place_beside(path)


def write_params_run(path: Path, run: RunConfig, tokenizer: Tokenizer, params: dict[str, Any]) -> RunConfig:
    """Makes a run directory of a configuration, a tokenizer and parameters, all of it or nothing.

    It can be sampled from and evaluated like any run, and trained on with `init_from`.

    Args:
      path: the directory; absent or empty.
      run: the configuration, `model.vocab_size` included.
      tokenizer: the tokenizer to copy.
      params: float32 parameters, arrays of JAX or NumPy.

    Returns:
      The configuration as stored.

    Raises:
      InputError: the directory can't be made or written.
    """
    require_free(path)
    # Made beside it and moved into place; what a killed process left there is in the way of nobody.
    beside = place_beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with created(beside, run, tokenizer):
            save_params(beside / CHECKPOINTS_DIRECTORY, params)
        for lock in (beside / LOCK_FILE, path / LOCK_FILE):
            lock.unlink(missing_ok=True)
        os.rename(beside, path.resolve())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read_config(path)
