"""Changes of blocks, and routers and adapters fitted to them, against loops and other ways to the same optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star import presets
from mod_star.config import DataConfig
from mod_star.data import train_batches
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.model.layers import rms_norm
from mod_star.model.routing import predict
from mod_star.pretrained import calibration
from mod_star.pretrained.calibration import block_changes, fit_adapter, fit_block, fitted_params, least_changed
from mod_star.pretrained.params_run import write_params_run
from mod_star.pretrained.upcycle import Skipping, upcycle
from mod_star.runs.directory import load_run, read_config
from mod_star.tokenization import load_tokenizer

RNG = np.random.default_rng(3)


def test_changes_are_one_minus_the_cosine_of_input_and_output() -> None:
    streams = RNG.normal(size=(3, 5, 4))
    expected = []
    for before, after in ((streams[0], streams[1]), (streams[1], streams[2])):
        cosines = [a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(before, after, strict=True)]
        expected.append(1 - sum(cosines) / 5)
    np.testing.assert_allclose(block_changes(streams), expected, rtol=1e-12)
    np.testing.assert_allclose(block_changes(np.stack([streams[0], 7 * streams[0]])), 0, atol=1e-12)


def test_the_layout_that_changes_least_has_neither_the_first_nor_the_last_block() -> None:
    changes = np.array([0.0, 0.3, 0.2, 0.4, 0.1, 0.3, 0.9, 0.9, 0.2, 0.9, 0.9, 0.0])
    assert least_changed(changes, 4) == 2  # a mean of 0.5; that of blocks 3, 7 and 11 is 0.67; 0.33 would be the least
    changes[6] = changes[10] = 0.1
    assert least_changed(changes, 4) == 3
    changes[[1, 5, 9]] = 0.05
    assert least_changed(changes, 4) == 2
    with pytest.raises(InputError, match=r"^--every = 2: must be at least 3 with --blocks least-changed"):
        least_changed(changes, 2)


def error(inputs: Any, targets: Any, product: Any) -> float:
    return float(np.sum((targets - inputs @ product) ** 2))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_an_adapter_is_the_best_map_of_its_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As alternating least squares finds it; with all ranks it is the ordinary regression."""
    monkeypatch.setattr(calibration, "RIDGE", 0.0)
    unit, rms = RNG.normal(size=(80, 6)), RNG.uniform(0.5, 2, (80, 1))
    relative = unit @ RNG.normal(size=(6, 6)) + RNG.normal(size=(80, 6))
    down, up = fit_adapter(unit, relative, rms, rank)
    assert down.shape == (6, rank) and up.shape == (rank, 6)
    inputs = unit / rms
    best: Any = RNG.normal(size=(rank, 6))
    for _ in range(400):
        left = np.linalg.lstsq(inputs, relative @ np.linalg.pinv(best), rcond=None)[0]
        best = np.linalg.lstsq(inputs @ left, relative, rcond=None)[0]
    assert error(inputs, relative, down @ up) == pytest.approx(error(inputs, relative, left @ best), rel=1e-6)
    if rank == 6:
        np.testing.assert_allclose(down @ up, np.linalg.lstsq(inputs, relative, rcond=None)[0], atol=1e-10)


def planted(size: int, width: int) -> tuple[Any, Any, Any]:
    """Tokens, what a block makes of them (a map of rank 2, and noise that some direction scales), and log noise."""
    before = RNG.normal(size=(size, width)) * RNG.uniform(1, 3, (size, 1))
    rms = np.sqrt(np.mean(before**2, -1, keepdims=True))
    unit, direction = before / rms, RNG.normal(size=width) / width**0.5
    strength = 2 * unit @ direction - 2
    low = unit @ RNG.normal(size=(width, 2)) @ RNG.normal(size=(2, width))
    return before, before + low + np.exp(strength)[:, None] * rms * RNG.normal(size=(size, width)), strength


