"""Documents to batches, with grain: split -> shuffle -> repeat -> mix -> tokenise -> pack -> batch -> prefetch.

A batch is a dict of NumPy arrays, all [B, S]:

| key           | dtype   | what                                                                                      |
|---------------|---------|-------------------------------------------------------------------------------------------|
| `tokens`      | int32   | input tokens; a document is bos, its text, and (as a target only) eos                      |
| `targets`     | int32   | the next token of the same document                                                        |
| `positions`   | int32   | position in the segment, from 0                                                            |
| `segment_ids` | int32   | 1, 2, ... for the documents in the sequence, 0 for padding                                 |
| `weights`     | float32 | 1 where there is a target to learn, 0 for padding                                          |

Tokens and targets are packed as pairs, so no target is lost: neither at the end of a document (eos is never an input,
for nothing follows it) nor where a sequence ends in the middle of one (it goes on in the next sequence, as a new
segment). Every token of a document except the first is a target exactly once. A document begins with bos only where the
tokenizer wants that (`Tokenizer.starts_with_bos`), or where it has no text.

A conversation is a document of which only the assistant's tokens are to be learned: all others have weight 0. It is
what its chat template makes of it up to the assistant's last token, see `mod_star.data.conversations`. Sequences with
nothing to learn are left out.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset, ThreadPrefetchIterDataset, batch_and_pad

from mod_star.config import DataConfig
from mod_star.data.conversations import Conversation, check_rendering, tokenise
from mod_star.data.sources import Document, Tell, read_sources
from mod_star.errors import InputError, require
from mod_star.tokenization.special_tokens import END_OF_TEXT
from mod_star.tokenization.tokenizers import Tokenizer, begin

Batch = dict[str, np.ndarray]


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    context: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    tell: Tell = lambda line: None,
) -> _Rows:
    """Training batches without end, in an order that only `config.seed` and the batch size decide.

    Each source is shuffled anew in every epoch; sources are mixed by document in proportion to `config.weights`. Every
    row of the batch is a stream of its own: of each source's documents, row r has every B-th, and packs them by itself.
    So a batch is the same however many processes make it, each its own rows, and a state may be taken by some processes
    and gone on with by others (`merge_states`). The iterator's `get_state()`, {"rows": {row: state}}, is JSON and
    small; it goes on exactly where it was taken, in the middle of a document if need be.

    Args:
        config: Sources, weights, split, packing, seed.
        tokenizer: Makes the ids.
        context: S, length of a sequence.
        batch_size: B, sequences of the whole batch.
        rows: Which of them to make, in this order; all of them by default.
        tell: Takes lines about what is read otherwise than one may think.

    Returns:
        A dataset of batches (see the module); its `documents` are the numbers of documents of the sources, those that
        are held out included.

    Raises:
        InputError: A source cannot be read or split, has too little text for S, or has conversations that the
            tokenizer's chat template doesn't fit.
    """
    rows = range(batch_size) if rows is None else rows
    parts = _split_documents(config, tokenizer, context, tell)
    _check_conversations(parts, tokenizer, tell)
    shuffled = [
        grain.MapDataset.source(train).shuffle(seed=_seed(config.seed, 1, index)).repeat()
        for index, (train, _) in enumerate(parts)
    ]
    weights = config.weights or [len(train) for train, _ in parts]
    streams = []
    for row in rows:
        # Slicing each source, not the mixture, keeps its proportions in every row.
        own = [source[row::batch_size] for source in shuffled]
        mixture = own[0] if len(own) == 1 else grain.MapDataset.mix(own, weights)
        streams.append(_sequences(mixture, config, tokenizer, context))
    return _Rows(rows, streams, [len(train) + len(held_out) for train, held_out in parts])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of all rows from the states of several processes' iterators, taken at the same step."""
    if len(states) == 1:
        return states[0]
    return {"rows": {row: state for part in states for row, state in part["rows"].items()}}


def held_out_batches(config: DataConfig, tokenizer: Tokenizer, context: int, batch_size: int) -> grain.IterDataset:
    """One pass over the held-out documents, the same whenever it is iterated.

    With `config.pack` every token of every document (except its first) is a target exactly once; the last sequence and
    the last batch are filled up with padding of weight 0. The order is fixed but mixes the sources, so that the first
    batches stand for all of them.

    Args, Raises: See `train_batches`.

    Returns:
        A finite dataset of batches, all of `batch_size`.
    """
    held_out = [held_out for _, held_out in _split_documents(config, tokenizer, context)]
    documents = grain.MapDataset.concatenate([grain.MapDataset.source(part) for part in held_out])
    documents = documents.shuffle(seed=_seed(config.seed, 2, 0))
    fill = functools.partial(batch_and_pad, batch_size=batch_size)
    return _sequences(documents, config, tokenizer, context).batch(batch_size, drop_remainder=False, batch_fn=fill)


