"""Parameters that are trained and those that are frozen: which patterns mean which, and what a step does with them."""

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
from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.flops import parameter_count
from mod_star.model import Decoder
from mod_star.runs.directory import load_run
from mod_star.runs.summary import read_summary
from mod_star.trainable import leaves_by_path, matches, trained_part, trained_paths, with_trained_part
from mod_star.training.state import TrainState, init_state
from mod_star.training.step import make_train_step
from mod_star.training.train import train

QUERY = ("groups", "full_0", "block", "query")


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("query", True), ("block/query", True), ("groups/full_0/block/query", True), ("full_0", True),
        ("full_0/block", True), ("full_*", True), ("full_*/*/q?ery", True), ("que", False), ("routed", False),
        ("full_0/query", False), ("query/weight", False), ("", False), ("/query", False), ("Query", False),
        ("full_[1-9]", False),
    ],
)  # fmt: skip
def test_a_pattern_is_one_name_of_a_path_or_several_in_a_row(pattern: str, matched: bool) -> None:
    assert matches(pattern, QUERY) is matched


def frozen_but(run: RunConfig, *patterns: str) -> RunConfig:
    return replace(run, train=replace(run.train, trainable=patterns))


def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(
    tiny_run: RunConfig, random_params: Callable[..., Any]
) -> None:
    params = random_params(tiny_run.model, tiny_run.routing)
    for patterns in (("routers",), ("router", "routers"), ("routers", "router")):
        with pytest.raises(InputError) as error:
            trained_paths(frozen_but(tiny_run, *patterns), params)
        message = str(error.value)
        assert message.startswith(f"train.trainable = {patterns!r}: 'routers' matches no parameter; ")
        assert " query, routed, router, " in message and "\n" not in message


def test_what_is_trained_and_put_back(tiny_run: RunConfig, random_params: Callable[..., Any]) -> None:
    params = random_params(tiny_run.model, tiny_run.routing)
    run = frozen_but(tiny_run, "router", "embedding")
    part = trained_part(run, params)
    assert {"/".join(names) for names in leaves_by_path(part)} == {"embedding", "groups/routed/router/weight"}
    again = with_trained_part(run, params, jax.tree.map(lambda leaf: leaf + 1, part))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, params)
    for names, leaf in leaves_by_path(again).items():
        moved = names[0] == "embedding" or "router" in names
        np.testing.assert_array_equal(leaf, leaves_by_path(params)[names] + int(moved))
    assert trained_part(tiny_run, params) is params


def test_frozen_parameters_have_no_gradient_and_no_state_and_the_others_are_trained_as_without_them(
    routed_run: RunConfig, random_params: Callable[..., Any], tiny_batch: dict[str, jax.Array]
) -> None:
    """AdamW works element by element, so that without clipping a parameter's step does not depend on the others'."""
    run = replace(routed_run, optimizer=replace(routed_run.optimizer, clip=0.0))
    decoder, params = Decoder(run.model, run.routing), random_params(run.model, run.routing)
    after, products, states = {}, {}, {}
    for name, own in (("all", run), ("some", frozen_but(run, "routed/router", "feed_forward/up", "final_norm"))):
        state: TrainState = init_state(decoder, own, 100, params)
        lowered = jax.jit(make_train_step(decoder, own, 100)).lower(state, tiny_batch)
        products[name] = lowered.as_text().count("dot_general")
        after[name], states[name] = leaves_by_path(lowered.compile()(state, tiny_batch)[0].params), state.opt_state
    trained = {names for names in after["all"] if names[-1] in ("up", "final_norm") or "router" in names}
    assert 0 < len(trained) < len(after["all"])
    for names, leaf in leaves_by_path(params).items():
        np.testing.assert_array_equal(after["some"][names], after["all"][names] if names in trained else leaf)
        assert (after["all"][names] != leaf).any()
    kept = ["/".join(names) for names, leaf in leaves_by_path(states["some"]).items() if leaf.ndim]
    assert len(kept) == 2 * len(trained) and all(any(k.endswith("/".join(t)) for t in trained) for k in kept)
    count = sum(leaf.size for names, leaf in leaves_by_path(params).items() if names in trained)
    whole, some = (sum(leaf.size for leaf in jax.tree.leaves(states[name]) if leaf.ndim) for name in ("all", "some"))
    assert (whole, some) == (2 * parameter_count(params), 2 * count)
    # Five matrices of the block, two of the predictor, and the embedding as head: none has a gradient of its own.
    assert products["some"] <= products["all"] - 8


@pytest.mark.nightly
def test_a_run_goes_on_bit_for_bit_and_says_how_much_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = presets.tiny()
    model = replace(run.model, width=8, heads=1, layers=1, context=16)
    run = replace(run, model=model, routing=replace(run.routing, every=1, predictor_width=4))
    run = replace(
        run, train=replace(run.train, steps=4, batch_size=2, checkpoint_every=2, eval_every=0, eval_batches=1)
    )
    with pytest.raises(InputError, match="matches no parameter"):
        train(frozen_but(run, "rooter"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    run = frozen_but(run, "router", "predictor")
    summary = train(run, tmp_path / "run")
    assert f"parameters, {summary.trained_parameters} of them trained" in capsys.readouterr().out
    assert read_summary(tmp_path / "run").trained_parameters == summary.trained_parameters < summary.parameters
    half, whole = (leaves_by_path(load_run(tmp_path / "run", step).params) for step in (2, 4))
    for names, leaf in whole.items():
        assert (leaf != half[names]).any() == ("router" in names or "predictor" in names)
    assert train(run, tmp_path / "run", resume_from=2, quiet=True).evaluation == summary.evaluation
    jax.tree.map(np.testing.assert_array_equal, leaves_by_path(load_run(tmp_path / "run", 4).params), whole)
