"""The benchmark of lengths: what its ratios are ratios of. What it measures needs a quiet machine."""

from dataclasses import replace

import pytest

from experiments.benchmarks import lengths
from mod_star.config import ModelConfig, RoutingConfig


@pytest.mark.nightly
def test_every_length_is_divided_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelConfig(vocab_size=64, width=16, heads=2, layers=1, mlp_width=32)
    monkeypatch.setattr(lengths, "model", lambda S: replace(tiny, context=S))
    monkeypatch.setattr(lengths, "ARMS", {"dense": RoutingConfig(every=0)})
    figures = lengths.measure(64, (16, 64), rounds=1)
    for kind in ("bytes", "flops", "seconds"):
        assert figures[f"dense_{kind}_s64"] > 0
        expected = figures[f"dense_{kind}_s64"] / figures[f"dense_{kind}_s16"]
        assert figures[f"dense_{kind}_ratio_s64"] == expected
    assert figures["dense_flops_ratio_s64"] > 1  # equal tokens, longer attention
    ratio = figures["dense_seconds_ratio_s64"] / figures["dense_flops_ratio_s64"]
    assert figures["dense_seconds_over_flops_s64"] == ratio
