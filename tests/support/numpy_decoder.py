"""The decoder once more, written from the papers in float64 NumPy: loops over tokens and heads, no batching, no JAX.

What tests compare `mod_star.model.Decoder` with. Nothing is imported from the package but its configuration's types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mod_star.config import ModelConfig, RoutingConfig

Array = np.ndarray


def float64(tree: Any) -> Any:
    """A nested dict of arrays in float64."""
    return {k: float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def layer(tree: Any, index: int) -> Any:
    """One layer of parameters that are stacked along their first axis."""
    return {k: layer(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return np.stack([row / np.sqrt(np.mean(row**2) + eps) * scale for row in x])


def frequency(pair: int, config: ModelConfig) -> float:
    """Radians per position of one pair; Llama 3.1 decides by wavelength, with the original context as the measure."""
    plain = config.rope_theta ** (-2 * pair / config.head_size)
    if config.rope_scaling == "none":
        return plain
    if config.rope_scaling == "linear":
        return plain / config.rope_factor
    wavelength, original = 2 * np.pi / plain, config.rope_original_context
    if wavelength > original / config.rope_low_freq_factor:
        return plain / config.rope_factor
    if wavelength < original / config.rope_high_freq_factor:
        return plain
    smooth = (original / wavelength - config.rope_low_freq_factor) / (
        config.rope_high_freq_factor - config.rope_low_freq_factor
    )
    return (1 - smooth) * plain / config.rope_factor + smooth * plain


def rope(vector: Array, position: int, config: ModelConfig) -> Array:
    """Turns the pair (e, e + E/2) by position · theta^(-2e/E), scaled, as a complex number."""
    half = len(vector) // 2
    angles = position * np.array([frequency(pair, config) for pair in range(half)])
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def projected(params: Any, name: str, h: Array, head: int, config: ModelConfig) -> Array:
    """One head's query, key or value of one token, with bias and norm where there are such."""
    vector = h @ params[name][:, head]
    if config.qkv_bias:
        vector = vector + params[f"{name}_bias"][head]
    if config.qk_norm and name != "value":
        vector = rms_norm(vector[None], params[f"{name}_norm"], config.norm_eps)[0]
    return vector