def prefetch_to_device(
    batches: grain.IterDataset, sharding: jax.sharding.Sharding | None = None, buffer: int = 2
) -> grain.IterDataset:
    """Makes batches in a background thread and puts them on the devices ahead of time.

    Args:
        batches: Batches of this process.
        sharding: Where the global batch goes, of which `batches` holds this process's share. None: the default device.
        buffer: The most batches that wait on the device.

    Returns:
        A dataset of dicts of `jax.Array`. Its iterator's state is that of the batch last taken, not of those ahead, and
        fits the iterator of `batches` too. Its thread ends with it, or when `close()` is called.
    """

    def put(batch: Batch) -> dict[str, jax.Array]:
        if sharding is None:
            return jax.device_put(batch)
        rows = jax.make_array_from_process_local_data
        return {name: rows(sharding, values) for name, values in batch.items()}

    return _ClosedAtExit(ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=buffer))


@dataclass(frozen=True)
class _Subset(Sequence[Document]):
    """Some documents of a source."""

    documents: Sequence[Document]
    indices: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.documents[int(self.indices[index])]


def _split_documents(
    config: DataConfig, tokenizer: Tokenizer, context: int, tell: Tell = lambda line: None
) -> list[tuple[_Subset, _Subset]]:
    """(training, held-out) documents of every source; both hold at least one document, and together S + 1 tokens."""
    require(config.seed >= 0, "data.seed", config.seed, "must not be negative")
    sources = read_sources(config.source, config.template, config.separator, tell, _marks(tokenizer))
    parts = []
    for index, (spec, documents) in enumerate(zip(config.source, sources, strict=True)):
        if len(documents) < 2:
            raise InputError(
                f"data.source = {spec!r}: has a single document; one to train on and one to hold out are needed"
            )
        order = np.random.default_rng([config.seed, 0, index]).permutation(len(documents))
        count = min(max(round(len(documents) * config.held_out), 1), len(documents) - 1)
        parts.append((_Subset(documents, np.sort(order[count:])), _Subset(documents, np.sort(order[:count]))))
    for name, part in (("training", 0), ("held-out", 1)):
        _require_tokens([both[part] for both in parts], name, config, tokenizer, context)
    return parts


def _require_tokens(
    parts: Sequence[_Subset], name: str, config: DataConfig, tokenizer: Tokenizer, context: int
) -> None:
    """Raises InputError if the documents have fewer than S + 1 tokens, or none to learn. Reads as few as it must."""
    tokens = learned = 0
    for document in (document for part in parts for document in part):
        pairs = _token_pairs(tokenizer, document)["pairs"]
        tokens += len(pairs) + 1
        learned += int(pairs[: None if config.pack else context, 2].sum())
        if tokens > context and learned:
            return
    if tokens > context:
        raise InputError(
            f"model.context = {context}: the {name} documents have no token to learn within it, and data.pack is False"
        )
    raise InputError(
        f"model.context = {context}: the {name} documents have {tokens} tokens, at least context + 1 are needed "
        "(a shorter context, more data, or another data.held_out)"
    )


def _marks(tokenizer: Tokenizer) -> list[str]:
    """Spellings of what ends a text, here or in other people's files."""
    spelled = [tokenizer.token_text(token) for token in tokenizer.end_ids]
    spelled = [
        text for text, token in zip(spelled, tokenizer.end_ids, strict=True) if tokenizer.encode(text) == [token]
    ]
    return list(dict.fromkeys([END_OF_TEXT, *spelled]))


def _check_conversations(parts: Sequence[tuple[_Subset, _Subset]], tokenizer: Tokenizer, tell: Tell) -> None:
    """Raises InputError if the chat template doesn't fit a conversation that is in memory: now, not in a later step."""
    in_memory = [train.documents for train, _ in parts if isinstance(train.documents, list)]
    conversations = [each for documents in in_memory for each in documents if isinstance(each, Conversation)]
    for conversation in conversations:
        check_rendering(tokenizer, conversation)
    if conversations and "strftime_now" in (tokenizer.chat_template or ""):
        tell("the tokenizer's chat template asks for the date, which conversations then have in them")


