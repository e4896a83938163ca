"""Parameters on disk are read slice by slice: what they are, what they take, and what is compiled before."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params
from decoding_models import make_generator, make_prompts

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.step import own_params
from mod_star.errors import InputError
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.runs.checkpoints import save_params
from mod_star.runs.params_file import PARAMS_NAME, open_params_file, read_params_file

MODEL = ModelConfig(vocab_size=29, width=24, layers=2, heads=2, mlp_width=24, context=256)
ROUTING = RoutingConfig(every=2, capacity=0.5, predictor_width=8)
GREEDY = GenerationConfig(9, Sampling(0))


def stored(directory: Path, params: Any) -> dict[str, Any]:
    save_params(directory, params)
    return open_params_file(directory / "0", jax.eval_shape(lambda: params))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(MODEL, ROUTING)


def test_what_is_read_is_what_was_saved(tmp_path: Path, params: dict[str, Any]) -> None:
    on_disk = stored(tmp_path, params)
    loaded = read_params_file(tmp_path / "0", jax.eval_shape(lambda: params))
    for leaf, whole, expected in zip(*map(jax.tree.leaves, (on_disk, loaded, params)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
        np.testing.assert_array_equal(whole, expected)
        assert isinstance(whole, jax.Array) and whole.dtype == expected.dtype
        for i in (0, -1) if leaf.shape else ():
            np.testing.assert_array_equal(leaf[i], expected[i])
    query = on_disk["groups"]["full_0"]["block"]["query"]
    with pytest.raises(IndexError):
        query[1]  # there is one group
    (tmp_path / "0" / PARAMS_NAME).write_bytes((tmp_path / "0" / PARAMS_NAME).read_bytes()[: query.offset + 4])
    with pytest.raises(InputError, match="cannot be loaded: OSError: the file has become shorter"):
        np.asarray(query)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taking_over_holds_the_weights_once(tmp_path: Path, dtype: Any) -> None:
    config = ModelConfig(vocab_size=99, width=256, layers=8, heads=4, mlp_width=512, context=64, dtype=dtype)
    decoder = Decoder(config, RoutingConfig(every=0))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(decoder, 0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    on_disk = stored(tmp_path, params)
    slice_bytes = 256 * 512 * 4
    live = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()  # NumPy tells it what it allocates
    try:
        own = own_params(decoder, on_disk)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    assert sum(array.nbytes for array in jax.live_arrays()) - live == weights > 8 * slice_bytes
    assert peak <= weights + 2 * slice_bytes
    if dtype == "float32":  # XLA has taken over what NumPy had read into
        assert weights <= now <= weights + slice_bytes
    expected = own_params(decoder, params)
    for leaf, other in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_nothing_is_compiled_after_warm_up_and_nothing_read_before(
    tmp_path: Path, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    decoder = Decoder(MODEL, ROUTING)
    generator = make_generator(decoder, stored(tmp_path, params))
    prompts = make_prompts((5,))
    programs = ("jit(prefill_group)", "jit(_advance)")

    def compiled() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [name for name in programs for line in lines if line.startswith(f"Finished XLA compilation of {name}")]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        generator.warm_up(prompts, GREEDY)
        assert compiled() == list(programs)
        assert "params" not in vars(generator), "the weights have been read while programs were compiled"
        (found,) = generator.generate(prompts, GREEDY)
        assert compiled() == []
        for other in make_prompts((1, 30, 64)):
            generator.generate([other], GREEDY)
        assert compiled() == [], "prompts of up to 64 tokens"
        generator.generate(make_prompts((100,)), GREEDY)
        assert compiled() == [programs[0]], "a longer prompt compiles the blocks of one group"
    (expected,) = make_generator(decoder, params).generate(prompts, GREEDY)
    assert found.tokens == expected.tokens and found.log_probs == expected.log_probs


def test_sampling_imports_neither_data_nor_orbax() -> None:
    program = (
        "import sys, mod_star.commands.sample, mod_star.commands.sample_branches, mod_star.decoding.cot, "
        "mod_star.runs.directory; from mod_star.commands.sample import *; options = SampleOptions(Path('run')); "
        "with_chosen_rule(None, options), chosen_think(None, options); "
        "print(*{'grain', 'orbax', 'tensorstore', 'mod_star.data'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert shown == "\n"
