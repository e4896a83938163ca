"""What a run is, and on which devices it runs, as frozen dataclasses: checked when made, options of the command line.

The docstring under a field is its help text, and its range (`mod_star.config_checks`) stands in its type. Sizes are in
tokens unless a field says otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mod_star.config_checks import NotEmpty, above, at_least, between, check_fields
from mod_star.errors import InputError, require
from mod_star.network_config import ModelConfig, RoutingConfig, require_network, require_thinkable

__all__ = [
    "DataConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProcessesConfig",
    "RoutingConfig",
    "RunConfig",
    "ThinkingConfig",
    "TrainConfig",
    "from_dict",
    "require_network",
    "require_thinkable",
    "to_dict",
]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences."""

    source: Annotated[tuple[str, ...], NotEmpty()] = ("python-docs",)
    """What to read: python-docs (embedded), files or globs (.txt .md .jsonl .json .csv .parquet .arrayrecord, text and
    JSON also .gz .bz2 .zst), tfds:NAME[:SPLIT]."""
    weights: Annotated[tuple[float, ...], above(0)] = ()
    """Share of each source in the mixture's documents, one number per source. Empty: as many as each has."""
    template: str | None = None
    """How a record becomes text, such as "Q: {question}\\nA: {answer}". None: its field "text", or else "messages" (or
    "conversations"), of which the assistant's are learned; "{turns}" names another field of messages."""
    separator: Annotated[str | None, NotEmpty()] = None
    """What stands between the documents of text files, such as "<|endoftext|>". None: a file is one, or is cut up."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    held_out: Annotated[float, between(0, 1)] = 0.05
    """Share of the documents kept for evaluation; a document is never in both parts."""
    pack: bool = True
    """Fill sequences with several documents that do not see each other. False: one document each, cut or padded."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the shuffle and of the split."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        allowed = f"must give one weight per source ({len(self.source)}) or none"
        require(len(self.weights) in (0, len(self.source)), "data.weights", self.weights, allowed)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping and a learning-rate schedule."""

    learning_rate: Annotated[float, above(0)] = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to the final rate; stable then linear decay over the last decay_fraction; constant."""
    warmup_steps: Annotated[int, at_least(0)] = 50
    """Steps of linear warm-up from 0; at most half of the run."""
    decay_fraction: Annotated[float, between(0, 1, "(]")] = 0.2
    """Share of the steps in which the wsd schedule decays."""
    final_fraction: Annotated[float, between(0, 1, "[]")] = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Decoupled decay (times the learning rate) of matrices; norms, router and predictor are not decayed."""
    b1: Annotated[float, between(0, 1, "[)")] = 0.9
    """Adam's decay of the first moment."""
    b2: Annotated[float, between(0, 1, "[)")] = 0.95
    """Adam's decay of the second moment."""
    eps: Annotated[float, above(0)] = 1e-8
    """Adam's epsilon."""
    clip: Annotated[float, at_least(0, "0: no clipping")] = 1.0
    """Global gradient norm at which gradients are scaled down; 0: no clipping. The predictor is clipped apart."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, in what portions, and what to write down."""

    objective: Literal["next_token", "quiet_star"] = "next_token"
    """quiet_star: teach the model to think before it predicts, see the fields of thinking."""
    steps: Annotated[int, at_least(1)] = 1000
    """Optimizer steps. Ignored when flops is given."""
    flops: Annotated[float | None, above(0)] = None
    """Training budget in floating-point operations, such as 1e15: as many steps as fit into it."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Sequences per optimizer step."""
    accumulation: Annotated[int, at_least(1)] = 1
    """Equal portions in which a batch is computed, one after the other (less memory, same gradient)."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the initial parameters and of stochastic routing."""
    trainable: tuple[str, ...] = ()
    """Parameters to train, by their paths: a name such as router or embedding, or several in a row such as
    routed/block; * stands for any part of a name. All others are frozen: they have no gradient and no optimizer state.
    Empty: all are trained, or with lora.rank what lora says."""
    loss_chunk: Annotated[int, at_least(1)] = 128
    """Positions per sequence whose logits exist at one time in the loss."""
    log_every: Annotated[int, at_least(1)] = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[int, at_least(0, "0: only at the end")] = 200
    """Steps between held-out evaluations; 0: only at the end."""
    eval_batches: Annotated[int, at_least(1)] = 16
    """The most batches of a held-out evaluation."""
    checkpoint_every: Annotated[int, at_least(0, "0: only at the end")] = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Annotated[int, at_least(1)] = 3
    """How many of the latest checkpoints stay on disk."""
    max_skipped: Annotated[int, at_least(1)] = 5
    """Steps with a non-finite loss or gradient, in a row, after which training stops."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        allowed = f"must divide train.batch_size = {self.batch_size}"
        require(self.batch_size % self.accumulation == 0, "train.accumulation", self.accumulation, allowed)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): frozen weights, and small trained matrices beside them. In force where rank is not 0."""

    rank: Annotated[int, at_least(0, "0: no adapters")] = 0
    """Rank R of the adapters: a weight W of D inputs and F outputs becomes W + alpha / R · A·B, with A DxR and B RxF.
    0: none. Else adapters are trained, and what train.trainable names; empty, it means what a pretrained model lacks:
    routers, predictors and thinking."""
    alpha: Annotated[float, above(0)] = 16.0
    """Scale of the adapters, divided by the rank."""
    targets: Annotated[tuple[str, ...], NotEmpty()] = ("block",)
    """Matrices of blocks that get an adapter, by their paths as for train.trainable, such as query value. block: all of
    attention and feed-forward. Embedding, head, routers and experts cannot have one."""

    def __post_init__(self) -> None:
        check_fields(self, "lora")


