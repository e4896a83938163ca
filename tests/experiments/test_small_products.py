"""The benchmark of small products: what it computes. What it measures needs a quiet machine."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import small_products


def test_the_loop_multiplies_each_input_in_turn() -> None:
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (3, 5, 6))
    first, second = (np.asarray(each, np.float64) @ np.asarray(y, np.float64) for each in x)
    expected = (2 * first + second)[..., :1, :1]
    np.testing.assert_allclose(small_products.repeated(x, y, 3)(), expected, rtol=1e-5, atol=1e-5)


def test_every_block_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_products, "BLOCKS", ((1, 8, 8), (2, 8, 8)))
    monkeypatch.setattr(small_products, "ROWS", 16)
    found = small_products.measure(rounds=1, operations=1e5)
    assert list(found) == ["1 x (8 x 64) (64 x 8)", "2 x (8 x 64) (64 x 8)", "(16 x 512) (512 x 1408)"]
    assert all(speed.gflops > 0 for speed in found.values())
