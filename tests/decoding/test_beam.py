"""Beam search against a naive one that runs whole texts, and against trying every text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decoding_models import VOCAB, make_prompts
from some_nightly import some_nightly
from symbols import END_IDS, SYMBOLS, Subject, SymbolTokenizer

from mod_star.decoding import GenerationConfig, Think
from mod_star.decoding.beam import BeamSearch, beam_search
from mod_star.decoding.beam_rules import Hypothesis, run_search
from mod_star.decoding.text import StopWatch
from mod_star.decodings import Beam
from mod_star.errors import InputError

NEW, W = 5, 3
TOKENIZER = SymbolTokenizer()
PROMPTS = make_prompts((3, 9, 1))

Text = tuple[list[int], list[float]]


def naive_beams(
    subject: Subject, prompt: list[int], beams: int, new_tokens: int, penalty: float, stop: str = "\n"
) -> list[Hypothesis]:
    """The same rules on lists of whole texts."""
    live: list[Text] = [([], [])]
    ended: list[Hypothesis] = []
    for _ in range(new_tokens):
        longer: list[Text] = []
        for tokens, log_probs in live:
            log_p = subject.log_p(prompt + tokens)
            for token in range(VOCAB):
                text = ([*tokens, token], [*log_probs, float(log_p[token])])
                if token in END_IDS:
                    ended.append(hypothesis(*text, True, penalty))
                else:
                    longer.append(text)
        longer = sorted(longer, key=lambda text: -sum(text[1]))[: 2 * beams]
        stopped = [text for text in longer if stop in TOKENIZER.decode(text[0])]
        ended += [replace(hypothesis(*text, False, penalty), stopped=True) for text in stopped]
        live = [text for text in longer if text not in stopped][:beams]
    return best([*ended, *(hypothesis(*text, False, penalty) for text in live)], beams)


def hypothesis(tokens: list[int], log_probs: list[float], finished: bool, penalty: float) -> Hypothesis:
    return Hypothesis(tokens, log_probs, [], finished, sum(log_probs) / len(tokens) ** penalty)


def best(found: Sequence[Hypothesis], count: int) -> list[Hypothesis]:
    return sorted(found, key=lambda each: -each.score)[:count]


def check(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.finished for each in found] == [each.finished for each in expected]
    assert [each.stopped for each in found] == [each.stopped for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-3)
        assert ours.score == pytest.approx(theirs.score, abs=1e-3)


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    return {kind: Subject(kind) for kind in ("routed", "thinking")}


@pytest.mark.parametrize(
    ("kind", "penalty"),
    some_nightly([("routed", 0.0), ("routed", 1.0), ("thinking", 0.6)], ("routed", 1.0), ("thinking", 0.6)),
)
@pytest.mark.slow
def test_it_is_the_naive_search(subjects: dict[str, Subject], kind: str, penalty: float) -> None:
    subject = subjects[kind]
    think = Think("always") if subject.thinker else Think()
    prompts = PROMPTS[: 2 if subject.thinker else None]  # the naive search takes its time
    found = BeamSearch(subject.generator, W, penalty, think).search(prompts, NEW)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        check(hypotheses, naive_beams(subject, prompt, W, NEW, penalty))
        for each in hypotheses:
            for step, gap in enumerate(each.gaps):
                second, first = np.sort(np.exp(subject.log_p(prompt + each.tokens[:step])))[-2:]
                assert gap == pytest.approx(first - second, abs=2e-4)
    ends = [each.finished for hypotheses in found for each in hypotheses]
    assert any(ends) if penalty == 0.0 else not all(ends)


@pytest.mark.nightly
def test_beams_as_wide_as_the_vocabulary_find_the_best_of_all_texts(subjects: dict[str, Subject]) -> None:
    subject, prompt, going_on = subjects["routed"], PROMPTS[1], range(len(SYMBOLS))
    first = subject.log_p(prompt)
    every = [hypothesis([end], [float(first[end])], True, 0.5) for end in END_IDS]
    for token in going_on:
        second = subject.log_p([*prompt, token])
        every += [
            hypothesis([token, last], [float(first[token]), float(second[last])], last in END_IDS, 0.5)
            for last in range(VOCAB)
        ]
    assert len(every) == len(END_IDS) + len(going_on) * VOCAB
    (found,) = BeamSearch(subject.generator, VOCAB, 0.5).search([prompt], 2)
    check(found, best(every, VOCAB))


@pytest.mark.parametrize("penalty", some_nightly([0.0, 1.0], 0.0))
@pytest.mark.slow
def test_a_stop_string_ends_a_text_and_its_score(subjects: dict[str, Subject], penalty: float) -> None:
    subject = subjects["routed"]
    encoded = [[token % len(SYMBOLS) for token in prompt] for prompt in PROMPTS]
    free = naive_beams(subject, encoded[1], W, NEW, 1.0)[0].tokens
    search = BeamSearch(subject.generator, W, penalty)
    whys = Counter[tuple[bool, bool]]()
    for stop in (TOKENIZER.decode(free[1:3]), TOKENIZER.decode(free[:1])):  # one over two tokens
        watches = [StopWatch(TOKENIZER, TOKENIZER.decode(ids), (stop, "never there")) for ids in encoded]
        for ids, found in zip(encoded, search.search(encoded, NEW, watches), strict=True):
            check(found, naive_beams(subject, ids, W, NEW, penalty, stop))
            for each in found:
                text = TOKENIZER.decode(each.tokens)
                assert each.stopped == (stop in text) and stop not in text[:-1], "nothing after it counts"
                whys[each.finished, each.stopped] += 1
    assert whys[False, True] and len(whys) > 1, whys


@pytest.mark.nightly
def test_with_stop_strings_it_still_finds_the_best_of_all_texts(subjects: dict[str, Subject]) -> None:
    subject, prompt, going_on = subjects["routed"], [token % len(SYMBOLS) for token in PROMPTS[1]], range(len(SYMBOLS))
    first = subject.log_p(prompt)
    (first_stop, *_), (other, *_) = np.argsort(-first[: len(SYMBOLS)]), np.argsort(first[: len(SYMBOLS)])
    stops = (SYMBOLS[first_stop], SYMBOLS[other] * 2)
    every = [hypothesis([end], [float(first[end])], True, 1.0) for end in END_IDS]
    for token in going_on:
        if token == first_stop:
            every.append(replace(hypothesis([token], [float(first[token])], False, 1.0), stopped=True))
            continue
        second = subject.log_p([*prompt, token])
        for last in range(VOCAB):
            one = hypothesis([token, last], [float(first[token]), float(second[last])], last in END_IDS, 1.0)
            every.append(replace(one, stopped=last == first_stop or token == last == other))
    watches = [StopWatch(TOKENIZER, TOKENIZER.decode(prompt), stops)]
    (found,) = BeamSearch(subject.generator, VOCAB, 1.0).search([prompt], 2, watches)
    check(found, best(every, VOCAB))
    assert sum(each.stopped for each in found) > 1 and found[0].score != best(every, VOCAB)[-1].score


def test_texts_come_best_first_and_cut_at_stop_strings(subjects: dict[str, Subject]) -> None:
    generator, tokenizer = subjects["routed"].generator, SymbolTokenizer()
    encoded = [[token % len(SYMBOLS) for token in prompt] for prompt in PROMPTS]
    prompts = [tokenizer.decode(prompt) for prompt in encoded]
    found = beam_search(generator, prompts, GenerationConfig(NEW, branches=W), length_penalty=1.0, encoded=encoded)
    for prompt, ids, beams, hypotheses in zip(
        prompts, encoded, found, BeamSearch(generator, W, 1.0).search(encoded, NEW), strict=True
    ):
        assert [beam.prompt for beam in beams] == [prompt] * W
        assert ids == tokenizer.encode(prompt)
        for beam, each in zip(beams, hypotheses, strict=True):
            assert beam.text == tokenizer.decode(each.tokens)
            assert beam.finished == ("end" if each.finished else "length")
            assert len(beam.gaps) == len(beam.log_probs) == len(beam.tokens) == len(each.tokens) - each.finished
            assert (beam.end_log_prob is not None) == each.finished
    compiled: Any = run_search
    known = compiled._cache_size()
    longest = max(itertools.chain(*found), key=lambda beam: len(beam.text)).text
    stop = longest[2]
    for beams in beam_search(
        generator, prompts, GenerationConfig(NEW, branches=W, stop=(stop,)), length_penalty=1.0, encoded=encoded
    ):
        assert all(stop not in beam.text for beam in beams)
        scores = [beam.path_log_prob()[1] for beam in beams]
        assert scores == sorted(scores, reverse=True), "ranked without what a cut text would have gone on with"
    beam_search(generator, prompts, GenerationConfig(NEW, branches=W), length_penalty=1.0, encoded=encoded)
    assert compiled._cache_size() == known, "the same search again compiles nothing"
    assert Beam().length_penalty == 1.0, "as in transformers"


def test_bad_searches_are_refused(subjects: dict[str, Subject]) -> None:
    generator = subjects["routed"].generator
    for beams, penalty, message in (
        (0, 0.0, "beams = 0: must be at least 1"),
        (VOCAB + 1, 0.0, f"beams = {VOCAB + 1}: must be at most the vocabulary, {VOCAB}"),
        (2, -1.0, "length_penalty = -1.0: must be at least 0 and finite"),
        (2, math.inf, "length_penalty = inf: must be at least 0 and finite"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            BeamSearch(generator, beams, penalty)
    with pytest.raises(InputError, match=r"^think\.when = 'always': must be never"):
        BeamSearch(generator, 2, think=Think("always"))
    for config, message in (
        (GenerationConfig(3, branches=2, confidence=True), "confidence = True: must be False"),
        (GenerationConfig(3, branches=2, branch_range=(0, 1)), r"branch_range = \(0, 1\): must be None"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            beam_search(generator, ["1"], config)