def _seed(*words: int) -> int:
    """An unsigned 32-bit seed that differs with any of the words."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _sequences(
    documents: grain.MapDataset, config: DataConfig, tokenizer: Tokenizer, context: int
) -> grain.IterDataset:
    """Documents to sequences: the entries of a batch, [S] each."""
    pairs = documents.map(functools.partial(_token_pairs, tokenizer))
    # No reader threads: tokenising holds the interpreter lock, so that they only cost (a fifth of the throughput);
    # `prefetch_to_device` has one thread for the whole pipeline.
    stream = pairs.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if not config.pack:
        return _WithTargets(stream.map(functools.partial(_one_document, context)))
    packed = ConcatThenSplitIterDataset(stream, length_struct={"pairs": context})
    return _WithTargets(_JsonState(packed).map(_packed_documents))


def _token_pairs(tokenizer: Tokenizer, document: Document) -> dict[str, np.ndarray]:
    """Each token of [bos] text [eos] with its successor, and 1 where that is to be learned; int32 [length - 1, 3]."""
    if isinstance(document, Conversation):
        ids, learned = tokenise(tokenizer, document)
    else:
        ids = np.array([*begin(tokenizer, document), tokenizer.eos_id], dtype=np.int32)
        learned = np.ones(len(ids), bool)
    return {"pairs": np.stack([ids[:-1], ids[1:], learned[1:].astype(np.int32)], axis=1)}


def _one_document(context: int, document: dict[str, np.ndarray]) -> Batch:
    """A document cut or padded to S tokens."""
    pairs_Lx3 = document["pairs"][:context]
    pairs_Sx3 = np.zeros((context, 3), np.int32)
    pairs_Sx3[: len(pairs_Lx3)] = pairs_Lx3
    segment_ids_S = (np.arange(context) < len(pairs_Lx3)).astype(np.int32)
    return _sequence(pairs_Sx3, np.arange(context, dtype=np.int32) * segment_ids_S, segment_ids_S)


def _packed_documents(packed: dict[str, np.ndarray]) -> Batch:
    return _sequence(packed["pairs"], packed["pairs_positions"], packed["pairs_segment_ids"])


def _sequence(pairs_Sx3: np.ndarray, positions_S: np.ndarray, segment_ids_S: np.ndarray) -> Batch:
    return {
        "tokens": pairs_Sx3[:, 0],
        "targets": pairs_Sx3[:, 1],
        "positions": positions_S,
        "segment_ids": segment_ids_S,
        "weights": (pairs_Sx3[:, 2] * (segment_ids_S > 0)).astype(np.float32),
    }


class _Rows(grain.IterDataset):
    """Batches from one dataset of sequences per row."""

    def __init__(self, rows: Sequence[int], streams: Sequence[grain.IterDataset], documents: Sequence[int]) -> None:
        super().__init__(streams)
        self.documents = documents
        self._rows = [str(row) for row in rows]

    def __iter__(self) -> grain.DatasetIterator:
        return _RowsIterator(self._rows, [iter(stream) for stream in self._parents])


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, rows: Sequence[str], streams: Sequence[grain.DatasetIterator]) -> None:
        super().__init__(streams)
        self._streams = dict(zip(rows, streams, strict=True))

    def __next__(self) -> Batch:
        sequences = [next(stream) for stream in self._streams.values()]
        return {name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}

    def get_state(self) -> dict[str, Any]:
        return {"rows": {row: stream.get_state() for row, stream in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for row, stream in self._streams.items():
            stream.set_state(state["rows"][row])


class _JsonState(grain.IterDataset):
    """Lets the packing's state go through JSON, as in a checkpoint.

    grain 0.2.18 tells "no rest of a document" from its state by comparing tuples. JSON makes them lists: a state taken
    before the first batch would then skip a document.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonStateIterator(iter(self._parent))


class _JsonStateIterator(grain.DatasetIterator):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {feature: tuple(bounds) for feature, bounds in state["remainder_slices"].items()}
        self._parent.set_state(state | {"remainder_slices": slices})


class _WithTargets(grain.IterDataset):
    """Leaves out sequences with nothing to learn, such as the middle of a long question: a step on them costs time."""

    def __iter__(self) -> grain.DatasetIterator:
        return _WithTargetsIterator(iter(self._parent))


class _WithTargetsIterator(grain.DatasetIterator):
    def __next__(self) -> Batch:
        while True:
            sequence: Batch = next(self._parent)
            if sequence["weights"].any():
                return sequence

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class _ClosedAtExit(grain.IterDataset):
    """Ends the threads of its iterators before the interpreter goes down; inside JAX they would abort the process."""

    def __iter__(self) -> grain.DatasetIterator:
        return _ClosedAtExitIterator(iter(self._parent))


class _ClosedAtExitIterator(grain.DatasetIterator):
    def __init__(self, iterator: grain.DatasetIterator) -> None:
        super().__init__()
        self._iterator: grain.DatasetIterator | None = iterator
        _open_iterators.add(self)

    def __next__(self) -> Any:
        return next(self._opened())

    def get_state(self) -> dict[str, Any]:
        return self._opened().get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._opened().set_state(state)

    def close(self) -> None:
        # grain closes once more when it deletes the iterator: now, not at the end, when its modules may be gone.
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def _opened(self) -> grain.DatasetIterator:
        if self._iterator is None:
            raise ValueError("the iterator is closed")
        return self._iterator


_open_iterators: weakref.WeakSet[_ClosedAtExitIterator] = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    for iterator in list(_open_iterators):
        iterator.close()
