"""Checkpoints through Orbax, with a state small enough to look at and no model."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mod_star.errors import InputError
from mod_star.runs import checkpoints, integrity
from mod_star.runs.checkpoints import CheckpointWriter
from mod_star.training.state import TrainState


def make_state(step: int = 0) -> TrainState:
    params = {"groups": {"w": jnp.arange(12.0).reshape(3, 4) / 7}, "head": jnp.ones(3)}
    done, skipped, streak = (jnp.asarray(n, jnp.int32) for n in (step, 1, 0))
    return TrainState(done, params, optax.adamw(0.1).init(params), jax.random.key(5), skipped, streak)


def make_batches() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset().batch(4))


@jax.jit
def advance(state: TrainState) -> TrainState:
    params = jax.tree.map(lambda p: p * 1.01 + 0.1, state.params)
    return replace(state, step=state.step + 1, params=params, key=jax.random.fold_in(state.key, 1))


def equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(bits(x), bits(y))), a, b)
    return all(jax.tree.leaves(same))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState, list[int]]:
    """Checkpoints 1 to 4 with 3 kept; the last state, and the batch that comes after it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    donating = jax.jit(advance, donate_argnums=0)
    state, batches = make_state(), make_batches()
    writer = CheckpointWriter(directory, keep=3)
    for step in range(1, 5):
        next(batches)
        state = donating(state)
        # The next step overwrites the state's memory while this is still being written.
        writer.save(state, batches, {"seconds": step / 2})
    writer.close()
    return directory, state, next(batches).tolist()


def test_restores_everything_bit_for_bit(saved: tuple[Path, TrainState, list[int]]) -> None:
    directory, state, following = saved
    assert checkpoints.saved_steps(directory) == [2, 3, 4]
    assert checkpoints.choose_checkpoint(directory, None, "--step") == 4
    batches = make_batches()
    like = jax.eval_shape(make_state)
    found, progress = checkpoints.restore_state(directory, 4, like, batches)
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(state))
    assert equal(found, state)
    assert next(batches).tolist() == following
    assert progress == {"seconds": 2.0}
    assert equal(checkpoints.restore_params(directory, 4, like.params), state.params)
    # The background write of an older step didn't pick up what a later step put in the same buffers.
    expected = advance(advance(make_state()))
    assert equal(checkpoints.restore_state(directory, 2, like, batches)[0], expected)


def test_batches_go_on_in_the_same_data_and_begin_at_the_beginning_of_other_data(tmp_path: Path) -> None:
    batches = make_batches()
    first = next(batches).tolist()
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(make_state(1), batches, {"data": "these"})
    writer.close()
    second = next(batches).tolist()
    for data, expected in ((None, second), ("these", second), ("others", first)):
        restored = make_batches()
        checkpoints.restore_state(tmp_path, 1, jax.eval_shape(make_state), restored, data=data)
        assert next(restored).tolist() == expected


def test_checksums_are_sha256sum_s(saved: tuple[Path, TrainState, list[int]]) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=saved[0] / "4", check=True)


