"""Runs that start from another run's parameters: what they start with, what they refuse, and what they outlive."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from untrained_runs import write_run

from mod_star import presets
from mod_star.config import RunConfig
from mod_star.data import train_batches
from mod_star.errors import InputError
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.runs import directory as run_dir
from mod_star.runs.base_run import load_base
from mod_star.runs.checkpoints import CheckpointWriter, restore_state, saved_steps
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.runs.resuming import resumed_config
from mod_star.tokenization import load_tokenizer, train_bpe
from mod_star.training.interrupt import Interrupted
from mod_star.training.loop import TrainingLoop
from mod_star.training.state import init_state
from mod_star.training.train import TrainSummary, train

STEPS = 4
PARTS = "from mod_star.parts import Parts\nmine = Parts()\n"


def with_fields(run: RunConfig, group: str, **fields: Any) -> RunConfig:
    return replace(run, **{group: replace(getattr(run, group), **fields)})


def fine(base: Path, **fields: Any) -> RunConfig:
    """A run from `base` with its configuration, except for the length and these fields of train."""
    few = {"steps": STEPS, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    return with_fields(replace(run_dir.read_config(base), init_from=str(base)), "train", **few | fields)


def make_base(path: Path, run: RunConfig | None = None, tokenizer: str = "bytes", **extra: Any) -> Path:
    """A run of one dense block with random parameters, and `extra` beside them, as checkpoint 7; nothing is trained."""
    run = run or with_fields(presets.dense(presets.tiny()), "model", width=8, heads=1, layers=1, context=16)
    run = with_fields(with_fields(run, "data", tokenizer=tokenizer), "model", vocab_size=320)
    params = jax.jit(lambda: init_params(Decoder(run.model, run.routing), 5))() | extra
    return write_run(path, run, load_tokenizer(tokenizer), params, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


def load_state(path: Path, step: int) -> Any:
    """A checkpoint's state, and the batch that comes next."""
    loaded = run_dir.load_run(path, step)
    run, directory = loaded.config, path / "checkpoints"
    like = jax.eval_shape(lambda: init_state(loaded.decoder, run, STEPS))
    batches = iter(train_batches(run.data, loaded.tokenizer, run.model.context, run.train.batch_size))
    state = restore_state(directory, step, like, batches)[0]
    return replace(state, key=jax.random.key_data(state.key)), next(batches)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(path)]


