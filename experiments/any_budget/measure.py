"""A trained model's loss, and which questions it computes more of, by budget, causal rule and who shares a budget."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from experiments.any_budget.run import ANY, BUDGETS, TEMPLATE, Options
from mod_star.data.files import read_records
from mod_star.inspection.calibration import evaluation_batches
from mod_star.inspection.routing_calibration import budget_thresholds
from mod_star.model import Decoder
from mod_star.model.routing import RoutingMode
from mod_star.model.threshold import with_thresholds
from mod_star.model.transformer import logits_of
from mod_star.runs.directory import load_run
from mod_star.tokenization.tokenizers import Tokenizer, begin
from mod_star.training.objectives.next_token import forward

ROWS = 16
"""Questions of a batch."""
LEVELS = {"1 or 2": (1, 2), "3 or 4": (3, 4), "5 to 8": (5, 8)}
"""Groups of questions by the steps of their solutions."""
WAYS: dict[str, tuple[bool, RoutingMode, str]] = {
    "top-k, sequence": (False, "top_k", "sequence"),
    "top-k, batch": (False, "top_k", "batch"),
    "predictor, sequence": (False, "causal", "sequence"),
    "threshold, sequence": (True, "causal", "sequence"),
    "threshold, batch": (True, "causal", "batch"),
}
"""Whether thresholds replace the trained causal rule, the mode, and whose budget it is."""


@dataclass(frozen=True)
class Questions:
    """GSM8K's test questions with their solutions, one per row, in an order of their own."""

    tokens_QxS: npt.NDArray[np.int32]
    """One token longer than what the model reads."""
    lengths_Q: npt.NDArray[np.int64]
    """Tokens that the model reads."""
    asked_Q: npt.NDArray[np.int64]
    """Of those, tokens of the question."""
    steps_Q: npt.NDArray[np.int64]
    """Lines of the solution, the answer's own apart."""


def questions(options: Options, tokenizer: Tokenizer, context: int) -> Questions:
    """As many as asked for of those that fit into the context, drawn once for all."""
    rows: list[tuple[list[int], int, int]] = []
    for record, _ in read_records(str(options.data / "gsm8k_test.jsonl")):
        ids = begin(tokenizer, TEMPLATE.format(**record))[: context + 2]
        asked = len(begin(tokenizer, TEMPLATE.split("{answer}")[0].format(**record)))
        if len(ids) <= context + 1:
            rows.append((ids, asked, record["answer"].strip().count("\n")))
    count = min(options.questions, len(rows)) // ROWS * ROWS
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    tokens = np.zeros((len(chosen), context + 1), np.int32)
    for row, i in enumerate(chosen):
        tokens[row, : len(rows[i][0])] = rows[i][0]
    columns = [[len(rows[i][0]) - 1 for i in chosen], [rows[i][1] for i in chosen], [rows[i][2] for i in chosen]]
    return Questions(tokens, *map(np.array, columns))


def batches(asked: Questions) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The questions in batches, one document per row."""
    for start in range(0, len(asked.lengths_Q), ROWS):
        tokens = asked.tokens_QxS[start : start + ROWS]
        S = tokens.shape[1] - 1
        is_token = np.arange(S) < asked.lengths_Q[start : start + ROWS, None]
        positions = np.broadcast_to(np.arange(S, dtype=np.int32), is_token.shape)
        yield {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
            "segment_ids": is_token.astype(np.int32), "asked": asked.asked_Q[start : start + ROWS],
        }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 3))
def of_batch(decoder: Decoder, params: Any, batch: dict[str, jax.Array], mode: RoutingMode) -> tuple[jax.Array, ...]:
    """Of each row the NLL in nats; shares that routed blocks compute of its tokens and of its question; overflow."""
    output = forward(decoder, params, batch, None, mode)
    logits_BxSxV = jax.vmap(functools.partial(logits_of, params))(output.hidden)
    chosen = jnp.take_along_axis(logits_BxSxV, batch["targets"][..., None], -1)[..., 0]
    is_token = batch["segment_ids"] > 0
    nll_B = jnp.sum(jnp.where(is_token, jax.nn.logsumexp(logits_BxSxV, -1) - chosen, 0), 1)
    is_asked = is_token & (batch["positions"] < batch["asked"][:, None])

    def share(selected: jax.Array, among: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(selected & among[:, None], -1) / jnp.sum(among, -1)[:, None], -1)

    trace: Any = output.trace
    return nll_B, share(trace.selected, is_token), share(trace.selected, is_asked), share(trace.overflow, is_token)


def measure(options: Options, seed: int) -> dict[str, Any]:
    """Results of the model for all budgets with one seed: budget -> way -> what came out."""
    run = load_run(options.out / f"{ANY}-{seed}")
    asked = questions(options, run.tokenizer, run.config.model.context)
    held_out = evaluation_batches(run)[: options.calibration_batches]
    results: dict[str, Any] = {}
    for budget in BUDGETS:
        decoder = run.decoder.clone(routing=replace(run.config.routing, capacity=budget))
        thresholds = jnp.asarray(budget_thresholds(run, budget, held_out).thresholds, jnp.float32)
        own = results[f"{budget:g}"] = {}
        for name, (by_threshold, mode, over) in WAYS.items():
            chosen, params = with_thresholds(decoder, run.params, thresholds) if by_threshold else (decoder, run.params)
            chosen = chosen.clone(budget_over=over)
            parts = [jax.device_get(of_batch(chosen, params, batch, mode)) for batch in batches(asked)]
            own[name] = _summary(asked, *map(np.concatenate, zip(*parts, strict=True)))
    return results


def _summary(asked: Questions, nll: Any, share: Any, share_asked: Any, overflow: Any) -> dict[str, Any]:
    """Means over all questions and over those of a level; nats per token, and shares of a question's tokens."""
    weights = asked.lengths_Q / asked.lengths_Q.sum()
    levels = {name: (asked.steps_Q >= low) & (asked.steps_Q <= high) for name, (low, high) in LEVELS.items()}
    return {
        "loss": float(nll.sum() / asked.lengths_Q.sum()),
        "share": float(share @ weights),
        "overflow": float(overflow @ weights),
        "share by steps": {name: float(share[where].mean()) for name, where in levels.items()},
        "share of the question by steps": {name: float(share_asked[where].mean()) for name, where in levels.items()},
        "loss by steps": {
            name: float(nll[where].sum() / asked.lengths_Q[where].sum()) for name, where in levels.items()
        },
        "questions by steps": {name: int(where.sum()) for name, where in levels.items()},
    }


def measured(options: Options, seed: int) -> dict[str, Any]:
    """`measure`, or what it has written before."""
    path: Path = options.out / f"measured-{seed}.json"
    if not path.exists():
        path.write_text(json.dumps(measure(options, seed), indent=1) + "\n", encoding="utf-8")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
