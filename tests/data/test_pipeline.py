"""The pipeline: exact contents, split, mixture, rows, restoration, limits."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from chat_tokenizers import CHATML, INST, chat_tokenizer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from some_nightly import some_nightly

from mod_star.config import DataConfig
from mod_star.data import held_out_batches, merge_states, prefetch_to_device, train_batches
from mod_star.data.pipeline import Batch
from mod_star.errors import InputError
from mod_star.tokenization import ByteTokenizer

BOS, EOS = 256, 257
DTYPES = {"tokens": "int32", "targets": "int32", "positions": "int32", "segment_ids": "int32", "weights": "float32"}
TOKENIZER = ByteTokenizer()


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def words(name: str, count: int) -> list[str]:
    """Documents of different lengths, each of which says which one it is."""
    return [f"{name}{number:03d}" + "." * (number * 7 % 23) for number in range(count)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    sources = write(tmp_path / "a.jsonl", words("a", 40)), write(tmp_path / "b.jsonl", words("b", 30))
    return DataConfig(source=sources, held_out=0.2, seed=3)


def documents_of(batches: list[Batch]) -> list[str]:
    """The documents that packed batches hold, put together again: a segment that does not start with bos continues."""
    documents: list[list[int]] = []
    columns = (np.concatenate([batch[key] for batch in batches]) for key in ("tokens", "targets", "segment_ids"))
    for tokens, targets, segments in zip(*columns, strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            if tokens[here][0] == BOS:
                documents.append([])
            documents[-1].extend(targets[here])
    return [TOKENIZER.decode(ids) for ids in documents]


def by_row(batches: list[Batch]) -> list[list[Batch]]:
    """The batches of each row alone: every row is a stream of its own."""
    rows = range(len(batches[0]["tokens"]))
    return [[{key: value[row : row + 1] for key, value in batch.items()} for batch in batches] for row in rows]


def whole_documents(batches: list[Batch]) -> list[str]:
    """The documents of all rows, without each row's last, which may be cut off."""
    return [text for row in by_row(batches) for text in documents_of(row)[:-1]]


def take(dataset: grain.IterDataset, count: int) -> list[Batch]:
    return list(itertools.islice(dataset, count))


