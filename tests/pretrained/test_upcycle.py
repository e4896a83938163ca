"""A dense model as a Mixture-of-Depths model: the same function at capacity 1, a run like any other, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import make_generator
from fork_server import succeed
from some_nightly import some_nightly
from thinking_models import Thinker, scores

from mod_star import presets
from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.decoding import GenerationConfig, Sampling
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.model.transformer import head_matrix
from mod_star.pretrained.params_run import write_params_run
from mod_star.pretrained.upcycle import (
    NO_SKIPPING,
    Skipping,
    default_stages,
    upcycle,
    upcycled_config,
    upcycled_params,
)
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.metrics import read_metrics
from mod_star.thinking.objective import predicted
from mod_star.tokenization import load_tokenizer
from mod_star.training.objectives.next_token import make_loss
from mod_star.training.train import train

DENSE = RunConfig(
    model=ModelConfig(vocab_size=29, width=16, layers=4, heads=4, kv_heads=2, mlp_width=24, context=24),
    routing=RoutingConfig(every=0),
)
PARTS = """import jax
from mod_star.parts import Part, Parts
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.routing import (
    expert_choice, linear_router, linear_router_init, no_flops, no_parameters, router_rule, rule_cross_entropy
)
own_layer = Parts(feed_forward=Part(swiglu_init, lambda params, x: swiglu(params, x) / 2))
own_router = Parts(router=Part(linear_router_init, lambda params, x: 1 + linear_router(params, x)))
own_gate = Parts(gate=jax.nn.sigmoid)
own_selection = Parts(selection=expert_choice)
own_causal_rule = Parts(causal_rule=Part(no_parameters, router_rule, no_flops))
own_adapter = Parts(adapter=Part(no_parameters, lambda params, x: x))
own_block = Parts(block=Part(Parts().block.init, lambda *arrays: Parts().block.apply(*arrays)))
own_auxiliary_loss = Parts(auxiliary_loss=rule_cross_entropy)
"""


def at_capacity_1(run: RunConfig) -> RunConfig:
    """What checkpoint 0 of an upcycled run is."""
    return replace(run, routing=replace(run.routing, capacity=1.0, stages=()))


@pytest.fixture(scope="module")
def dense_params(random_params: Callable[..., Any]) -> Any:
    return random_params(DENSE.model, DENSE.routing)


@pytest.fixture(scope="module")
def dense_logits(dense_params: Any, tiny_batch: dict[str, jax.Array]) -> np.ndarray:
    return logits(DENSE, dense_params, tiny_batch, "top_k")


def logits(run: RunConfig, params: Any, batch: dict[str, jax.Array], mode: Any) -> np.ndarray:
    """float32 BxSxV; zeros at pads, which no other token sees."""
    decoder = Decoder(run.model, run.routing)

    def one(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        output: Any = decoder.apply({"params": params}, tokens, positions, segment_ids, mode=mode)
        return jnp.where(segment_ids[:, None] > 0, output.hidden @ head_matrix(params).T, 0)

    return np.asarray(jax.jit(jax.vmap(one))(batch["tokens"], batch["positions"], batch["segment_ids"]))


@pytest.mark.parametrize(
    ("every", "skipping"),
    some_nightly(
        [(1, NO_SKIPPING), (2, NO_SKIPPING), (2, Skipping(keep_key_values=True, adapter_rank=3))],
        (1, NO_SKIPPING),
        (2, NO_SKIPPING),
    ),
    ids=["all", "half", "kept"],
)
@pytest.mark.slow
def test_at_capacity_1_the_logits_are_the_dense_models(
    every: int, skipping: Skipping, dense_params: Any, dense_logits: np.ndarray, tiny_batch: dict[str, jax.Array]
) -> None:
    run = upcycled_config(DENSE, 0.25, every, skipping)
    params, expected = upcycled_params(dense_params, run), dense_logits
    # Attention to keys in two sets, the kept ones and the block's own, adds them up in another order.
    atol = 2e-5 if skipping.keep_key_values else 0
    for mode in ("top_k", "causal"):
        np.testing.assert_allclose(logits(at_capacity_1(run), params, tiny_batch, mode), expected, rtol=0, atol=atol)
    # It is routing that makes the difference as soon as the capacity falls.
    assert np.abs(logits(replace(run, routing=replace(run.routing, stages=())), params, tiny_batch, "top_k")
                  - expected).max() > 0.01  # fmt: skip


@pytest.mark.slow
def test_at_capacity_1_the_router_learns_from_every_token(dense_params: Any, tiny_batch: dict[str, jax.Array]) -> None:
    run = at_capacity_1(upcycled_config(DENSE, 0.25))
    params = upcycled_params(dense_params, run)
    loss = make_loss(Decoder(run.model, run.routing), run)
    targets, valid = jnp.sum(tiny_batch["weights"]), jnp.sum(tiny_batch["segment_ids"] > 0)
    gradient = jax.jit(jax.grad(lambda p: loss(p, tiny_batch, jax.random.key(0), targets, valid)[0]))(params)
    routed = gradient["groups"]["routed"]
    assert (np.abs(routed["router"]["weight"]).max(-1) > 1e-4).all()
    # The predictor is to go on taking every token; and it can learn otherwise, its hidden layer is not zero.
    assert (routed["predictor"]["shift"] < 0).all()
    assert (np.abs(routed["predictor"]["output"]).max(-1) > 0).all()


@pytest.mark.nightly
def test_it_generates_what_the_dense_model_does(dense_params: Any) -> None:
    run = at_capacity_1(upcycled_config(DENSE, 0.125))
    prompts = [[1, 2, 3], [5, 4, 3, 2, 1, 0, 7], [28]]
    found = [
        make_generator(Decoder(one.model, one.routing), params).generate(
            prompts, GenerationConfig(12, Sampling(temperature=0.8), seed=3)
        )
        for one, params in ((DENSE, dense_params), (run, upcycled_params(dense_params, run)))
    ]
    for dense, routed in zip(*found, strict=True):
        assert routed.tokens == dense.tokens and len(dense.tokens) == 12
        # Two programs, whose float32 logits of up to 8 may differ by a few units in the last place, 5e-7 each.
        np.testing.assert_allclose(routed.log_probs, dense.log_probs, rtol=1e-6, atol=4e-6)
        assert (routed.routed_fraction, routed.overflow) == ([1.0, 1.0], 0)


@pytest.mark.parametrize("thinker", ["dense"], indirect=True)
@pytest.mark.nightly
def test_a_thinking_model_goes_on_thinking(thinker: Thinker, thought_of: Any, scored: Any) -> None:
    run = upcycled_config(thinker.run, 0.25)
    params = upcycled_params(thinker.params, run)
    chex.assert_trees_all_equal(params["thinking"], thinker.params["thinking"])
    _, talk = scores(at_capacity_1(run))(params, thinker.batch, *thought_of)
    _, weights = predicted(thinker.batch, thought_of[0], run.thinking)
    there = np.asarray(weights)[:, :, None] > 0  # what lies behind the end of a document is not predicted
    found, expected = (np.where(there, each.nll_BxJxMxN, 0) for each in (talk, scored[1]))
    assert there.mean() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    chex.assert_trees_all_close(talk.advantages_BxJxM, scored[1].advantages_BxJxM, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capacity", "stages"),
    [
        (1.0, ()),
        (0.7, (1.0,)),
        (0.5, (1.0,)),
        (0.3, (1.0, 0.5)),
        (0.125, (1.0, 0.5, 0.25)),
        (0.1, (1, 0.5, 0.25, 0.125)),
    ],
)
def test_the_capacity_is_halved_as_often_as_it_takes(capacity: float, stages: tuple[float, ...]) -> None:
    assert default_stages(capacity) == stages
    routing = upcycled_config(DENSE, capacity).routing
    assert (routing.capacity, routing.stages, routing.gate, routing.causal_rule) == (
        capacity, stages, "tanh", "predictor"
    )  # fmt: skip


def make_dense(path: Path, parts: str | None = None) -> Path:
    """A dense run of two blocks with random parameters and a context of 16."""
    tiny = presets.dense(presets.tiny())
    run = replace(
        tiny,
        model=replace(tiny.model, vocab_size=320, width=8, heads=1, mlp_width=8, context=16),
        train=replace(tiny.train, steps=6, batch_size=2, log_every=1, eval_every=0, checkpoint_every=0),
        parts=parts,
    )
    params = jax.jit(Decoder(run.model, run.routing).init)(jax.random.key(1), jnp.zeros(2, jnp.int32))["params"]
    write_params_run(path, run, load_tokenizer("bytes"), params)
    return path


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "dense")


@pytest.mark.nightly
def test_the_command_and_training_after_it(dense_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "upcycled"
    done = succeed("upcycle", dense_run, path, "--capacity", "0.5", environment={"COLUMNS": "100"})
    assert done.err == ""
    assert "1 of 2 blocks are routed" in done.out
    assert re.findall(r"^ +(\S+%) +(\S+%)", done.out, re.MULTILINE) == [
        ("100.00%", "50.0%"), ("50.00%", "50.0%")
    ]  # fmt: skip
    assert f"mod-star train NEW --init-from {path}" in done.out

    assert [entry.name for entry in tmp_path.iterdir()] == ["upcycled"]
    assert not (path / "checkpoints" / "0" / "training").exists()
    dense, loaded = load_run(dense_run), load_run(path)
    assert loaded.step == 0
    assert loaded.config == at_capacity_1(read_config(path)) == at_capacity_1(upcycled_config(dense.config, 0.5))
    tokens = jnp.arange(16)
    expected, found = (
        jax.jit(one.decoder.apply)({"params": one.params}, tokens).hidden for one in (dense, loaded)
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)

    # It is not a training to go on with; a run that starts from it inherits the plan.
    refused = r"upcycled: holds a model without the state of a training; .* train NEW --init-from .*upcycled"
    with pytest.raises(InputError, match=refused):
        train(read_config(path), path)
    train(replace(read_config(path), init_from=str(path)), tmp_path / "trained", quiet=True)
    capacities = [record["capacity"] for record in read_metrics(tmp_path / "trained") if "loss" in record]
    assert capacities == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.slow
def test_what_is_refused(dense_run: Path, trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("42")
    before, free = sorted(tmp_path.rglob("*")), tmp_path / "free"
    for source, target, options, message in (
        (trained_run, free, {}, r"^routing\.every = 2: this is a Mixture-of-Depths model already$"),
        (dense_run, free, {"every": 3}, r"^--every = 3: must divide model\.layers = 2$"),
        (dense_run, free, {"every": 0}, r"^--every = 0: must be at least 1$"),
        (dense_run, free, {"capacity": 0.0}, r"^--capacity = 0\.0: must lie in \(0, 1\]$"),
        (dense_run, free, {"capacity": float("nan")}, r"^--capacity = nan: must lie in \(0, 1\]$"),
        (dense_run, free, {"step": 3}, r"^--step = 3: .* has checkpoints \[0\]$"),
        (tmp_path / "full", free, {}, r"full: is not a run"),
        (dense_run, tmp_path / "full", {}, r"full: is neither empty nor a run"),
        (dense_run, dense_run, {}, r"dense: is a run already; choose another directory$"),
    ):
        with pytest.raises(InputError, match=message):
            upcycle(source, target, **{"capacity": 0.25} | options)  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("part", ["router", "gate", "selection", "causal_rule", "adapter"])
def test_decisions_of_ones_own_are_refused(part: str, tmp_path: Path) -> None:
    """They need not take every token at capacity 1, and may need other parameters than the built-in ones."""
    (tmp_path / "parts.py").write_text(PARTS)
    dense = make_dense(tmp_path / "dense", f"{tmp_path}/parts.py:own_{part}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=rf"^parts = .*: has its own {part}; only with the built-in ones"):
        upcycle(dense, tmp_path / "free", 0.25)
    assert sorted(tmp_path.rglob("*")) == before


def test_keys_are_not_kept_in_a_block_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    dense = make_dense(tmp_path / "dense", f"{tmp_path}/parts.py:own_block")
    with pytest.raises(InputError, match=r"^--keep-key-values = True: cannot be given with parts\.block of your own$"):
        upcycle(dense, tmp_path / "free", 0.25, skipping=Skipping(keep_key_values=True))


@pytest.mark.parametrize("parts", ["own_layer", "own_auxiliary_loss"])
def test_parts_that_decide_nothing_are_kept(parts: str, tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    dense = make_dense(tmp_path / "dense", f"{tmp_path}/parts.py:{parts}")
    stored = upcycle(dense, tmp_path / "upcycled", 0.5)
    assert stored.parts == f"{tmp_path}/upcycled/parts.py:{parts}"
    tokens = jnp.arange(16)
    expected, found = (
        jax.jit(one.decoder.apply)({"params": one.params}, tokens).hidden
        for one in map(load_run, (dense, tmp_path / "upcycled"))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_run_is_written_whole_or_not_at_all(dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / ".new.new" / "checkpoints").mkdir(parents=True)  # left by a process that was killed
    with monkeypatch.context() as patched:
        patched.setattr("mod_star.pretrained.params_run.save_params", full)
        with pytest.raises(InputError, match=r"new: cannot be written: No space left on device$"):
            upcycle(dense_run, tmp_path / "new", 0.5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    upcycle(dense_run, tmp_path / "new", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert load_run(tmp_path / "new").step == 0