def attention(params: Any, h: Array, rows: list[tuple[int, int]], config: ModelConfig) -> Array:
    """`rows` gives each token's (position, document); document 0 sees nothing, and its result is arbitrary."""
    out = np.zeros_like(h)
    group = config.heads // config.key_heads
    for i, (position, document) in enumerate(rows):
        seen = [j for j, (p, d) in enumerate(rows) if d == document and p <= position and d > 0]
        if config.sliding_window is not None:
            seen = [j for j in seen if position - rows[j][0] < config.sliding_window]
        for head in range(config.heads) if seen else ():
            query = rope(projected(params, "query", h[i], head, config), position, config)
            scores, values = [], []
            for j in seen:
                key = rope(projected(params, "key", h[j], head // group, config), rows[j][0], config)
                scores.append(query @ key / np.sqrt(config.head_size))
                values.append(projected(params, "value", h[j], head // group, config))
            weights = np.exp(np.array(scores) - max(scores))
            out[i] += (weights / weights.sum()) @ np.array(values) @ params["output"][head]
    return out


def swiglu(params: Any, h: Array) -> Array:
    gate = h @ params["gate"]
    return (gate * sigmoid(gate) * (h @ params["up"])) @ params["down"]


def block_delta(params: Any, x: Array, rows: list[tuple[int, int]], config: ModelConfig) -> Array:
    """Of all tokens of x, each of which sees the others."""
    delta = attention(params, rms_norm(x, params["attention_norm"], config.norm_eps), rows, config)
    return delta + swiglu(params["feed_forward"], rms_norm(x + delta, params["feed_forward_norm"], config.norm_eps))


def top_tokens(scores: Array, valid: Array, capacity: int) -> list[int]:
    """The `capacity` best valid tokens in order of position; of equal scores the earlier; NaN and -inf come last."""
    rank = [-np.inf if np.isnan(s) else s for s in scores]
    order = sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-rank[i], i))
    return sorted(order[:capacity])


def first_tokens(wanted: Array, slots: int) -> list[int]:
    """The first `slots` wanted tokens."""
    chosen: list[int] = []
    for i, want in enumerate(wanted):
        if want and len(chosen) < slots:
            chosen.append(i)
    return chosen


def predictor_logits(params: Any, x: Array) -> Array:
    unit = rms_norm(x, np.ones(x.shape[1]), 1e-6)
    return np.maximum(unit @ params["hidden"] + params["bias"], 0) @ params["output"] + params["shift"]


GATES: dict[str, Callable[[Array], Array]] = {
    "sigmoid": sigmoid,
    "identity": lambda r: r,
    "tanh": lambda r: 1 + 0.2 * np.tanh(r),
}


def one_document(ids: Any) -> tuple[Array, Array, Array]:
    """Tokens, positions and segment ids of a row with one document and no padding."""
    return np.asarray(ids), np.arange(len(ids)), np.ones(len(ids))


def decode(
    params: Any,
    row: tuple[Array, Array, Array],
    config: ModelConfig,
    routing: RoutingConfig,
    *,
    mode: str,
    most: int,
    noise: tuple[Array, float] | None = None,
    thresholds: Array | None = None,
) -> tuple[Array, list[dict[str, Array]]]:
    """Hidden states SxD and what each routed block decided: scores, logits, selected and gates.

    `row` has tokens, positions and segment ids. `most` is how many tokens a routed block takes: the capacity, or the
    slots of the causal rule. `noise` is that of stochastic routing, [groups, S], and its threshold; `thresholds`
    [groups] are those of the threshold rule.
    """
    tokens, positions, segment_ids = row
    params = float64(params)
    x = params["embedding"][tokens]
    rows = [(int(p), int(d)) for p, d in zip(positions, segment_ids, strict=True)]
    valid = np.asarray(segment_ids) > 0
    names = [f"full_{i}" for i in range(routing.every - 1)] if routing.every else ["full_0"]
    if routing.every:
        place = routing.every if routing.first is None else routing.first
        names = [*names[: place - 1], "routed", *names[place - 1 :]]
    traces = []
    for group in range(config.layers // len(names)):
        for name in names:
            own = layer(params["groups"][name], group)
            if name != "routed":
                x = x + block_delta(own["block"], x, rows, config)
                continue
            unit = rms_norm(x, np.ones(x.shape[1]), 1e-6)
            scores = (unit if routing.router_norm else x) @ own["router"]["weight"]
            if noise is not None:
                ranked, logits = noise[0][group], noise[0][group] - noise[1]
            elif thresholds is not None:
                ranked, logits = scores, scores - thresholds[group]
            else:
                ranked = scores
                logits = predictor_logits(own["predictor"], x) if routing.causal_rule == "predictor" else scores
            wanted = (logits > 0) & valid
            chosen = top_tokens(ranked, valid, most) if mode == "top_k" else first_tokens(wanted, most)
            if routing.keep_key_values:  # all tokens are there to be seen
                delta = block_delta(own["block"], x, rows, config)[chosen]
            elif chosen:
                delta = block_delta(own["block"], x[chosen], [rows[i] for i in chosen], config)
            else:
                delta = np.zeros(0)
            gates = GATES[routing.gate](scores)
            selected = np.zeros(len(x), bool)
            selected[chosen] = True
            x = x.copy()
            for i, change in zip(chosen, delta, strict=True):
                x[i] = x[i] + gates[i] * change
            for passing in np.flatnonzero(~selected) if "adapter" in own else ():
                x[passing] = x[passing] + unit[passing] @ own["adapter"]["down"] @ own["adapter"]["up"]
            traces.append({"scores": scores, "logits": logits, "selected": selected, "gates": gates * selected})
    return rms_norm(x, params["final_norm"], config.norm_eps), traces
