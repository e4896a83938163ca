"""What `experiments.upcycle_kept` measures and trains: its options, its arms, and what each of them costs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mod_star.config import DataConfig, RunConfig
from mod_star.flops import forward_flops
from mod_star.pretrained.upcycle import NO_SKIPPING, Skipping, upcycled_config

TEMPLATE = "Q: {question}\nA: {answer}"
LAYOUTS = ((3, 2), (2, 2))
"""(every, first) of the layouts, the one that routes fewest blocks first."""
PARTS = 128
"""Capacities are multiples of 1 / PARTS."""


SMALL = ("router", "predictor", "adapter")
"""What is new in an upcycled model."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    start: str | None
    """The arm that it starts from; None: the dense model."""
    trainable: tuple[str, ...] = ()
    """Parameters, as for `train.trainable`; empty: all."""
    distilled: bool = False
    """Whether it learns the dense model's predictions, too."""
    lora_rank: int = 0
    stages: bool = False
    """Whether its capacity is 1, 1/2, ... before, as `mod-star upcycle` plans."""
    learning_rate: float = 2e-4
    """Of arms whose few weights are fitted, low: at 1e-3 their divergence from the dense model did not fall."""


RECIPES: dict[str, Recipe] = {
    "dense": Recipe(None, learning_rate=3e-4),
    "+ LoRA": Recipe("+ adapter", SMALL, distilled=True, lora_rank=16),
    "+ distillation": Recipe("+ adapter", SMALL, distilled=True),
    "+ adapter": Recipe("+ adapter", SMALL),
    "+ kept keys/values": Recipe("+ kept keys/values", SMALL[:2]),
    "routers only": Recipe("fitted routers", SMALL[:2]),
    "old recipe": Recipe("cut", stages=True, learning_rate=3e-4),
    "all weights": Recipe("+ adapter", distilled=True),
}
"""By name, in the order in which they are trained: what matters most comes first."""


@dataclass(frozen=True)
class Options:
    """Measures and trains what is missing, arm by arm, and reports. Interrupted, the same command goes on."""

    model: Path = Path("runs/smollm2")
    """The dense model: a run, or what mod-star import reads (a GGUF file, a Hugging Face directory)."""
    data: Path = Path("data")
    """Directory with gsm8k_train.jsonl; for likelihoods also gsm8k_test.jsonl and csqa_dev.jsonl."""
    out: Path = Path("runs/upcycle_kept")
    """Where runs, tables and plot are kept."""
    shares: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)
    """Forward FLOPs of the arms, as shares of the dense model's."""
    rank: int = 32
    """Rank of the adapters."""
    tokens: int = 16384
    """Tokens that routers and adapters are fitted to."""
    context: int = 256
    """Tokens per sequence."""
    batch_size: int = 2
    """Sequences per step, and per batch of an evaluation."""
    eval_batches: int = 8
    """Batches of a held-out evaluation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products of all arms; parameters are float32."""
    steps: int = 16
    """Steps of each trained arm."""
    trained_share: float = 0.8
    """Forward FLOPs of the trained arms."""
    trained: tuple[str, ...] = tuple(RECIPES)
    """Trained arms, in this order."""
    best: str = "+ LoRA"
    """The trained arm that is trained at the other shares, too, and whose decoding is measured."""
    new_tokens: int = 64
    """Tokens that a measurement of decoding generates."""
    rounds: int = 5
    """Rounds of measuring decoding, the models in turns."""
    questions: int = 200
    """Questions of each task whose answers' likelihood is measured."""
    parts: tuple[Literal["untrained", "trained", "likelihood", "decoding"], ...] = (
        "untrained", "trained", "likelihood", "decoding",
    )  # fmt: skip
    """What to measure. Likelihood and decoding are those of trained arms, and of the dense model before."""
    seed: int = 0
    """Seed of the data's order and split, and of the predictors."""
    report: bool = False
    """Only report, on what there is."""


@dataclass(frozen=True)
class Arm:
    """A way to make the dense model cheaper."""

    name: str
    skipping: Skipping
    fitted: bool


def arms(options: Options, data: DataConfig) -> list[Arm]:
    """From the plainest to the one that is trained; "adapter alone" is the last one without kept keys and values."""
    fitted = Skipping(text=data, tokens=options.tokens)
    kept = replace(fitted, keep_key_values=True)
    return [
        Arm("cut", NO_SKIPPING, False),
        Arm("fitted routers", fitted, True),
        Arm("+ kept keys/values", kept, True),
        Arm("adapter alone", replace(fitted, adapter_rank=options.rank), True),
        Arm("+ adapter", replace(kept, adapter_rank=options.rank), True),
    ]


def config_of(dense: RunConfig, arm: Arm, share: float) -> RunConfig | None:
    """The configuration that costs a share of the dense model's forward pass, with the fewest routed blocks that can.

    None: no layout is so cheap.
    """
    tokens = dense.model.context
    whole = forward_flops(dense.model, dense.routing, tokens).total

    def run_at(layout: tuple[int, int], part: int) -> RunConfig:
        every, first = layout
        run = upcycled_config(dense, part / PARTS, every, arm.skipping, first)
        return replace(run, routing=replace(run.routing, stages=()))

    def cost(run: RunConfig) -> float:
        return forward_flops(run.model, run.routing, tokens).total / whole

    for layout in LAYOUTS:
        at = functools.partial(run_at, layout)
        if cost(at(1)) <= share:
            above = 1
            while above < PARTS and cost(at(above)) < share:
                above += 1
            return min((at(max(1, above - 1)), at(above)), key=lambda run: abs(cost(run) - share))
    return None
