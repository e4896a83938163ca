"""Where to think: by entropy, by a learned decider, or at random, on the task of `experiments.quiet_star_composition`.

    python -m experiments.think_at_hard    # trains what is missing, then reports

README.md beside this file has the task and what was measured.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments.quiet_star_composition.run import QUIET_STAR
from experiments.support.composition_task import CLOSE, LENGTH, OPEN, STATES, VOCAB, is_answer, make_batch
from experiments.support.pretraining import DENSE, pretrained
from experiments.support.reporting import write_aside
from experiments.support.teaching import begin_teaching, teaching_run
from experiments.think_at_hard.report import SHARES, report
from mod_star.config import ModelConfig, RunConfig, TrainConfig
from mod_star.flops import training_step_flops
from mod_star.inspection.calibration import calibrated
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy_by_token, token_entropy
from mod_star.model.transformer import head_matrix
from mod_star.thinking.decider import decider_of, expected_gain
from mod_star.thinking.objective import choose_places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.training.objectives.next_token import forward

MODEL = ModelConfig(vocab_size=VOCAB, width=64, layers=2, heads=4, context=LENGTH, mlp_width=256, rope_theta=1000.0)
PRETRAIN_STEPS, PRETRAIN_BATCH = 1000, 32
BRACKETS, TRUTHFUL = 0.5, 1.0
"""Share of the lines of pretraining with brackets, and of brackets with the true states."""
THINKING = replace(QUIET_STAR, decider_width=64)
TEACH_BATCH, EVAL_BATCH = 8, 96


@dataclass(frozen=True)
class Options:
    """Teaches a model to think with every seed, and reports. Interrupted, the same command goes on."""

    out: Path = Path("runs/think_at_hard")
    """Where pretrained parameters, results, tables and the picture are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    steps: int = 60
    """Steps of teaching, each on 8 sequences of 48 symbols."""
    learning_rate: float = 1e-3
    """Of teaching; constant."""
    report: bool = False
    """Only report, on what there is."""


