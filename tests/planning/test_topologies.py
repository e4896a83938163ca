"""Names of machines: what they mean, and what is said of those that there aren't."""

from __future__ import annotations

import importlib.util
import sys

import jax
import pytest

from mod_star.errors import InputError
from mod_star.planning.chips import GPUS, TPUS
from mod_star.planning.topologies import Topology, devices_of, parse_topology


@pytest.mark.parametrize(
    ("name", "kind", "shape", "count"),
    [
        ("v5e:16x16", "tpu", (16, 16), 256),
        ("v6e:1x1", "tpu", (1, 1), 1),
        ("v4:2x2x1", "tpu", (2, 2, 1), 4),
        ("v5p:8x8x12", "tpu", (8, 8, 12), 768),
        ("h100:8", "gpu", (8,), 8),
        ("a100:32", "gpu", (32,), 32),
        ("cpu:3", "cpu", (3,), 3),
    ],
)
def test_names(name: str, kind: str, shape: tuple[int, ...], count: int) -> None:
    topology = parse_topology(name)
    assert (topology.kind, topology.shape, topology.count) == (kind, shape, count)
    assert (topology.chip is None) == (kind == "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", "must be one of v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5e:256", "must be one of v5e:1x1"),
        ("v5e", "must be one of v5e:1x1"),
        ("v5p:16x16", "or v5p:AxBxC with A <= B <= C, multiples of 4, at most 6144 chips"),
        ("v5p:8x4x4", "multiples of 4"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v4:16x16x20", "at most 4096 chips"),
        ("h100:0", "the number after h100: must be 1, 2, 4 or a multiple of 8"),
        ("h100:12", "must be 1, 2, 4 or a multiple of 8"),
        ("h100:8x8", "must be 1, 2, 4 or a multiple of 8"),
        ("cpu:", "must be from 1 to 4096"),
        ("cpu:5000", "must be from 1 to 4096"),
        ("v9:4x4", "must be a chip and a size, such as v4:4x4x4, v5e:4x4"),
        ("", "must be a chip and a size"),
    ],
)
def test_other_names_are_refused_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_topology(name)
    assert str(caught.value).startswith(f"--topology = {name!r}: ")
    assert message in str(caught.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs libtpu.* pip install 'jax\[tpu\]'.*--topology cpu:256") as caught:
        devices_of(parse_topology("v5e:16x16"))
    assert "\n" not in str(caught.value)


def test_a_process_that_jax_has_begun_in_keeps_its_devices() -> None:
    jax.devices()
    with pytest.raises(InputError, match=r"--topology = 'cpu:4000': JAX has begun with \d+ CPU devices"):
        devices_of(Topology("cpu:4000", "cpu", (4000,), None))


def test_figures_are_of_the_right_order() -> None:
    """Bytes and FLOP/s, not GiB and TFLOP/s: the ratios of real chips are alike."""
    for chip in (*TPUS.values(), *GPUS.values()):
        assert 0.95 * chip.hbm <= chip.usable <= chip.hbm
        assert 100 < chip.flops / chip.hbm_bandwidth < 700  # FLOP per byte
        assert 2 < chip.hbm_bandwidth / chip.interconnect < 11


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (jax[tpu])")
@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:2x4", "v6e:2x2", "v4:2x2x1", "v5p:2x2x2"])
def test_libtpu_knows_the_slices(name: str) -> None:
    """In a process of its own: libtpu reads the environment once."""
    import subprocess

    script = (
        "from mod_star.planning.topologies import devices_of, parse_topology, prepare_environment\n"
        f"prepare_environment(); print(len(devices_of(parse_topology({name!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == parse_topology(name).count
