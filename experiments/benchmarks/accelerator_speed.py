"""How fast an accelerator trains and generates: seconds, share of its peak, memory. `on_accelerator` runs this."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from experiments.benchmarks.thoughts import make_batch, make_params
from mod_star import presets
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.flops import training_step_flops
from mod_star.initial_params import init_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.planning.chips import GPUS, TPUS, Chip
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step

ROUNDS = 5
ROUTINGS = {
    "dense": RoutingConfig(every=0, predictor_width=128),
    "mod": RoutingConfig(every=2, capacity=0.125, predictor_width=128),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
"""JAX's names of TPUs -> ours. A GPU's name contains ours."""


def chip_of(device: jax.Device) -> Chip | None:
    """Published figures of this device; None for one that `mod_star.planning.chips` does not list."""
    if device.device_kind in KINDS:
        return TPUS[KINDS[device.device_kind]]
    kind = device.device_kind.lower()
    return next((chip for name, chip in GPUS.items() if device.platform == "gpu" and name in kind), None)


def shapes(tiny: bool) -> dict[str, ModelConfig]:
    """The models that are measured, by name; contexts come with what is measured."""
    if tiny:
        return {"tiny": replace(presets.tiny().model, vocab_size=256)}
    base = replace(presets.base().model, vocab_size=32_000)
    billion = replace(base, width=2048, layers=20, heads=16, kv_heads=8, mlp_width=5632)
    return {"base": base, "1b": billion}


@dataclass(frozen=True)
class StepCase:
    """One training step."""

    shape: str
    model: ModelConfig
    arm: str
    """dense, mod, quiet (Quiet-STaR on the dense network)."""
    tokens: int
    """Of one step, in sequences of `model.context`."""

    def run(self) -> RunConfig:
        """The step's run: an eighth of the positions think, in Quiet-STaR."""
        routing = ROUTINGS["mod" if self.arm == "mod" else "dense"]
        objective: Literal["quiet_star", "next_token"] = "quiet_star" if self.arm == "quiet" else "next_token"
        batch_size = max(1, self.tokens // self.model.context)
        # Chunks of the loss are parts of sequences: 2,048 positions of logits at a time, at most.
        train = TrainConfig(objective=objective, batch_size=batch_size, loss_chunk=min(self.model.context, 2048))
        thinking = ThinkingConfig(thought_length=8, n_true=4, n_thoughts=2, think_fraction=0.125, chunk=32)
        return RunConfig(self.model, routing, train=train, thinking=thinking)


def measure_step(case: StepCase) -> dict[str, float | None]:
    """Seconds of a step (median), what compiling took, share of the chip's peak, bytes of state and temporaries."""
    run = case.run()
    decoder = Decoder(run.model, run.routing)
    state = jax.jit(lambda: init_state(decoder, run, 100, make_params(run, decoder)))()
    batch = make_batch(run)
    began = time.perf_counter()
    step = jax.jit(make_train_step(decoder, run, 100), donate_argnums=0).lower(state, batch).compile()
    compiling, times = time.perf_counter() - began, []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    seconds, chip, memory = statistics.median(times[1:]), chip_of(jax.devices()[0]), step.memory_analysis()
    assert memory is not None
    flops = training_step_flops(run)
    return {
        "seconds": seconds,
        "tokens_per_second": run.train.batch_size * run.model.context / seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "share_of_peak": None if chip is None else flops / seconds / chip.flops,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "compile_seconds": compiling,
    }


def measure_decoding(model: ModelConfig, arm: str, batch_size: int, burst: int = 32) -> dict[str, float | None]:
    """Tokens per second of a batch with caches for a whole context; the routed share of a Mixture-of-Depths model."""
    decoder, bursts = Decoder(model, ROUTINGS[arm]), 4
    params = jax.jit(lambda: init_params(decoder, 0))()
    if arm == "mod":
        # Random predictors: about half of the tokens ask, and an eighth of the cache's slots bounds what is computed.
        predictor = params["groups"]["routed"]["predictor"]
        predictor["output"] = jax.random.normal(jax.random.key(3), predictor["output"].shape)
    generator = Generator(Model(decoder, params, ByteTokenizer()), end_ids=())
    room = burst * (bursts + 1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.vocab_size, model.context - room).tolist() for _ in range(batch_size)]
    state, times = generator.start(prompts, GenerationConfig(room)), []
    for number in range(bursts + 1):
        began = time.perf_counter()
        state = generator.advance(state, burst * (number + 1), Sampling(1.0))
        jax.block_until_ready(state.hidden_BxD)
        times.append((time.perf_counter() - began) / burst)
    seconds = statistics.median(times[1:])
    routed = [row.routed_fraction for row in generator.results(state)]
    return {
        "seconds": seconds,
        "tokens_per_second": batch_size / seconds,
        "routed_share": float(np.mean(routed)) if arm == "mod" else None,
    }


def measurements(tiny: bool) -> dict[str, Callable[[], dict[str, float | None]]]:
    """What is measured, by name, the most telling first."""
    contexts, tokens = ((16, 32, 64), 128) if tiny else ((1024, 4096, 16_384), 16_384)
    every: dict[str, Callable[[], dict[str, float | None]]] = {}

    def add_step(shape: str, model: ModelConfig, arm: str, context: int) -> None:
        case = StepCase(shape, replace(model, context=context), arm, tokens if arm != "quiet" else tokens // 4)
        every[f"{arm} step, {shape}, context {context}"] = lambda: measure_step(case)

    for shape, model in shapes(tiny).items():
        for arm in ("dense", "mod", "quiet"):
            add_step(shape, model, arm, contexts[0])
    shape, model = next(iter(shapes(tiny).items()))
    longest = replace(model, context=256 if tiny else 2048)
    for batch_size in (1, 16, 64):
        for arm in ROUTINGS:
            every[f"{arm} decoding, {shape}, batch {batch_size}"] = (
                lambda arm=arm, batch_size=batch_size: measure_decoding(longest, arm, batch_size)  # type: ignore[misc]
            )
    for context in contexts[1:]:
        for shape, model in shapes(tiny).items():
            for arm in ROUTINGS:
                add_step(shape, model, arm, context)
    return every
