"""A run's config.json, read without JAX, which takes seconds to import; names of a run's files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mod_star.config import RunConfig, from_dict
from mod_star.errors import InputError

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
"""The result of a run; there once it is complete, see `mod_star.training.summary`."""
PARTS_FILE = "parts.py"
TOKENIZER_DIRECTORY = "tokenizer"
BASE = "base"
"""Entry of config.json beside "config": the configuration, at the time, of the run that this one started from."""


def is_run(path: Path) -> bool:
    """Whether the directory holds a run."""
    return os.path.isfile(path / CONFIG_FILE)  # unlike Path.is_file, False for a name that is too long, too


def read_config(path: Path) -> RunConfig:
    """The stored configuration; its `parts` name the run's own copy.

    Raises:
      InputError: the directory isn't a run, or its config.json is damaged.
    """
    found = _read(path, "config")
    if found is None:
        raise InputError(f"{path / CONFIG_FILE}: cannot be read: it has no 'config'")
    return found


def read_starting_config(path: Path) -> RunConfig:
    """The configuration that a run which starts from this one begins with.

    The stored one, but for `routing.stages` where training is complete: it has gone through them, and a further run is
    not to raise the capacity again. Errors as `read_config`.
    """
    run = read_config(path)
    if run.routing.stages and (path / SUMMARY_FILE).is_file():
        return replace(run, routing=replace(run.routing, stages=()))
    return run


def read_base_config(path: Path) -> RunConfig | None:
    """The configuration that the run's own began as, that of `init_from`; None if it has no such run.

    It may have changed there, or be gone; this one stays. `parts` name the run's own copy. Errors as `read_config`.
    """
    return _read(path, BASE)


def _read(path: Path, entry: str) -> RunConfig | None:
    if not is_run(path):
        found = f"it has no {CONFIG_FILE}" if path.is_dir() else "there is no such directory"
        raise InputError(f"{path}: is not a run ({found})")
    try:
        stored: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        run = from_dict(stored[entry]) if entry in stored else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / CONFIG_FILE}: cannot be read: {error}") from error
    return run if run is None or run.parts is None else replace(run, parts=str(path / run.parts))
