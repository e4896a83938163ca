"""Eight devices do what one does, each with a part of the memory; and meshes that can't be are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eight_devices
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from on_eight import run_on_eight
from some_nightly import some_nightly

from mod_star.config import MeshConfig, RunConfig
from mod_star.distributed.sharding import make_mesh, require_fits, rows_of_process, spec_of
from mod_star.errors import InputError
from mod_star.presets import tiny

# Data and fsdp move whole rows and whole parameters, whatever blocks do with them: a dense model shows it. Tensor
# parallelism, which also cuts up the vocabulary, and all axes at once are for a model with a full and a routed block.
# All axes at once show that scored thoughts, accumulation and experts stay what they are.
QUICK, NIGHTLY = (
    [(kind, mesh) for kind, meshes in trained.items() for mesh in meshes]
    for trained in (eight_devices.QUICK, eight_devices.NIGHTLY)
)
CASES = [*QUICK, *NIGHTLY]
IN_MEMORY = [case for case in CASES if case[0] in ("dense", "routed", "quiet_star")]
# Bounds of the shares of arguments and of temporaries. Arguments are parameters, their two moments, and the batch;
# vectors stay whole, and at width 16 they count. Temporaries are activations and gradients.
SHARES = {"data": (1.0, 0.25), "fsdp": (0.16, 0.25), "tensor": (0.3, 0.4), "mixed": (0.31, 0.25)}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with what `eight_devices.py` found."""
    out = tmp_path_factory.mktemp("eight")
    run_on_eight("eight_devices.py", out, "quick")
    return out


