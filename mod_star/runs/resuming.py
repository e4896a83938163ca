"""Whether a configuration is that of a run on disk, so that its training may go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mod_star.config import RunConfig, to_dict
from mod_star.errors import InputError
from mod_star.runs.stored_config import (
    PARTS_FILE,
    TOKENIZER_DIRECTORY,
    is_run,
    read_base_config,
    read_config,
    read_starting_config,
)
from mod_star.storage import is_address
from mod_star.tokenization import load_saved_tokenizer, load_tokenizer


def resumed_config(path: Path, run: RunConfig) -> RunConfig:
    """The stored configuration, if it is the one that is asked for but for what may change while a run goes on.

    That is `train.steps` and `train.flops`, see `mod_star.training.extension`, and `data.source` where the paths of
    files are others: the caller must see to it that they hold the same. A file of parts or a tokenizer that has changed
    since counts; where it stands, or whether it is still there, doesn't matter, the run has its own copy. Nor does what
    became of the run that it started from.

    Raises:
      InputError: they differ; the message lists field: stored → asked for.
    """
    stored = read_config(path)
    if run.model.vocab_size == 0:  # what "from the tokenizer" came to is in the stored one
        run = replace(run, model=replace(run.model, vocab_size=stored.model.vocab_size))
    if same_parts(stored.parts, run.parts) or _parts_of_base(stored, run):
        run = replace(run, parts=stored.parts)
    if _same_base(path, stored, run):
        run = replace(run, init_from=stored.init_from)
    if _same_tokenizer(path, stored, run):
        run = replace(run, data=replace(run.data, tokenizer=stored.data.tokenizer))
    changed = differences(to_dict(stored), to_dict(run))
    free = {"train.steps", "train.flops"} | ({"data.source"} if _may_be_moved(stored, run) else set())
    if all(difference.partition(": ")[0] in free for difference in changed):
        stored = replace(
            stored,
            train=replace(stored.train, steps=run.train.steps, flops=run.train.flops),
            data=replace(stored.data, source=run.data.source),
        )
        changed = []
    spec = run.data.tokenizer
    # A run that started from another has that one's tokenizer, whatever is in this file.
    if stored.init_from is None and spec == stored.data.tokenizer and Path(spec).exists():
        copy = load_saved_tokenizer(path / TOKENIZER_DIRECTORY, spec)
        if load_tokenizer(spec).fingerprint != copy.fingerprint:
            changed.append(f"data.tokenizer: {spec} has changed")
    if changed:
        raise InputError(f"{path}: holds a run of another configuration: {'; '.join(changed)}")
    return stored


def _may_be_moved(stored: RunConfig, new_run: RunConfig) -> bool:
    """Whether the sources can be the same files at other places: no embedded text or prepared dataset is another."""
    old, new = stored.data.source, new_run.data.source
    named = lambda spec: spec == "python-docs" or spec.startswith("tfds:")  # noqa: E731
    return len(old) == len(new) and not any(a != b and (named(a) or named(b)) for a, b in zip(old, new, strict=True))


def _same_base(path: Path, stored: RunConfig, new_run: RunConfig) -> bool:
    """Whether two names are those of one run to start from; one that is gone from where it was may be found elsewhere,
    if its configuration is what it was."""
    old, new = stored.init_from, new_run.init_from
    if not (old and new):
        return False
    if is_address(old) or is_address(new):
        return Path(old) == Path(new)
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    if is_run(Path(old)) or not is_run(Path(new)):
        return False
    copied_base = read_base_config(path)
    return copied_base is not None and replace(copied_base, parts=None) == replace(
        read_starting_config(Path(new)), parts=None
    )


def _same_tokenizer(path: Path, stored: RunConfig, run: RunConfig) -> bool:
    """Whether another file is asked for that holds the run's tokenizer."""
    spec = run.data.tokenizer
    if "bytes" in (spec, stored.data.tokenizer) or spec == stored.data.tokenizer or not Path(spec).exists():
        return False
    copy = load_saved_tokenizer(path / TOKENIZER_DIRECTORY, stored.data.tokenizer)
    return bool(load_tokenizer(spec).fingerprint == copy.fingerprint)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The values that differ between two nested dicts, as "group.field: old → new"."""
    lines = []
    for name in old:
        if isinstance(old[name], Mapping):
            lines += differences(old[name], new[name], f"{prefix}{name}.")
        elif old[name] != new[name]:
            lines.append(f"{prefix}{name}: {old[name]} → {new[name]}")
    return lines


def same_parts(stored: str | None, reference: str | None) -> bool:
    """Whether `reference` names what the run's copy was made from, as far as that file still exists."""
    if stored is None or reference is None:
        return stored is reference
    (copy, _, old_name), (original, _, new_name) = stored.rpartition(":"), reference.rpartition(":")
    if old_name != new_name:
        return False
    return not Path(original).is_file() or Path(original).read_bytes() == Path(copy).read_bytes()


def _parts_of_base(stored: RunConfig, run: RunConfig) -> bool:
    """Whether the parts asked for are those of the run that this one started from, whatever is there now."""
    if stored.parts is None or run.parts is None or run.init_from is None:
        return False
    original, _, name = run.parts.rpartition(":")
    return Path(original) == Path(run.init_from) / PARTS_FILE and name == stored.parts.rpartition(":")[2]