def teach(options: Options, seed: int) -> None:
    """Teaches one model to think before every symbol, with a decider, and writes the curves of all rules."""
    path = options.out / f"seed-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    base_path, title = options.out / f"base-{seed}.msgpack", f"pretraining, seed {seed}"
    next_batch = functools.partial(make_batch, sequences=PRETRAIN_BATCH, brackets=BRACKETS, truthful=TRUTHFUL)
    params = pretrained(base_path, MODEL, PRETRAIN_STEPS, PRETRAIN_BATCH, seed, title, next_batch)
    pretrained_after = time.perf_counter() - began
    train = TrainConfig(steps=options.steps, batch_size=TEACH_BATCH, loss_chunk=1024, seed=seed)
    run = teaching_run(MODEL, DENSE, THINKING, options.learning_rate, train)
    state, step = begin_teaching(run, params, [OPEN], [CLOSE])
    rng = np.random.default_rng(seed + 1000)
    for _ in track(range(options.steps), f"teaching, seed {seed}"):
        state, _ = step(state, make_batch(rng, TEACH_BATCH, 0.0, TRUTHFUL))
    held_out = make_batch(np.random.default_rng(999), EVAL_BATCH, 0.0, TRUTHFUL)
    measured = measure(run)(state.params, held_out)
    result = {
        "seed": seed, "curves": curves(measured, np.random.default_rng(seed)), "places": by_place(measured),
        "flops_per_step": training_step_flops(run), "pretraining_seconds": pretrained_after,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_aside(path, (json.dumps(result) + "\n").encode())


def measure(run: RunConfig) -> Callable[[Any, Any], dict[str, np.ndarray]]:
    """`(params, batch) -> arrays [B, S]`: what each symbol's prediction is without and with a greedy thought, and what
    the rules see.

    base, talk: NLL in nats. base_right, talk_right: whether the right one of the five states is the most probable of
    them, at answers. entropy: of the prediction without a thought, in nats. decider: the gain that it expects. kind:
    0 for the start state, 1 for an answer, 2 for all else.
    """
    decoder = Decoder(run.model, run.routing)
    thinker = ThinkingDecoder(decoder, replace(run.thinking, n_true=1, n_thoughts=1, policy_weight=0.0))

    @jax.jit
    def predict(params: Any, batch: Any) -> dict[str, jax.Array]:
        text, key = forward(decoder, params, batch, None, "causal", keep_keys_values=True), jax.random.key(0)
        head = head_matrix(params)
        places = choose_places(thinker, batch, text, head, key, LENGTH)
        thoughts = sample_thoughts(thinker, params, text, batch, places, key, 0.0)

        def nlls(targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            asked = {**batch, "targets": targets}
            _, base = cross_entropy_by_token(text.hidden, head, targets, batch["weights"], LENGTH)
            _, talk = talk_loss(thinker, params, text, asked, places, thoughts, LENGTH)
            return base, talk.nll_BxJxMxN[:, :, 0, 0]

        base, talk = nlls(batch["targets"])
        of_states = [nlls(jnp.full_like(batch["targets"], state)) for state in range(STATES)]
        base_guess, talk_guess = (jnp.argmin(jnp.stack(each), 0) for each in zip(*of_states, strict=True))
        return {
            "base": base, "talk": talk, "base_right": base_guess == batch["targets"],
            "talk_right": talk_guess == batch["targets"], "entropy": token_entropy(text.hidden, head, LENGTH),
            "decider": jax.vmap(lambda hidden: expected_gain(decider_of(params), hidden))(text.hidden),
        }  # fmt: skip

    def of_batch(params: Any, batch: Any) -> dict[str, np.ndarray]:
        measured: dict[str, np.ndarray] = {k: np.asarray(v) for k, v in predict(params, batch).items()}
        answers = is_answer(batch)
        starts = (np.asarray(batch["targets"]) < STATES) & ~answers
        return measured | {"kind": np.select([starts, answers], [0, 1], 2)}

    return of_batch


def curves(measured: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, list[dict[str, float]]]:
    """For each rule and share: the share that thinks, the NLL of all symbols and of answers, and the right answers.

    The first half of the sequences sets the threshold, as `mod-star calibrate` does; the second half is measured. The
    rule "best" knows what each thought gains.
    """
    rules = {
        "decider": measured["decider"], "entropy": measured["entropy"],
        "random": rng.uniform(size=measured["base"].shape), "best": measured["base"] - measured["talk"],
    }  # fmt: skip
    half = len(measured["base"]) // 2
    test = {name: values[half:] for name, values in measured.items()}
    answers = test["kind"] == 1

    def outcome(thinks: np.ndarray) -> dict[str, float]:
        nll = np.where(thinks, test["talk"], test["base"])
        right = np.where(thinks, test["talk_right"], test["base_right"])
        return {
            "share": float(thinks.mean()), "nll": float(nll.mean()), "answers": float(nll[answers].mean()),
            "accuracy": float(right[answers].mean()),
        }  # fmt: skip

    found: dict[str, list[dict[str, float]]] = {}
    for name, scores in rules.items():
        found[name] = [outcome(np.zeros_like(answers))]
        for share in SHARES:
            threshold = calibrated(scores.ravel(), share, 0, "entropy" if name == "entropy" else "decider").threshold
            found[name].append(outcome(scores[half:] > threshold))
    return found


def by_place(measured: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means of what the rules see and of what a thought gains, by what comes next."""
    table = {}
    for kind, name in enumerate(("start state", "answer", "all else")):
        here = measured["kind"] == kind
        gain = (measured["base"] - measured["talk"])[here]
        table[name] = {
            "share": float(here.mean()), "entropy": float(measured["entropy"][here].mean()), "gain": float(gain.mean()),
            "expected": float(measured["decider"][here].mean()), "harmed": float((gain < -0.01).mean()),
        }  # fmt: skip
    return table


def main() -> None:
    """Trains what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.think_at_hard")
    if not options.report:
        for seed in options.seeds:
            teach(options, seed)
    report(options.out, Console())