@pytest.fixture(scope="module")
def eight_nightly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what takes longest: thoughts, accumulation, experts, and sampling."""
    out = tmp_path_factory.mktemp("eight-nightly")
    run_on_eight("eight_devices.py", out, "nightly")
    return out


@pytest.fixture
def folder(kind: str, mesh: str, request: pytest.FixtureRequest) -> Path:
    """Of the two, the directory that has this case."""
    found: Path = request.getfixturevalue("eight_nightly" if (kind, mesh) in NIGHTLY else "eight")
    return found


def load(eight: Path, kind: str, mesh: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(eight / f"{kind}-{mesh}.npz") as arrays:
        return dict(arrays), json.loads((eight / f"{kind}-{mesh}.json").read_text())


@pytest.mark.slow
def test_the_kernels_of_tpus_equal_one_device(eight: Path) -> None:
    """On rows that lie on data and fsdp, and heads on tensor."""
    with np.load(eight / "attention-one.npz") as one, np.load(eight / "attention-mixed.npz") as many:
        assert len(one.files) == 5  # result, log-sum-exp, gradients of queries, keys and values
        for name in one.files:
            np.testing.assert_allclose(many[name], one[name], atol=1e-5 * max(1.0, np.abs(one[name]).max()))


@pytest.mark.parametrize("program", ["decode", "auto"])
@pytest.mark.nightly
def test_a_decode_step_sends_no_cache(eight_nightly: Path, program: str) -> None:
    """Keys and values have four dimensions, with the heads; nothing else of a step has. Of rows that think, too."""
    text = (eight_nightly / f"{program}-mixed.txt").read_text()
    sent = re.findall(r"= (\(?[^=]*?\)?) (?:all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert sent and "while(" in text, "rows are pooled, and something is sent"
    sizes = [tuple(map(int, dims.split(","))) for kinds in sent for dims in re.findall(r"\[([\d,]+)\]", kinds)]
    assert all(len(size) < 4 for size in sizes), sizes


@pytest.mark.parametrize(("kind", "mesh"), some_nightly(CASES, *NIGHTLY))
@pytest.mark.slow
def test_losses_and_gradients_equal_one_device(folder: Path, kind: str, mesh: str) -> None:
    (one, _), (many, _) = load(folder, kind, "one"), load(folder, kind, mesh)
    assert one.keys() == many.keys()
    for name, expected in one.items():
        # Two thoughts that say the same have the same reward, but for rounding: which is "positive" is left to chance.
        if name != "metrics/reward_positive":
            np.testing.assert_allclose(many[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    largest = [np.abs(values).max() for name, values in one.items() if name.startswith("gradients/")]
    assert min(largest) > 1e-7 and max(largest) > 1e-3, "every parameter has a gradient to compare"


@pytest.mark.nightly
def test_parameters_are_put_together_once_for_all_tokens_of_thoughts(eight_nightly: Path) -> None:
    """Where `thinking.gather` says so; a thought has six tokens. The text and the scoring of thoughts put them
    together too."""
    by_step, by_token = load(eight_nightly, "gathered", "fsdp")[1]["put_together"]
    assert 0 < by_step < 0.8 * by_token


@pytest.mark.slow
def test_routing_selects_the_same_tokens(eight: Path) -> None:
    """Another token would also show in the gradients, on each mesh."""
    (_, one), (_, many) = load(eight, "routed", "one"), load(eight, "routed", "mixed")
    assert many["selected"] == one["selected"]
    assert 0 < np.mean(one["selected"]) < 0.3


@pytest.mark.nightly
def test_sampling_equals_one_device(eight_nightly: Path) -> None:
    one, many = (json.loads((eight_nightly / f"sample-{mesh}.json").read_text()) for mesh in ("one", "mixed"))
    for way in ("plain", "thinking", "auto"):
        for expected, found in zip(one[way], many[way], strict=True):
            assert found["tokens"] == expected["tokens"] and found["overflow"] == expected["overflow"]
            np.testing.assert_allclose(found["log_probs"], expected["log_probs"], rtol=1e-5, atol=1e-5)
    assert one["plain"] != one["thinking"] != one["auto"] != one["plain"]


@pytest.mark.parametrize(("kind", "mesh"), some_nightly(IN_MEMORY, *(case for case in IN_MEMORY if case in NIGHTLY)))
@pytest.mark.slow
def test_memory_falls_with_the_mesh(folder: Path, kind: str, mesh: str) -> None:
    one, many = (load(folder, kind, name)[1] for name in ("one", mesh))
    arguments, temporaries = (many[name] / one[name] for name in ("argument_bytes", "temp_bytes"))
    assert arguments < SHARES[mesh][0] and temporaries < SHARES[mesh][1]
    assert mesh != "data" or arguments > 0.9, "copies, on purpose"


@pytest.mark.slow
def test_a_tensor_parallel_forward_pass_puts_no_parameter_together(eight: Path) -> None:
    """Of a full and of a routed block."""
    program = load(eight, "routed", "tensor")[1]["eval_program"]
    moved = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for _, shape in moved if shape]
    smallest = 16 * 16  # query, key, value and output of a block: D x H·E
    assert all(size < smallest / 8 for size in sizes), moved
    assert "all-reduce" in program, "it is cut up at all"


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embedding", (64, 16), P("tensor", "fsdp")),
        ("params/head", (64, 16), P("tensor", "fsdp")),
        ("opt_state/1/mu/groups/full_0/block/query", (3, 16, 8, 2), P(None, "fsdp", "tensor", None)),
        ("groups/routed/block/key", (3, 16, 4, 2), P(None, "fsdp", "tensor", None)),
        ("groups/routed/block/output", (3, 8, 2, 16), P(None, "tensor", None, "fsdp")),
        ("groups/2/routed/block/output", (8, 2, 16), P("tensor", None, "fsdp")),
        ("groups/routed/block/value_bias", (3, 4, 2), P(None, "tensor", None)),
        ("groups/routed/block/feed_forward/down", (3, 32, 16), P(None, "tensor", "fsdp")),
        ("groups/routed/block/attention_norm", (3, 16), P()),
        ("groups/routed/router/weight", (3, 16), P()),
        ("groups/routed/predictor/hidden", (3, 16, 8), P(None, "fsdp", None)),
        ("thinking/mixing/first", (32, 16), P("fsdp", None)),
        ("lora/groups/routed/block/key/a", (3, 16, 2), P(None, "fsdp", None)),
        ("opt_state/1/mu/lora/groups/full_0/block/feed_forward/up/b", (3, 2, 32), P(None, None, "tensor")),
        ("lora/groups/full_0/block/output/a", (3, 16, 2), P(None, "tensor", None)),
        ("lora/groups/full_0/block/feed_forward/down/b", (3, 2, 16), P(None, None, "fsdp")),
        ("opt_state/4/count", (), P()),
        # A user's own: along the largest dimension that divides.
        ("groups/full_0/block/feed_forward/experts", (3, 5, 16, 40), P(None, None, None, "fsdp")),
        ("groups/full_0/block/feed_forward/experts", (3, 5, 16, 42), P(None, None, "fsdp", None)),
        ("groups/full_0/block/feed_forward/experts/up", (3, 4, 16, 40), P(None, "tensor", "fsdp", None)),
        ("groups/full_0/block/feed_forward/experts/down", (3, 4, 40, 16), P(None, "tensor", None, "fsdp")),
        ("groups/full_0/block/feed_forward/odd", (3, 5, 7), P(None, None, None)),
        # A name that a rule speaks of with other dimensions is the user's own too.
        ("groups/full_0/block/feed_forward/down", (3, 4, 8, 5), P(None, None, "fsdp", None)),
    ],
)
def test_rules(path: str, shape: tuple[int, ...], spec: P) -> None:
    assert spec_of(path, shape, fsdp=4) == spec


def test_a_mesh_that_does_not_fit_the_devices() -> None:
    with pytest.raises(InputError, match=r"data 2 x fsdp 1 x tensor 1: must multiply to the number of devices, 1"):
        make_mesh(MeshConfig(data=2), jax.devices()[:1])
    with pytest.raises(InputError, match=r"data \? x fsdp 2 x tensor 3: must multiply to the number of devices, 1"):
        make_mesh(MeshConfig(fsdp=2, tensor=3), jax.devices()[:1])
    with pytest.raises(InputError, match=r"mesh\.tensor = 0: must be at least 1"):
        MeshConfig(tensor=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert rows_of_process(mesh, 6) == range(6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 2, 1), r"train\.batch_size = 4: must be a multiple of mesh\.data x mesh\.fsdp = 3 x 2 = 6"),
        ((4, 1, 1), r"train\.batch_size = 4 / train\.accumulation = 2: must be a multiple of .* = 4 x 1 = 4"),
        ((1, 1, 3), r"mesh\.tensor = 3: must divide model\.vocab_size = 320"),
        ((1, 1, 4), r"mesh\.tensor = 4: must divide model\.heads = 2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_run(sizes: tuple[int, int, int], message: str) -> None:
    run: RunConfig = tiny()
    accumulation = 2 if sizes[0] == 4 else 1
    run = replace(
        run, model=replace(run.model, vocab_size=320), train=replace(run.train, accumulation=accumulation)
    )  # fmt: skip
    mesh: Any = SimpleNamespace(shape=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    with pytest.raises(InputError, match=message):
        require_fits(run, mesh)


def test_a_mesh_that_does_not_divide_the_experts() -> None:
    run = tiny()
    run = replace(run, model=replace(run.model, vocab_size=320, experts=3, mlp_width=33))
    mesh: Any = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 2})
    with pytest.raises(InputError, match=r"^mesh\.tensor = 2: must divide model\.experts = 3$"):
        require_fits(run, mesh)