@pytest.mark.parametrize(
    "damage",
    [lambda b: bytes([b[0] ^ 16]) + b[1:] if b else b"x", lambda b: b[:-1] if b else b"x", lambda b: None],
    ids=["flipped bit", "truncated", "missing"],
)
def test_every_damaged_file_is_noticed(
    saved: tuple[Path, TrainState, list[int]], damage: Callable[[bytes], bytes | None]
) -> None:
    directory = saved[0]
    files = [path for path in (directory / "4").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        if path.parent == directory / "4" and path.name in integrity.ORBAX_FILES and damage(b"x") is not None:
            continue  # time stamps and an empty marker: nothing that the state depends on
        good = path.read_bytes()
        bad = damage(good)
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        elif path.name == integrity.SUMS_FILE:  # as in a copy of a bucket's
            assert checkpoints.choose_checkpoint(directory, None, "--resume-from") == 4
            path.write_bytes(good)
            continue
        try:
            with pytest.raises(InputError, match=r"4 is damaged \(.*--resume-from 3 takes the one before it"):
                checkpoints.choose_checkpoint(directory, None, "--resume-from")
        finally:
            path.write_bytes(good)
    assert checkpoints.choose_checkpoint(directory, None, "--resume-from") == 4


def test_checksums_that_were_cut_off_are_told(tmp_path: Path) -> None:
    checkpoints.save_params(tmp_path, {"w": np.ones(3, np.float32)})
    (tmp_path / "0" / "training").write_text("")
    integrity.write_sums(tmp_path / "0")
    sums = tmp_path / "0" / integrity.SUMS_FILE
    whole = sums.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        sums.write_bytes(whole[:length])
        assert list(integrity.damages(tmp_path / "0")) == ["SHA256SUMS is cut off"]
    sums.write_bytes(whole)
    assert integrity.find_damage(tmp_path / "0") is None


def test_a_file_that_was_added_is_told(tmp_path: Path) -> None:
    checkpoints.save_params(tmp_path, {"w": np.ones(3, np.float32)})
    (tmp_path / "0" / "params" / "more").write_text("")
    assert list(integrity.damages(tmp_path / "0")) == ["params/more is not in SHA256SUMS"]


def test_a_checkpoint_of_another_step_is_not_what_was_saved(
    saved: tuple[Path, TrainState, list[int]], tmp_path: Path
) -> None:
    directory, state, _ = saved
    parts = checkpoints._to_saved(state)
    small = {"params": checkpoints._smallest(parts["params"]), "training": {"step": parts["training"]["step"]}}
    checkpoints._require_opened(directory, 4, small)
    shutil.copytree(directory / "4", tmp_path / "5")
    with pytest.raises(InputError, match=r"/5 is that of step 4$"):
        checkpoints._require_opened(tmp_path, 5, small)


def test_older_one_only_when_asked_for(saved: tuple[Path, TrainState, list[int]]) -> None:
    directory = saved[0]
    assert checkpoints.choose_checkpoint(directory, 3, "--step") == 3
    with pytest.raises(InputError, match=r"--step = 9: .* has checkpoints \[2, 3, 4\]"):
        checkpoints.choose_checkpoint(directory, 9, "--step")
    assert checkpoints.choose_checkpoint(directory / "none", None, "--step") is None
    with pytest.raises(InputError, match="has no checkpoints"):
        checkpoints.choose_checkpoint(directory / "none", 3, "--step")


def test_another_shape_is_bad_input(saved: tuple[Path, TrainState, list[int]]) -> None:
    like = jax.eval_shape(make_state).params | {"head": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="cannot be loaded"):
        checkpoints.restore_params(saved[0], 4, like)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    state, batches = make_state(7), make_batches()
    unfinished = tmp_path / "6.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert checkpoints.saved_steps(tmp_path) == []
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(state, batches, {})
    writer.close()
    assert not unfinished.exists()
    assert checkpoints.saved_steps(tmp_path) == [7]
    checkpoints.delete_after(tmp_path, 7)
    assert checkpoints.saved_steps(tmp_path) == [7]
    checkpoints.delete_after(tmp_path, 6)
    assert checkpoints.saved_steps(tmp_path) == []


def test_a_made_checkpoint_is_there_with_its_checksums_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"w": np.ones(3, np.float32)}

    def full_disk(checkpoint: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_sums", full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_params(tmp_path, params)
    assert checkpoints.saved_steps(tmp_path) == []
    checkpoints.save_params(tmp_path, params)
    assert checkpoints.saved_steps(tmp_path) == [0] and integrity.find_damage(tmp_path / "0") is None
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_logs_stay_filtered_after_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads may log until the process ends."""
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "filters", list(logger.filters))
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])

    def full_disk() -> None:
        raise OSError(28, "full")

    writer = CheckpointWriter(tmp_path, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(writer._manager, "wait_until_finished", full_disk)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    writer.close()
    error = OSError(28, "full")
    assert not logger.filter(logging.LogRecord("x", logging.ERROR, "", 0, "", (), (OSError, error, None)))


def test_logs_are_filtered_only_while_a_writer_is_open(tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [list(logger.filters) for logger in loggers]

    def heard(number: int) -> list[bool]:
        error = OSError(number, "full")
        record = logging.LogRecord("x", logging.ERROR, "", 0, "", (), (OSError, error, None))
        return [bool(logger.filter(record)) for logger in loggers]

    assert heard(28) == [True, True]
    first, second = checkpoints.CheckpointWriter(tmp_path / "a", 1), checkpoints.CheckpointWriter(tmp_path / "b", 1)
    assert heard(28) == [False, False]
    first.close()
    assert heard(28) == [False, False]
    second.close()
    assert heard(28) == [True, True] and [logger.filters for logger in loggers] == before
