"""A user's own router, feed-forward, gate, block and routing, from a file outside the package."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_server import succeed

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.model.routing import capacity_of, select_first, select_share
from mod_star.parts import DEFAULT_PARTS, Part, Parts, load_parts
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import TrainState
from mod_star.training.step import make_train_step

MY_PARTS = """
import jax
import jax.numpy as jnp
from mod_star.parts import Part, Parts

def router_init(key, config):
    return {"hidden": jax.random.normal(key, (config.width, 4)) / 4, "output": jnp.ones(4)}

def router(params, x):  # a small MLP instead of one projection
    return jnp.tanh(x.astype(jnp.float32) @ params["hidden"]) @ params["output"]

def mlp_init(key, config):
    up, down = jax.random.split(key)
    D = config.width
    return {"up": jax.random.normal(up, (D, 20)) / 4, "down": jax.random.normal(down, (20, D)) / 4}

def mlp(params, x):
    return jax.nn.gelu(x @ params["up"].astype(x.dtype)) @ params["down"].astype(x.dtype)

parts = Parts(router=Part(router_init, router), feed_forward=Part(mlp_init, mlp))
not_parts = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_parts.py"
    path.write_text(MY_PARTS)
    return path


@pytest.mark.slow
def test_a_router_and_a_feed_forward_of_ones_own_train_through_the_library(
    file: Path, routed_run: RunConfig, tiny_batch: dict[str, jax.Array], random_state: Callable[..., TrainState]
) -> None:
    parts = load_parts(f"{file}:parts")
    run = replace(routed_run, parts=f"{file}:parts")
    state = random_state(run, parts)
    routed = state.params["groups"]["routed"]
    assert set(routed["router"]) == {"hidden", "output"} and set(routed["block"]["feed_forward"]) == {"up", "down"}
    start = jax.tree.map(np.asarray, state.params)
    step = jax.jit(make_train_step(Decoder(run.model, run.routing, parts), run, 10))
    losses = []
    for _ in range(8):
        state, metrics = step(state, tiny_batch)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < losses[0] and state.skipped == 0
    for name in ("router", "block"):
        moved = jax.tree.map(
            lambda a, b: bool(np.any(a != b)), start["groups"]["routed"][name], state.params["groups"]["routed"][name]
        )
        assert all(jax.tree.leaves(moved)), "the gate brings a gradient to the router's every parameter"
    counted, ours = forward_flops(run.model, run.routing, 24, parts), forward_flops(run.model, run.routing, 24)
    assert counted.router > 2 * ours.router and counted.mlp != ours.mlp


