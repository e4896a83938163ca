"""Speed and memory of Mixture-of-Depths against its dense twin, on the machine it runs on.

    python -m experiments.benchmarks.mod           # a table
    python -m experiments.benchmarks.mod --json    # one flat JSON object

Everything is measured warm, the two models and the machine's own limits in turns, and reported as the median;
compilation is kept apart. Takes about four minutes on two CPU cores; nothing else should run beside it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.support.timing import in_turns
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.decoding.caches import cache_bytes
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.sampling import Sampling
from mod_star.flops import forward_flops, parameter_count, training_step_flops
from mod_star.initial_params import init_params
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import head_matrix
from mod_star.tokenization.tokenizers import ByteTokenizer
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step
from mod_star.views.terminal import result_table

DENSE, MOD = RoutingConfig(every=0), RoutingConfig(every=2, capacity=0.125)
ARMS = {"dense": DENSE, "mod": MOD}
CONTEXT = 1024


def model(context: int, layers: int = 8) -> ModelConfig:
    """The model that everything is measured on: width 512, 8 heads, vocabulary 4,096."""
    return ModelConfig(vocab_size=4096, width=512, heads=8, layers=layers, mlp_width=1408, context=context)


def matrix_products() -> dict[str, tuple[Callable[[], Any], float]]:
    """Float32 matrix products, the model's largest and a square one, with their FLOPs; the faster rate counts."""
    product = jax.jit(lambda a, b: a @ b)
    products: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, (m, k, n) in {"product_of_mlp": (2048, 512, 1408), "product_square": (2048, 2048, 2048)}.items():
        a, b = jax.random.normal(jax.random.key(0), (m, k)), jax.random.normal(jax.random.key(1), (k, n))
        count = round(3e10 / (2 * m * k * n))
        products[name] = (lambda a=a, b=b, count=count: [product(a, b) for _ in range(count)]), 2.0 * m * k * n * count  # type: ignore[misc]
    return products


