"""What a dense model's blocks do to a text, and the routers and adapters of an upcycled model, fitted to that.

A block changes a token by its delta. Three things follow from the deltas of all tokens, in closed form and in float64:

- how much each block changes its input, 1 - cos: the less, the sooner tokens may pass it by (arXiv 2403.03853 scores
  whole blocks so);
- the adapter of the skip path, the linear map of rank R from the token at unit RMS to the delta with the least squared
  error, relative to the token's size: reduced-rank regression;
- the router, the linear map with the least squared error to the logarithm of what the adapter leaves of the delta.

The adapter is fitted twice: to all tokens, for the router; then to those that the router lets pass by.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mod_star.config import DataConfig, RunConfig
from mod_star.data import train_batches
from mod_star.errors import InputError, require
from mod_star.model.layers import lookup
from mod_star.runs.directory import LoadedRun

SEQUENCE = 512
"""Longest sequence, in tokens, that a text is read in."""
Array = npt.NDArray[np.float64]
RIDGE = 0.01
"""Added to the mean square of each input, 1, in all regressions."""
ROUTER_SPREAD = 0.25
"""Standard deviation of the scores of a fitted router: gates of 1 + 0.2 tanh(r) stay within a few percent of 1."""
RULE_SPREAD = 4.0
"""Standard deviation of the logits of a fitted predictor."""


@dataclass(frozen=True)
class FittedBlock:
    """Router and adapter of one routed block, float64."""

    router_D: Array
    """Scores are unit-RMS tokens times this; their standard deviation is `ROUTER_SPREAD`."""
    threshold: float
    """Score that the capacity's share of the tokens exceeds."""
    down_DxR: Array
    up_RxD: Array


