"""One recipe: a Mixture-of-Depths model that thinks on budget and answers by CoT-decoding; each part switched off.

    python -m experiments.composed    # trains and asks what is missing, then reports

README.md beside this file has the task (`experiments.support.worked_lines`) and what was measured.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments.composed.report import report
from experiments.cot_decoding_composition.run import BRANCHES, NEW_TOKENS, accuracies, openings
from experiments.support.pretraining import DENSE, pretrained
from experiments.support.reporting import write_aside
from experiments.support.teaching import begin_teaching, teaching_run
from experiments.support.worked_lines import HELD_OUT, LENGTH, SYMBOLS, TOKENIZER, make_batch, question
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import GenerationConfig, Generator, Think
from mod_star.decoding.branches import Branches
from mod_star.decoding.cot import cot_decode
from mod_star.flops import forward_flops
from mod_star.inspection.calibration import calibrated
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.cross_entropy import token_entropy
from mod_star.model.transformer import head_matrix
from mod_star.thinking.decider import decider_flops, decider_of, expected_gain
from mod_star.thinking.sample import thought_slots
from mod_star.training.objectives.next_token import forward

MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, width=64, layers=2, heads=4, context=LENGTH, mlp_width=256, rope_theta=1000.0
)
ROUTINGS = {"dense": DENSE, "MoD": RoutingConfig(every=2, capacity=0.5)}
OPENINGS = {"#": 0.46, "#(": 0.04, "(": 0.2, "!": 0.15, "[": 0.15}
"""As in `experiments.support.worked_lines`, but 4 % of the lines open with # and work the answer out after it."""
STEPS, BATCH = 3000, 32
TEACH_BATCH, LEARNING_RATE = 8, 3e-4
THINKING = ThinkingConfig(
    thought_length=10,  # a worked line has five states, and a separator after each
    n_true=2,
    n_thoughts=4,
    think_fraction=0.25,
    think_where="entropy",
    policy_weight=2.0,
    baseline="leave_one_out",
    drop_negative=False,
    embedding_rate=1.0,
    chunk=96,
    decider_width=64,
)
SHARE = 0.075
"""Of the symbols to think before: half as many again as there are answers without working."""
CALIBRATED_ON = 96
"""Sequences that thresholds are chosen on."""
AT_ONCE = 100
"""Questions of a batch."""


@dataclass(frozen=True)
class Options:
    """Trains and asks with every seed, and reports. Interrupted, the same command goes on."""

    out: Path = Path("runs/composed")
    """Where parameters, results, tables and the picture are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    steps: int = 160
    """Steps that teach to think, or that go on without thoughts; each on 8 sequences of 48 symbols."""
    pretraining_steps: int = STEPS
    """Steps of pretraining, each on 32 sequences."""
    questions: int = 200
    """Held-out questions that are asked, at most 500."""
    report: bool = False
    """Only report, on what there is."""


def taught(options: Options, trunk: str, thinks: bool, seed: int) -> tuple[RunConfig, dict[str, Any]]:
    """A pretrained model that has gone on for some steps, with thoughts or without; on the same lines."""
    routing, path = ROUTINGS[trunk], options.out / f"base-{trunk}-{seed}.msgpack"
    title = f"pretraining, {trunk}, seed {seed}"

    def next_batch(rng: np.random.Generator) -> dict[str, Any]:
        return make_batch(rng, BATCH, OPENINGS)

    params = pretrained(path, MODEL, options.pretraining_steps, BATCH, seed, title, next_batch, routing)
    train = TrainConfig(steps=options.steps, batch_size=TEACH_BATCH, loss_chunk=512, seed=seed)
    run = teaching_run(MODEL, routing, THINKING if thinks else None, LEARNING_RATE, train)
    state, step = begin_teaching(run, params, [SYMBOLS.index("(")], [SYMBOLS.index(")")])
    rng = np.random.default_rng(seed + 1000)
    for _ in track(range(options.steps), f"teaching, {trunk}, {'thoughts' if thinks else 'none'}, seed {seed}"):
        state, _ = step(state, make_batch(rng, TEACH_BATCH, OPENINGS))
    return run, jax.device_get(state.params)


def without_knowledge(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """The parameters with a decider of random weights, whose scores have nothing to do with what thoughts gain."""
    rng, decider = np.random.default_rng(seed), decider_of(params)
    drawn = {name: rng.normal(size=np.shape(leaf)).astype(np.float32) for name, leaf in decider.items()}
    return {**params, "thinking": {**params["thinking"], "decider": drawn}}


def ways_to_think(run: RunConfig, params: dict[str, Any], seed: int) -> dict[str, tuple[dict[str, Any], Think]]:
    """Parameters and rule of every way to think. A rule's threshold is chosen on lines that it was not taught."""
    if not run.thinks:
        return {"none": (params, Think())}
    drawn, batch = without_knowledge(params, seed), make_batch(np.random.default_rng(999), CALIBRATED_ON, OPENINGS)
    decoder = Decoder(run.model, run.routing)
    text = jax.jit(lambda params, batch: forward(decoder, params, batch, None, "causal"))(params, batch)

    def by_decider(params: dict[str, Any]) -> Think:
        expected = jax.vmap(lambda hidden: expected_gain(decider_of(params), hidden))(text.hidden)
        threshold = calibrated(np.asarray(expected).ravel(), SHARE, 0, "decider").threshold
        return Think("auto", threshold, SHARE, by="decider")

    entropy = np.asarray(token_entropy(text.hidden, head_matrix(params), LENGTH)).ravel()
    return {
        "budget": (params, Think("auto", calibrated(entropy, SHARE, 0, "entropy").threshold, SHARE)),
        "taught, none": (params, Think()),
        "decider": (params, by_decider(params)),
        "random": (drawn, by_decider(drawn)),
        "always": (params, Think("always")),
    }


