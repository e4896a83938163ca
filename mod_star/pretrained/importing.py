"""A pretrained model becomes a run directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mod_star.config import DataConfig, RunConfig
from mod_star.errors import InputError, require
from mod_star.home import expanded
from mod_star.pretrained.build import DENSE, build_params, check_source
from mod_star.pretrained.fit_tokenizer import token_without_row
from mod_star.pretrained.hf_config import CONFIG_NAME
from mod_star.pretrained.hf_directory import download, open_hf
from mod_star.pretrained.params_run import require_free, write_params_run
from mod_star.pretrained.source import Source
from mod_star.runs.directory import require_vocabulary
from mod_star.tokenization import HuggingFaceTokenizer

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_source(spec: str) -> Source:
    """Opens a directory of Hugging Face's, a GGUF file, or a model of the hub ("org/name"); reads no weights yet.

    Raises:
      InputError: it is none of these, damaged, or of a kind that is not supported.
    """
    path = expanded(spec)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file() and (files := sorted(path.glob("*.gguf"))):
            names = ", ".join(file.name for file in files[:3])
            raise InputError(f"{path}: has no {CONFIG_NAME}, and {names}; name one .gguf file")
        return open_hf(path)
    if path.is_file():
        if path.suffix == ".gguf":
            from mod_star.pretrained.gguf_source import open_gguf

            return open_gguf(path)
        if path.suffix == ".safetensors":
            raise InputError(f"{path}: name its directory, which has config.json and tokenizer.json beside it")
        raise InputError(
            f"{path}: must be a directory with config.json and .safetensors files, or a .gguf file (pickles such as "
            "pytorch_model.bin are never loaded)"
        )
    if _HUB_NAME.fullmatch(spec):
        return open_hf(download(spec))
    raise InputError(f"{spec}: there is no such file or directory, and it is not a hub name (org/name)")


def run_config(source: Source, context: int | None, dtype: Literal["float32", "bfloat16"] = "float32") -> RunConfig:
    """The configuration of the run that a source becomes; arguments as for `import_model`.

    Raises:
      InputError: the context is longer than the model's, or the tokenizer has ids without an embedding.
    """
    longest = source.config.context
    if context is not None:
        require(2 <= context <= longest, "--context", context, f"must lie in [2, {longest}], the model's own")
    model = replace(source.config, context=context or longest, dtype=dtype)
    tokenizer = str(source.path / "tokenizer.json" if source.path.is_dir() else source.path)
    run = RunConfig(model=model, routing=DENSE, data=DataConfig(tokenizer=tokenizer))
    if isinstance(source.tokenizer, HuggingFaceTokenizer) and source.tokenizer.vocab_size > model.vocab_size:
        rows, ids = model.vocab_size, source.tokenizer.vocab_size
        last = token_without_row(source.tokenizer, rows)
        raise InputError(
            f"{source.path}: model.vocab_size = {rows}: the tokenizer has {ids} ids, and text can give {last}"
        )
    require_vocabulary(run, source.tokenizer)
    return run


def import_model(
    source: Source,
    path: Path,
    context: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int], None] = lambda count: None,
) -> RunConfig:
    """Makes the run directory `path` of a pretrained model, all of it or nothing.

    Args:
      source: from `open_source`.
      path: absent or empty.
      context: longest sequence of the run; None: the longest that the model was made for.
      dtype: type of activations.
      progress: called with the number of elements read, after each tensor.

    Returns:
      The configuration as stored.

    Raises:
      InputError: `path` is taken or can't be written, or the source doesn't fit (see `build_params`, `run_config`).
    """
    require_free(path)
    run = run_config(source, context, dtype)
    check_source(source)
    return write_params_run(path, run, source.tokenizer, build_params(source, progress))