def read_streams(dense: LoadedRun, data: DataConfig, tokens: int) -> npt.NDArray[np.float32]:
    """The stream before each block and after the last one, [layers + 1, N, D], of text that the run would train on.

    Args:
      dense: a model without routed blocks.
      data: the text, whose held-out part is not read.
      tokens: N is at least this, by less than a batch of four sequences.

    Raises:
      InputError: the text can't be read.
    """
    run: RunConfig = dense.config
    context = min(SEQUENCE, run.model.context)
    rows = max(1, min(4, tokens // context))
    program = jax.jit(lambda params, batch: _streams(dense, params, batch))
    pieces: list[npt.NDArray[np.float32]] = []
    for batch in itertools.islice(iter(train_batches(data, dense.tokenizer, context, rows)), tokens):
        arrays = {name: jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")}
        valid = np.asarray(batch["segment_ids"]) > 0
        pieces.append(np.asarray(program(dense.params, arrays), np.float32)[:, valid])
        if sum(piece.shape[1] for piece in pieces) >= tokens:
            break
    return np.concatenate(pieces, 1)


def _streams(dense: LoadedRun, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[layers + 1, B, S, D] of a batch."""
    decoder = dense.decoder

    def one(tokens_S: jax.Array, positions_S: jax.Array, ids_S: jax.Array) -> jax.Array:
        def step(x_SxD: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
            delta, *_ = decoder.parts.compute_block(
                block, x_SxD, positions_S, ids_S, ids_S > 0, (), decoder.config
            )  # fmt: skip
            return x_SxD + delta, x_SxD

        first = lookup(params["embedding"], tokens_S).astype(decoder.config.dtype)
        last, before = jax.lax.scan(step, first, params["groups"]["full_0"]["block"])
        return jnp.concatenate([before, last[None]])

    return jax.vmap(one, out_axes=1)(batch["tokens"], batch["positions"], batch["segment_ids"])


def block_changes(streams: npt.NDArray[np.floating]) -> Array:
    """1 - cos of each block's input and output, the mean over tokens: float64 [layers], from [layers + 1, N, D]."""

    def change(before: Array, after: Array) -> float:
        norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        return float(np.mean(1 - np.sum(before * after, -1) / np.maximum(norms, 1e-30)))

    pairs = itertools.pairwise(np.asarray(stream, np.float64) for stream in streams)
    return np.array([change(before, after) for before, after in pairs])


def least_changed(changes: Array, every: int) -> int:
    """The first routed block, counted from 1, of the layout whose routed blocks change their input the least.

    Layouts are those that a model can have: each every-th block. Those with the first or the last block are left out.

    Raises:
      InputError: every layout has one of the two.
    """
    layers = len(changes)
    layouts = {first: range(first - 1, layers, every) for first in range(1, every + 1)}
    inner = {first: each for first, each in layouts.items() if 0 not in each and layers - 1 not in each}
    if not inner:
        raise InputError(
            f"--every = {every}: must be at least 3 with --blocks least-changed: the first and the last block are "
            "never routed then"
        )
    return min(inner, key=lambda first: (float(np.mean(changes[list(inner[first])])), first))


def fit_block(before_NxD: npt.ArrayLike, after_NxD: npt.ArrayLike, capacity: float, rank: int) -> FittedBlock:
    """Router and adapter of a block from its input and output.

    Args:
      before_NxD: tokens before the block.
      after_NxD: the same after it.
      capacity: share of the tokens to compute, in (0, 1].
      rank: of the adapter; 0: none.
    """
    before, after = np.asarray(before_NxD, np.float64), np.asarray(after_NxD, np.float64)
    delta, rms = after - before, np.sqrt(np.mean(before**2, -1, keepdims=True) + 1e-6)
    unit, relative = before / rms, delta / rms
    down, up = fit_adapter(unit, relative, rms, rank)
    left = np.mean((relative - unit @ down @ up / rms) ** 2, -1)
    target = np.log(left + 1e-12)
    target -= np.quantile(target, 1 - capacity)
    router = _ridge(unit, target[:, None])[:, 0]
    router *= ROUTER_SPREAD / max(1e-12, float(np.std(unit @ router)))
    scores = unit @ router
    threshold = float(np.quantile(scores, 1 - capacity)) if capacity < 1 else float(np.min(scores)) - ROUTER_SPREAD
    passing = scores <= threshold
    if rank and passing.sum() > rank:
        down, up = fit_adapter(unit[passing], relative[passing], rms[passing], rank)
    return FittedBlock(router, threshold, down, up)


def fit_adapter(unit_NxD: Array, relative_NxD: Array, rms_Nx1: Array, rank: int) -> tuple[Array, Array]:
    """Down DxR and up RxD with the least sum of squares of relative - unit · down · up / rms, but for the ridge.

    Reduced-rank regression (Izenman 1975): ordinary regression, then a projection of its predictions onto their first
    R principal directions.

    Args:
      unit_NxD: tokens at unit RMS.
      relative_NxD: deltas divided by the tokens' RMS.
      rms_Nx1: that RMS.
      rank: R.
    """
    D = unit_NxD.shape[1]
    if rank == 0:
        return np.zeros((D, 0)), np.zeros((0, D))
    inputs = unit_NxD / rms_Nx1
    whole_DxD = _ridge(inputs, relative_NxD)
    gram = inputs.T @ inputs
    _, directions = np.linalg.eigh(whole_DxD.T @ gram @ whole_DxD)
    first_DxR = directions[:, ::-1][:, :rank]
    return whole_DxD @ first_DxR, first_DxR.T


def _ridge(inputs_NxD: Array, targets: Array) -> Array:
    """Weights of the regression of targets on inputs."""
    gram = inputs_NxD.T @ inputs_NxD
    D = gram.shape[0]
    return np.linalg.solve(gram + RIDGE * np.trace(gram) / D * np.eye(D), inputs_NxD.T @ targets)


def fitted_params(fits: list[FittedBlock], routed: dict[str, Any], rank: int) -> dict[str, Any]:
    """The entries of fitted routed blocks: router, predictor and adapter, float32, stacked over groups.

    The predictor's first two hidden units carry the score and its opposite, so that its logit is the score less the
    threshold. The other units have no effect yet.

    Args:
      fits: one per group.
      routed: the entries before the fit, whose predictor is changed in two units.
      rank: of the adapters; 0: there are none.
    """
    predictor = {name: np.array(value, np.float32) for name, value in routed["predictor"].items()}
    require(
        predictor["bias"].shape[-1] >= 2, "routing.predictor_width", predictor["bias"].shape[-1], "must be 2 or more"
    )
    predictor["output"][:] = 0
    for group, fit in enumerate(fits):
        slope = RULE_SPREAD / ROUTER_SPREAD
        for unit, sign in enumerate((1.0, -1.0)):
            predictor["hidden"][group, :, unit] = sign * fit.router_D
            predictor["bias"][group, unit] = 0
            predictor["output"][group, unit] = sign * slope
        predictor["shift"][group] = -slope * fit.threshold
    entries: dict[str, Any] = {
        "router": {"weight": np.stack([fit.router_D for fit in fits]).astype(np.float32)},
        "predictor": predictor,
    }
    if rank:
        names = {"down": [fit.down_DxR for fit in fits], "up": [fit.up_RxD for fit in fits]}
        entries["adapter"] = {name: np.stack(each).astype(np.float32) for name, each in names.items()}
    return jax.tree.map(jnp.asarray, entries)
