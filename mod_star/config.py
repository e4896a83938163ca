"""What a run is, as frozen dataclasses: validated when made, settable field by field from the command line.

The docstring under a field is its help text. Sizes are in tokens unless a field says otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mod_star.errors import InputError, require


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in options
    if origin is UnionType:
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, Integral)
    if hint is float:
        return isinstance(value, Real) and math.isfinite(value)
    return isinstance(value, hint)


def _require_types(group: str, config: object) -> None:
    """Raises InputError for a value that is not of its field's type: not every configuration comes by command line."""
    for name, hint in get_type_hints(type(config)).items():
        said = f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else getattr(hint, "__name__", hint)
        require(_fits(getattr(config, name), hint), f"{group}.{name}", getattr(config, name), f"must be {said}")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int = 0
    """Rows of the embedding. 0: as many as the tokenizer has, rounded up to a multiple of 64."""
    width: int = 256
    """Width D of the residual stream."""
    layers: int = 6
    """Number of blocks, routed ones included."""
    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads, a divisor of heads (grouped-query attention). None: as many as heads."""
    head_dim: int | None = None
    """Width of one head, even. None: width / heads."""
    mlp_width: int | None = None
    """Hidden width of the feed-forward layer. None: 8/3 of width, rounded up to a multiple of 64."""
    context: int = 256
    """Longest sequence S: tokens per training sequence, and the limit of prompt plus generated tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies are stretched to a longer context: linear: all divided by rope_factor; llama3: only the
    slow ones (Llama 3.1), with the three fields below."""
    rope_factor: float = 1.0
    """What scaled rotary frequencies are divided by; 1 without rope_scaling."""
    rope_low_freq_factor: float = 1.0
    """llama3: frequencies that turn less than so often in rope_original_context are divided by rope_factor."""
    rope_high_freq_factor: float = 4.0
    """llama3: frequencies that turn more than so often in rope_original_context stay; between the two, a mixture."""
    rope_original_context: int = 8192
    """llama3: context that the model was trained with before its frequencies were stretched."""
    sliding_window: int | None = None
    """A token attends to itself and the sliding_window - 1 positions before it (Mistral). None: to all before it."""
    qkv_bias: bool = False
    """Add learned biases to queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, before they are rotated (Qwen3)."""
    norm_eps: float = 1e-6
    """Epsilon inside RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the LM head too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products. Parameters, router, softmax and losses are float32 always."""
    attention: Literal["auto", "fused", "segments"] = "auto"
    """fused: jax.nn.dot_product_attention; segments: our own softmax; auto: fused on a GPU, segments elsewhere."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing; all but matrix products; everything but each group's input."""
    scan: bool = True
    """Scan over groups of blocks (compile time independent of depth). False: a Python loop, for debugging."""

    def __post_init__(self) -> None:
        _require_types("model", self)
        for name in ("width", "layers", "heads", "context"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "must be 0 (from the tokenizer) or positive")
        require(self.context >= 2, "model.context", self.context, "must be at least 2 (a token and its successor)")
        if self.head_dim is None:
            require(
                self.width % self.heads == 0,
                "model.heads",
                self.heads,
                f"must divide model.width = {self.width} (or give model.head_dim)",
            )
        require(
            self.head_size % 2 == 0 and self.head_size > 0,
            "model.head_dim",
            self.head_size,
            "must be even and positive (rotary positions turn pairs)",
        )
        require(
            self.kv_heads is None or (self.kv_heads >= 1 and self.heads % self.kv_heads == 0),
            "model.kv_heads",
            self.kv_heads,
            f"must be a divisor of model.heads = {self.heads}",
        )
        require(self.hidden_width >= 1, "model.mlp_width", self.mlp_width, "must be at least 1")
        require(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "must be greater than 1")
        require(self.rope_factor >= 1, "model.rope_factor", self.rope_factor, "must be at least 1")
        require(
            self.rope_factor == 1 or self.rope_scaling != "none",
            "model.rope_factor",
            self.rope_factor,
            "must be 1 with model.rope_scaling = 'none'",
        )
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(low > 0, "model.rope_low_freq_factor", low, "must be positive")
        require(high > low, "model.rope_high_freq_factor", high, f"must be above model.rope_low_freq_factor = {low}")
        original = self.rope_original_context
        require(original >= 1, "model.rope_original_context", original, "must be at least 1")
        window = self.sliding_window
        require(window is None or window >= 1, "model.sliding_window", window, "must be at least 1")
        require(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "must lie between 0 and 1")
        require(
            self.attention != "fused" or self.dtype == "bfloat16",
            "model.attention",
            self.attention,
            "needs model.dtype = 'bfloat16' (the fused kernel takes 16-bit types only)",
        )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        """Number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward layer."""
        return 64 * math.ceil(8 * self.width / 3 / 64) if self.mlp_width is None else self.mlp_width


