"""A run's directory: what it holds, when it may be written, and how a trained model is loaded from it.

    RUN/config.json      the whole configuration, that of the run it started from, and the versions that started it
        tokenizer/       copy of the tokenizer
        data.json        what identifies the data, see `mod_star.data.identity`
        parts.py         copy of the user's parts, if any: a run needs nothing but its directory
        checkpoints/     see `mod_star.runs.checkpoints`
        metrics.jsonl    what was measured; tensorboard/ and curves.png show the same
        summary.json     the result, once training is complete
        .lock            held by the process that trains

config.json is written last: a directory without it is not a run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

import mod_star
from mod_star.atomic_files import UNFINISHED
from mod_star.config import LoraConfig, RunConfig, to_dict
from mod_star.distributed.sharding import all_devices, require_model_fits
from mod_star.errors import InputError, require
from mod_star.initial_params import initial_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.lora import merged
from mod_star.model.product_weights import quantised, require_weights
from mod_star.model.transformer import StackedParams
from mod_star.parts import load_parts
from mod_star.runs.buckets import (
    CHECKPOINTS_DIRECTORY,
    COPY_FILE,
    FETCHING_FILE,
    bring_back,
    checkpoints_of,
    working_copy,
)
from mod_star.runs.integrity import PARAMS_ITEM
from mod_star.runs.locks import LOCK_FILE, locked
from mod_star.runs.plain_paths import require_showable
from mod_star.runs.saved_checkpoints import choose_checkpoint, restore_params, stored_params
from mod_star.runs.stored_config import (
    BASE,
    CONFIG_FILE,
    DATA_FILE,
    PARTS_FILE,
    TOKENIZER_DIRECTORY,
    is_run,
    read_base_config,
    read_config,
    write_data,
    write_json,
)
from mod_star.stages import at_capacity, config_at
from mod_star.storage import is_address
from mod_star.tokenization import Tokenizer, load_saved_tokenizer, save_tokenizer

if TYPE_CHECKING:  # importing data takes a second and 30 MB, which sampling need not pay
    from mod_star.data.identity import Identity

__all__ = [
    "CHECKPOINTS_DIRECTORY",
    "CONFIG_FILE",
    "LOCK_FILE",
    "PARTS_FILE",
    "TOKENIZER_DIRECTORY",
    "LoadedRun",
    "created",
    "is_run",
    "load_run",
    "locked",
    "place_beside",
    "read_base_config",
    "read_config",
    "require_creatable",
    "require_vocabulary",
]

OF_A_WORKING_COPY = {COPY_FILE, FETCHING_FILE}
BEFORE_CONFIG = {LOCK_FILE, TOKENIZER_DIRECTORY, PARTS_FILE, CONFIG_FILE + UNFINISHED} | OF_A_WORKING_COPY
BEFORE_CONFIG |= {DATA_FILE, DATA_FILE + UNFINISHED}
"""What a directory can hold that a new run was about to be made in when its process was killed."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what belongs to it."""

    config: RunConfig
    """As stored; with stages, capacity and length of thoughts are those of the checkpoint, and there are no stages.
    Adapters are merged into the weights, and `lora` is its default."""
    tokenizer: Tokenizer
    decoder: Decoder
    params: StackedParams
    """float32 parameters, a plain nested dict; weights of matrix products may be in 8 bits."""
    step: int
    """Step of the checkpoint that the parameters are from."""
    mesh: Mesh | None = None
    """Where the parameters lie, if on several devices."""

    @property
    def model(self) -> Model:
        """The model alone: what generation, scoring and evaluation are given."""
        thinking = self.config.thinking if "thinking" in self.params else None
        return Model(self.decoder, self.params, self.tokenizer, thinking, self.mesh)


def load_run(
    directory: str | Path,
    step: int | None = None,
    option: str | None = "--step",
    mesh: Mesh | None = None,
    capacity: float | None = None,
    weights: str | None = None,
    on_disk: bool = False,
) -> LoadedRun:
    """Loads a run's model from a checkpoint.

    Args:
      directory: of the run; it may be in a bucket (gs://).
      step: of the checkpoint; None: the newest.
      option: what the command calls `step`, for the error message; None: it has no such option.
      mesh: where the parameters lie, as they do in training; None: on one device.
      capacity: one of the run's `routing.budgets` to use the model at; None: its `routing.capacity`.
      weights: int8: quantise the weights of matrix products, for generating and scoring (`mod_star.model.int8`); None:
        as they are stored.
      on_disk: leave the parameters on disk where they can be read array by array, which those of imported and upcycled
        models can: `params` are `mod_star.runs.params_file.StoredArray`s then, for a `Generator` alone.

    Raises:
      InputError: the directory isn't a run, has no checkpoint, the checkpoint's parameters are damaged (an older one
        is named), or the model was not trained for the capacity. The rest of the checkpoint, the optimizer's state, is
        not looked at.
    """
    require_weights(weights)
    path = working_copy(directory)
    run = read_config(path)
    if capacity is not None:
        run = at_capacity(run, capacity, "--capacity")
    all_devices()  # or it is told why not, rather than by whatever asks for one first
    if mesh is not None:
        require_model_fits(run.model, mesh)
    checkpoints = checkpoints_of(path)
    with ThreadPoolExecutor(1) as pool:  # a large tokenizer takes as long as the checksums of 135M parameters
        loading = pool.submit(load_saved_tokenizer, path / TOKENIZER_DIRECTORY, run.data.tokenizer)
        chosen = choose_checkpoint(checkpoints, step, option, PARAMS_ITEM)
        if chosen is None:
            raise InputError(f"{path}: has no checkpoint yet")
        tokenizer = loading.result()
    require_vocabulary(run, tokenizer)
    run = config_at(run, chosen)
    decoder = Decoder(run.model, run.routing, load_parts(run.parts))
    like = jax.eval_shape(lambda: initial_params(decoder, run, tokenizer))
    left_there = on_disk and mesh is None and weights is None and not run.lora.rank
    params = stored_params(checkpoints, chosen, like) if left_there else None
    if params is None:
        params = merged(restore_params(checkpoints, chosen, like, mesh), run.lora, donate=True)
    if weights is not None:
        params = quantised(decoder, params, donate=True)
    return LoadedRun(replace(run, lora=LoraConfig()), tokenizer, decoder, params, chosen, mesh)


