"""Runs to start from: functions that return a `RunConfig`. Change any field with `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig


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


def large() -> RunConfig:
    """The shape of Mistral 7B v0.1 (arXiv 2310.06825), dense: 32 layers of width 4096, for a slice of 256 chips.

    Batches of 256 sequences of 2048 tokens. `vocab_size` is Mistral's; a tokenizer of no more tokens goes with it.
    On TPU v5e:16x16 the mesh is data 8 x fsdp 32: shards of fewer than 128 columns make the compiler sum whole
    gradients where it could scatter the sums.
    """
    return RunConfig(
        model=ModelConfig(
            vocab_size=32_000,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            mlp_width=14_336,
            context=2048,
            sliding_window=4096,
            norm_eps=1e-5,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        routing=RoutingConfig(every=0, predictor_width=256),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(
            # One chunk: the gradient of the LM head is summed over the devices once for each.
            steps=100_000,
            batch_size=256,
            loss_chunk=2048,
            eval_every=1000,
            eval_batches=4,
            checkpoint_every=1000,
        ),
    )


def large_mod() -> RunConfig:
    """The same, with every other block computing an eighth of the tokens."""
    run = large()
    return replace(run, routing=replace(run.routing, every=2, capacity=0.125))


def large_quiet() -> RunConfig:
    """The same, dense, learning to think 12 tokens after every token of sequences of 256 (Quiet-STaR, section 5)."""
    run = large()
    return replace(
        run,
        model=replace(run.model, context=256),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20, weight_decay=0.001),
        train=replace(run.train, objective="quiet_star", steps=200, eval_every=20, checkpoint_every=20),
        thinking=ThinkingConfig(thought_length=12, n_true=4, n_thoughts=2, chunk=64),
    )


def dense(run: RunConfig) -> RunConfig:
    """The dense twin: the same run with every block computing every token."""
    return replace(run, routing=replace(run.routing, every=0))


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "7b": large,
    "7b-mod": large_mod,
    "7b-quiet": large_quiet,
}
"""What `mod-star train --preset` and `mod-star plan` offer."""