def test_a_router_takes_the_tokens_that_the_adapter_cannot_stand_in_for() -> None:
    before, after, strength = planted(3000, 12)
    fit = fit_block(before, after, 0.25, 2)
    unit = before / np.sqrt(np.mean(before**2, -1, keepdims=True) + 1e-6)
    scores = unit @ fit.router_D
    assert np.corrcoef(scores, strength)[0, 1] > 0.95
    assert np.std(scores) == pytest.approx(calibration.ROUTER_SPREAD)
    assert np.mean(scores > fit.threshold) == pytest.approx(0.25, abs=1e-3)
    passing = scores <= fit.threshold
    left = (after - before - unit @ fit.down_DxR @ fit.up_RxD)[passing]
    assert np.sum(left**2) < 0.25 * np.sum((after - before)[passing] ** 2)
    none = fit_block(before, after, 1.0, 0)
    assert none.down_DxR.shape == (12, 0) and np.all(unit @ none.router_D > none.threshold)


def test_a_router_is_the_regression_with_a_ridge_of_the_logarithm_of_what_is_left() -> None:
    """By least squares with a row more for each input. The adapter is that of the tokens that pass by."""
    before, after, _ = planted(300, 8)
    for rank, capacity in ((0, 0.25), (2, 0.125)):
        fit = fit_block(before, after, capacity, rank)
        rms = np.sqrt(np.mean(before**2, -1, keepdims=True) + 1e-6)
        unit, relative = before / rms, (after - before) / rms
        down, up = fit_adapter(unit, relative, rms, rank)
        target = np.log(np.mean((relative - (unit / rms) @ down @ up) ** 2, -1) + 1e-12)
        target -= np.quantile(target, 1 - capacity)
        pull = np.sqrt(calibration.RIDGE * np.sum(unit**2) / 8) * np.eye(8)
        router = np.linalg.lstsq(np.concatenate([unit, pull]), np.concatenate([target, np.zeros(8)]), rcond=None)[0]
        np.testing.assert_allclose(fit.router_D, router * calibration.ROUTER_SPREAD / np.std(unit @ router), rtol=1e-8)
        passing = unit @ fit.router_D <= fit.threshold
        down, up = fit_adapter(unit[passing], relative[passing], rms[passing], rank)
        np.testing.assert_allclose(fit.down_DxR @ fit.up_RxD, down @ up, rtol=1e-8, atol=1e-12)


def test_a_fitted_predictor_says_whether_the_score_passes_the_threshold() -> None:
    before, after, _ = planted(400, 8)
    fits = [fit_block(before, after, capacity, 2) for capacity in (0.25, 0.5)]
    start = {
        "hidden": RNG.normal(size=(2, 8, 4)), "bias": np.ones((2, 4)), "output": np.ones((2, 4)), "shift": np.ones(2)
    }  # fmt: skip
    entries = fitted_params(fits, {"predictor": start}, 2)
    x = RNG.normal(size=(50, 8)).astype(np.float32)
    unit = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    for group, fit in enumerate(fits):
        logits = predict(jax.tree.map(lambda leaf, group=group: leaf[group], entries["predictor"]), jnp.asarray(x))
        expected = calibration.RULE_SPREAD / calibration.ROUTER_SPREAD * (unit @ fit.router_D - fit.threshold)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(entries["adapter"]["down"][group], fit.down_DxR, rtol=1e-6)
        np.testing.assert_allclose(entries["router"]["weight"][group], fit.router_D, rtol=1e-6)
    assert np.any(np.asarray(entries["predictor"]["hidden"])[:, :, 2:] != 0), "the other units can still learn"


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory, random_params: Callable[..., Any]) -> Path:
    """A dense run of four blocks, and beside it a text."""
    tiny = presets.dense(presets.tiny())
    model = replace(tiny.model, vocab_size=320, width=8, layers=4, heads=1, mlp_width=8, context=16)
    path = tmp_path_factory.mktemp("dense") / "dense"
    (path.parent / "text.txt").write_text("a few words of a text that has some words\n\n" * 40)
    run = replace(tiny, model=model)
    write_params_run(path, run, load_tokenizer("bytes"), random_params(model, run.routing))
    return path


