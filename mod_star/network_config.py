"""The network's part of a run's configuration: its sizes, and which of its blocks are routed.

See `mod_star.config`, which is where both are to be imported from.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from mod_star.config_checks import require_types
from mod_star.errors import require


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
    precision: Literal["highest", "high", "default"] = "highest"
    """Precision of float32 products in linear layers and attention on TPUs and GPUs. highest: float32; high: three
    bfloat16 passes or TF32; default: bfloat16 or TF32. CPUs compute in float32 always, and all other products do."""
    attention: Literal["auto", "fused", "segments"] = "auto"
    """fused: jax.nn.dot_product_attention; segments: our own softmax; auto: fused on a GPU, segments elsewhere."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing; all but matrix products; everything but each group's input."""
    scan: bool = True
    """Scan over groups of blocks (compile time independent of depth). False: a Python loop, for debugging."""

    def __post_init__(self) -> None:
        require_types("model", self)
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
    """Share of a sequence's tokens, padding left out, that a routed block computes, in (0, 1]."""
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
        require_types("routing", self)
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


def require_network(model: ModelConfig, routing: RoutingConfig) -> None:
    """Raises InputError unless the two make a network: every layer in a group, no more tokens routed than there are."""
    if routing.every == 0:
        return
    allowed = f"must be a multiple of routing.every = {routing.every}"
    require(model.layers % routing.every == 0, "model.layers", model.layers, allowed)
    tokens = routing.capacity_tokens
    allowed = f"must be at most model.context = {model.context}"
    require(tokens is None or tokens <= model.context, "routing.capacity_tokens", tokens, allowed)


def require_thinkable(routing: RoutingConfig) -> None:
    """Raises InputError if a model that is routed so cannot think."""
    require(
        routing.every == 0 or routing.selection == "learned",
        "routing.selection",
        routing.selection,
        "must be learned (or routing.every 0) to think: whether a thought is computed can't be left to chance",
    )
