"""A model in one piece: from a run, and what its generator takes from it."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from decoding_models import Model as Tiny
from decoding_models import make_model

import mod_star
from mod_star.config import ThinkingConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.loaded_model import Model
from mod_star.runs.directory import load_run


def test_a_run_gives_its_model(trained_run: Path) -> None:
    run, model = load_run(trained_run), Model.load(trained_run)
    assert (model.decoder, model.thinking, model.mesh, model.routing_key) == (run.decoder, None, None, None)
    assert model.tokenizer.fingerprint == run.model.tokenizer.fingerprint and not model.can_think
    assert run.model.params is run.params
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert mod_star.Model is Model
    assert Model.load(str(trained_run), step=run.step).decoder == run.decoder


def test_a_generator_ends_where_the_tokenizer_says() -> None:
    tiny = Tiny({"every": 0})

    class Ends:
        """A tokenizer of which only the ends are asked for."""

        end_ids = (5, 7)

    model = make_model(tiny.decoder, tiny.params, tokenizer=Ends())  # type: ignore[arg-type]
    generator, free = Generator(model), Generator(model, end_ids=())
    assert (generator.end_ids, free.end_ids) == ((5, 7), ())
    config = GenerationConfig(40, Sampling(3.0), branches=4)
    ended = generator.generate([[1, 2]], config)
    for result, whole in zip(ended, free.generate([[1, 2]], config), strict=True):
        first = next((place for place, token in enumerate(whole.tokens) if token in (5, 7)), None)
        assert result.finished == (first is not None)
        assert result.tokens == whole.tokens[:first]
    assert any(result.finished for result in ended), "the test shows less than it should"


def test_a_model_thinks_if_it_has_learned_to_and_routes_by_a_key_if_routing_draws() -> None:
    tiny, random = Tiny({"every": 0}), Tiny({"selection": "stochastic"})
    assert not make_model(tiny.decoder, tiny.params, thinking=ThinkingConfig()).can_think
    learned = make_model(tiny.decoder, tiny.params | {"thinking": {}}, thinking=ThinkingConfig())
    assert learned.can_think and not make_model(tiny.decoder, learned.params).can_think
    key = jax.random.key(3)
    assert make_model(tiny.decoder, tiny.params, routing_key=key).routing_key_in_force is None
    assert make_model(random.decoder, random.params, routing_key=key).routing_key_in_force is key
    assert make_model(random.decoder, random.params).routing_key_in_force == jax.random.key(0)