def text_of(dense_run: Path) -> DataConfig:
    return replace(read_config(dense_run).data, source=(str(dense_run.parent / "text.txt"),), separator="\n\n")


def test_a_model_upcycled_with_a_text(dense_run: Path, tmp_path: Path) -> None:
    dense, text = load_run(dense_run), text_of(dense_run)
    streams = calibration.read_streams(dense, text, 64)
    assert streams.shape[0] == 5 and streams.shape[1] >= 64 and streams.shape[2] == 8
    skipping = Skipping("least-changed", keep_key_values=True, adapter_rank=2, text=text, tokens=64)
    run = upcycle(dense_run, tmp_path / "kept", 0.25, 4, skipping=skipping)
    routing = run.routing
    assert (routing.every, routing.capacity, routing.stages, routing.gate) == (4, 0.25, (), "tanh")
    assert (routing.router_norm, routing.keep_key_values, routing.adapter_rank) == (True, True, 2)
    assert routing.first == least_changed(block_changes(streams), 4) and routing.first in (2, 3)
    fit = fit_block(streams[routing.first - 1], streams[routing.first], 0.25, 2)
    loaded = load_run(tmp_path / "kept")
    routed = loaded.params["groups"]["routed"]
    np.testing.assert_allclose(routed["router"]["weight"][0], fit.router_D, rtol=1e-5)
    np.testing.assert_allclose(routed["adapter"]["up"][0], fit.up_RxD, rtol=1e-5)
    output: Any = jax.jit(lambda p, t: loaded.decoder.apply({"params": p}, t, mode="top_k"))(
        loaded.params, jnp.arange(16)
    )
    assert np.asarray(output.trace.selected).sum() == 4 and np.isfinite(output.hidden).all()


def test_streams_are_those_of_the_decoder(dense_run: Path) -> None:
    """After the last block and the final norm they are its hidden states: of documents apart, and of no padding."""
    dense, short = load_run(dense_run), dense_run.parent / "short.txt"
    short.write_text("\n\n".join("abcdefghi"[: 3 + number % 6] for number in range(60)))
    decoder: Decoder = dense.decoder
    apply: Any = jax.jit(jax.vmap(lambda *each: decoder.apply({"params": dense.params}, *each).hidden))  # type: ignore[union-attr]
    for pack in (True, False):
        text = replace(text_of(dense_run), source=(str(short),), pack=pack)
        batch = next(iter(train_batches(text, dense.tokenizer, 16, 4)))
        valid = batch["segment_ids"] > 0
        assert batch["segment_ids"].max() > 1 if pack else not valid.all()
        streams = calibration.read_streams(dense, text, 64)
        found = rms_norm(jnp.asarray(streams[-1]), dense.params["final_norm"], decoder.config.norm_eps)
        expected = np.asarray(apply(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))))
        np.testing.assert_allclose(found[: valid.sum()], expected[valid], rtol=1e-4, atol=1e-5)


def test_what_is_refused(dense_run: Path, tmp_path: Path) -> None:
    text = text_of(dense_run)
    for skipping, message in (
        (Skipping(adapter_rank=-1), r"^--adapter-rank = -1: must be at least 0$"),
        (Skipping("least-changed"), r"^--blocks = 'least-changed': must be last without --text"),
        (Skipping(text=text, tokens=7), r"^--tokens = 7: must be at least model\.width = 8$"),
        (Skipping("least-changed", text=text, tokens=64), r"^--every = 2: must be at least 3 with --blocks"),
    ):
        with pytest.raises(InputError, match=message):
            upcycle(dense_run, tmp_path / "free", 0.25, skipping=skipping)
    assert list(tmp_path.iterdir()) == []
