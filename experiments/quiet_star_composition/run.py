"""Quiet-STaR where thinking is needed: two layers that can't compose six permutations in one pass.

    python -m experiments.quiet_star_composition    # trains what is missing, then reports

README.md beside this file has the task, what was measured, and what else was tried.
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

from experiments.quiet_star_composition.report import report
from experiments.support.composition_task import CLOSE, LENGTH, OPEN, STATES, VOCAB, is_answer, make_batch, spell
from experiments.support.pretraining import DENSE, pretrained
from experiments.support.reporting import write_aside
from experiments.support.teaching import begin_teaching, teaching_run
from mod_star.config import ModelConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.flops import training_step_flops
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy_by_token, token_entropy
from mod_star.model.routing import select_top
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import choose_places, place_count, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.training.objectives.next_token import forward

MODEL = ModelConfig(vocab_size=VOCAB, width=128, layers=2, heads=4, context=LENGTH, mlp_width=512, rope_theta=1000.0)
PRETRAIN_STEPS, PRETRAIN_BATCH = 1500, 48
TEACH_BATCH, EVAL_BATCH = 8, 48
BRACKETS = 0.5

QUIET_STAR = ThinkingConfig(
    thought_length=5,
    n_true=2,
    n_thoughts=4,
    policy_weight=2.0,  # n_true: measured when rewards, sums over n_true tokens, were divided by thoughts
    baseline="leave_one_out",
    drop_negative=False,
    embedding_rate=1.0,
    chunk=64,
)


@dataclass(frozen=True)
class Arm:
    """One way to go on from the pretrained model, on lines without brackets."""

    thinking: ThinkingConfig | None = QUIET_STAR
    """None: next-token training."""
    truthful: float = 0.5
    """Share of the brackets in pretraining that held the true states."""
    steps: int | None = None
    """Steps, if other than the options say."""


ARMS: dict[str, Arm] = {
    "truthful brackets": Arm(truthful=1.0, steps=40),
    "trained on": Arm(None),
    "quiet-star": Arm(),
    "as in the paper": Arm(replace(QUIET_STAR, baseline="mean", drop_negative=True)),
    "no reinforce": Arm(replace(QUIET_STAR, policy_weight=0.0)),
    "pause": Arm(replace(QUIET_STAR, kind="pause", policy_weight=0.0, n_thoughts=1)),
    "latent": Arm(replace(QUIET_STAR, kind="latent", policy_weight=0.0, n_thoughts=1)),
    "expected": Arm(replace(QUIET_STAR, kind="expected", policy_weight=0.0, n_thoughts=1)),
    "rlp": Arm(replace(QUIET_STAR, mixing="thought", talk_weight=0.0, base_weight=0.0)),
    "0.5 by entropy": Arm(replace(QUIET_STAR, think_fraction=0.5, think_where="entropy")),
    "0.5 at random": Arm(replace(QUIET_STAR, think_fraction=0.5)),
    "0.25 by entropy": Arm(replace(QUIET_STAR, think_fraction=0.25, think_where="entropy")),
    "0.25 at random": Arm(replace(QUIET_STAR, think_fraction=0.25)),
    "length 4": Arm(replace(QUIET_STAR, thought_length=4)),
    "length 8": Arm(replace(QUIET_STAR, thought_length=8)),
    "length 16": Arm(replace(QUIET_STAR, thought_length=16)),
}


@dataclass(frozen=True)
class Options:
    """Pretrains, teaches every arm with every seed, and reports. Interrupted, the same command goes on."""

    out: Path = Path("runs/quiet_star_composition")
    """Where pretrained parameters, results, tables and plots are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(ARMS))
    """Which arms."""
    steps: int = 80
    """Steps of teaching, each on 8 sequences of 48 symbols."""
    learning_rate: float = 1e-3
    """Of teaching; constant."""
    report: bool = False
    """Only report, on what there is."""


def base_params(options: Options, truthful: float, seed: int) -> dict[str, Any]:
    """Parameters of the base model; made once per seed and share of truthful brackets."""
    path = options.out / f"base-{truthful:g}-{seed}.msgpack"
    title = f"pretraining, {truthful:.0%} truthful, seed {seed}"

    def next_batch(rng: np.random.Generator) -> dict[str, Any]:
        return make_batch(rng, PRETRAIN_BATCH, BRACKETS, truthful)

    return pretrained(path, MODEL, PRETRAIN_STEPS, PRETRAIN_BATCH, seed, title, next_batch)


