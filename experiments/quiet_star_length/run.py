"""Quiet-STaR where questions need one to eight steps of work: what thoughts of 2 to 12 tokens can hold.

    python -m experiments.quiet_star_length    # trains what is missing, then reports

README.md beside this file has the task and what was measured.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments.quiet_star_length.report import report
from experiments.quiet_star_length.task import CLOSE, LENGTH, OPEN, PLACES, VOCAB, make_batch, steps_of
from experiments.support.composition_task import STATES
from experiments.support.pretraining import DENSE, pretrained
from experiments.support.reporting import write_aside
from experiments.support.teaching import begin_teaching, teaching_run
from mod_star.config import ModelConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.flops import training_step_flops
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy_by_token
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import Places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.training.objectives.next_token import forward

MODEL = ModelConfig(vocab_size=VOCAB, width=128, layers=2, heads=4, context=LENGTH, mlp_width=512, rope_theta=1000.0)
PRETRAIN_STEPS, PRETRAIN_BATCH = 2000, 48
TEACH_BATCH, EVAL_BATCH, EVAL_BATCHES = 8, 64, 6
BRACKETS = 0.5
AT_ONCE = 6
"""Answers of a sequence that are looked at, at most."""

# The setting that did best in experiments/quiet_star_composition.
QUIET_STAR = ThinkingConfig(
    n_true=2, n_thoughts=4, think_fraction=0.25, think_where="entropy", policy_weight=2.0, baseline="leave_one_out",
    drop_negative=False, embedding_rate=1.0, chunk=64,
)  # fmt: skip
ARMS: dict[str, ThinkingConfig | None] = {
    "no thoughts": None,
    **{f"length {length}": replace(QUIET_STAR, thought_length=length) for length in (2, 4, 6, 8, 12)},
    "pause, length 8": replace(QUIET_STAR, thought_length=8, kind="pause", policy_weight=0.0, n_thoughts=1),
    "no reinforce, length 8": replace(QUIET_STAR, thought_length=8, policy_weight=0.0),
}
"""Ways to go on from the pretrained model, on lines without brackets; None: next-token training."""


@dataclass(frozen=True)
class Options:
    """Pretrains, teaches every arm with every seed, and reports. Interrupted, the same command goes on."""

    out: Path = Path("runs/quiet_star_length")
    """Where pretrained parameters, results, tables and the picture are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(ARMS))
    """Which arms."""
    steps: int = 120
    """Steps of teaching, each on 8 sequences of 64 symbols."""
    learning_rate: float = 1e-3
    """Of teaching; constant."""
    report: bool = False
    """Only report, on what there is."""


def teach(options: Options, name: str, seed: int) -> None:
    """Trains one arm and writes how many answers are right by steps of work, before and after."""
    path = options.out / f"{name.replace(' ', '_')}-{seed}.json"
    if path.exists():
        return
    base_path = options.out / f"base-{seed}.msgpack"
    title = f"pretraining, seed {seed}"
    next_batch = functools.partial(make_batch, sequences=PRETRAIN_BATCH, brackets=BRACKETS)
    params = pretrained(base_path, MODEL, PRETRAIN_STEPS, PRETRAIN_BATCH, seed, title, next_batch)
    thinking, began = ARMS[name], time.perf_counter()
    train = TrainConfig(steps=options.steps, batch_size=TEACH_BATCH, loss_chunk=512, seed=seed)
    run = teaching_run(MODEL, DENSE, thinking, options.learning_rate, train)
    state, step = begin_teaching(run, params, [OPEN], [CLOSE])
    evaluate = make_evaluation(run)
    rng, held_out_rng = np.random.default_rng(seed + 1000), np.random.default_rng(999)
    held_out = [make_batch(held_out_rng, EVAL_BATCH, 0.0) for _ in range(EVAL_BATCHES)]
    before = evaluate(state.params, held_out)
    for _ in track(range(options.steps), f"{name}, seed {seed}"):
        state, _ = step(state, make_batch(rng, TEACH_BATCH, 0.0))
    result = {
        "arm": name, "seed": seed, "before": before, "after": evaluate(state.params, held_out),
        "flops_per_step": training_step_flops(run), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_aside(path, (json.dumps(result) + "\n").encode())


def make_evaluation(run: RunConfig) -> Callable[[Any, list[dict[str, Any]]], dict[str, list[float]]]:
    """`(params, batches) -> {"without": …, "with": …}`: share of the answers that are right, by 1 to 8 steps of work,
    without and with a greedy thought right before the answer."""
    decoder = Decoder(run.model, run.routing)
    thinks = run.train.objective == "quiet_star"
    thinking = replace(run.thinking, n_true=1, n_thoughts=1, think_fraction=1.0, policy_weight=0.0, talk_weight=1.0)
    thinker = ThinkingDecoder(decoder, thinking)

    @jax.jit
    def guesses(params: Any, batch: Any, places: Places) -> tuple[jax.Array, jax.Array]:
        """Most probable states BxJ, without and with a thought."""
        text = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        head = head_matrix(params)
        key = jax.random.key(0)
        thoughts = sample_thoughts(thinker, params, text, batch, places, key, 0.0) if thinks else None

        def nll(state: int) -> tuple[jax.Array, jax.Array]:
            asked = {**batch, "targets": jnp.full_like(batch["targets"], state)}
            _, base = cross_entropy_by_token(text.hidden, head, asked["targets"], batch["weights"], LENGTH)
            base = jax.vmap(lambda row, at: row[at])(base, places.indices_BxJ)
            if thoughts is None:
                return base, base
            _, talk = talk_loss(thinker, params, text, asked, places, thoughts, LENGTH)
            return base, talk.nll_BxJxMxN[:, :, 0, 0]

        of_states = [nll(state) for state in range(STATES)]
        base, talk = (jnp.argmin(jnp.stack(each), 0) for each in zip(*of_states, strict=True))
        return base, talk

    def evaluate(params: Any, batches: list[dict[str, Any]]) -> dict[str, list[float]]:
        right: dict[str, list[list[bool]]] = {name: [[] for _ in range(PLACES)] for name in ("without", "with")}
        for batch in batches:
            steps = steps_of(batch)
            order = np.argsort(steps == 0, axis=1, kind="stable")[:, :AT_ONCE]
            filled = np.take_along_axis(steps, order, 1) > 0
            found = guesses(params, batch, Places(jnp.asarray(order, jnp.int32), jnp.asarray(filled)))
            targets = np.take_along_axis(np.asarray(batch["targets"]), order, 1)
            for name, guess in zip(right, jax.device_get(found), strict=True):
                for n, is_right in zip(
                    np.take_along_axis(steps, order, 1)[filled], (guess == targets)[filled], strict=True
                ):
                    right[name][n - 1].append(bool(is_right))
        return {name: [float(np.mean(each)) for each in by_steps] for name, by_steps in right.items()}

    return evaluate


def main() -> None:
    """Trains what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.quiet_star_length")
    if not options.report:
        for seed in options.seeds:
            for name in options.arms:
                teach(options, name, seed)
    report(options.out, tuple(ARMS), Console())
