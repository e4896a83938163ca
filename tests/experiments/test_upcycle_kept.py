"""The experiment on models that are upcycled and kept: arms cost what they should, and learn from the dense model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import decode, float64, one_document

from experiments.upcycle_kept import distil
from experiments.upcycle_kept.arms import RECIPES, Options, arms, config_of
from experiments.upcycle_kept.likelihoods import likelihoods
from mod_star.config import DataConfig, ModelConfig, RoutingConfig, RunConfig
from mod_star.flops import forward_flops
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.tokenization import ByteTokenizer
from mod_star.training.objectives import forward, next_token

DENSE = RunConfig(
    model=ModelConfig(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, context=256),
    routing=RoutingConfig(every=0),
)


def test_all_arms_cost_their_share_where_a_layout_can() -> None:
    whole = forward_flops(DENSE.model, DENSE.routing, 256).total
    for arm in arms(Options(), DataConfig()):
        for share, every in ((0.9, 3), (0.8, 3), (0.7, 2)):
            run = config_of(DENSE, arm, share)
            assert run is not None and (run.routing.every, run.routing.first) == (every, 2)
            assert forward_flops(run.model, run.routing, 256).total / whole == pytest.approx(share, abs=0.004)
        assert config_of(DENSE, arm, 0.5) is None


def test_every_recipe_starts_from_an_arm_that_has_what_it_trains() -> None:
    starts = {arm.name: arm for arm in arms(Options(), DataConfig())}
    for recipe in RECIPES.values():
        if recipe.start is not None:
            skipping = starts[recipe.start].skipping
            assert ("adapter" in recipe.trainable) <= (skipping.adapter_rank > 0)
            assert recipe.stages == (not starts[recipe.start].fitted)
    assert Options().best in RECIPES


def test_the_loss_is_that_of_the_next_token_plus_the_divergence(
    tiny_run: RunConfig, tiny_batch: dict[str, jax.Array], random_params: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = replace(tiny_run, model=replace(tiny_run.model, layers=2), init_from="runs/upcycled")
    dense = replace(run, routing=replace(run.routing, every=0))
    decoder, teacher = (Decoder(each.model, each.routing) for each in (run, dense))
    params, frozen = (random_params(each.model, each.routing, seed=seed) for seed, each in enumerate((run, dense)))
    loaded = type("Loaded", (), {"decoder": teacher, "params": frozen})
    monkeypatch.setattr(distil, "teacher_of", lambda start: loaded)
    objective, plain, key = distil.distil(decoder, run), next_token(decoder, run), jax.random.key(0)
    targets, valid = jnp.sum(tiny_batch["weights"]), jnp.sum(tiny_batch["segment_ids"] > 0)

    @jax.jit
    def losses(params: Any, frozen: Any) -> Any:
        total, sums = objective.loss(params, tiny_batch, key, targets, valid, frozen)
        hidden = (
            forward(decoder, params, tiny_batch, key, "top_k").hidden,
            forward(teacher, frozen, tiny_batch, None).hidden,
        )
        return total, sums["kl"], plain.loss(params, tiny_batch, key, targets, valid)[0], hidden

    total, kl, alone, (student, reference) = jax.device_get(losses(params, frozen))
    expected = 0.0
    for row, column in np.argwhere(np.asarray(tiny_batch["weights"]) > 0):
        logits = student[row, column] @ params["embedding"].T, reference[row, column] @ frozen["embedding"].T
        q, p = (np.exp(np.float64(each) - each.max()) for each in logits)
        q, p = q / q.sum(), p / p.sum()
        expected += np.sum(p * np.log(p / q))
    assert float(kl) == pytest.approx(expected, rel=1e-4) and expected > 1
    assert float(total) == pytest.approx(float(alone + kl / targets), rel=1e-5)


def test_likelihoods_are_those_of_the_right_answers(tmp_path: Path, random_params: Callable[..., Any]) -> None:
    """Against the whole text in float64. The question of 200 bytes does not fit, and does not count."""
    numbers = [("1 and 2?", "3"), ("4 and 8?", "12"), ("x" * 200, "7")]
    (tmp_path / "gsm8k_test.jsonl").write_text(
        "".join(json.dumps({"question": asked, "answer": f"It is.\n#### {gold}"}) + "\n" for asked, gold in numbers)
    )
    texts = ("bank", "a long old road", "sea")
    choices = [{"label": label, "text": text} for label, text in zip("ABC", texts, strict=True)]
    asked = [("q1", "Where?", "B"), ("q2", "Whence?", "A")]
    (tmp_path / "csqa_dev.jsonl").write_text(
        "".join(
            json.dumps({"id": name, "question": {"stem": stem, "choices": choices}, "answerKey": gold}) + "\n"
            for name, stem, gold in asked
        )
    )
    config, routing = ModelConfig(vocab_size=258, width=16, layers=1, heads=2, mlp_width=24), RoutingConfig(every=0)
    config = replace(config, context=96)
    params = random_params(config, routing)
    model = Model(Decoder(config, routing), params, ByteTokenizer())
    found = likelihoods(model, tmp_path, questions=9)

    def log_prob(before: str, after: str) -> float:
        ids = np.array([256, *(before + after).encode()])
        reference = float64(params)
        hidden = decode(reference, one_document(ids), config, routing, mode="causal", most=len(ids))[0]
        logits = hidden @ reference["embedding"].T
        logits -= logits.max(-1, keepdims=True)
        log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:-1]
        return float(sum(row[byte] for row, byte in list(zip(log_probs, ids[1:], strict=True))[-len(after.encode()) :]))

    expected = [-log_prob(f"Q: {asked}\nA: ", f"{gold}\n") for asked, gold in numbers[:2]]
    assert found["gsm8k"]["value"] == pytest.approx(np.mean(expected), rel=1e-4) and found["gsm8k"]["n"] == 2
    listed = "".join(f"\n({label}) {text}" for label, text in zip("ABC", texts, strict=True))
    right = 0
    for _, stem, gold in asked:
        scores = [log_prob(f"Q: {stem}{listed}\nA:", f" {text}") / len(f" {text}".strip()) for text in texts]
        right += "ABC"[int(np.argmax(scores))] == gold
    assert found["csqa"]["value"] == right / 2 and found["csqa"]["n"] == 2