def teach(options: Options, name: str, seed: int) -> None:
    """Trains one arm and writes its curve, with what it costs."""
    path = options.out / f"{name.replace(' ', '_')}-{seed}.json"
    if path.exists():
        return
    arm = ARMS[name]
    params = base_params(options, arm.truthful, seed)
    steps = arm.steps or options.steps
    train = TrainConfig(steps=steps, batch_size=TEACH_BATCH, loss_chunk=1024, seed=seed)
    run = teaching_run(MODEL, DENSE, arm.thinking, options.learning_rate, train)
    state, step = begin_teaching(run, params, [OPEN], [CLOSE])
    evaluate = make_evaluation(run)
    rng = np.random.default_rng(seed + 1000)
    held_out = make_batch(np.random.default_rng(999), EVAL_BATCH, 0.0, arm.truthful)
    every = 5 if steps <= 50 else 10
    curve, seconds = [], 0.0
    for number in track(range(steps + 1), f"{name}, seed {seed}"):
        if number % every == 0:
            curve.append({"step": number, **evaluate(state.params, held_out)})
        if number < steps:
            batch = make_batch(rng, TEACH_BATCH, 0.0, arm.truthful)
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics["loss"])
            seconds += time.perf_counter() - began if number else 0.0
    result = {
        "arm": name, "seed": seed, "curve": curve, "seconds_per_step": seconds / max(1, steps - 1),
        "flops_per_step": training_step_flops(run), "text_tokens": steps * TEACH_BATCH * LENGTH,
    }  # fmt: skip
    write_aside(path, (json.dumps(result) + "\n").encode())


def make_evaluation(run: RunConfig) -> Callable[[Any, Any], dict[str, Any]]:
    """NLL and accuracy on all symbols and on answers: without thoughts, with greedy and with sampled ones, on budget.

    On budget, only as many positions think as in training, chosen in the same way.
    """
    decoder = Decoder(run.model, run.routing)
    thinks = run.train.objective == "quiet_star"
    thinking = replace(run.thinking, n_true=1, n_thoughts=1, think_fraction=1.0, policy_weight=0.0)

    def nlls(params: Any, batch: Any, text: Any, places: Any, thoughts: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """NLL of the batch's targets without and with thoughts [B, S], and the mixing weights."""
        head = head_matrix(params)
        _, base = cross_entropy_by_token(text.hidden, head, batch["targets"], batch["weights"], LENGTH)
        if not thinks:
            return base, base, jnp.zeros_like(base)
        _, talk = talk_loss(ThinkingDecoder(decoder, thinking), params, text, batch, places, thoughts, LENGTH)
        return base, talk.nll_BxJxMxN[:, :, 0, 0], talk.weights_BxJxMxN[:, :, 0, 0]

    @functools.partial(jax.jit, static_argnames="temperature")
    def predict(params: Any, batch: Any, key: jax.Array, temperature: float) -> Any:
        text = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        head = head_matrix(params)
        places = choose_places(ThinkingDecoder(decoder, thinking), batch, text, head, key, LENGTH)
        thoughts = None
        if thinks:
            thoughts = sample_thoughts(
                ThinkingDecoder(decoder, thinking), params, text, batch, places, key, temperature
            )
        base, talk, weights = nlls(params, batch, text, places, thoughts)
        states = [
            nlls(params, {**batch, "targets": jnp.full_like(batch["targets"], state)}, text, places, thoughts)[:2]
            for state in range(STATES)
        ]
        base_guess, guess = (jnp.argmin(jnp.stack(each), 0) for each in zip(*states, strict=True))
        by_entropy = run.thinking.think_where == "entropy"
        scores = token_entropy(text.hidden, head, LENGTH) if by_entropy else jax.random.uniform(key, base.shape)
        J = place_count(run.thinking, LENGTH)
        chosen = jax.vmap(lambda s: select_top(s, s > -1, J).mask_S)(scores)
        tokens = thoughts.tokens_T[:, :, 0] if thoughts is not None else jnp.zeros((*base.shape, 0), jnp.int32)
        return base, talk, chosen, weights, base_guess, guess, tokens

    def evaluate(params: Any, batch: Any) -> dict[str, Any]:
        look = functools.partial(predict, params, batch, jax.random.key(1))
        base, talk, chosen, weights, base_guess, guess, thoughts = jax.device_get(look(0.0))
        _, sampled, _, _, _, sampled_guess, _ = jax.device_get(look(1.0 if thinks else 0.0))
        answers, targets = is_answer(batch), np.asarray(batch["targets"])
        budget, budget_guess = np.where(chosen, talk, base), np.where(chosen, guess, base_guess)
        result: dict[str, Any] = {"weight": float(weights[answers].mean()), "thought": spell(thoughts[answers][0])}
        for name, nll, guessed in (
            ("base", base, base_guess),
            ("talk", talk, guess),
            ("sampled", sampled, sampled_guess),
            ("budget", budget, budget_guess),
        ):
            result[name] = float(nll.mean())
            result[f"{name}_answers"] = float(nll[answers].mean())
            result[f"{name}_accuracy"] = float(np.mean((guessed == targets)[answers]))
        return result

    return evaluate


def main() -> None:
    """Trains what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.quiet_star_composition")
    if not options.report:
        for seed in options.seeds:
            for name in options.arms:
                teach(options, name, seed)
    report(options.out, tuple(ARMS), options.steps, Console())
