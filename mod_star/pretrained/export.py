"""A dense run becomes a Hugging Face directory, which transformers loads with the same logits."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mod_star.errors import InputError
from mod_star.model.lora import require_merged
from mod_star.pretrained.build import Place, places, take_tensor
from mod_star.pretrained.byte_tokenizer import byte_tokenizer_json
from mod_star.pretrained.families import FAMILIES, family_of
from mod_star.pretrained.hf_config import CONFIG_NAME, hf_config
from mod_star.pretrained.hf_directory import TOKENIZER_NAME
from mod_star.pretrained.model_card import CARD_NAME, model_card
from mod_star.pretrained.safetensors_files import INDEX_NAME, SINGLE_NAME
from mod_star.runs.directory import LoadedRun, place_beside, require_creatable
from mod_star.tokenization import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

ExportType = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 2 * 1024**3
"""A file of weights has at most so many bytes (or one tensor). While it is written, its tensors are in memory twice."""


def require_exportable(loaded: LoadedRun) -> str:
    """The family of a run's model.

    Raises:
      InputError: no other library has this network: it routes, it has experts, it thinks, it has a user's parts, or a
        combination of options that no family has; or its adapters are not merged, which a dense model would lack.
    """
    run = loaded.config
    require_merged(loaded.params)
    if run.routing.every:
        raise InputError(
            f"routing.every = {run.routing.every}: a Mixture-of-Depths model cannot be exported: transformers has no "
            "network that routes tokens around blocks; only dense models can be"
        )
    if run.model.experts:
        raise InputError(
            f"model.experts = {run.model.experts}: a model with experts cannot be exported: no family that is written "
            "chooses among experts as this network does"
        )
    if "thinking" in loaded.params:
        raise InputError(
            "train.objective = 'quiet_star': a thinking model cannot be exported: transformers has no mixing head and "
            "no thoughts; only models that do not think can be"
        )
    if run.parts is not None:
        raise InputError(
            f"parts = {run.parts!r}: a model with parts of your own cannot be exported: transformers lacks them"
        )
    return family_of(run.model)


def export_model(
    loaded: LoadedRun,
    path: Path,
    dtype: ExportType = "float32",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda count: None,
    run: Path | None = None,
) -> list[Path]:
    """Writes the Hugging Face directory `path` with its model card, all of it or nothing.

    Args:
      loaded: a run's model.
      path: absent or empty.
      dtype: type of the weights in the files.
      shard_bytes: see `SHARD_BYTES`.
      progress: called with the number of elements written, after each tensor that is ready and each file.
      run: the run's directory, for what the card says of evaluations; None: not known.

    Returns:
      The files, in `path`.

    Raises:
      InputError: the model can't be exported (see `require_exportable`) or not in this type, or `path` can't be
        written.
    """
    family = require_exportable(loaded)
    require_creatable(path)
    beside = place_beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        _write_weights(beside, family, loaded.params, dtype, shard_bytes, progress)
        _write_tokenizer(beside, loaded.tokenizer, loaded.config.model.context)
        ends = list(loaded.tokenizer.end_ids)
        tokens = {"bos_token_id": loaded.tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
        _write_json(beside / "generation_config.json", tokens)
        _write_json(beside / CONFIG_NAME, hf_config(family, loaded.config.model) | tokens | {"torch_dtype": dtype})
        card = model_card(loaded, family, path.resolve().name, dtype, run)
        (beside / CARD_NAME).write_text(card, encoding="utf-8")
        os.rename(beside, path.resolve())
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{path}: cannot be written: {reason or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(path.iterdir())


def _write_weights(
    directory: Path,
    family: str,
    params: dict[str, Any],
    dtype: ExportType,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    shards = list(_shards(list(places(FAMILIES[family].names, params)), kind.itemsize, shard_bytes))
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for place in shard:
            tensors[place.tensor] = _converted(take_tensor(params, place), kind, place.tensor)
            progress(tensors[place.tensor].size)
        save_file(tensors, directory / name, {"format": "pt"})  # transformers asks for this word
        with safe_open(directory / name, "np") as written:  # what can't be opened again has not been written
            assert set(written.keys()) == tensors.keys(), name
        os.chmod(directory / name, 0o666 & directory.stat().st_mode)  # save_file leaves it to its owner alone
    if len(shards) > 1:
        size = sum(math.prod(place.shape) for shard in shards for place in shard) * kind.itemsize
        where = {place.tensor: name for name, shard in zip(names, shards, strict=True) for place in shard}
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": where})


def _converted(array: np.ndarray, kind: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = array.astype(kind, copy=False)
    if not np.isfinite(converted).all():
        raise InputError(
            f"--dtype = {kind.name!r}: tensor {name} has values out of its range; take float32 or bfloat16"
        )
    return converted


def _shards(tensors: list[Place], itemsize: int, most: int) -> Iterator[list[Place]]:
    shard: list[Place] = []
    room = most
    for place in tensors:
        size = math.prod(place.shape) * itemsize
        if shard and size > room:
            yield shard
            shard, room = [], most
        shard.append(place)
        room -= size
    yield shard


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, context: int) -> None:
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.starts_with_bos,
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = tokenizer.content
        named = {"bos_token": tokenizer.special.bos_id, "eos_token": tokenizer.special.eos_id}
        spelled: Callable[[int], str | None] = tokenizers.Tokenizer.from_str(content).id_to_token
    else:
        assert isinstance(tokenizer, ByteTokenizer)
        content, named = byte_tokenizer_json(), {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        spelled = tokenizer.token_text
    values |= {key: spelled(token) for key, token in named.items() if token is not None}
    (directory / TOKENIZER_NAME).write_text(content, encoding="utf-8", newline="")
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
    _write_json(directory / "tokenizer_config.json", values)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