def assert_equal(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def naive_packing(documents: list[str], context: int) -> dict[str, list[list[int]]]:
    """The full sequences that a loop over tokens packs."""
    rows: dict[str, list[list[int]]] = {key: [] for key in DTYPES}
    row: dict[str, list[int]] = {key: [] for key in DTYPES}
    for text in documents:
        ids = [BOS, *text.encode(), EOS]
        segment, position = max(row["segment_ids"], default=0) + 1, 0
        for token, target in itertools.pairwise(ids):
            for key, value in zip(DTYPES, (token, target, position, segment, 1), strict=True):
                row[key].append(value)
            position += 1
            if len(row["tokens"]) == context:
                for key in DTYPES:
                    rows[key].append(row[key])
                row, segment, position = {key: [] for key in DTYPES}, 1, 0
    return rows


def test_packed_batches_equal_a_naive_loop(config: DataConfig) -> None:
    batches = take(train_batches(config, TOKENIZER, 24, 4), 12)
    for batch in batches:
        assert {key: value.dtype.name for key, value in batch.items()} == DTYPES
        assert all(value.shape == (4, 24) for value in batch.values())
    for row in by_row(batches):
        expected = naive_packing(documents_of(row), 24)
        for key in DTYPES:
            sequences = np.concatenate([batch[key] for batch in row])
            np.testing.assert_array_equal(sequences, np.array(expected[key])[: len(sequences)])


def test_documents_begin_with_bos_only_where_the_tokenizer_wants_it(tmp_path: Path) -> None:
    class Without(ByteTokenizer):
        starts_with_bos = False

    source = write(tmp_path / "a.jsonl", ["ab", "", "c", "def"])
    config = DataConfig(source=(source,), held_out=0.5, pack=False)
    rows = [
        (row["tokens"][0, row["weights"][0] > 0].tolist(), row["targets"][0, row["weights"][0] > 0].tolist())
        for maker in (held_out_batches, train_batches)
        for row in take(maker(config, Without(), 3, 1), 2)
    ]
    # An empty document is bos alone: nothing could be predicted otherwise.
    expected = [([97, 98], [98, EOS]), ([BOS], [EOS]), ([99], [EOS]), ([100, 101, 102], [101, 102, EOS])]
    assert sorted(rows) == sorted(expected)


def test_targets_stay_inside_their_document(config: DataConfig) -> None:
    for batch in take(train_batches(config, TOKENIZER, 24, 4), 12):
        same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        np.testing.assert_array_equal(batch["targets"][:, :-1][same], batch["tokens"][:, 1:][same])
        # At a border the target is this document's end, and what follows is the start of the next.
        np.testing.assert_array_equal(batch["targets"][:, :-1][~same], EOS)
        np.testing.assert_array_equal(batch["tokens"][:, 1:][~same], BOS)
        np.testing.assert_array_equal(batch["positions"][:, 1:][~same], 0)
        assert (batch["tokens"] != EOS).all()
        assert (batch["weights"] == 1).all()


def test_every_held_out_token_counts_once(config: DataConfig) -> None:
    dataset = held_out_batches(config, TOKENIZER, 24, 4)
    batches = list(dataset)
    assert all(value.shape == (4, 24) for batch in batches for value in batch.values())
    held_out = documents_of(batches)
    assert len(held_out) == len(set(held_out)) == 8 + 6
    counted = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    assert Counter(counted.tolist()) == Counter(token for text in held_out for token in [*text.encode(), EOS])
    padding = batches[-1]["weights"] == 0
    assert padding.any()
    for key in DTYPES:
        assert (batches[-1][key][padding] == 0).all()
    assert_equal(batches, list(dataset))
    # The first batches stand for all sources.
    assert {text[0] for text in documents_of(batches[:1])} == {"a", "b"}


def test_split_is_by_document_and_by_seed(config: DataConfig) -> None:
    everything = set(words("a", 40) + words("b", 30))
    splits = []
    for seed in (3, 4):
        seeded = DataConfig(source=config.source, held_out=0.2, seed=seed)
        held_out = set(documents_of(list(held_out_batches(seeded, TOKENIZER, 24, 4))))
        trained = set(whole_documents(take(train_batches(seeded, TOKENIZER, 24, 4), 60)))
        assert not held_out & trained
        assert held_out | trained == everything
        splits.append(held_out)
    assert splits[0] != splits[1]


def test_order_is_the_seeds_and_epochs_differ(config: DataConfig) -> None:
    assert_equal(take(train_batches(config, TOKENIZER, 24, 4), 5), take(train_batches(config, TOKENIZER, 24, 4), 5))
    one_source = DataConfig(source=config.source[:1], held_out=0.2)
    documents = documents_of(take(train_batches(one_source, TOKENIZER, 24, 1), 120))
    first, second = documents[:32], documents[32:64]
    assert set(first) == set(second)
    assert len(set(first)) == 32
    assert first != second != sorted(first)


@pytest.mark.parametrize(("weights", "share"), [((), 32 / 56), ((3.0, 1.0), 0.75), ((0.1, 0.4), 0.2)])
def test_mixture_shares(config: DataConfig, weights: tuple[float, ...], share: float) -> None:
    mixed = DataConfig(source=config.source, held_out=0.2, weights=weights)
    for row in by_row(take(train_batches(mixed, TOKENIZER, 24, 2), 120)):
        documents = documents_of(row)
        assert np.mean([text.startswith("a") for text in documents]) == pytest.approx(share, abs=0.01)


def test_rows_share_an_epoch_without_overlap(tmp_path: Path) -> None:
    config = DataConfig(source=(write(tmp_path / "a.jsonl", words("a", 50)),), held_out=0.1)
    rows = by_row(take(train_batches(config, TOKENIZER, 16, 3), 40))
    assert len(set(itertools.chain(*[documents_of(row)[:15] for row in rows]))) == 45


def test_batches_do_not_depend_on_who_makes_which_rows(config: DataConfig) -> None:
    whole = iter(train_batches(config, TOKENIZER, 24, 4))
    parts = [iter(train_batches(config, TOKENIZER, 24, 4, rows)) for rows in (range(2), (2, 3))]

    def step(iterators: list[grain.DatasetIterator]) -> Batch:
        made = [next(iterator) for iterator in iterators]
        return {key: np.concatenate([batch[key] for batch in made]) for key in made[0]}

    for _ in range(7):
        assert_equal([next(whole)], [step(parts)])
    # Saved by two, gone on with by one, and by four; saved by one, gone on with by two.
    state = json.loads(json.dumps(merge_states([iterator.get_state() for iterator in parts])))
    assert state == json.loads(json.dumps(whole.get_state()))
    one = iter(train_batches(config, TOKENIZER, 24, 4))
    four = [iter(train_batches(config, TOKENIZER, 24, 4, (row,))) for row in range(4)]
    for iterator in (one, *four, *parts):
        next(iterator)
        iterator.set_state(state)
    for _ in range(5):
        expected = next(whole)
        assert_equal([expected, expected, expected], [next(one), step(four), step(parts)])


@pytest.mark.parametrize("pack", some_nightly([True, False], False))
@pytest.mark.slow
def test_restored_equals_continued_from_anywhere(config: DataConfig, pack: bool) -> None:
    # Sequences shorter and longer than documents; every state goes through JSON, as in a checkpoint.
    mixed = DataConfig(source=config.source, held_out=0.2, weights=(2.0, 1.0), pack=pack)
    for context, batch_size in ((7, 1), (24, 3), (100, 1)):
        dataset = train_batches(mixed, TOKENIZER, context, batch_size)
        iterator = iter(dataset)
        states, batches = [], []
        for _ in range(40):
            states.append(json.dumps(iterator.get_state()))
            batches.append(next(iterator))
        used = iter(dataset)
        for step in (0, 1, 2, 3, 11, 12, 13, 29, 35, 0):
            fresh = iter(train_batches(mixed, TOKENIZER, context, batch_size))
            for restored in (fresh, used):
                restored.set_state(json.loads(states[step]))
                assert json.dumps(restored.get_state()) == states[step]
                assert_equal([next(restored) for _ in range(4)], batches[step : step + 4])


def test_without_packing_one_document_per_sequence(tmp_path: Path) -> None:
    texts = ["ab", "abcdefgh", "ab", "abcdefgh"]
    config = DataConfig(source=(write(tmp_path / "a.jsonl", texts),), held_out=0.5, pack=False)
    rows = take(train_batches(config, TOKENIZER, 5, 1), 2) + list(held_out_batches(config, TOKENIZER, 5, 1))
    assert len(rows) == 4
    short, _, _, long = sorted(rows, key=lambda row: row["weights"].sum())
    expected = {"tokens": [BOS, 97, 98, 0, 0], "targets": [97, 98, EOS, 0, 0], "positions": [0, 1, 2, 0, 0]}
    for key, value in (expected | {"segment_ids": [1, 1, 1, 0, 0], "weights": [1, 1, 1, 0, 0]}).items():
        assert short[key].tolist() == [value]
        assert short[key].dtype == DTYPES[key]
    assert long["tokens"].tolist() == [[BOS, 97, 98, 99, 100]]
    assert long["targets"].tolist() == [[97, 98, 99, 100, 101]]
    assert long["segment_ids"].tolist() == [[1] * 5]


def test_context_longer_than_the_data(tmp_path: Path) -> None:
    # Nine documents to train on and one to hold out, of 6 tokens each.
    config = DataConfig(source=(write(tmp_path / "a.jsonl", ["abcd"] * 10),), held_out=0.1)
    train_batches(config, TOKENIZER, 5, 1)
    for make in (train_batches, held_out_batches):
        with pytest.raises(InputError) as error:
            make(config, TOKENIZER, 6, 1)
        assert str(error.value).startswith(
            "model.context = 6: the held-out documents have 6 tokens, at least context + 1"
        )
        with pytest.raises(InputError, match=r"model\.context = 54: the training documents have 54 tokens"):
            make(config, TOKENIZER, 54, 1)


def test_a_source_that_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A single short document.")
    with pytest.raises(InputError, match=r"a\.txt': has a single document; one to train on and one to hold out"):
        train_batches(DataConfig(source=(str(path),)), TOKENIZER, 4, 1)


def test_negative_seed() -> None:
    with pytest.raises(InputError, match=r"data\.seed = -1: must be at least 0"):
        train_batches(DataConfig(seed=-1), TOKENIZER, 4, 1)


def test_prefetch_gives_device_arrays_and_the_state_of_what_was_taken(config: DataConfig) -> None:
    plain = train_batches(config, TOKENIZER, 24, 4)
    iterator = iter(prefetch_to_device(plain, buffer=3))
    before = json.dumps(iterator.get_state())
    batches = [next(iterator) for _ in range(5)]
    assert all(isinstance(value, jax.Array) for value in batches[0].values())
    assert_equal(batches, take(plain, 5))
    state = json.dumps(iterator.get_state())
    following = [next(iterator) for _ in range(3)]
    iterator.close()
    for dataset in (prefetch_to_device(plain), plain):
        restored = iter(dataset)
        restored.set_state(json.loads(state))
        assert_equal([next(restored) for _ in range(3)], following)
        restored.set_state(json.loads(before))
        assert_equal([next(restored)], batches[:1])
        restored.close()


def test_prefetch_follows_a_sharding_and_ends(config: DataConfig) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec("data"))
    held_out = held_out_batches(config, TOKENIZER, 24, 4)
    batches = list(prefetch_to_device(held_out, sharding))
    assert batches[0]["tokens"].sharding == sharding
    assert_equal(batches, list(held_out))