def training(context: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Forward pass (loss included) and whole training step, dense and MoD, with their FLOPs and the product rate."""
    products = matrix_products()
    calls = {name: call for name, (call, _) in products.items()}
    # Apart, because a training step leaves caches and allocator in another state than a forward pass finds usually.
    forwards, steps = dict(calls), dict(calls)
    results: dict[str, float] = {}
    for arm, routing in ARMS.items():
        run = RunConfig(model=model(context), routing=routing, train=TrainConfig(batch_size=batch_size))
        decoder = Decoder(run.model, routing)
        state = {"now": jax.jit(lambda decoder=decoder, run=run: init_state(decoder, run, 100))()}  # type: ignore[misc]
        tokens = jax.random.randint(jax.random.key(1), (batch_size, context + 1), 0, run.model.vocab_size)
        shape = (batch_size, context)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), shape),
            "segment_ids": jnp.ones(shape, jnp.int32),
            "weights": jnp.ones(shape),
        }

        def loss(params: Any, batch: Any, decoder: Decoder = decoder, run: RunConfig = run) -> jax.Array:
            hidden = forward(decoder, params, batch, None, "top_k").hidden
            return cross_entropy(hidden, head_matrix(params), batch["targets"], batch["weights"], run.train.loss_chunk)

        evaluate, step = jax.jit(loss), jax.jit(make_train_step(decoder, run, 100), donate_argnums=0)

        def train_once(state: dict[str, Any] = state, step: Any = step, batch: Any = batch) -> Any:
            state["now"], metrics = step(state["now"], batch)
            return metrics

        forwards[f"{arm} forward"] = lambda evaluate=evaluate, state=state, batch=batch: evaluate(  # type: ignore[misc]
            state["now"].params, batch
        )
        steps[f"{arm} train"] = train_once
        # Top-k routing doesn't ask the predictor, and XLA leaves it out.
        forward_pass = dataclasses.replace(forward_flops(run.model, routing, context), predictor=0.0)
        results[f"{arm} forward flops"] = forward_pass.total * batch_size
        results[f"{arm} train flops"] = training_step_flops(run)
    for functions in (forwards, steps):
        times = in_turns(functions, rounds)
        rate = max(flops / times.pop(name) for name, (_, flops) in products.items())
        results |= times
        results["product rate"] = max(rate, results.get("product rate", 0.0))
    return results


def report_training(json_: dict[str, float], suffix: str, measured: dict[str, float]) -> None:
    """Ratios of MoD to dense, and what share of the product rate the dense twin reaches."""
    for kind in ("forward", "train"):
        json_[f"{kind}_time_ratio_{suffix}"] = measured[f"mod {kind}"] / measured[f"dense {kind}"]
        json_[f"{kind}_flop_ratio_{suffix}"] = measured[f"mod {kind} flops"] / measured[f"dense {kind} flops"]
        rate = measured[f"dense {kind} flops"] / measured[f"dense {kind}"]
        json_[f"dense_{kind}_matmul_fraction_{suffix}"] = rate / measured["product rate"]
        for arm in ARMS:
            json_[f"{arm}_{kind}_seconds_{suffix}"] = measured[f"{arm} {kind}"]
    json_[f"matmul_gflops_{suffix}"] = measured["product rate"] / 1e9


def calibrated(decoder: Decoder) -> dict[str, Any]:
    """Random parameters whose predictors route 12.5 % of random tokens in every routed block."""
    params = init_params(decoder, 0)
    if not decoder.routing.every:
        return params
    predictor = params["groups"]["routed"]["predictor"]
    predictor["output"] = jax.random.normal(jax.random.key(3), predictor["output"].shape)
    tokens = jax.random.randint(jax.random.key(5), (4, CONTEXT), 0, decoder.config.vocab_size)

    @jax.jit
    def logits_of(params: dict[str, Any]) -> jax.Array:
        ids = {"positions": jnp.broadcast_to(jnp.arange(CONTEXT), tokens.shape), "segment_ids": jnp.ones_like(tokens)}
        trace = forward(decoder, params, {"tokens": tokens} | ids, None, "causal").trace
        assert trace is not None
        return trace.logits

    for layer in range(predictor["shift"].shape[0]):  # a block's decisions change what the next one sees
        logits = logits_of(params)[:, layer]
        predictor["shift"] = predictor["shift"].at[layer].set(-jnp.quantile(logits, 1 - decoder.routing.capacity))
    return params


def read_bandwidth() -> dict[str, tuple[Callable[[], Any], float]]:
    """Ways to read memory with all cores, with their bytes; the fastest counts."""
    wide = jax.random.normal(jax.random.key(0), (65536, 1024))
    vector = jnp.ones(1024)
    weights = [jax.random.normal(jax.random.key(i), (512, 1408)) for i in range(90)]
    row = jnp.ones((1, 512))
    summed, product = jax.jit(jnp.sum), jax.jit(lambda w, x: w @ x)
    several = jax.jit(lambda weights, x: [x @ w for w in weights])
    return {
        "sum": (lambda: summed(wide), wide.nbytes),
        "product with a vector": (lambda: product(wide, vector), wide.nbytes),
        "products with a row": (lambda: several(weights, row), 90 * weights[0].nbytes),
    }


def roofline(routing: RoutingConfig, batch_size: int, share: float, bandwidth: float, rate: float) -> float:
    """Least seconds of one decoding step: the larger of bytes touched / bandwidth and FLOPs / product rate.

    Full blocks read their weights and every row's whole cache. A routed block reads its weights if any row is routed,
    and the caches of the routed rows; `share` of the rows are, on average, independently.
    """
    config = model(CONTEXT)
    D, F, P = config.width, config.hidden_width, routing.predictor_width
    weights = 4 * D * D + 3 * D * F
    cache = 2 * D  # elements per slot
    groups = config.layers // 2 if routing.every else config.layers
    elements: float = groups * (weights + batch_size * CONTEXT * cache) + config.vocab_size * D
    flops = 2.0 * batch_size * (groups * (weights + CONTEXT * cache) + config.vocab_size * D)
    if routing.every:
        slots = causal_slots(routing, CONTEXT)
        deciding = D + D * P + P
        elements += groups * ((1 - (1 - share) ** batch_size) * weights + deciding + share * batch_size * slots * cache)
        flops += 2.0 * batch_size * groups * (share * (weights + slots * cache) + deciding)
    return max(4 * elements / bandwidth, flops / rate)


def decoding(generators: dict[str, Generator], batch_size: int, burst: int = 8, bursts: int = 12) -> dict[str, float]:
    """Median seconds of one decoding step, dense and MoD in turns, with caches for a full context; the routed share."""
    rng = np.random.default_rng(0)
    room = burst * (bursts + 1)
    prompts = [rng.integers(0, 4096, CONTEXT - room).tolist() for _ in range(batch_size)]
    states = {arm: generator.start(prompts, GenerationConfig(room)) for arm, generator in generators.items()}
    times: dict[str, list[float]] = {arm: [] for arm in generators}
    for number in range(bursts + 1):
        for arm, generator in generators.items():
            began = time.perf_counter()
            states[arm] = generator.advance(states[arm], burst * (number + 1), Sampling(1.0))
            jax.block_until_ready(states[arm].hidden_BxD)
            times[arm].append((time.perf_counter() - began) / burst)
    results = {arm: statistics.median(values[1:]) for arm, values in times.items()}
    results["share"] = float(np.mean([row.routed_fraction for row in generators["mod"].results(states["mod"])]))
    caches = states["mod"].caches
    full, routed = cache_bytes(caches[0]), cache_bytes(caches[1])
    results["cache fraction"] = routed / full
    return results


def compile_seconds(layers: int) -> float:
    """Time to compile a MoD training step of this depth, tracing included."""
    run = RunConfig(model=model(256, layers), routing=MOD, train=TrainConfig(batch_size=8))
    decoder = Decoder(run.model, MOD)
    state = jax.eval_shape(lambda: init_state(decoder, run, 100))
    ids = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = dict.fromkeys(names, ids) | {"weights": jax.ShapeDtypeStruct((8, 256), jnp.float32)}
    began = time.perf_counter()
    jax.jit(make_train_step(decoder, run, 100), donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - began


def measure() -> dict[str, float]:
    """All of it, as one flat dict."""
    figures: dict[str, float] = {}
    report_training(figures, "s256", training(256, 8, rounds=7))
    report_training(figures, "s1024", training(1024, 4, rounds=3))
    figures["dense_forward_matmul_fraction"] = figures["dense_forward_matmul_fraction_s256"]
    figures["dense_train_matmul_fraction"] = figures["dense_train_matmul_fraction_s256"]

    products, reads = matrix_products(), read_bandwidth()
    limits = in_turns({name: call for name, (call, _) in (products | reads).items()}, rounds=7)
    rate = max(flops / limits[name] for name, (_, flops) in products.items())
    bandwidth = max(size / limits[name] for name, (_, size) in reads.items())
    figures["read_bandwidth_gb_s"] = bandwidth / 1e9
    generators = {}
    for arm, routing in ARMS.items():
        decoder = Decoder(model(CONTEXT), routing)
        generators[arm] = Generator(Model(decoder, calibrated(decoder), ByteTokenizer()), end_ids=())
    for batch_size in (1, 16):
        measured = decoding(generators, batch_size)
        share, name = measured["share"], f"b{batch_size}"
        ideal = roofline(DENSE, batch_size, share, bandwidth, rate) / roofline(MOD, batch_size, share, bandwidth, rate)
        figures[f"decode_speedup_{name}"] = measured["dense"] / measured["mod"]
        figures[f"decode_limit_{name}"] = ideal
        figures[f"decode_efficiency_{name}"] = measured["dense"] / measured["mod"] / ideal
        figures[f"decode_routed_share_{name}"] = share
        for arm in ARMS:
            figures[f"{arm}_decode_tokens_per_second_{name}"] = batch_size / measured[arm]
        figures["routed_cache_fraction"] = measured["cache fraction"]

    figures["compile_seconds_8"], figures["compile_seconds_32"] = compile_seconds(8), compile_seconds(32)
    figures["compile_ratio_32_over_8"] = figures["compile_seconds_32"] / figures["compile_seconds_8"]
    figures["parameters"] = float(parameter_count(generators["mod"].params))
    return figures


@dataclass(frozen=True)
class Options:
    """Measures Mixture-of-Depths against its dense twin: training, decoding, caches, compilation."""

    json: bool = False
    """Print one flat JSON object instead of a table."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    figures = {name: float(f"{value:.4g}") for name, value in measure().items()}
    if options.json:
        print(json.dumps(figures))
    else:
        Console().print(result_table("Mixture-of-Depths against dense", ["quantity", "value"], list(figures.items())))


if __name__ == "__main__":
    main()