@dataclass(frozen=True)
class ThinkingConfig:
    """Quiet-STaR (arXiv 2403.09629): thoughts between tokens. In force where train.objective is quiet_star."""

    thought_length: Annotated[int, at_least(0, "0: no thoughts")] = 8
    """Tokens t of a thought, <start> and <end> not counted. 0: none, as with next_token; for the end of stages."""
    n_true: Annotated[int, at_least(1)] = 4
    """Tokens of the text that are predicted after a thought; its reward is summed over them."""
    n_thoughts: Annotated[int, at_least(1)] = 2
    """Thoughts that are sampled at each thinking position and compared with one another."""
    kind: Literal["sampled", "pause", "latent", "expected"] = "sampled"
    """What a thought reads at its next step. sampled: the token it has drawn (the paper). pause: <start> again, a
    control that computes as much and says nothing. latent: its last hidden state; expected: the mean embedding of the
    tokens that it predicts. The last two are learned by the gradient alone; they need policy_weight 0, n_thoughts 1."""
    think_fraction: Annotated[float, between(0, 1, "(]")] = 1.0
    """Share of a sequence's positions, padding left out, that think while training; 1 is the paper."""
    think_where: Literal["random", "entropy"] = "random"
    """Which positions think if not all: chosen by chance, or those where the base prediction is least certain."""
    decider_width: Annotated[int, at_least(0, "0: none")] = 0
    """Hidden units of the decider, which learns how much a thought helps before a token, for mod-star calibrate."""
    base_weight: Annotated[float, at_least(0)] = 1.0
    """Weight in the loss of the negative log-likelihood (NLL) without thoughts."""
    talk_weight: Annotated[float, at_least(0)] = 1.0
    """Weight of the NLL of the prediction mixed after a thought."""
    policy_weight: Annotated[float, at_least(0)] = 1.0
    """Weight of the REINFORCE loss, on the scale of the NLL after thoughts: both are divided by the number of
    predictions. Equal to talk_weight: with leave_one_out and without drop_negative the gradient is that of the expected
    NLL after thoughts. 0: thoughts are sampled but nothing teaches what to think."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a thought's reward is compared with: the mean over all thoughts of its position (paper), or the others'."""
    mixing: Literal["head", "thought"] = "head"
    """What is predicted after a thought. head: a mixture with the base prediction, by weights that the paper's head
    learns. thought: the prediction after the thought alone, as in RLP."""
    drop_negative: bool = True
    """Learn only from thoughts that beat the baseline (paper). False with leave_one_out: the unbiased estimate."""
    temperature: Annotated[float, at_least(0, "0: greedy")] = 1.0
    """Temperature of sampling thoughts while training; 0: greedy. Gradients are always those of temperature 1."""
    policy_temperature: Annotated[float, above(0)] = 1.0
    """Divides the logits of thought tokens in the REINFORCE loss (3 in the authors' code)."""
    start_text: Annotated[str, NotEmpty()] = "---"
    """Text whose mean embedding <start> begins as."""
    end_text: Annotated[str, NotEmpty()] = "---"
    """Text whose mean embedding <end> begins as."""
    embedding_rate: Annotated[float, above(0)] = 100.0
    """Learning rate of <start> and <end>, as a multiple of the others'."""
    chunk: Annotated[int, at_least(1)] = 32
    """Positions per sequence that are scored at one time; less memory, same result."""
    gather: Literal["token", "step"] = "token"
    """When parameters that a mesh's fsdp axis cuts up are put together for sampling thoughts. token: a group of blocks
    at a time, for every token of the thoughts. step: all of them, once; needs room for a whole model on each device."""
    stages: Annotated[tuple[int, ...], at_least(1)] = ()
    """Falling lengths that training goes through before thought_length (Fast Quiet-STaR), each for as many steps and as
    one program."""
    stage_fraction: Annotated[float, between(0, 1)] = 0.5
    """Share of the steps that all stages together take; the rest is trained at thought_length."""

    def __post_init__(self) -> None:
        check_fields(self, "thinking")
        if self.stages:
            falling = all(a > b for a, b in itertools.pairwise((*self.stages, self.thought_length)))
            allowed = f"must fall to above thinking.thought_length = {self.thought_length}"
            require(falling, "thinking.stages", self.stages, allowed)
        require(
            self.n_thoughts >= 2 or self.policy_weight == 0,
            "thinking.n_thoughts",
            self.n_thoughts,
            "must be at least 2: a single thought equals its baseline, its reward is always zero (or set "
            "thinking.policy_weight to 0)",
        )
        if self.kind != "sampled":  # there is nothing to reinforce, and the thoughts of a place are all the same
            for name, only in (("policy_weight", 0), ("n_thoughts", 1)):
                value, rule = getattr(self, name), f"must be {only} with thinking.kind = {self.kind!r}"
                require(value == only, f"thinking.{name}", value, rule)


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run; stored as config.json in its directory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parts: str | None = None
    """Your functions (router, block, objective, reward, ...): FILE.py:NAME of a mod_star.Parts. None: built-in ones."""
    init_from: str | None = None
    """Directory of a run to start from: its newest parameters, and its fields as defaults. None: random parameters."""

    @property
    def thinks(self) -> bool:
        """Whether the model learns to think, and has parameters for it."""
        return self.train.objective == "quiet_star"

    def __post_init__(self) -> None:
        check_fields(self)
        require_network(self.model, self.routing)
        if self.thinks:
            n_true, context = self.thinking.n_true, self.model.context
            require(n_true < context, "thinking.n_true", n_true, f"must be below model.context = {context}")
            require_thinkable(self.routing)
            name = "stages" if self.routing.stages else "budgets"
            values = getattr(self.routing, name)
            allowed = f"must be empty with routing.{name} = {values}: only one of the two may change"
            one = not (self.thinking.stages and values and self.routing.every)
            require(one, "thinking.stages", self.thinking.stages, allowed)
            for name in ("noise", "explore"):
                value = getattr(self.routing, name)
                allowed = "must be 0 with train.objective = 'quiet_star', which routes its text by the causal rule"
                require(value == 0 or self.routing.every == 0, f"routing.{name}", value, allowed)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON-able values."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from what `to_dict` gave (possibly through JSON).

    Fields that an older version did not have take their defaults, which keep what it did; unknown names are errors.
    """
    groups = {"model": ModelConfig, "routing": RoutingConfig, "data": DataConfig, "optimizer": OptimizerConfig}
    groups |= {"train": TrainConfig, "thinking": ThinkingConfig, "lora": LoraConfig}
    built = _known("config", RunConfig, values)
    for name, group in groups.items():
        fields = _known(f"config.{name}", group, values.get(name, {}))
        if name == "model" and fields.get("attention") in ("fused", "segments"):  # ways that older versions had
            fields["attention"] = "auto"
        built[name] = group(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
    return RunConfig(**built)


def _known(where: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(f.name for f in dataclasses.fields(kind))
    if odd := sorted(values.keys() - set(names)):
        raise InputError(f"{where}: unknown fields {odd}; there are {names}")
    return dict(values)


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; not a part of a run, which may go on with another one."""

    data: Annotated[int, at_least(0, "0: all devices that are left")] = 0
    """Copies of the model, each with its own sequences. 0: as many as there are devices for."""
    fsdp: Annotated[int, at_least(1)] = 1
    """Devices that parameters and optimizer state of a copy are cut up among; they have their own sequences too."""
    tensor: Annotated[int, at_least(1)] = 1
    """Devices that every matrix product is cut up among (heads, hidden width, vocabulary)."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh")


@dataclass(frozen=True)
class ProcessesConfig:
    """For machines that JAX does not know as a cluster; on Cloud TPU, GKE, Slurm and Open MPI nothing is needed."""

    coordinator: str | None = None
    """HOST:PORT of the first process, a free port there. None: found by JAX, or there is only one process."""
    count: Annotated[int | None, at_least(1)] = None
    """How many processes there are, with a coordinator given."""
    index: Annotated[int | None, at_least(0)] = None
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        check_fields(self, "processes")
        is_set = [value is not None for value in (self.coordinator, self.count, self.index)]
        require(
            len(set(is_set)) == 1,
            "processes",
            (self.coordinator, self.count, self.index),
            "coordinator, count and index must be given together, or none of them",
        )
        if self.coordinator is None or self.count is None or self.index is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        require(bool(host) and port.isdecimal(), "processes.coordinator", self.coordinator, "must be HOST:PORT")
        require(self.index < self.count, "processes.index", self.index, f"must lie in [0, {self.count})")