def ask(options: Options, trunk: str, thinks: bool, seed: int) -> None:
    """Asks all held-out questions by CoT-decoding, of which the first branch is greedy, and writes what came out."""
    path = options.out / f"{trunk}-{'thoughts' if thinks else 'none'}-{seed}.json"
    if path.exists():
        return
    began = time.perf_counter()
    run, params = taught(options, trunk, thinks, seed)
    result: dict[str, Any] = {
        "trunk": trunk, "thinks": thinks, "seed": seed, "questions": options.questions,
        "teaching_seconds": time.perf_counter() - began, "ways": {},
    }  # fmt: skip
    for way, (own, think) in ways_to_think(run, params, seed).items():
        result["ways"][way] = measure(options, run, own, think)
    write_aside(path, (json.dumps(result) + "\n").encode())


def measure(options: Options, run: RunConfig, params: dict[str, Any], think: Think) -> dict[str, Any]:
    """Right answers, operations and thoughts of an answer for k = 1 to 10 branches, and what became of the branches."""
    began = time.perf_counter()
    model = Model(Decoder(run.model, run.routing), params, TOKENIZER, run.thinking if run.thinks else None)
    generator, config = Generator(model), GenerationConfig(NEW_TOKENS, branches=BRANCHES, think=think)
    questions = [question(int(number)) for number in HELD_OUT[: options.questions]]
    branches: list[Branches] = []
    for first in range(0, len(questions), AT_ONCE):
        branches += cot_decode(generator, [q.text for q in questions[first : first + AT_ONCE]], config, last_state)
    each = [[result.first(k) for result in branches] for k in range(1, BRANCHES + 1)]
    return {
        "right": accuracies(questions, branches, {}),
        "flops": [float(np.mean([answer_flops(run, think, result) for result in of_k])) for of_k in each],
        "thoughts": [float(np.mean([thought_count(think, result) for result in of_k])) for of_k in each],
        "routed": _routed(branches), "openings": openings(questions, branches),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def last_state(text: str) -> tuple[int, int] | None:
    """Where the last state of a text is. `LastOption` takes 0,1,2 in worked states for a list of the options."""
    at = max(text.rfind(state) for state in "01234")
    return None if at < 0 else (at, at + 1)


def thought_count(think: Think, result: Branches) -> int:
    """Thoughts of an answer. What precedes the end token is in no record: a model that always thinks has one there."""
    completions = [branch.completion for branch in result.branches]
    recorded = sum(thought is not None for completion in completions for thought in completion.thoughts)
    unrecorded = sum(completion.finished == "end" for completion in completions) if think.when == "always" else 0
    return recorded + unrecorded


def answer_flops(run: RunConfig, think: Think, result: Branches) -> float:
    """Operations of an answer: the prompt once, the tokens of all branches, and t + 2 more for every thought.

    A token counts as one of a sequence of the context's length. Of the text a routed block computes the share that it
    did compute, of thoughts as many as it has slots for. A thought adds the mixing head, and every token the decider
    where it decides.
    """
    own, D, t = run.thinking, run.model.width, run.thinking.thought_length
    text = 1 + len(result.prompt) + sum(len(branch.completion.tokens) for branch in result.branches)
    flops = text * token_flops(run, _routed([result]))
    if thoughts := thought_count(think, result):
        share = thought_slots(run.routing, own) / (t + 2) if run.routing.every else None
        flops += thoughts * ((t + 2) * token_flops(run, share) + 2.0 * (3 * D * D + D))
    if think.by == "decider":
        flops += decider_flops(run.model, own.decider_width, text)
    return flops


def token_flops(run: RunConfig, routed: float | None) -> float:
    """Operations of a token of a sequence of the context's length, if routed blocks compute that share of it."""
    routing = run.routing if routed is None else replace(run.routing, capacity=max(routed, 1 / LENGTH))
    return forward_flops(run.model, routing, LENGTH).total / LENGTH


def _routed(branches: list[Branches]) -> float | None:
    """Share of the tokens of the text that the routed block computed; None for a dense model."""
    shares = [share for result in branches for branch in result.branches for share in branch.completion.routed_fraction]
    return float(np.mean(shares)) if shares else None


def main() -> None:
    """Trains and asks what is missing, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.composed")
    if not options.report:
        for seed in options.seeds:
            for trunk in ROUTINGS:
                for thinks in (False, True):
                    ask(options, trunk, thinks, seed)
    report(options.out, Console())
