"""What a run is, as frozen dataclasses: validated when made, settable field by field from the command line.

The docstring under a field is its help text. Sizes are in tokens unless a field says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mod_star.config_checks import fits, require_types
from mod_star.errors import InputError, require
from mod_star.network_config import ModelConfig, RoutingConfig, require_network, require_thinkable

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RoutingConfig",
    "RunConfig",
    "ThinkingConfig",
    "TrainConfig",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences."""

    source: tuple[str, ...] = ("python-docs",)
    """What to read: python-docs (embedded), files or globs (.txt .md .jsonl .json .csv .parquet .arrayrecord, text and
    JSON also .gz .bz2 .zst), tfds:NAME[:SPLIT]."""
    weights: tuple[float, ...] = ()
    """Share of each source in the mixture's documents, one number per source. Empty: as many as each has."""
    template: str | None = None
    """How a record becomes text, such as "Q: {question}\\nA: {answer}". None: its field "text", or else "messages" (or
    "conversations"), of which the assistant's are learned; "{turns}" names another field of messages."""
    separator: str | None = None
    """What stands between the documents of text files, such as "<|endoftext|>". None: a file is one, or is cut up."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation, in (0, 1); a document is never in both parts."""
    pack: bool = True
    """Fill sequences with several documents that don't see each other. False: one document each, cut or padded."""
    seed: int = 0
    """Seed of the shuffle and of the split."""

    def __post_init__(self) -> None:
        require_types("data", self)
        require(len(self.source) >= 1, "data.source", self.source, "must name at least one source")
        require(
            len(self.weights) in (0, len(self.source)),
            "data.weights",
            self.weights,
            f"must give one weight per source ({len(self.source)}) or none",
        )
        require(all(w > 0 for w in self.weights), "data.weights", self.weights, "must be positive")
        require(self.separator != "", "data.separator", self.separator, "must not be empty")
        require(0 < self.held_out < 1, "data.held_out", self.held_out, "must lie between 0 and 1")
        require(self.seed >= 0, "data.seed", self.seed, "must not be negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping and a learning-rate schedule."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to the final rate; stable then linear decay over the last decay_fraction; constant."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0; at most half of the run."""
    decay_fraction: float = 0.2
    """Share of the steps in which the wsd schedule decays."""
    final_fraction: float = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled decay (times the learning rate) of matrices; norms, router and predictor are not decayed."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip: float = 1.0
    """Global gradient norm at which gradients are scaled down; 0: no clipping. The predictor is clipped apart."""

    def __post_init__(self) -> None:
        require_types("optimizer", self)
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must not be negative")
        require(0 < self.decay_fraction <= 1, "optimizer.decay_fraction", self.decay_fraction, "must lie in (0, 1]")
        require(0 <= self.final_fraction <= 1, "optimizer.final_fraction", self.final_fraction, "must lie in [0, 1]")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must not be negative")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        require(self.clip >= 0, "optimizer.clip", self.clip, "must be 0 (off) or positive")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, in what portions, and what to write down."""

    objective: Literal["next_token", "quiet_star"] = "next_token"
    """quiet_star: teach the model to think before it predicts, see the fields of thinking."""
    steps: int = 1000
    """Optimizer steps. Ignored when flops is given."""
    flops: float | None = None
    """Training budget in floating-point operations, such as 1e15: as many steps as fit into it."""
    batch_size: int = 8
    """Sequences per optimizer step."""
    accumulation: int = 1
    """Equal portions in which a batch is computed, one after the other (less memory, same gradient)."""
    seed: int = 0
    """Seed of the initial parameters and of stochastic routing."""
    loss_chunk: int = 128
    """Positions per sequence whose logits exist at one time in the loss."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between held-out evaluations; 0: only at the end."""
    eval_batches: int = 16
    """The most batches of a held-out evaluation."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints stay on disk."""
    max_skipped: int = 5
    """Steps with a non-finite loss or gradient, in a row, after which training stops."""

    def __post_init__(self) -> None:
        require_types("train", self)
        for name in ("steps", "batch_size", "accumulation", "loss_chunk", "log_every", "eval_batches"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        for name in ("keep_checkpoints", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        for name in ("eval_every", "checkpoint_every", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative")
        require(self.flops is None or self.flops > 0, "train.flops", self.flops, "must be positive")
        require(
            self.batch_size % self.accumulation == 0,
            "train.accumulation",
            self.accumulation,
            f"must divide train.batch_size = {self.batch_size}",
        )


@dataclass(frozen=True)
class ThinkingConfig:
    """Quiet-STaR (arXiv 2403.09629): thoughts between tokens. In force where train.objective is quiet_star."""

    thought_length: int = 8
    """Tokens t of a thought, <start> and <end> not counted."""
    n_true: int = 4
    """Tokens of the text that are predicted after a thought; its reward is summed over them."""
    n_thoughts: int = 2
    """Thoughts that are sampled at each thinking position and compared with one another."""
    kind: Literal["sampled", "pause"] = "sampled"
    """pause: <start> repeated in place of a sampled thought, a control that computes as much and says nothing."""
    think_fraction: float = 1.0
    """Share of a sequence's positions, padding left out, that think while training, in (0, 1]; 1 is the paper."""
    think_where: Literal["random", "entropy"] = "random"
    """Which positions think if not all: chosen by chance, or those where the base prediction is least certain."""
    base_weight: float = 1.0
    """Weight in the loss of the negative log-likelihood (NLL) without thoughts."""
    talk_weight: float = 1.0
    """Weight of the NLL of the prediction mixed after a thought."""
    policy_weight: float = 1.0
    """Weight of the REINFORCE loss, on the scale of the NLL after thoughts: both are divided by the number of
    predictions. Equal to talk_weight: with leave_one_out and without drop_negative the gradient is that of the expected
    NLL after thoughts. 0: thoughts are sampled but nothing teaches what to think."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a thought's reward is compared with: the mean over all thoughts of its position (paper), or the others'."""
    drop_negative: bool = True
    """Learn only from thoughts that beat the baseline (paper). False with leave_one_out: the unbiased estimate."""
    temperature: float = 1.0
    """Of sampling thoughts while training; 0: greedy. Gradients are those of temperature 1 whatever this is."""
    policy_temperature: float = 1.0
    """Divides the logits of thought tokens in the REINFORCE loss (3 in the authors' code)."""
    start_text: str = "---"
    """Text whose mean embedding <start> begins as."""
    end_text: str = "---"
    """Text whose mean embedding <end> begins as."""
    embedding_rate: float = 100.0
    """Learning rate of <start> and <end>, as a multiple of the others'."""
    chunk: int = 32
    """Positions per sequence that are scored at one time; less memory, same result."""

    def __post_init__(self) -> None:
        require_types("thinking", self)
        for name in ("thought_length", "n_true", "n_thoughts", "chunk"):
            require(getattr(self, name) >= 1, f"thinking.{name}", getattr(self, name), "must be at least 1")
        require(0 < self.think_fraction <= 1, "thinking.think_fraction", self.think_fraction, "must lie in (0, 1]")
        for name in ("base_weight", "talk_weight", "policy_weight", "temperature"):
            require(getattr(self, name) >= 0, f"thinking.{name}", getattr(self, name), "must not be negative")
        for name in ("policy_temperature", "embedding_rate"):
            require(getattr(self, name) > 0, f"thinking.{name}", getattr(self, name), "must be positive")
        for name in ("start_text", "end_text"):
            require(getattr(self, name), f"thinking.{name}", getattr(self, name), "must not be empty")
        require(
            self.n_thoughts >= 2 or self.policy_weight == 0,
            "thinking.n_thoughts",
            self.n_thoughts,
            "must be at least 2: a single thought equals its baseline, its reward is always zero (or set "
            "thinking.policy_weight to 0)",
        )
        if self.kind == "pause":
            for name, allowed in (("policy_weight", 0), ("n_thoughts", 1)):
                value = getattr(self, name)
                require(value == allowed, f"thinking.{name}", value, f"must be {allowed} with thinking.kind = 'pause'")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run; stored as config.json in its directory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    parts: str | None = None
    """Your own router, gate, feed-forward or block: FILE.py:NAME of a mod_star.Parts. None: the built-in ones."""
    init_from: str | None = None
    """Directory of a run to start from: its newest parameters, and its fields as defaults. None: random parameters."""

    @property
    def thinks(self) -> bool:
        """Whether the model learns to think, and has parameters for it."""
        return self.train.objective == "quiet_star"

    def __post_init__(self) -> None:
        require(fits(self.init_from, str | None), "init_from", self.init_from, "must be a str, the directory of a run")
        require_network(self.model, self.routing)
        if self.thinks:
            n_true, context = self.thinking.n_true, self.model.context
            require(n_true < context, "thinking.n_true", n_true, f"must be below model.context = {context}")
            require_thinkable(self.routing)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON-able values."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from what `to_dict` gave (possibly through JSON).

    Fields that an older version did not have take their defaults, which keep what it did; unknown names are errors.
    """
    groups = {"model": ModelConfig, "routing": RoutingConfig, "data": DataConfig, "optimizer": OptimizerConfig}
    groups |= {"train": TrainConfig, "thinking": ThinkingConfig}
    built = _known("config", RunConfig, values)
    for name, group in groups.items():
        given = _known(f"config.{name}", group, values.get(name, {}))
        built[name] = group(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
    return RunConfig(**built)


def _known(where: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(f.name for f in dataclasses.fields(kind))
    if odd := sorted(values.keys() - set(names)):
        raise InputError(f"{where}: unknown fields {odd}; there are {names}")
    return dict(values)
