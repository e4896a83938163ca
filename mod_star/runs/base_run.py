"""The run that another one starts from: loads it, and refuses fields that do not fit its parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.runs.buckets import working_copy
from mod_star.runs.directory import TOKENIZER_DIRECTORY, LoadedRun, load_run, read_config
from mod_star.runs.resuming import same_parts
from mod_star.runs.stored_config import read_starting_config
from mod_star.tokenization import Tokenizer, load_tokenizer

# What the parameters compute with. All other fields may differ: they say how fast, how exactly or how often it is done.
MODEL_FIELDS: tuple[str, ...] = ("vocab_size", "width", "layers", "heads", "norm_eps", "tie_embeddings")
MODEL_FIELDS += ("rope_theta", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
MODEL_FIELDS += ("rope_original_context", "sliding_window", "qkv_bias", "qk_norm", "experts")
EXPERT_FIELDS = ("experts_active", "experts_null", "experts_null_kind", "experts_balance")
ROUTED_FIELDS: tuple[str, ...] = (
    "gate",
    "causal_rule",
    "selection",
    "predictor_width",
    "first",
    "router_norm",
    "keep_key_values",
)
ROUTED_FIELDS += ("adapter_rank",)


def load_base(run: RunConfig, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None) -> LoadedRun | None:
    """Loads the newest checkpoint of `run.init_from`, if that is given, and checks that `run` can start from it.

    Args:
      run: the new run; `model.vocab_size` 0 stands for that of the other.
      tokenizer: the new run's own, if it has been made already; None: the one that `data.tokenizer` names. Where that
        is what the other run's configuration says, the copy in its directory is meant, not the original.
      mesh: where its parameters are to lie; None: one device.

    Returns:
      The other run; its `config` is the one that the new run's defaults are from, see `read_starting_config`.

    Raises:
      InputError: it is not a run, has no checkpoint or a damaged one, has another tokenizer, or a field that its
        parameters depend on is different.
    """
    if run.init_from is None:
        return None
    path = working_copy(run.init_from)
    _require_same_function(run, read_config(path))
    base = load_run(path, option=None, mesh=mesh)
    spec = run.data.tokenizer
    if tokenizer is None and spec != base.config.data.tokenizer:
        tokenizer = load_tokenizer(spec)
    if tokenizer is not None and tokenizer.fingerprint != base.tokenizer.fingerprint:
        base_tokenizer = base.config.data.tokenizer
        shown = repr(base_tokenizer) if base_tokenizer == "bytes" else f"a copy is in {path / TOKENIZER_DIRECTORY}"
        raise InputError(f"data.tokenizer = {spec!r}: must be that of init_from = {run.init_from!r} ({shown})")
    return replace(base, config=read_starting_config(path))


def _require_same_function(run: RunConfig, base: RunConfig) -> None:
    """Raises InputError, which lists them all, if fields differ that the parameters depend on."""
    if run.model.vocab_size == 0:
        run = replace(run, model=replace(run.model, vocab_size=base.model.vocab_size))
    routed = run.routing.every > 0 or base.routing.every > 0
    thinks = run.thinks and base.thinks  # what a base has not learned begins anew
    fields, needed = _defining(run, routed, thinks), _defining(base, routed, thinks)
    if thinks and base.thinking.decider_width:  # where there is none, one may be added
        name = "thinking.decider_width"
        fields[name], needed[name] = run.thinking.decider_width, base.thinking.decider_width
    if run.model.experts and base.model.experts:
        fields, needed = fields | _defining_experts(run), needed | _defining_experts(base)
    differ = [f"{name} = {fields[name]!r}: must be {needed[name]!r}" for name in fields if fields[name] != needed[name]]
    if not same_parts(base.parts, run.parts):
        differ.append(f"parts = {run.parts!r}: must be {base.parts!r}, or a file of the same content")
    if differ:
        raise InputError(f"{'; '.join(differ)}, as in init_from = {run.init_from!r}")


def _defining(run: RunConfig, routed: bool, thinks: bool) -> dict[str, Any]:
    """The fields that the parameters depend on, by name; a size that is None counts as what it stands for."""
    model = run.model
    fields = {f"model.{name}": getattr(model, name) for name in MODEL_FIELDS}
    fields |= {"model.kv_heads": model.key_heads, "model.head_dim": model.head_size}
    fields |= {"model.mlp_width": model.hidden_width}
    fields["routing.every"] = run.routing.every
    if routed:
        fields |= {f"routing.{name}": getattr(run.routing, name) for name in ROUTED_FIELDS}
    if thinks:
        fields["thinking.mixing"] = run.thinking.mixing
    return fields


def _defining_experts(run: RunConfig) -> dict[str, Any]:
    """The same of experts."""
    fields = {f"model.{name}": getattr(run.model, name) for name in EXPERT_FIELDS}
    return fields | {"model.experts_width": run.model.expert_width}