@pytest.mark.slow
def test_it_starts_as_what_the_other_was_at_its_end(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    # Too low a rate to move anything; other fields that may differ do. Its own seed doesn't matter to parameters.
    run = fine(trained_run, steps=1, seed=3, batch_size=4)
    run = with_fields(run, "optimizer", learning_rate=1e-30, b1=0.5)
    run = with_fields(run, "model", vocab_size=0, scan=False, mlp_width=24)
    train(run, path)
    assert f"{path} starts from {trained_run} (step 12): " in capsys.readouterr().out
    assert saved_steps(path / "checkpoints") == [0, 1]
    there, here, after = (run_dir.load_run(*at) for at in ((trained_run, 12), (path, 0), (path, 1)))
    chex.assert_trees_all_equal(here.params, there.params)
    chex.assert_trees_all_close(after.params, there.params, rtol=0, atol=1e-29)
    assert here.config.model.vocab_size == there.config.model.vocab_size
    assert {leaf.dtype for leaf in jax.tree.leaves(here.params)} == {jnp.dtype("float32")}
    evaluations = [[r["eval_loss"] for r in read_metrics(at) if "eval_loss" in r] for at in (trained_run, path)]
    assert evaluations[1] == [pytest.approx(evaluations[0][-1], rel=1e-5)]

    # All else is new.
    state, _ = load_state(path, 0)
    expected: Any = jax.jit(lambda: init_state(here.decoder, run, STEPS))()
    chex.assert_trees_all_equal(state.opt_state, expected.opt_state)
    chex.assert_trees_all_equal(state.key, jax.random.key_data(expected.key))
    assert (state.step, state.skipped, state.streak) == (0, 0, 0)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    path = tmp_path_factory.mktemp("runs") / "straight"
    return path, train(fine(base), path, quiet=True)


def stopping(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Sends SIGTERM before calls of a method whose arguments `when` picks."""
    method = getattr(owner, name)

    def stops(self: Any, *args: Any) -> Any:
        if when(*args):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, *args)

    monkeypatch.setattr(owner, name, stops)


@pytest.mark.nightly
def test_interrupted_and_resumed_without_the_other_run(
    base: Path,
    uninterrupted: tuple[Path, TrainSummary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone, path = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    run = fine(gone)
    with monkeypatch.context() as patched:
        stopping(patched, TrainingLoop, "_compile", lambda *_: True)
        with pytest.raises(Interrupted, match="stopped before the first step"):
            train(run, path, quiet=True)
    assert saved_steps(path / "checkpoints") == [0]
    assert read_metrics(path) == []
    shutil.rmtree(gone)
    assert run_dir.load_run(path).step == 0

    with monkeypatch.context() as patched:
        stopping(patched, MetricsWriter, "write", lambda step, values: step == 2 and "loss" in values)
        with pytest.raises(Interrupted, match=f"stopped after step 2 of {STEPS}"):
            train(run, path)
    assert f"{path} goes on from step 0: " in capsys.readouterr().out
    # The path may be written in another way.
    for resume_from, begins in ((None, 2), (0, 0)):
        summary = train(replace(run, init_from=f"{gone}/"), path, resume_from=resume_from)
        assert f"{path} goes on from step {begins}: " in capsys.readouterr().out
        assert saved_steps(path / "checkpoints") == [0, 2, 4]
        straight_path, straight = uninterrupted
        assert summary.evaluation == straight.evaluation
        assert timeless(path) == timeless(straight_path)
        chex.assert_trees_all_equal(load_state(path, STEPS), load_state(straight_path, STEPS))
    with pytest.raises(InputError, match=f"init_from: {gone} → None$"):
        train(replace(run, init_from=None), path)


@pytest.mark.nightly
def test_killed_before_its_first_checkpoint(
    base: Path, uninterrupted: tuple[Path, TrainSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, path = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    run = fine(moving)

    def killed(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "save", killed)
        with pytest.raises(MemoryError):
            train(run, path, quiet=True)
    assert run_dir.read_config(path) == run
    assert saved_steps(path / "checkpoints") == []
    shutil.rmtree(moving)
    with pytest.raises(InputError, match=r"base: is not a run \(there is no such directory\)"):
        train(run, path, quiet=True)
    make_base(moving, with_fields(run_dir.read_config(base), "model", norm_eps=0.5))
    with pytest.raises(InputError, match=r"^model.norm_eps = 1e-06: must be 0.5, as in init_from = "):
        train(run, path, quiet=True)
    shutil.rmtree(moving)
    shutil.copytree(base, moving)
    assert train(run, path, quiet=True).evaluation == uninterrupted[1].evaluation
    chex.assert_trees_all_equal(load_state(path, STEPS), load_state(uninterrupted[0], STEPS))


@pytest.mark.slow
def test_what_is_not_a_run_to_start_from(base: Path, tmp_path: Path) -> None:
    empty, damaged = tmp_path / "empty", shutil.copytree(base, tmp_path / "damaged")
    with run_dir.created(empty, run_dir.read_config(base), load_tokenizer("bytes")):
        pass
    shutil.copytree(base / "checkpoints" / "7", damaged / "checkpoints" / "9")
    sums = damaged / "checkpoints" / "9" / "SHA256SUMS"
    sums.write_text(sums.read_text()[:-9])
    for path, message in (
        (tmp_path / "none", r"none: is not a run \(there is no such directory\)"),
        (base / "checkpoints", r"checkpoints: is not a run \(it has no config.json\)"),
        (empty, "empty: has no checkpoint yet"),
        (damaged, "checkpoints/9 is damaged .*; delete it to take the one before it"),
    ):
        with pytest.raises(InputError, match=message):
            train(replace(fine(base), init_from=str(path)), tmp_path / "run")
    with pytest.raises(InputError, match=r"^init_from = 3: must be a str"):
        RunConfig(init_from=3)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("model", {"vocab_size": 384}, "model.vocab_size = 384: must be 320"),
        ("model", {"width": 32, "mlp_width": 24}, "model.width = 32: must be 16; model.head_dim = 16: must be 8"),
        ("model", {"layers": 4}, "model.layers = 4: must be 2"),
        ("model", {"heads": 4}, "model.heads = 4: must be 2; model.kv_heads = 4: must be 2; model.head_dim = 4"),
        ("model", {"kv_heads": 1}, "model.kv_heads = 1: must be 2"),
        ("model", {"head_dim": 4}, "model.head_dim = 4: must be 8"),
        ("model", {"mlp_width": None}, "model.mlp_width = 64: must be 24"),
        ("model", {"rope_theta": 5e5}, "model.rope_theta = 500000.0: must be 10000.0"),
        (
            "model",
            {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 8.0},
            "model.rope_scaling = 'llama3': must be 'none'; model.rope_factor = 2.0: must be 1.0; "
            "model.rope_low_freq_factor = 2.0: must be 1.0; model.rope_high_freq_factor = 8.0: must be 4.0",
        ),
        ("model", {"rope_original_context": 64}, "model.rope_original_context = 64: must be 8192"),
        ("model", {"sliding_window": 5}, "model.sliding_window = 5: must be None"),
        ("model", {"norm_eps": 1e-5}, "model.norm_eps = 1e-05: must be 1e-06"),
        ("model", {"qkv_bias": True}, "model.qkv_bias = True: must be False"),
        ("model", {"qk_norm": True}, "model.qk_norm = True: must be False"),
        ("model", {"experts": 3}, "model.experts = 3: must be 0"),
        ("model", {"tie_embeddings": False}, "model.tie_embeddings = False: must be True"),
        ("routing", {"every": 1}, "routing.every = 1: must be 2"),
        ("routing", {"every": 0}, "routing.every = 0: must be 2"),
        ("routing", {"gate": "tanh"}, "routing.gate = 'tanh': must be 'sigmoid'"),
        ("routing", {"causal_rule": "predictor"}, "routing.causal_rule = 'predictor': must be 'router'"),
        ("routing", {"selection": "stochastic"}, "routing.selection = 'stochastic': must be 'learned'"),
        ("routing", {"predictor_width": 8}, "routing.predictor_width = 8: must be 16"),
    ],
)
def test_a_field_that_the_parameters_depend_on(
    trained_run: Path, tmp_path: Path, group: str, fields: dict[str, Any], message: str
) -> None:
    run = with_fields(fine(trained_run), group, **fields)
    with pytest.raises(InputError) as refused:
        train(run, tmp_path / "run")
    said = str(refused.value)
    assert said.startswith(message) and said.endswith(f", as in init_from = {str(trained_run)!r}"), said
    assert said.count("must be") == message.count("=") and "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_other_fields_may_differ(trained_run: Path, base: Path) -> None:
    run = fine(trained_run)
    run = with_fields(run, "model", context=40, dtype="bfloat16", attention="plain", remat="full", scan=False)
    run = with_fields(run, "routing", capacity=0.5, capacity_tokens=3, headroom=2.0, auxiliary_weight=1.0)
    run = with_fields(run, "data", source=("none.txt",), seed=3)
    run = with_fields(run, "optimizer", schedule="wsd")
    found = load_base(with_fields(run, "model", kv_heads=2, head_dim=8, vocab_size=0))
    assert found is not None and found.step == 12
    # What only routed blocks have doesn't matter where there are none.
    assert load_base(with_fields(fine(base), "routing", gate="tanh", selection="stochastic", predictor_width=3))


@pytest.mark.slow
def test_parts_must_have_the_same_content(base: Path, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.py", tmp_path / "other.py"
    mine.write_text(PARTS)
    other.write_text(PARTS + "# other\n")
    with_parts = make_base(tmp_path / "parts", replace(run_dir.read_config(base), parts=f"{mine}:mine"))
    mine.unlink()
    own = f"{with_parts}/parts.py:mine"
    run = fine(with_parts)
    assert run.parts == own
    for start, parts, needed in ((with_parts, None, own), (with_parts, f"{other}:mine", own), (base, own, None)):
        with pytest.raises(InputError) as refused:
            load_base(replace(fine(start), parts=parts))
        assert str(refused.value).startswith(
            f"parts = {parts!r}: must be {needed!r}, or a file of the same content, as"
        )

    path = tmp_path / "run"
    kept = run_dir.load_run(with_parts).config
    with run_dir.created(path, run, load_tokenizer("bytes"), kept):
        pass
    # Whatever becomes of them there, this run has its own.
    (with_parts / "parts.py").write_text(PARTS + "# changed\n")
    assert resumed_config(path, run).parts == f"{path}/parts.py:mine"
    assert run_dir.read_base_config(path) == replace(kept, parts=f"{path}/parts.py:mine")
    with pytest.raises(InputError, match=r"parts: .*parts.py:mine → .*other.py:mine"):
        resumed_config(path, replace(run, parts=f"{other}:mine"))


@pytest.mark.slow
def test_the_tokenizer_is_the_other_runs(base: Path, tmp_path: Path) -> None:
    spec, copy, other = (str(tmp_path / name) for name in ("first.json", "copy.json", "other.json"))
    fingerprint = train_bpe(["one two three"], 270, spec).fingerprint
    shutil.copy(spec, copy)
    train_bpe(["four five six seven"], 270, other)
    start = make_base(tmp_path / "bpe", tokenizer=spec)
    run = fine(start)

    def found(tokenizer: str) -> Any:
        loaded = load_base(with_fields(run, "data", tokenizer=tokenizer))
        assert loaded is not None
        return loaded.tokenizer.fingerprint

    shutil.copy(other, spec)  # what the file is now doesn't matter
    assert found(spec) == found(copy) == fingerprint
    Path(spec).unlink()
    assert found(spec) == fingerprint
    for bad in (other, "bytes"):
        with pytest.raises(InputError) as refused:
            found(bad)
        assert str(refused.value) == (
            f"data.tokenizer = {bad!r}: must be that of init_from = {str(start)!r} (a copy is in {start}/tokenizer)"
        )
    with pytest.raises(InputError, match=r"other.json': must be that of init_from = .* \('bytes'\)$"):
        load_base(with_fields(fine(base), "data", tokenizer=other))
    with pytest.raises(InputError, match="no such file"):
        found("none.json")

    path = tmp_path / "run"
    loaded = load_base(run)
    assert loaded is not None
    with run_dir.created(path, run, loaded.tokenizer, loaded.config):
        pass
    shutil.copy(other, spec)
    assert resumed_config(path, run) == run
    # A run that has been made has a tokenizer already: the base must still be one with the same.
    with pytest.raises(InputError, match=r"must be that of init_from"):
        load_base(run, load_tokenizer(other))
