"""Protocols against the whole text run in float64, and against the decodings that they stand for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_params
from numpy_decoder import decode, float64, one_document
from sentence_piece import sentence_piece

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import GenerationConfig, Sampling, complete
from mod_star.decoding.answers import LastNumber
from mod_star.decoding.beam import BeamSearch
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.decoding.cot import cot_decode, self_consistency
from mod_star.decoding.rankings import RANKINGS
from mod_star.decodings import Beam, Cot, Greedy, SelfConsistency
from mod_star.errors import InputError
from mod_star.evaluation.branch_records import branch_record, branches_of, cot_answers, rankings_of
from mod_star.evaluation.generation import GeneratedAnswer
from mod_star.evaluation.likelihood import ChoiceLikelihood, ExpectedProbability, continuations
from mod_star.evaluation.prompts import Prompts
from mod_star.evaluation.protocols import Subject, measures
from mod_star.evaluation.scoring import ScoringConfig, score
from mod_star.evaluation.tasks import Item
from mod_star.loaded_model import Model
from mod_star.model import Decoder
from mod_star.tokenization.tokenizers import ByteTokenizer, train_bpe

CONTEXT = 64
CONFIG = ModelConfig(
    vocab_size=258, context=CONTEXT, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, tie_embeddings=False
)
ROUTING = RoutingConfig(every=0)
NUMBERS = [
    Item("a", "one?", "42", "number"),
    Item("b", "two, and more?", "7", "number"),
    Item("c", "x", "-3", "number"),
]
CHOICES = [
    Item("p", "one?", "no", "choice", ("yes", "no"), ("certainly", "by no means")),
    Item("q", "a longer one?", "yes", "choice", ("yes", "no"), ("certainly", "by no means")),
]


class Naive:
    """A tiny model of bytes, and what it says in float64."""

    @cached_property
    def params(self) -> Any:
        return random_params(CONFIG, ROUTING)

    @cached_property
    def subject(self) -> Subject:
        tokenizer = ByteTokenizer()
        return Subject(Model(Decoder(CONFIG, ROUTING), self.params, tokenizer), Prompts(tokenizer))

    @cached_property
    def generator(self) -> Any:
        return self.subject.generator()

    def log_probs(self, before: str, after: str) -> Any:
        """Log-probabilities MxV at each byte of `after`, behind bos and `before`; and the bytes."""
        params = float64(self.params)
        ids = np.array([256, *(before + after).encode()])
        hidden = decode(params, one_document(ids), CONFIG, ROUTING, mode="causal", most=len(ids))[0]
        logits = hidden @ params["head"].T
        logits = logits - logits.max(-1, keepdims=True)
        M = len(after.encode())
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[-M - 1 : -1], ids[-M:]


@pytest.fixture(scope="module")
def naive() -> Naive:
    return Naive()


def by_id(protocol: Any, subject: Subject, items: list[Item]) -> dict[str, Any]:
    protocol.check(subject, items)
    records = list(protocol.records(subject, list(enumerate(items))))
    assert all(record["seconds"] >= 0 for record in records)
    assert sorted(record["id"] for record in records) == [item.id for item in items]
    return {record["id"]: record for record in records}


@pytest.mark.parametrize("texts", [False, True])
def test_choices_by_log_likelihood(naive: Naive, texts: bool) -> None:
    records = by_id(ChoiceLikelihood(texts=texts, batch_size=2), naive.subject, CHOICES)
    for item in CHOICES:
        record, prompt = records[item.id], f"Q: {item.question}\nA:"
        assert record["prompt"] == prompt
        shown = item.choice_texts if texts else item.choices
        expected = []
        for text in shown:
            log_probs, ids = naive.log_probs(prompt, f" {text}")
            expected.append(log_probs[np.arange(len(ids)), ids].sum())
        assert list(record["log_likelihoods"]) == ["yes", "no"]
        np.testing.assert_allclose(list(record["log_likelihoods"].values()), expected, atol=1e-4)
        best = item.choices[int(np.argmax(expected))]
        per_character = item.choices[int(np.argmax([x / len(text) for x, text in zip(expected, shown, strict=True)]))]
        assert record["answers"] == {"log-likelihood": best, "log-likelihood per character": per_character}
        assert record["scores"]["log-likelihood per character"] == (per_character == item.gold)
        assert record["answer"] == best and record["correct"] == (best == item.gold)


def test_expected_probability_over_digits_and_newline(naive: Naive) -> None:
    records = by_id(ExpectedProbability(batch_size=2), naive.subject, NUMBERS)
    allowed = [*b"0123456789", *b"\n"]
    for item in NUMBERS:
        log_probs, ids = naive.log_probs(f"Q: {item.question}\nA:", f" {item.gold}\n")
        # The blank is a token of its own here, and no digit: it is given, not predicted.
        record = records[item.id]
        total = np.exp(log_probs[:, allowed]).sum(-1)
        expected = [
            np.exp(row[token]) / all_of if token in allowed else 0.0
            for row, token, all_of in zip(log_probs, ids, total, strict=True)
        ]
        counted = expected[1:]
        np.testing.assert_allclose(record["probabilities"], counted, rtol=1e-4)
        assert record["scores"]["expected probability"] == pytest.approx(math.prod(counted), rel=1e-4)
        argmax = [allowed[int(row.argmax())] for row in log_probs[1:, allowed]]
        assert record["scores"]["argmax"] == record["correct"] == (argmax == ids[1:].tolist())
        assert record["scores"]["greedy"] == (log_probs[1:].argmax(-1).tolist() == ids[1:].tolist())
    assert records["c"]["scores"]["expected probability"] == 0, "a sign is no digit"
    assert records["a"]["scores"]["expected probability"] > 0


def test_expected_probability_over_the_choices_tokens(naive: Naive) -> None:
    records = by_id(ExpectedProbability(), naive.subject, CHOICES)
    allowed = sorted({*b"yesno\n"})
    for item in CHOICES:
        log_probs, ids = naive.log_probs(f"Q: {item.question}\nA: ", f"{item.gold}\n")
        restricted = log_probs - np.log(np.exp(log_probs[:, allowed]).sum(-1, keepdims=True))
        expected = math.exp(restricted[np.arange(len(ids)), ids].sum())
        assert records[item.id]["scores"]["expected probability"] == pytest.approx(expected, rel=1e-4)


def test_a_continuation_is_split_where_its_tokens_are(tmp_path: Path, naive: Naive) -> None:
    tokenizer = train_bpe(["A: 12\nA: 7\nA: 12\n" * 20], 300, tmp_path / "tokenizer.json")
    model = dataclasses.replace(naive.subject.model, tokenizer=tokenizer)
    subject = Subject(model, Prompts(tokenizer))
    item = Item("a", "?", "12", "number")
    pairs = continuations(subject, item, [" 12", " 7", " 12\n"])
    bos = [tokenizer.bos_id] if tokenizer.starts_with_bos else []
    for (before, after), text in zip(pairs, (" 12", " 7", " 12\n"), strict=True):
        assert [*before, *after] == [*bos, *tokenizer.encode(f"Q: ?\nA:{text}")]
        assert after
    assert len({tuple(before) for before, _ in pairs}) == 1
    # Without a bos, an empty prompt is bos all the same; one that is joined with the answer leaves nothing.
    without = sentence_piece(starts_with_bos=False)
    subject = Subject(dataclasses.replace(model, tokenizer=without), Prompts(without, "{question}"))
    assert continuations(subject, Item("a", "", "1", "number"), ["1"]) == [([1], without.encode("1"))]
    with pytest.raises(InputError, match="item 'a': its prompt and answer are one token"):
        continuations(subject, Item("a", "t", "he", "text"), ["he"])


def test_a_blank_of_its_own_is_given_in_sentence_piece_too(naive: Naive) -> None:
    tokenizer = sentence_piece()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    subject = Subject(Model(Decoder(config, ROUTING), random_params(config, ROUTING), tokenizer), Prompts(tokenizer))
    item = Item("a", "one?", "72", "number")
    ids = [1, *tokenizer.encode("Q: one?\nA: 72\n")]
    spelt = [tokenizer.token_text(token) for token in ids[-4:]]
    assert spelt == ["▁", "7", "2", "⏎"], "what is tested here"
    digits = [token for digit in "0123456789" for token in (tokenizer.encode(digit)[-1], 3 + ord(digit))]  # and bytes
    allowed = [*digits, ids[-1]]
    (scored,) = score(subject.model, [(ids[:-3], ids[-3:])], ScoringConfig(allowed_ids=allowed))
    (record,) = ExpectedProbability().records(subject, [(0, item)])
    assert record["tokens"] == ["7", "2", "⏎"]
    expected = math.exp(math.fsum(scored.restricted_log_probs or []))
    assert 0 < record["scores"]["expected probability"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.nightly
def test_every_decoding_answers_as_it_does_alone(naive: Naive, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, generator = naive.subject, naive.generator
    monkeypatch.setattr(Subject, "generator", lambda _: generator)  # compile once
    prompts = [subject.prompts.text(item) for item in NUMBERS]
    tokenizer, finder, T = subject.model.tokenizer, LastNumber(), 16

    cot = by_id(GeneratedAnswer(Cot(branches=3), T), subject, NUMBERS)
    for expected, item in zip(
        cot_decode(generator, prompts, GenerationConfig(T, branches=3), finder), NUMBERS, strict=True
    ):
        record = cot[item.id]
        assert [branch["text"] for branch in record["branches"]] == [b.completion.text for b in expected.branches]
        for ranking in RANKINGS.values():
            name = {"delta": "Δ", "log_prob": "log-prob", "normalised_log_prob": "log-prob per token"}[ranking.name]
            assert record["answers"][f"CoT max, {name}"] == expected.answer(ranking)
            aggregated = expected.answer(ranking, aggregate=True)
            assert record["answers"][f"CoT aggregated, {name}"] == aggregated
        assert record["answer"] == expected.answer(aggregate=True)
        assert record["answers"]["greedy (branch 0)"] == expected.branches[0].answer

    greedy = by_id(GeneratedAnswer(Greedy(), T), subject, NUMBERS)
    *_, alone = complete(generator, prompts, GenerationConfig(T, Sampling(0.0)))
    for completion, item in zip(alone, NUMBERS, strict=True):
        assert greedy[item.id]["text"] == completion.text == cot[item.id]["branches"][0]["text"]
        assert greedy[item.id]["answer"] == finder.canonical(completion.text)

    drawn, sampled = Sampling(1.5), GeneratedAnswer(SelfConsistency(1.5, branches=3), T, seed=5)
    samples = by_id(sampled, subject, NUMBERS)
    together = self_consistency(generator, prompts, GenerationConfig(T, drawn, branches=3, seed=5), finder)
    for expected, item in zip(together, NUMBERS, strict=True):
        assert [b["text"] for b in samples[item.id]["branches"]] == [b.completion.text for b in expected.branches]
        assert samples[item.id]["answers"] == {
            "self-consistency": expected.majority_answer(), "one sample": expected.branches[0].answer,
        }  # fmt: skip
    # What is drawn depends on the item's number alone, so that an interrupted evaluation draws the same.
    (again,) = sampled.records(subject, [(2, NUMBERS[2])])
    assert [branch["text"] for branch in again["branches"]] == [branch["text"] for branch in samples["c"]["branches"]]

    beams = by_id(GeneratedAnswer(Beam(branches=2), T), subject, NUMBERS)
    best = BeamSearch(generator, 2).search([subject.prompts.encode(item) for item in NUMBERS], T)
    for expected_beams, item in zip(best, NUMBERS, strict=True):
        rows = beams[item.id]["branches"]
        assert [row["text"] for row in rows] == [tokenizer.decode(beam.tokens) for beam in expected_beams]
        np.testing.assert_allclose(
            [row["log_prob"] for row in rows], [sum(beam.log_probs) for beam in expected_beams], atol=1e-4
        )
        assert beams[item.id]["answer"] == rows[0]["answer"]
        assert all((row["delta"] is None) == (row["answer"] is None) for row in rows)


def test_branches_come_back_from_their_records(naive: Naive) -> None:
    prompts, asked = [naive.subject.prompts.text(item) for item in NUMBERS], ConfidenceConfig(4)
    for found in cot_decode(naive.generator, prompts, GenerationConfig(16, branches=3), LastNumber(), confidence=asked):
        kept = branches_of([branch_record(branch) for branch in found.branches])
        assert cot_answers(kept) == cot_answers(found)
        assert cot_answers(kept, rankings_of(asked)) == cot_answers(found, rankings_of(asked))
        for one, other in zip(kept.branches, found.branches, strict=True):
            assert one.confidence is not None and other.confidence is not None
            assert astuple(one.confidence) == pytest.approx(astuple(other.confidence), abs=1e-5)
        assert kept.totals() == pytest.approx(found.totals(), abs=1e-5)
        assert [branch.dropped for branch in kept.branches] == [branch.dropped for branch in found.branches]


def test_measures_are_means_over_items() -> None:
    records = [
        {"id": str(n), "scores": {"right": n < 3, "probability": n / 10, "never": False}} for n in range(10)
    ]  # fmt: skip
    found = measures(records)
    assert {name: each.value for name, each in found.items()} == pytest.approx(
        {"right": 0.3, "probability": 0.45, "never": 0.0}
    )
    assert found["right"].low == pytest.approx(0.1078, abs=1e-4), "Wilson's"
    assert found["never"].high == pytest.approx(0.2775, abs=1e-4)
    assert found == measures(records[::-1]), "whatever the order in which they were done"


def test_what_cannot_be_done_is_told_first(naive: Naive) -> None:
    text = [Item("t", "one?", "words", "text")]
    long = [*NUMBERS, Item("long", "x" * 60, "1", "number")]
    for protocol, items, message in (
        (ChoiceLikelihood(), NUMBERS, "--protocol = 'choice': needs choices; the answers of this task are of"),
        (ExpectedProbability(), text, "--protocol = 'expected': needs numbers or choices"),
        (ExpectedProbability(), long, "item 'long' = 70 tokens with its prompt: must be at most 65 (context 64)"),
        (GeneratedAnswer(new_tokens=16), long, "item 'long' = 67 tokens with its prompt: must be at most 48 (context"),
        (GeneratedAnswer(new_tokens=64), NUMBERS, "--new-tokens = 64: must lie in [1, 63]"),
        (GeneratedAnswer(Cot(branches=259), 8), NUMBERS, "--branches = 259: must be at most the vocabulary, 258"),
        (GeneratedAnswer(new_tokens=8), text, "--continuation: must be given for answers of any words"),
        (GeneratedAnswer(new_tokens=8, continuation="So"), long, "must be at most 21 (context 64 minus 8 new"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            protocol.check(naive.subject, items)  # type: ignore[attr-defined]
        assert message in str(error.value)
