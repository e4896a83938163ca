"""What a network is: its sizes, and which tokens its routed blocks compute. Import all of it from `mod_star.config`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from mod_star.config_checks import above, at_least, between, check_fields
from mod_star.errors import require


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: Annotated[int, at_least(0, "0: from the tokenizer")] = 0
    """Rows of the embedding. 0: as many as the tokenizer has, rounded up to a multiple of 64."""
    width: Annotated[int, at_least(1)] = 256
    """Width D of the residual stream."""
    layers: Annotated[int, at_least(1)] = 6
    """Number of blocks, routed ones included."""
    heads: Annotated[int, at_least(1)] = 4
    """Query heads."""
    kv_heads: Annotated[int | None, at_least(1)] = None
    """Key/value heads, a divisor of heads (grouped-query attention). None: as many as heads."""
    head_dim: Annotated[int | None, at_least(2)] = None
    """Width of one head, even. None: width / heads."""
    mlp_width: Annotated[int | None, at_least(1)] = None
    """Hidden width of the feed-forward layer. None: 8/3 of width, rounded up to a multiple of 64."""
    experts: Annotated[int, at_least(0, "0: none")] = 0
    """Experts of every block's feed-forward layer, of which each token chooses some. 0: one layer for all tokens."""
    experts_active: Annotated[int, at_least(1)] = 2
    """Experts that each token chooses, null ones included."""
    experts_width: Annotated[int | None, at_least(1)] = None
    """Hidden width of an expert. None: that of the feed-forward layer / experts_active, rounded up."""
    experts_null: Annotated[int, at_least(0)] = 0
    """Null experts among those that a token can choose; they compute nothing (integrated MoDE)."""
    experts_null_kind: Literal["zero", "copy"] = "zero"
    """What a null expert gives: zero, or the token that it gets."""
    experts_balance: Literal["aux", "bias", "none"] = "aux"
    """What keeps experts equally used: aux: a loss. bias: biases that choose but do not weigh. none: nothing."""
    experts_weight: Annotated[float, at_least(0)] = 0.01
    """Weight of what balances the experts in the loss; of little effect on biases, which Adam scales anyway."""
    context: Annotated[int, at_least(2, "a token and its successor")] = 256
    """Longest sequence S: tokens per training sequence, and the limit of prompt plus generated tokens."""
    rope_theta: Annotated[float, above(1)] = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies are stretched to a longer context: linear: all divided by rope_factor; llama3: only the
    slow ones (Llama 3.1), with the three fields below."""
    rope_factor: Annotated[float, at_least(1)] = 1.0
    """What scaled rotary frequencies are divided by; 1 without rope_scaling."""
    rope_low_freq_factor: Annotated[float, above(0)] = 1.0
    """llama3: frequencies that turn less than so often in rope_original_context are divided by rope_factor."""
    rope_high_freq_factor: Annotated[float, above(0)] = 4.0
    """llama3: frequencies that turn more than so often in rope_original_context stay; between the two, a mixture."""
    rope_original_context: Annotated[int, at_least(1)] = 8192
    """llama3: context that the model was trained with before its frequencies were stretched."""
    sliding_window: Annotated[int | None, at_least(1)] = None
    """A token attends to itself and the sliding_window - 1 positions before it (Mistral). None: to all before it."""
    qkv_bias: bool = False
    """Add learned biases to queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, before they are rotated (Qwen3)."""
    norm_eps: Annotated[float, between(0, 1)] = 1e-6
    """Epsilon inside RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the LM head too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products. Parameters, router, softmax and losses are float32 always."""
    precision: Literal["highest", "high", "default"] = "highest"
    """Precision of float32 products in linear layers and attention on TPUs and GPUs. highest: float32; high: three
    bfloat16 passes or TF32; default: bfloat16 or TF32. CPUs compute in float32 always, and all other products do."""
    attention: Literal["auto", "plain"] = "auto"
    """auto: block by block, on TPUs and on NVIDIA GPUs in kernels (compute capability 8.0 or newer). plain: products of
    some queries with all keys, one after the other; for older GPUs, and to compare with."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing; all but matrix products; everything but each block's input."""
    scan: bool = True
    """Scan over groups of blocks (compile time independent of depth). False: a Python loop, for debugging."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        allowed = f"must divide model.width = {self.width} (or give model.head_dim)"
        require(self.head_dim is not None or self.width % self.heads == 0, "model.heads", self.heads, allowed)
        allowed = "must be even (rotary positions turn pairs)"
        require(self.head_size % 2 == 0, "model.head_dim", self.head_size, allowed)
        allowed = f"must be a divisor of model.heads = {self.heads}"
        require(self.heads % self.key_heads == 0, "model.kv_heads", self.kv_heads, allowed)
        allowed = "must be 1 with model.rope_scaling = 'none'"
        require(self.rope_factor == 1 or self.rope_scaling != "none", "model.rope_factor", self.rope_factor, allowed)
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(high > low, "model.rope_high_freq_factor", high, f"must be above model.rope_low_freq_factor = {low}")
        self._check_experts()

    def _check_experts(self) -> None:
        allowed = "must be 0 without model.experts"
        require(self.experts > 0 or self.experts_null == 0, "model.experts_null", self.experts_null, allowed)
        allowed = f"must be at most model.experts + model.experts_null = {self.all_experts}"
        few_enough = self.experts == 0 or self.experts_active <= self.all_experts
        require(few_enough, "model.experts_active", self.experts_active, allowed)

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

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert."""
        return -(-self.hidden_width // self.experts_active) if self.experts_width is None else self.experts_width

    @property
    def all_experts(self) -> int:
        """Experts that a token can choose from, null ones included."""
        return self.experts + self.experts_null


@dataclass(frozen=True)
class RoutingConfig:
    """Mixture-of-Depths (arXiv 2404.02258): which blocks are routed, and how tokens are chosen."""

    every: Annotated[int, at_least(0, "0: dense")] = 2
    """Every n-th block is routed (2: every other, 1: all). 0: none, a dense model."""
    first: Annotated[int | None, at_least(1)] = None
    """The first routed block, counted from 1, at most every: blocks first, first + every, ... are routed. None: every,
    so that the last block is routed, too."""
    capacity: Annotated[float, between(0, 1, "(]")] = 0.125
    """Share of a sequence's tokens, padding left out, that a routed block computes."""
    capacity_tokens: Annotated[int | None, at_least(1)] = None
    """The same as an absolute count, whatever the length of the sequence; overrides capacity."""
    gate: Literal["sigmoid", "identity", "tanh"] = "sigmoid"
    """What scales a routed block's output: sigmoid(r), r (the paper), or 1 + 0.2 tanh(r)."""
    router_norm: bool = False
    """The router reads the stream at unit RMS, as the predictor does; else as it is."""
    keep_key_values: bool = False
    """Tokens that pass by a routed block give keys and values in it, which the tokens that it computes attend to."""
    adapter_rank: Annotated[int, at_least(0, "0: none")] = 0
    """Rank of a linear map that is added to tokens that pass by a routed block, of these tokens; zero at first. 0:
    none."""
    causal_rule: Literal["predictor", "router"] = "predictor"
    """Who decides without seeing the future: a small MLP on the detached stream, or the router's own logit > 0."""
    predictor_width: Annotated[int, at_least(1)] = 64
    """Hidden width of the predictor."""
    auxiliary_weight: Annotated[float, at_least(0)] = 0.01
    """Weight of the loss that trains the causal rule; of little effect on a predictor, which Adam scales anyway."""
    selection: Literal["learned", "stochastic"] = "learned"
    """learned: top-C by router score. stochastic: top-C of Gaussian noise, the paper's control."""
    headroom: Annotated[float, at_least(1)] = 1.5
    """Slots of a routed block under the causal rule, as a multiple of its capacity; further tokens pass by."""
    decoded_rows: Literal["all", "fixed"] = "all"
    """Rows of a batch that a routed block computes at a step of decoding. all: those that are routed, in a loop as long
    as it takes. fixed: always 1.5 times as many as are to be expected, and one; where more are routed, those with the
    lowest scores pass by. For GPUs, which ask the host at every turn of such a loop whether there is another."""
    stages: Annotated[tuple[float, ...], between(0, 1, "(]")] = ()
    """Falling capacities that training goes through before capacity, each for as many steps and as one program."""
    stage_fraction: Annotated[float, between(0, 1)] = 0.5
    """Share of the steps that all stages together take; the rest is trained at capacity."""
    budgets: Annotated[tuple[float, ...], between(0, 1, "(]")] = ()
    """Falling capacities of which every training step draws one: the model can be used at each. capacity is one."""
    noise: Annotated[float, at_least(0)] = 0.0
    """Standard deviation of the Gaussian noise on the scores by which training ranks tokens, as a multiple of the
    scores' own in the sequence. 0: none. Evaluation and generation have none."""
    explore: Annotated[float, between(0, 1, "[]")] = 0.0
    """Share of the capacity that training gives to tokens drawn uniformly from all; the best by score get the rest.
    Evaluation and generation give none."""
    explore_steps: Annotated[int, at_least(0, "0: they stay")] = 0
    """Steps in which noise and explore fall linearly to 0; 0: they stay."""

    def __post_init__(self) -> None:
        check_fields(self, "routing")
        if self.every and self.first is not None:
            allowed = f"must be at most routing.every = {self.every}"
            require(self.first <= self.every, "routing.first", self.first, allowed)
        for name in ("noise", "explore"):
            allowed = "must be 0 with routing.selection = 'stochastic', which selects by noise alone"
            value = getattr(self, name)
            require(value == 0 or self.selection == "learned", f"routing.{name}", value, allowed)
        if self.budgets:
            self._check_budgets()
        if self.stages:
            falling = all(a > b for a, b in itertools.pairwise((*self.stages, self.capacity)))
            allowed = f"must fall from at most 1 to above routing.capacity = {self.capacity}"
            require(falling, "routing.stages", self.stages, allowed)
            allowed = "must be None with routing.stages, which are shares"
            require(self.capacity_tokens is None, "routing.capacity_tokens", self.capacity_tokens, allowed)

    def _check_budgets(self) -> None:
        falling = all(a > b for a, b in itertools.pairwise(self.budgets))
        allowed = f"must fall, and contain routing.capacity = {self.capacity}"
        require(falling and self.capacity in self.budgets, "routing.budgets", self.budgets, allowed)
        allowed = "must be empty with routing.budgets"
        require(not self.stages, "routing.stages", self.stages, allowed)
        allowed = "must be None with routing.budgets, which are shares"
        require(self.capacity_tokens is None, "routing.capacity_tokens", self.capacity_tokens, allowed)
        allowed = "must be predictor with routing.budgets: the router's own score does not depend on the budget"
        one_rule = self.selection == "learned" and self.causal_rule == "router"
        require(not one_rule, "routing.causal_rule", self.causal_rule, allowed)


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
    if routing.every == 0:
        return
    allowed = "must be False to think: the slots of a thought count the keys and values of computed tokens alone"
    require(not routing.keep_key_values, "routing.keep_key_values", routing.keep_key_values, allowed)
    require(
        routing.selection == "learned",
        "routing.selection",
        routing.selection,
        "must be learned (or routing.every 0) to think: chance must not decide whether a thought is computed",
    )
