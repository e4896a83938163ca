"""Runs to start from: functions that return a `RunConfig`. Change any field with `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig


def tiny() -> RunConfig:
    """Seconds on a CPU, for tests and first looks: 2 layers of width 32, 20 steps."""
    return RunConfig(
        model=ModelConfig(width=32, layers=2, heads=2, context=64),
        routing=RoutingConfig(capacity=0.25, predictor_width=16),
        optimizer=OptimizerConfig(warmup_steps=4),
        train=TrainConfig(
            steps=20, batch_size=4, loss_chunk=32, log_every=5, eval_every=10, eval_batches=2, checkpoint_every=10
        ),
    )


def small() -> RunConfig:
    """Minutes on a CPU: 6 layers of width 256, the defaults of every field."""
    return RunConfig()


def base() -> RunConfig:
    """The class of 100M parameters, hours on one accelerator: 12 layers of width 768, bfloat16."""
    return RunConfig(
        model=ModelConfig(width=768, layers=12, heads=12, context=1024, dtype="bfloat16", remat="dots"),
        routing=RoutingConfig(predictor_width=128),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500),
        train=TrainConfig(steps=20_000, batch_size=32, eval_every=500, checkpoint_every=500),
    )


def dense(run: RunConfig) -> RunConfig:
    """The dense twin: the same run with every block computing every token."""
    return replace(run, routing=replace(run.routing, every=0))


PRESETS: dict[str, Callable[[], RunConfig]] = {"tiny": tiny, "small": small, "base": base}
"""What `mod-star train --preset` offers."""
