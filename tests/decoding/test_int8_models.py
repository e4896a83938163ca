"""Models with int8 weights generate and score what the widened weights would in a plain forward pass; commands too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from decoding_models import ROUTING_KEY, Model, make_generator, make_model
from fork_server import succeed

import mod_star
from mod_star.cli import main
from mod_star.decoding import GenerationConfig, Sampling
from mod_star.errors import InputError
from mod_star.evaluation.scoring import score
from mod_star.model.int8 import Int8Weight
from mod_star.model.product_weights import OF_BLOCK, OF_FEED_FORWARD, is_product_weight, quantised

NEW = 8


def widened(params: Any) -> Any:
    is_weight = lambda leaf: isinstance(leaf, Int8Weight)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.widened() if is_weight(leaf) else leaf, params, is_leaf=is_weight)


@pytest.mark.parametrize(
    ("routing", "sizes", "prompts"),
    [
        pytest.param({"every": 0}, {"tie_embeddings": False}, [[4, 5], [6, 7, 8, 9], [3]], marks=pytest.mark.nightly),
        ({"every": 2}, {"width": 64}, [[1, 2, 3]]),
    ],
    ids=["dense", "mod"],
)
def test_tokens_and_scores_are_those_of_the_widened_weights(
    routing: dict[str, Any], sizes: dict[str, Any], prompts: list[list[int]]
) -> None:
    model = Model(routing, **sizes)
    params = quantised(model.decoder, model.params)
    model.params = widened(params)
    generator = make_generator(model.decoder, params, routing_key=ROUTING_KEY)
    rows = generator.generate(prompts, GenerationConfig(NEW, sampling=Sampling(0)))
    for prompt, row in zip(prompts, rows, strict=True):
        logits_SxV = model.teach([*prompt, *row.tokens[:-1]]).logits_SxV[len(prompt) - 1 :]
        log_p_SxV = np.asarray(jax.nn.log_softmax(logits_SxV))
        assert row.tokens == log_p_SxV.argmax(-1).tolist()
        np.testing.assert_allclose(row.log_probs, log_p_SxV.max(-1), atol=2e-5)
    scored = score(make_model(model.decoder, params, routing_key=ROUTING_KEY), [(prompts[0], rows[0].tokens)])
    np.testing.assert_allclose(scored[0].log_probs, rows[0].log_probs, atol=2e-5)


def test_all_products_weights_are_quantised_and_a_tied_or_donated_array_once() -> None:
    model = Model({"every": 2})
    embedding = model.params["embedding"]
    params = quantised(model.decoder, {**model.params, "head": embedding}, donate=True)
    assert params["head"] is params["embedding"] and embedding.is_deleted()
    leaves = jax.tree_util.tree_leaves_with_path(params["groups"], is_leaf=lambda leaf: isinstance(leaf, Int8Weight))
    kept = [path[-1].key for path, leaf in leaves if isinstance(leaf, Int8Weight)]
    assert sorted(kept) == sorted(2 * (OF_BLOCK + OF_FEED_FORWARD))
    assert not any(is_product_weight(model.decoder, path) for path, leaf in leaves if not isinstance(leaf, Int8Weight))


def test_unknown_weights_are_refused(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^weights = 'int4': must be one of int8$"):
        mod_star.Model.load(trained_run, weights="int4")
    for command in (["sample", str(trained_run)], ["evaluate", str(trained_run), "--data", "x", "--task", "gsm8k"]):
        with pytest.raises(SystemExit):
            main([*command, "--weights", "int4"])
        assert "--weights" in (said := capsys.readouterr().err) and "int8" in said and said.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["train", str(trained_run), "--weights", "int8"])
    assert "unknown option --weights" in capsys.readouterr().err


@pytest.mark.nightly
def test_commands_take_int8(trained_run: Path, tmp_path: Path) -> None:
    options = ("--prompt", "The", "--temperature", "0", "--new-tokens", "12", "--json")
    row = json.loads(succeed("sample", trained_run, *options, "--weights", "int8").out)
    model = mod_star.Model.load(trained_run, weights="int8")
    prompt = model.tokenizer.encode("The")
    likelihoods = score(model, [([model.tokenizer.bos_id, *prompt], row["tokens"])])[0]
    assert all(likelihoods.is_greedy), "the command's tokens are those of int8 weights"
    np.testing.assert_allclose(likelihoods.log_probs, row["log_probs"], atol=1e-4)
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"q": f"{n} + {n}?", "a": 2 * n}) for n in range(4)))
    task = ("--question", "{q}", "--answer", "{a}", "--kind", "number", "--new-tokens", "8", "--weights", "int8")
    succeed("evaluate", trained_run, "--data", data, *task, "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["--weights"] == "int8" and results["items"] == 4
