"""A run's config.json, read without JAX, which takes seconds to import; names of a run's files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mod_star.atomic_files import write_atomically
from mod_star.config import RunConfig, from_dict
from mod_star.errors import InputError

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
"""The result of a run; there once it is complete, see `mod_star.runs.summary`."""
PARTS_FILE = "parts.py"
TOKENIZER_DIRECTORY = "tokenizer"
DATA_FILE = "data.json"
"""What identifies the data, see `mod_star.data.identity`; runs that older versions made have none."""
CHANGES = "changes"
"""Entry of config.json and data.json: what became another value while the run went on, and after which step."""
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
    config = _read(path, "config")
    if config is None:
        raise InputError(f"{path / CONFIG_FILE}: cannot be read: it has no 'config'")
    return config


def read_starting_config(path: Path) -> RunConfig:
    """The configuration that a run which starts from this one begins with.

    The stored one, but for `routing.stages` and `thinking.stages` where training is complete: it has gone through them,
    and a further run is not to go through them again. Errors as `read_config`.
    """
    run = read_config(path)
    if (run.routing.stages or run.thinking.stages) and (path / SUMMARY_FILE).is_file():
        return replace(run, routing=replace(run.routing, stages=()), thinking=replace(run.thinking, stages=()))
    return run


def read_base_config(path: Path) -> RunConfig | None:
    """The configuration that the run's own began as, that of `init_from`; None if it has no such run.

    It may have changed there, or be gone; this one stays. `parts` name the run's own copy. Errors as `read_config`.
    """
    return _read(path, BASE)


def read_data(path: Path) -> list[dict[str, Any]] | None:
    """What identifies the data that the run was made with, or has gone on with; None: it isn't known.

    Raises:
      InputError: data.json is damaged.
    """
    try:
        stored = json.loads((path / DATA_FILE).read_text(encoding="utf-8"))
        return list(stored["sources"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / DATA_FILE}: cannot be read: {error}; delete it to go on unchecked") from error


def write_data(path: Path, sources: list[dict[str, Any]], step: int = 0) -> None:
    """Writes data.json; what it held is kept among its changes, with the step after which the data is another."""
    file = path / DATA_FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    changes = [] if before is None else [*before.get(CHANGES, []), {"after_step": step, "sources": before["sources"]}]
    write_json(file, {"sources": sources} | ({CHANGES: changes} if changes else {}))


def change_config(path: Path, run: RunConfig, step: int) -> None:
    """Writes the values of `run` that may change while a run goes on into its config.json, and what they were.

    Args:
      path: the run's directory.
      run: the configuration from here on: `train.steps`, `train.flops`, `data.source`.
      step: after which.
    """
    stored = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    now: dict[str, dict[str, Any]] = {
        "train": {"steps": run.train.steps, "flops": run.train.flops},
        "data": {"source": list(run.data.source)},
    }
    before: dict[str, Any] = {}
    for group, values in now.items():
        for name, value in values.items():
            if stored["config"][group].get(name) != value:
                before[f"{group}.{name}"] = stored["config"][group].get(name)
                stored["config"][group][name] = value
    if before:
        stored[CHANGES] = [*stored.get(CHANGES, []), {"after_step": step, "before": before}]
        write_json(path / CONFIG_FILE, stored)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file that is there as a whole or not at all. Errors as for `write_atomically`."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def _read(path: Path, entry: str) -> RunConfig | None:
    if not is_run(path):
        reason = f"it has no {CONFIG_FILE}" if path.is_dir() else "there is no such directory"
        raise InputError(f"{path}: is not a run ({reason})")
    try:
        stored: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        run = from_dict(stored[entry]) if entry in stored else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / CONFIG_FILE}: cannot be read: {error}") from error
    return run if run is None or run.parts is None else replace(run, parts=str(path / run.parts))