@pytest.mark.nightly
def test_a_program_imports_no_framework_and_may_leave_in_the_middle() -> None:
    code = """
import sys
from mod_star.config import DataConfig
from mod_star.data import prefetch_to_device, train_batches
from mod_star.tokenization import ByteTokenizer
iterator = iter(prefetch_to_device(train_batches(DataConfig(), ByteTokenizer(), 64, 2)))
next(iterator)
print({"tensorflow", "tensorflow_datasets", "torch"} & set(sys.modules))
"""
    root, environment = Path(__file__).parents[2], os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "set()\n", "")


def test_errors_in_the_background_reach_the_caller(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for number in range(20):
        writer.write(b"\xff" if number == 13 else b"some text")
    writer.close()
    config = DataConfig(source=(str(tmp_path / "a.arrayrecord"),), seed=1)
    with pytest.raises(InputError, match=r"record 14: not valid UTF-8"):
        take(prefetch_to_device(train_batches(config, TOKENIZER, 8, 1)), 40)


def test_the_embedded_default() -> None:
    config = DataConfig()
    (batch,) = take(train_batches(config, TOKENIZER, 256, 2), 1)
    assert batch["weights"].sum() == 2 * 256
    assert sum(batch["weights"].sum() for batch in held_out_batches(config, TOKENIZER, 256, 8)) > 2_000


CHAT = (
    {"role": "user", "content": "Why is it?"}, {"role": "assistant", "content": "It is here."},
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"},
)  # fmt: skip


def write_chats(path: Path, count: int = 12) -> str:
    """Conversations of different lengths; the assistant's first answer says which one it is."""
    lines = []
    for number in range(count):
        first = CHAT[1] | {"content": f"number {number}" + "." * (number % 5)}
        lines.append(json.dumps({"messages": [CHAT[0], first, *CHAT[2 : 2 + 2 * (number % 2)]]}))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("pack", [True, False])
def test_only_the_assistants_tokens_have_weight(tmp_path: Path, pack: bool) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model", CHATML)
    config = DataConfig(source=(write_chats(tmp_path / "a.jsonl"),), held_out=0.5, pack=pack)
    batches = list(held_out_batches(config, tokenizer, 48, 2))
    assert all({key: value.dtype.name for key, value in batch.items()} == DTYPES for batch in batches)
    spell = tokenizer._tokenizer.id_to_token
    learned, seen = [
        [str(spell(int(token))) for batch in batches for token in batch["targets"][where(batch)]]
        for where in (lambda batch: batch["weights"] == 1, lambda batch: batch["segment_ids"] > 0)
    ]
    assert all(set(np.unique(batch["weights"])) <= {0.0, 1.0} for batch in batches)
    answers = [text for text in "".join(learned).replace("Ġ", " ").split("<|im_end|>") if text]
    documents = len(list(held_out_batches(replace(config, pack=False), tokenizer, 200, 1)))
    assert documents == 6
    if pack:
        assert len([text for text in answers if text.startswith("number ")]) == documents
        assert set(answers) - {text for text in answers if text.startswith("number ")} <= {"yes"}
    assert "<|im_start|>" in seen and "<|im_start|>" not in learned
    # Tokens and their order are as ever: a document's pairs in a row.
    for batch in batches:
        same = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][same], batch["tokens"][:, 1:][same])


