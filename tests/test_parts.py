"""A user's own router, feed-forward, gate and block, from a file outside the package."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.model import Decoder
from mod_star.parts import DEFAULT_PARTS, load_parts
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
        ("{file}:missing", "missing must be a mod_star.Parts, found NoneType"),
        ("{file}:not_parts", "not_parts must be a mod_star.Parts, found int"),
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