def test_a_gate_and_a_block_of_ones_own_are_used(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], random_state: Callable[..., TrainState]
) -> None:
    block = DEFAULT_PARTS.block

    def no_delta(params, x, positions, segment_ids, valid, context, config, parts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        delta, own = block.apply(params, x, positions, segment_ids, valid, context, config, parts)
        return jnp.zeros_like(delta) + 1, own

    parts = replace(DEFAULT_PARTS, gate=lambda r: jnp.full_like(r, 5.0), block=replace(block, apply=no_delta))
    decoder = Decoder(tiny_run.model, tiny_run.routing, parts)
    params = random_state(tiny_run).params
    output = jax.jit(lambda p, t: decoder.apply({"params": p}, t, mode="top_k"))(params, tiny_batch["tokens"][0])
    x = np.asarray(params["embedding"])[tiny_batch["tokens"][0]]
    x += (
        2 * 1 + 5.0 * np.sum(output.trace.selected, 0)[:, None]
    )  # two full blocks, and the routed ones that computed it
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params["final_norm"]
    np.testing.assert_allclose(output.hidden, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_ones_own_is_added_to_the_tokens_that_pass_by(
    routed_run: RunConfig, tiny_batch: dict[str, jax.Array], random_params: Callable[..., Any]
) -> None:
    def weight(key: jax.Array, model: ModelConfig, routing: RoutingConfig) -> Any:
        return {"weight": jnp.full(model.width, 3.0)}

    def no_delta(params: Any, x: jax.Array, *arrays: Any) -> Any:
        delta, own = DEFAULT_PARTS.block.apply(params, x, *arrays)
        return 0 * delta, own

    parts = Parts(
        adapter=Part(weight, lambda params, x: 0 * x + params["weight"]), block=Part(DEFAULT_PARTS.block.init, no_delta)
    )
    decoder = Decoder(routed_run.model, routed_run.routing, parts)
    params = random_params(routed_run.model, routed_run.routing, parts)
    output: Any = jax.jit(lambda p, t: decoder.apply({"params": p}, t))(params, tiny_batch["tokens"][0])
    x = np.asarray(params["embedding"])[tiny_batch["tokens"][0]]
    passed = ~np.asarray(output.trace.selected[0])
    x = x + passed[:, None] * np.asarray(params["groups"]["routed"]["adapter"]["weight"][0])
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params["final_norm"]
    np.testing.assert_allclose(output.hidden, expected, rtol=1e-4, atol=1e-5)
    assert 0 < passed.sum() < len(passed)
    narrow = replace(parts, adapter=Part(weight, lambda params, x: x[:, 1:]))
    with pytest.raises(InputError, match=r"^parts\.adapter = float32\[24, 15\]: must be float32\[24, 16\]"):
        jax.eval_shape(lambda p, t: Decoder(routed_run.model, routed_run.routing, narrow).apply({"params": p}, t),
                       params, tiny_batch["tokens"][0])  # fmt: skip


def test_keys_cannot_be_kept_in_a_block_of_ones_own(routed_run: RunConfig) -> None:
    parts = Parts(block=Part(DEFAULT_PARTS.block.init, lambda *arrays: DEFAULT_PARTS.block.apply(*arrays)))
    decoder = Decoder(routed_run.model, replace(routed_run.routing, keep_key_values=True), parts)
    message = r"^routing\.keep_key_values = True: must be False with parts\.block of your own"
    with pytest.raises(InputError, match=message):
        jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros(2, jnp.int32))


def test_none_means_the_built_in_parts() -> None:
    assert load_parts(None) is DEFAULT_PARTS


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{file}", "must be FILE.py:NAME"),
        ("{file}:", "must be FILE.py:NAME"),
        ("parts", "must be FILE.py:NAME"),
        ("my_parts.txt:parts", "must be FILE.py:NAME"),
        ("{file}x.py:parts", "there is no file"),
        ("{file}:missing", "missing must be a mod_star.Parts, not NoneType"),
        ("{file}:not_parts", "not_parts must be a mod_star.Parts, not int"),
    ],
)
def test_a_reference_that_is_no_good_is_one_clear_line(file: Path, reference: str, message: str) -> None:
    reference = reference.format(file=file)
    with pytest.raises(InputError) as error:
        load_parts(reference)
    assert str(error.value).startswith(f"parts = {reference!r}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["1/0", "def (", "import no_such_module", "raise SystemExit(3)", "raise ValueError('a\\nb')"]
)
def test_a_file_that_fails_is_one_clear_line(tmp_path: Path, source: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(InputError, match=r"broken\.py fails with \w+") as error:
        load_parts(f"{path}:parts")
    assert "\n" not in str(error.value)


def documented(name: str) -> str:
    """The Python block of docs/how-to/extend.md that is the file of this name."""
    page = (Path(__file__).parents[1] / "docs/how-to/extend.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if block.startswith(f"# {name}"))
    assert block.count("\n") <= 25
    return str(block)


@pytest.mark.parametrize("name", ["norm_router.py", "threshold.py"])
@pytest.mark.nightly
def test_documented_routing_of_ones_own_trains_and_samples_by_the_command_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(documented(name))
    tiny = ["--preset", "tiny", "--train.steps", "3", "--train.log-every", "1", "--model.context", "32", "--quiet"]
    tiny += ["--model.layers", "1", "--routing.every", "1", "--train.eval-batches", "1"]
    there = f"os.chdir({str(tmp_path)!r})"
    succeed("train", "run", *tiny, "--parts", f"{name}:parts", before=there)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["lm_loss"] for record in records if "lm_loss" in record]
    assert len(losses) == 3 and np.all(np.isfinite(losses))
    path.unlink()  # the run has its own copy
    done = succeed("sample", "run", "--prompt", "A", "--new-tokens", "4", "--json", before=there)
    assert len(json.loads(done.out)["routed_fraction"]) == 1


def outputs_with(parts: Parts, run: RunConfig, batch: dict[str, jax.Array], mode: str) -> tuple[Decoder, Any, Any]:
    decoder = Decoder(run.model, run.routing, parts)
    params = jax.jit(lambda: init_params(decoder, 5))()
    return decoder, params, computed(decoder, params, batch, mode)


def computed(decoder: Decoder, params: Any, batch: dict[str, jax.Array], mode: str) -> Any:
    program = jax.jit(jax.vmap(lambda params, row: decoder.apply({"params": params}, row, mode=mode), (None, 0)))
    return jax.device_get(program(params, batch["tokens"]))


def of_file(name: str, tmp_path: Path) -> Parts:
    path = tmp_path / name
    path.write_text(documented(name))
    return load_parts(f"{path}:parts")


@pytest.mark.slow
def test_the_norm_router_computes_the_tokens_with_the_largest_norms(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], tmp_path: Path
) -> None:
    run = replace(tiny_run, routing=replace(tiny_run.routing, every=1))
    _, params, output = outputs_with(of_file("norm_router.py", tmp_path), run, tiny_batch, "top_k")
    x = np.asarray(params["embedding"], np.float64)[tiny_batch["tokens"]]
    expected = np.sqrt(np.mean(x**2, -1))
    np.testing.assert_allclose(output.trace.scores[:, 0], expected, rtol=1e-5)
    capacity = capacity_of(run.routing, expected.shape[1])
    for scores, selected in zip(np.asarray(output.trace.scores[:, 0]), output.trace.selected[:, 0], strict=True):
        assert np.flatnonzero(selected).tolist() == sorted(np.argsort(-scores, kind="stable")[:capacity].tolist())


@pytest.mark.slow
def test_threshold_selection_equals_a_loop_and_decides_alike_without_the_future(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], tmp_path: Path
) -> None:
    run = replace(tiny_run, routing=replace(tiny_run.routing, every=1, headroom=1.0))
    parts = of_file("threshold.py", tmp_path)
    decoder, params, output = outputs_with(parts, run, tiny_batch, "top_k")
    assert "predictor" not in params["groups"]["routed"]
    capacity, numbers = capacity_of(run.routing, tiny_batch["tokens"].shape[1]), set()
    for scores, selected in zip(
        output.trace.scores.reshape(-1, 24), output.trace.selected.reshape(-1, 24), strict=True
    ):
        chosen = [i for i, score in enumerate(np.asarray(scores).tolist()) if score > 0.1][:capacity]
        assert np.flatnonzero(selected).tolist() == chosen
        numbers.add(len(chosen))
    assert max(numbers) > 0
    causal = computed(decoder, params, tiny_batch, "causal")
    np.testing.assert_array_equal(causal.trace.selected, output.trace.selected)
    np.testing.assert_array_equal(causal.hidden, output.hidden)