@dataclass(frozen=True)
class RoutingConfig:
    """Mixture-of-Depths (arXiv 2404.02258): which blocks are routed, and how tokens are chosen."""

    every: int = 2
    """Every n-th block is routed (2: every other, 1: all). 0: none, a dense model."""
    capacity: float = 0.125
    """Share of a sequence's tokens that a routed block computes, in (0, 1]."""
    capacity_tokens: int | None = None
    """The same as an absolute count, whatever the length of the sequence; overrides capacity."""
    gate: Literal["sigmoid", "identity", "tanh"] = "sigmoid"
    """What scales a routed block's output: sigmoid(r), r (the paper), or 1 + 0.2 tanh(r)."""
    causal_rule: Literal["predictor", "router"] = "predictor"
    """Who decides without seeing the future: a small MLP on the detached stream, or the router's own logit > 0."""
    predictor_width: int = 64
    """Hidden width of the predictor."""
    auxiliary_weight: float = 0.01
    """Weight of the loss that trains the causal rule; of little effect on a predictor, which Adam scales anyway."""
    selection: Literal["learned", "stochastic"] = "learned"
    """learned: top-C by router score. stochastic: top-C of Gaussian noise, the paper's control."""
    headroom: float = 1.5
    """Slots of a routed block under the causal rule, as a multiple of its capacity; further tokens pass by."""
    stages: tuple[float, ...] = ()
    """Falling capacities that training goes through before capacity, each for as many steps and as one program."""
    stage_fraction: float = 0.5
    """Share of the steps that all stages together take; the rest is trained at capacity."""

    def __post_init__(self) -> None:
        _require_types("routing", self)
        require(self.every >= 0, "routing.every", self.every, "must be 0 (dense) or positive")
        require(0 < self.capacity <= 1, "routing.capacity", self.capacity, "must lie in (0, 1]")
        require(
            self.capacity_tokens is None or self.capacity_tokens >= 1,
            "routing.capacity_tokens",
            self.capacity_tokens,
            "must be at least 1",
        )
        require(self.predictor_width >= 1, "routing.predictor_width", self.predictor_width, "must be at least 1")
        require(self.auxiliary_weight >= 0, "routing.auxiliary_weight", self.auxiliary_weight, "must not be negative")
        require(self.headroom >= 1, "routing.headroom", self.headroom, "must be at least 1")
        require(0 < self.stage_fraction < 1, "routing.stage_fraction", self.stage_fraction, "must lie between 0 and 1")
        if self.stages:
            falling = all(a > b for a, b in itertools.pairwise((*self.stages, self.capacity)))
            require(
                falling and self.stages[0] <= 1,
                "routing.stages",
                self.stages,
                f"must fall from at most 1 to above routing.capacity = {self.capacity}",
            )
            require(
                self.capacity_tokens is None,
                "routing.capacity_tokens",
                self.capacity_tokens,
                "must be None with routing.stages, which are shares",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences."""

    source: tuple[str, ...] = ("python-docs",)
    """What to read: python-docs (embedded), files or globs (.txt .md .jsonl .json .arrayrecord), tfds:NAME[:SPLIT]."""
    weights: tuple[float, ...] = ()
    """Share of each source in the mixture's documents, one number per source. Empty: as many as each has."""
    template: str | None = None
    """How a JSON record becomes text, such as "Q: {question}\\nA: {answer}". None: its field "text"."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation, in (0, 1); a document is never in both parts."""
    pack: bool = True
    """Fill sequences with several documents that don't see each other. False: one document each, cut or padded."""
    seed: int = 0
    """Seed of the shuffle and of the split."""

    def __post_init__(self) -> None:
        _require_types("data", self)
        require(len(self.source) >= 1, "data.source", self.source, "must name at least one source")
        require(
            len(self.weights) in (0, len(self.source)),
            "data.weights",
            self.weights,
            f"must give one weight per source ({len(self.source)}) or none",
        )
        require(all(w > 0 for w in self.weights), "data.weights", self.weights, "must be positive")
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
        _require_types("optimizer", self)
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
    """Batches of a held-out evaluation at the most."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints stay on disk."""
    max_skipped: int = 5
    """Steps with a non-finite loss or gradient, in a row, after which training stops."""

    def __post_init__(self) -> None:
        _require_types("train", self)
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
    """Share of a sequence's positions that think while training, in (0, 1]; 1 is the paper."""
    think_where: Literal["random", "entropy"] = "random"
    """Which positions think if not all: chosen by chance, or those where the base prediction is least certain."""
    base_weight: float = 1.0
    """Weight in the loss of the negative log-likelihood (NLL) without thoughts."""
    talk_weight: float = 1.0
    """Weight of the NLL of the prediction mixed after a thought."""
    policy_weight: float = 1.0
    """Weight of the REINFORCE loss; 0: thoughts are sampled but nothing teaches what to think."""
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
        _require_types("thinking", self)
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

    def __post_init__(self) -> None:
        routing, model = self.routing, self.model
        require(_fits(self.init_from, str | None), "init_from", self.init_from, "must be a str, the directory of a run")
        if routing.every:
            require(
                model.layers % routing.every == 0,
                "model.layers",
                model.layers,
                f"must be a multiple of routing.every = {routing.every}",
            )
            tokens = routing.capacity_tokens
            require(
                tokens is None or tokens <= model.context,
                "routing.capacity_tokens",
                tokens,
                f"must be at most model.context = {model.context}",
            )
        if self.train.objective == "quiet_star":
            n_true = self.thinking.n_true
            require(n_true < model.context, "thinking.n_true", n_true, f"must be below model.context = {model.context}")
            require(
                routing.every == 0 or routing.selection == "learned",
                "routing.selection",
                routing.selection,
                "must be learned (or routing.every 0) to think: whether a thought is computed can't be left to chance",
            )


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