def test_sequences_with_nothing_to_learn_are_left_out(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model", CHATML)
    path = tmp_path / "a.jsonl"
    long, short = ({"role": "user", "content": "hello " * count} for count in (60, 1))
    lines = [json.dumps({"messages": [question, CHAT[1]]}) for question in (long, short) for _ in range(10)]
    path.write_text("\n".join(lines))
    config = DataConfig(source=(str(path),), held_out=0.5)
    for pack in (True, False):
        iterator = iter(train_batches(replace(config, pack=pack), tokenizer, 64, 2))
        batches = [next(iterator) for _ in range(12)]
        assert all((batch["weights"].sum(1) > 0).all() for batch in batches)
        state = json.loads(json.dumps(iterator.get_state()))
        following = [next(iterator) for _ in range(6)]
        iterator.set_state(state)
        assert_equal(following, [next(iterator) for _ in range(6)])
    # Nothing is lost of what is to be learned.
    held_out = [batch["weights"].sum() for batch in held_out_batches(config, tokenizer, 64, 2)]
    whole = [batch["weights"].sum() for batch in held_out_batches(replace(config, pack=False), tokenizer, 400, 1)]
    assert sum(held_out) == sum(whole) > 0
    path.write_text("\n".join(lines[:10]))
    with pytest.raises(
        InputError, match=r"model\.context = 32: the training documents have no token to learn within it"
    ):
        train_batches(replace(config, pack=False), tokenizer, 32, 1)


def test_conversations_are_checked_before_the_first_batch(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = {"messages": [{"role": "system", "content": "s"}, *CHAT]}
    path.write_text(f"{json.dumps({'messages': CHAT})}\n" * 40 + json.dumps(bad))
    config = DataConfig(source=(str(path),))
    with pytest.raises(InputError, match=r"line 41: chat template: fails on these messages \(Only user and"):
        train_batches(config, chat_tokenizer(tmp_path / "inst", INST, "</s>", "<s>"), 16, 1)
    with pytest.raises(InputError, match=r"line 1: has messages, for which data\.tokenizer must have a chat template"):
        train_batches(config, TOKENIZER, 16, 1)


def test_what_is_read_otherwise_than_one_may_think_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.<|endoftext|>Two.<|im_end|> and more words\n\n" * 200)
    chats = write_chats(tmp_path / "b.jsonl")
    tokenizer = chat_tokenizer(tmp_path / "model", CHATML + "{{ strftime_now('%Y') if false }}")
    told: list[str] = []
    config = DataConfig(source=(str(tmp_path / "a.txt"), chats))
    train_batches(config, tokenizer, 16, 1, None, told.append)
    first, second, third = told
    assert "'<|endoftext|>' inside" in first and "'<|im_end|>' inside" in second and "asks for the date" in third
    told.clear()
    train_batches(DataConfig(source=config.source[:1], separator="<|endoftext|>"), TOKENIZER, 16, 1, None, told.append)
    assert told == []