@pytest.mark.nightly
def test_a_causal_rule_of_ones_own_has_its_parameters_is_trained_by_ones_own_loss_and_counted(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], random_state: Callable[..., TrainState]
) -> None:
    rule = Part(
        lambda key, config, routing: {"weight": jax.random.normal(key, (config.width,))},
        lambda params, x, scores, noise, routing, context: jax.lax.stop_gradient(x) @ params["weight"],
    )

    def squared(trace: Any, valid: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid[:, None], (trace.logits - target) ** 2, 0), (0, 2))

    parts = replace(DEFAULT_PARTS, causal_rule=rule, auxiliary_loss=squared)
    state = random_state(tiny_run, parts)
    assert set(state.params["groups"]["routed"]["predictor"]) == {"weight"}
    decoder = Decoder(tiny_run.model, tiny_run.routing, parts)
    output: Any = jax.jit(functools.partial(forward, decoder, key=None, mode="top_k"))(state.params, tiny_batch)
    _, metrics = jax.jit(make_train_step(decoder, tiny_run, 10))(state, tiny_batch)
    valid = np.asarray(tiny_batch["segment_ids"] > 0)[:, None]
    errors = (np.asarray(output.trace.logits, np.float64) - np.asarray(output.trace.selected)) ** 2
    expected = np.sum(errors * valid) / (valid.sum() * errors.shape[1])
    np.testing.assert_allclose(metrics["auxiliary_loss"], expected, rtol=1e-4)
    counted = forward_flops(tiny_run.model, tiny_run.routing, 24, parts)
    groups, D = errors.shape[1], tiny_run.model.width
    assert counted.predictor == pytest.approx(groups * 2 * 24 * D, rel=0.1)


@pytest.mark.parametrize("slots", [1, 5, 7])
@pytest.mark.slow
def test_a_selection_with_another_number_of_slots_than_the_capacity_is_refused(
    slots: int, tiny_run: RunConfig, tiny_batch: dict[str, jax.Array]
) -> None:
    parts = replace(DEFAULT_PARTS, selection=lambda scores, valid, routing, noise: select_first(valid, slots))
    assert capacity_of(tiny_run.routing, tiny_batch["tokens"].shape[1]) == 6
    message = f"parts.selection = '{slots} slots': must have as many as the capacity, 6"
    decoder = Decoder(tiny_run.model, tiny_run.routing, parts)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(functools.partial(decoder.init, mode="top_k"), jax.random.key(5), tiny_batch["tokens"][0])


def test_matrix_products_of_a_selection_are_counted(tiny_run: RunConfig) -> None:
    def smoothed(scores: jax.Array, valid: jax.Array, routing: RoutingConfig, noise: Any) -> Any:
        return select_share(jnp.ones((24, 24)) @ scores, valid, routing)

    own = forward_flops(tiny_run.model, tiny_run.routing, 24, replace(DEFAULT_PARTS, selection=smoothed))
    ours = forward_flops(tiny_run.model, tiny_run.routing, 24)
    assert own.router - ours.router >= 2 * 24 * 24 and own.mlp == ours.mlp
