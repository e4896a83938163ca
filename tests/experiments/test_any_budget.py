"""The experiment on budgets: equal arms, what is measured of questions, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from experiments.any_budget.measure import LEVELS, ROWS, WAYS, batches, of_batch, questions
from experiments.any_budget.report import against_alone, report
from experiments.any_budget.run import ANY, ARMS, BUDGETS, Options, config
from mod_star.config import ModelConfig, RoutingConfig
from mod_star.model import Decoder
from mod_star.stages import plan_stages
from mod_star.tokenization import load_tokenizer


def test_arms_differ_in_their_capacities_alone_and_have_equal_steps() -> None:
    whole = config(Options(), ANY, 0)
    for arm in ARMS:
        run = config(Options(), arm, 0)
        assert replace(run, routing=whole.routing) == whole
        assert plan_stages(replace(run, model=replace(run.model, vocab_size=512))).steps == whole.train.steps
        if arm != ANY:
            assert run.routing == replace(whole.routing, budgets=(), capacity=float(arm))
    assert whole.routing.budgets == BUDGETS and len(ARMS) == 5


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Solutions of one to three steps, and one that is too long."""
    path = tmp_path_factory.mktemp("any_budget")
    records = [
        {"question": f"{n}?", "answer": "\n".join([*(f"step {i}" for i in range(1 + n % 3)), f"#### {n}"])}
        for n in range(ROWS + 3)
    ]
    records.append({"question": "x" * 60, "answer": "1\n#### 1"})
    (path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Options(data=path, out=path / "out", seeds=1, questions=40)


@pytest.mark.slow
def test_questions_are_measured_as_their_decisions_and_probabilities_say(options: Options) -> None:
    tokenizer, model = load_tokenizer("bytes"), ModelConfig(vocab_size=320, width=8, layers=1, heads=1, context=48)
    asked = questions(options, tokenizer, model.context)
    assert len(asked.lengths_Q) == ROWS, "whole batches, without the long one"
    assert set(asked.steps_Q.tolist()) == {1, 2, 3}
    text = tokenizer.decode(asked.tokens_QxS[0, 1 : asked.lengths_Q[0] + 1].tolist())
    assert text.count("\n") == asked.steps_Q[0] + 1 and text.endswith(f"#### {text[3 : text.index('?')]}")
    assert tokenizer.decode(asked.tokens_QxS[0, 1 : asked.asked_Q[0]].tolist()) == text[: text.index("A:") + 3]
    routing = RoutingConfig(every=1, capacity=0.25, predictor_width=4)
    decoder, params = Decoder(model, routing), random_params(model, routing)
    (batch,) = batches(asked)
    nll_B, share_B, asked_B, overflow_B = jax.device_get(of_batch(decoder, params, batch, "causal"))

    def one(tokens: jax.Array, segment_ids: jax.Array) -> Any:
        return decoder.apply({"params": params}, tokens, None, segment_ids)

    output = jax.device_get(jax.jit(jax.vmap(one))(jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])))
    for row in (0, 7):
        n = asked.lengths_Q[row]
        logits = output.hidden[row, :n].astype(np.float64) @ np.asarray(params["embedding"], np.float64).T
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = asked.tokens_QxS[row, 1 : n + 1]
        np.testing.assert_allclose(nll_B[row], -log_p[np.arange(n), targets].sum(), rtol=1e-4)
        selected = output.trace.selected[row, 0]
        np.testing.assert_allclose(share_B[row], selected[:n].mean(), rtol=1e-5)
        np.testing.assert_allclose(asked_B[row], selected[: asked.asked_Q[row]].mean(), rtol=1e-5)
        np.testing.assert_allclose(overflow_B[row], output.trace.overflow[row, 0, :n].mean(), rtol=1e-5)
    assert 0 < share_B.mean() < 1


def test_tables_are_made_of_the_runs_that_there_are(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"1": 2.0, "0.5": 2.1, "0.25": 2.2, "0.125": 2.3}
    whole = {"eval_loss": 2.323, "eval_loss_causal": 2.33} | {
        f"{name}_at_{budget}": 1.01 * loss
        for budget, loss in losses.items()
        if budget != "0.125"
        for name in ("eval_loss", "eval_loss_causal")
    }
    evaluations = {ANY: whole} | {
        budget: {"eval_loss": loss, "eval_loss_causal": loss} for budget, loss in losses.items() if budget != "0.5"
    }
    report(options)
    assert "nothing to report yet" in capsys.readouterr().out
    for arm, evaluation in evaluations.items():
        (options.out / f"{arm}-0").mkdir(parents=True)
        (options.out / f"{arm}-0" / "summary.json").write_text(json.dumps({"evaluation": evaluation}))
    by_level = {level: 0.25 + 0.05 * i for i, level in enumerate(LEVELS)}
    way = {"loss": 3.0, "share": 0.25, "overflow": 0.0, "share by steps": by_level, "loss by steps": by_level}
    way |= {"share of the question by steps": by_level}
    (options.out / "measured-0.json").write_text(
        json.dumps({f"{each:g}": dict.fromkeys(WAYS, way) for each in BUDGETS})
    )
    assert against_alone(options, [0])["0.125"]["any"] == [2.323]
    report(options)
    text = (options.out / "results.md").read_text()
    assert "| a model for the budget alone | 2.0000 | – | 2.2000 | 2.3000 |" in text
    assert "| all less alone, of the loss | +1.00% | – | +1.00% | +1.00% |" in text
    assert "| top-k, batch | 0.250 | 0.300 | 0.350 | +0.100 |" in text
    assert (options.out / "figure.png").is_file()
