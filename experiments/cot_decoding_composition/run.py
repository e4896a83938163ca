"""CoT-decoding in a controlled case: a model that is wrong at once, and right where its second first token leads.

    python -m experiments.cot_decoding_composition    # trains and asks what is missing, then reports

README.md beside this file has the task (`experiments.support.worked_lines`) and what was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments.cot_decoding_composition.report import report
from experiments.support.pretraining import DENSE, pretrained
from experiments.support.reporting import write_aside
from experiments.support.worked_lines import HELD_OUT, LENGTH, TOKENIZER, Question, make_batch, question
from mod_star.config import ModelConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.decoding.answers import LastOption
from mod_star.decoding.branches import Branch, Branches
from mod_star.decoding.cot import cot_decode, self_consistency
from mod_star.decoding.rankings import RANKINGS
from mod_star.loaded_model import Model
from mod_star.model import Decoder

MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, width=128, layers=2, heads=4, context=LENGTH, mlp_width=512, rope_theta=1000.0
)
STEPS, BATCH = 1200, 48
NEW_TOKENS = 20
"""Worked lines take 14 with the newline."""
BRANCHES = 10
AT_ONCE = 50
"""Questions of a batch."""
STATE = LastOption(tuple("01234"))
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class Options:
    """Trains and asks with every seed, and reports. Interrupted, the same command goes on."""

    out: Path = Path("runs/cot_decoding_composition")
    """Where parameters, results and tables are kept."""
    plot: Path = Path("experiments/cot_decoding_composition/figure.png")
    """The picture."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    report: bool = False
    """Only report, on what there is."""


def base_params(options: Options, seed: int) -> dict[str, Any]:
    """Parameters of the model; made once per seed."""
    path, title = options.out / f"base-{seed}.msgpack", f"pretraining, seed {seed}"
    return pretrained(path, MODEL, STEPS, BATCH, seed, title, lambda rng: make_batch(rng, BATCH))


def ask(options: Options, seed: int) -> None:
    """Asks all held-out questions with every way of decoding, and writes who was right how often."""
    path = options.out / f"results-{seed}.json"
    if path.exists():
        return
    generator = Generator(Model(Decoder(MODEL, DENSE), base_params(options, seed), TOKENIZER))
    questions = [question(int(number)) for number in HELD_OUT]
    branches: list[Branches] = []
    samples: dict[float, list[Branches]] = {temperature: [] for temperature in TEMPERATURES}
    for first in track(range(0, len(questions), AT_ONCE), f"asking, seed {seed}"):
        prompts = [question.text for question in questions[first : first + AT_ONCE]]
        branches += cot_decode(generator, prompts, GenerationConfig(NEW_TOKENS, branches=BRANCHES), STATE)
        for temperature, voted in samples.items():
            config = GenerationConfig(NEW_TOKENS, Sampling(temperature), branches=BRANCHES, seed=seed * 1000 + first)
            voted += self_consistency(generator, prompts, config, STATE)
    result = {
        "seed": seed,
        "questions": len(questions),
        "accuracy": accuracies(questions, branches, samples),
        "openings": openings(questions, branches),
    }
    write_aside(path, (json.dumps(result) + "\n").encode())


def accuracies(
    questions: list[Question], branches: list[Branches], samples: dict[float, list[Branches]]
) -> dict[str, list[float]]:
    """The share of right answers of each way of decoding, for k = 1 to BRANCHES branches or samples."""

    def right(answers: list[str | None]) -> float:
        return float(np.mean([answer == question.answer for answer, question in zip(answers, questions, strict=True)]))

    curves: dict[str, list[float]] = {}
    for k in range(1, BRANCHES + 1):
        first = [result.first(k) for result in branches]
        ways = {
            f"{ranking} {'aggregated' if aggregate else 'max'}": [r.answer(RANKINGS[ranking], aggregate) for r in first]
            for ranking in RANKINGS
            for aggregate in (False, True)
        }
        ways["majority of branches"] = [result.majority_answer() for result in first]
        for temperature, results in samples.items():
            ways[f"self-consistency {temperature:g}"] = [result.first(k).majority_answer() for result in results]
        for name, answers in ways.items():
            curves.setdefault(name, []).append(right(answers))
    curves["greedy"] = curves["delta max"][:1]
    for temperature, results in samples.items():
        curves[f"sampling {temperature:g}"] = [
            float(np.mean([right([result.branches[i].answer for result in results]) for i in range(BRANCHES)]))
        ]
    hits = [[branch.answer == q.answer for branch in r.branches] for r, q in zip(branches, questions, strict=True)]
    curves["any branch"] = [float(np.mean([any(row[:k]) for row in hits])) for k in range(1, BRANCHES + 1)]
    return curves


def openings(questions: list[Question], branches: list[Branches]) -> dict[str, dict[str, float]]:
    """What became of the branches, by their first token: of ten per question."""
    groups: dict[str, list[tuple[bool, Branch]]] = {}
    for result, line in zip(branches, questions, strict=True):
        for branch in result.branches:
            groups.setdefault(branch.first_token, []).append((branch.answer == line.answer, branch))
    table: dict[str, dict[str, float]] = {}
    for token, group in groups.items():
        counting = [(right, branch) for right, branch in group if branch.dropped is None]
        table[token] = {"branches": len(group) / len(questions), "dropped": 1 - len(counting) / len(group)}
        if counting:
            table[token]["right"] = float(np.mean([right for right, _ in counting]))
            for name, ranking in RANKINGS.items():
                table[token][name] = float(np.mean([ranking.of(branch) for _, branch in counting]))
    return table


def main() -> None:
    """Trains and asks what is missing, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_composition")
    if not options.report:
        for seed in options.seeds:
            ask(options, seed)
    report(options.out, options.plot, Console())