def require_vocabulary(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError if the tokenizer has ids that the model has no embedding for."""
    V = run.model.vocab_size
    require(tokenizer.vocab_size <= V, "model.vocab_size", V, f"the tokenizer has {tokenizer.vocab_size} ids")


def require_creatable(path: Path) -> None:
    """Raises InputError unless a new run can be made at `path`: absent or empty, and writable.

    Where another process has made a run since the caller looked, that is what the error says.
    """
    if is_address(path):
        raise InputError(f"{path}: must be a directory; only mod-star train makes runs in buckets")
    require_showable(path)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{path}: must be a directory, and is a file")
        try:
            names = {entry.name for entry in path.iterdir()}
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        left_by_a_killed_start = names <= BEFORE_CONFIG and not names.isdisjoint((LOCK_FILE, COPY_FILE))
        if names and not left_by_a_killed_start:
            if is_run(path):
                with locked(path):  # which raises the error of a run that is being trained
                    raise _made_meanwhile(path)
            raise InputError(f"{path}: is neither empty nor a run (it has no {CONFIG_FILE}); choose another directory")
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{path}: cannot be made: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {'is' if existing == path.absolute() else f'{existing} is'} not writable")


def _made_meanwhile(path: Path) -> InputError:
    return InputError(f"{path}: another process has made a run here in the meantime; the same command goes on with it")


def place_beside(path: Path) -> Path:
    """Where a directory is made that is moved to `path` when it is whole: a hidden neighbour, always the same one.

    Raises:
      InputError: `path` is the working directory, which would be another one then.
    """
    if path.resolve() == Path.cwd():
        raise InputError(f"{path}: is the working directory, which cannot be replaced; name one inside it")
    path = path.resolve()
    name = path.name
    if len(name.encode(errors="surrogateescape")) > 200:  # a name has at most 255 bytes
        name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return path.with_name(f".{name}.new")


@contextmanager
def created(
    path: Path, run: RunConfig, tokenizer: Tokenizer, base: RunConfig | None = None, data: Identity | None = None
) -> Iterator[RunConfig]:
    """Makes the directory of a new run, yields its stored configuration, and keeps others out until left.

    What was made is removed again if it can't be completed.

    Args:
      path: where; see `require_creatable`.
      run: a configuration that has been checked in full, `model.vocab_size` included.
      tokenizer: the tokenizer to copy.
      base: configuration of the run that this one starts from, to be kept for `read_base_config`.
      data: what identifies its data; None: it has none, or it isn't known.

    Raises:
      InputError: the directory can't be written, or another process was faster.
    """
    require_creatable(path)
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}") from error
    with locked(path):
        if is_run(path):
            raise _made_meanwhile(path)
        require_creatable(path)
        try:
            (path / DATA_FILE).unlink(missing_ok=True)  # a killed start may have left another
            if data is not None:
                write_data(path, data)
            _write(path, run, tokenizer, base)
            bring_back(path)
        except BaseException as error:
            shutil.rmtree(path / TOKENIZER_DIRECTORY, ignore_errors=True)
            for name in (
                PARTS_FILE,
                CONFIG_FILE + UNFINISHED,
                CONFIG_FILE,
                DATA_FILE + UNFINISHED,
                DATA_FILE,
                LOCK_FILE,
            ):
                (path / name).unlink(missing_ok=True)
            if new:
                path.rmdir()
            if isinstance(error, OSError):
                raise InputError(f"{error.filename or path}: cannot be written: {error.strerror}") from error
            raise
        yield read_config(path)


def _write(path: Path, run: RunConfig, tokenizer: Tokenizer, base: RunConfig | None) -> None:
    shutil.rmtree(path / TOKENIZER_DIRECTORY, ignore_errors=True)  # a killed start may have left others
    (path / PARTS_FILE).unlink(missing_ok=True)
    save_tokenizer(tokenizer, path / TOKENIZER_DIRECTORY)
    if run.parts is not None:
        original, _, name = run.parts.rpartition(":")
        shutil.copyfile(original, path / PARTS_FILE)
        run = replace(run, parts=f"{PARTS_FILE}:{name}")
    versions = {"mod_star": mod_star.__version__, "jax": jax.__version__, "python": platform.python_version()}
    configs = {"config": to_dict(run)}
    if base is not None:  # its parts are the same, and the copy here outlives the one there
        configs[BASE] = to_dict(replace(base, parts=run.parts))
    write_json(path / CONFIG_FILE, versions | configs)  # last: it makes the directory a run
