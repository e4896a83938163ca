"""What a generation is asked for: what cannot be, and what the decodings of the command line come to."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.generation_config import config_of
from mod_star.decoding.sampling import BRANCHING, GREEDY
from mod_star.decodings import (
    DECODINGS,
    FIELDS,
    Beam,
    Cot,
    Decoding,
    DecodingName,
    Greedy,
    SelfConsistency,
    Temperature,
    chosen_decoding,
    decodings_with,
    name_of,
)
from mod_star.errors import InputError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": ("a", "")}, r"stop = \('a', ''\): must not be an empty string"),
        ({"stop": "ab"}, "stop = 'ab': must be a tuple of texts"),
        ({"branches": 0}, "branches = 0: must be at least 1"),
        ({"burst": 0}, "burst = 0: must be at least 1"),
        ({"rows": 0}, "rows = 0: must be at least 1"),
    ],
)
def test_what_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        GenerationConfig(5, **values)


def test_what_is_left_to_the_decoding() -> None:
    config = GenerationConfig(5)
    assert (config.rows_per_prompt, config.drawn) == (1, Sampling(1.0))
    assert config_of(Greedy(), 5) == GenerationConfig(5, GREEDY, branches=1)
    assert config_of(Temperature(top_k=3), 5, seed=2) == GenerationConfig(5, Sampling(0.8, 3), branches=1, seed=2)
    assert config_of(SelfConsistency(), 5) == GenerationConfig(5, Sampling(0.7), branches=10)
    assert config_of(Cot(branches=3), 5) == GenerationConfig(5, BRANCHING, branches=3)
    assert config_of(Beam(), 5, stop=("x",)) == GenerationConfig(5, None, ("x",), branches=4)


def test_every_decoding_is_chosen_by_its_name_with_its_own_options() -> None:
    assert tuple(DECODINGS) == get_args(DecodingName) and set(DECODINGS.values()) == set(get_args(Decoding))
    nothing: dict[str, Any] = dict.fromkeys(FIELDS)
    for name, kind in DECODINGS.items():
        assert chosen_decoding(name, nothing | {"aggregate": False}) == kind()
        assert name_of(kind()) == name
        own = {field.name for field in fields(kind)}
        for field in FIELDS:
            given = nothing | {field: getattr(Cot(), field, None) or getattr(SelfConsistency(), field, None) or 0.5}
            if field in own:
                assert getattr(chosen_decoding(name, given), field) == given[field]
                continue
            with pytest.raises(InputError) as error:
                chosen_decoding(name, given)
            option, others = "--" + field.replace("_", "-"), ", ".join(decodings_with(field))
            assert str(error.value) == f"{option}: cannot be combined with --decoding {name}, only with {others}"
    for name in ("self-consistency", "beam", "cot"):
        with pytest.raises(InputError, match=r"^--branches = 0: must be at least 1"):
            chosen_decoding(name, {"branches": 0})
    with pytest.raises(InputError, match=r"^--temperature = 0\.0: must be above 0: samples must differ"):
        chosen_decoding("self-consistency", {"temperature": 0.0})
