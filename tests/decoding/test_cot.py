"""CoT-decoding against a naive loop that runs the whole text again for every branch and step."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from decoding_models import CONTEXT, VOCAB, make_prompts
from sentence_piece import sentence_piece
from some_nightly import some_nightly
from symbols import END_IDS, SYMBOLS, Subject, SymbolTokenizer

from mod_star.decoding import Generated, GenerationConfig, Sampling, Think
from mod_star.decoding.answers import LastNumber, Phrase
from mod_star.decoding.branches import Branches
from mod_star.decoding.confidence import ConfidenceConfig, TrueQuestion
from mod_star.decoding.continuation import ids_continued
from mod_star.decoding.cot import ANSWER_TOKENS, Reading, continue_texts, cot_decode, read_branches, self_consistency
from mod_star.decoding.p_true import p_true
from mod_star.decoding.rankings import MEASURED, RANKINGS
from mod_star.decoding.text import completion_of
from mod_star.errors import InputError
from mod_star.tokenization import begin

NEW, K, GROUP = 7, 6, 2
QUESTION = TrueQuestion("?", " 1", " 2")
TOKENIZER, NUMBER = SymbolTokenizer(), LastNumber()
ENCODED = [[token % len(SYMBOLS) for token in prompt] for prompt in make_prompts((3, 9, 1, 5, 2))]
PROMPTS = [TOKENIZER.decode(prompt) for prompt in ENCODED]


@dataclass
class Naive:
    """A branch as the plain model makes it."""

    tokens: list[int]
    log_probs: list[float]
    gaps: list[float]
    ended: bool
    rows: list[np.ndarray]
    """The distribution before each token, as log-probabilities."""
    p_true: float | None = None

    @property
    def text(self) -> str:
        return "".join(SYMBOLS[token] for token in self.tokens)

    @property
    def digits(self) -> Any:
        found = list(re.finditer(r"\d+", self.text))
        return found[-1] if found else None

    @property
    def dropped(self) -> bool:
        text = self.text.strip()
        return not text or not self.ended or text[-1] == "?" or self.digits is None

    def score(self, ranking: str) -> float:
        """Log-probabilities hold the end's, gaps and confidences don't."""
        if ranking == "p_true":
            assert self.p_true is not None
            return self.p_true
        if ranking == "self_certainty":
            return float(np.mean([-np.mean(row + math.log(VOCAB)) for row in self.rows]))
        if ranking in MEASURED:
            tokens = [-float(np.mean(sorted(row)[-20:])) for row in self.rows]
            groups = [np.mean(tokens[i : i + GROUP]) for i in range(max(1, len(tokens) - GROUP + 1))]
            value = {"mean_confidence": np.mean(tokens), "tail_confidence": np.mean(tokens[-GROUP:])}
            return float(value.get(ranking, min(groups)))  # of so few groups the lowest tenth is one
        if ranking == "delta":
            return float(np.mean(self.gaps[self.digits.start() : self.digits.end()]))
        return sum(self.log_probs) / (1 if ranking == "log_prob" else len(self.log_probs))


def naive_branches(subject: Subject, prompt: list[int], branches: int, new_tokens: int) -> list[Naive]:
    ranked = np.argsort(-subject.log_p(prompt), kind="stable")[:branches]
    made = []
    for first in ranked.tolist():
        branch = Naive([], [], [], False, [])
        while len(branch.log_probs) < new_tokens and not branch.ended:
            log_p = subject.log_p(prompt + branch.tokens)
            token = first if not branch.tokens else int(np.argmax(log_p))
            branch.log_probs.append(log_p[token])
            branch.ended = token in END_IDS
            if not branch.ended:
                second, best = np.sort(np.exp(log_p))[-2:]
                branch.gaps.append(best - second)
                branch.tokens.append(token)
                branch.rows.append(log_p)
        if subject.thinker is None and not branch.dropped:
            asked = prompt + branch.tokens + TOKENIZER.encode(" ?" if branch.text[-1] != " " else "?")
            yes, no = (np.exp(subject.log_p([*asked, *TOKENIZER.encode(" ")]))[int(digit)] for digit in "12")
            branch.p_true = float(yes / (yes + no))
        made.append(branch)
    return made


@pytest.fixture(scope="module", params=some_nightly(["dense", "routed", "thinking"], "dense", "thinking"))
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture(scope="module")
def results(subject: Subject) -> list[Branches]:
    think = Think("always") if subject.thinker else Think()
    count = 3 if subject.thinker else len(PROMPTS)  # the naive loop takes its time
    return cot_decode(
        subject.generator,
        PROMPTS[:count],
        GenerationConfig(NEW, branches=K, think=think),
        NUMBER,
        encoded=ENCODED[:count],
        confidence=ConfidenceConfig(GROUP, None if subject.thinker else QUESTION),
    )


@pytest.mark.slow
def test_it_is_the_naive_loop(subject: Subject, results: list[Branches]) -> None:
    whys = Counter[str | None]()
    for result, prompt, text in zip(results, ENCODED, PROMPTS, strict=False):
        naive = naive_branches(subject, prompt, K, NEW)
        assert result.prompt == text
        assert len(result.branches) == K
        for branch, expected in zip(result.branches, naive, strict=True):
            assert branch.completion.tokens == expected.tokens
            assert branch.completion.text == expected.text
            np.testing.assert_allclose(branch.completion.gaps, expected.gaps, atol=2e-4)
            np.testing.assert_allclose(branch.log_prob, sum(expected.log_probs), atol=1e-3)
            whys[branch.dropped] += 1
            assert (branch.dropped is not None) == expected.dropped
            assert branch.first_token == "".join(TOKENIZER.token_text(token) for token in expected.tokens[:1])
            if not expected.dropped:
                assert branch.answer == str(int(expected.digits[0]))
                assert branch.span == expected.digits.span()
                assert branch.delta == pytest.approx(expected.score("delta"), abs=2e-4)
        counting = [branch for branch in naive if not branch.dropped]
        for name, ranking in (RANKINGS | MEASURED).items():
            if name == "p_true" and subject.thinker:
                continue  # it is not asked with a thought
            for index, expected in zip(result.counting, counting, strict=True):
                assert ranking.score(result.branches[index]) == pytest.approx(expected.score(name), rel=1e-4, abs=1e-4)
            scores = [(branch.score(name), str(int(branch.digits[0]))) for branch in counting]
            assert result.answer(ranking) == (max(scores)[1] if scores else None)
            totals: dict[str, float] = {}
            for score, answer in scores:
                totals[answer] = totals.get(answer, 0.0) + (math.exp(score) if name.endswith("log_prob") else score)
            expected_answer = max(totals, key=lambda answer: totals[answer]) if totals else None
            assert result.answer(ranking, aggregate=True) == expected_answer
    assert whys[None] >= 2 and len(whys) >= 3, f"the test shows less than it should: {whys}"


@pytest.mark.parametrize("subject", ["routed"], indirect=True)
@pytest.mark.nightly
def test_small_batches_give_the_same(subject: Subject, results: list[Branches]) -> None:
    config, asked = GenerationConfig(NEW, branches=K, rows=K), ConfidenceConfig(GROUP, QUESTION)
    rows = cot_decode(subject.generator, PROMPTS, config, NUMBER, encoded=ENCODED, confidence=asked)
    for found, expected in zip(rows, results, strict=True):
        for ours, theirs in zip(found.branches, expected.branches, strict=True):
            assert (ours.completion.text, ours.dropped) == (theirs.completion.text, theirs.dropped)
            assert ours.delta == (None if theirs.delta is None else pytest.approx(theirs.delta, abs=1e-5))
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-5)
            assert ours.p_true == (None if theirs.p_true is None else pytest.approx(theirs.p_true, abs=1e-5))


@pytest.mark.parametrize("subject", ["dense"], indirect=True)
@pytest.mark.nightly
def test_the_branched_token_can_be_left_out_of_delta(subject: Subject, results: list[Branches]) -> None:
    skipped = cot_decode(
        subject.generator, PROMPTS, GenerationConfig(NEW, branches=K), NUMBER, encoded=ENCODED, skip_first=True
    )
    changed = 0
    for found, expected in zip(skipped, results, strict=True):
        for ours, theirs in zip(found.branches, expected.branches, strict=True):
            if theirs.span is None or theirs.span[0] > 0:
                np.testing.assert_equal(ours.delta, theirs.delta)
            else:
                rest = theirs.completion.gaps[1 : theirs.span[1]]
                assert ours.delta == pytest.approx(np.mean(rest) if rest else 0.0)
                changed += 1
    assert changed > 0


@pytest.mark.parametrize("subject", ["routed"], indirect=True)
@pytest.mark.nightly
def test_a_continuation_is_what_the_model_says_after_each_whole_branch(
    subject: Subject, results: list[Branches], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mod_star.decoding.cot.ANSWER_TOKENS", 9)  # the context is small
    found = cot_decode(
        subject.generator, PROMPTS, GenerationConfig(NEW, branches=K), NUMBER, encoded=ENCODED, continuation="=> "
    )
    aligned = 0
    for result, expected, prompt in zip(found, results, ENCODED, strict=True):
        for branch, before in zip(result.branches, expected.branches, strict=True):
            assert branch.completion.tokens == before.completion.tokens
            text = branch.completion.text
            blank = "" if not text or text[-1] == " " else " "
            ids = prompt + branch.completion.tokens + TOKENIZER.encode(f"{blank}=> ")
            said: list[int] = []
            while len(said) < 9 and (not said or said[-1] not in END_IDS):
                said.append(int(np.argmax(subject.log_p(ids + said))))
            assert branch.continuation == TOKENIZER.decode(said)
            numbers = [str(int(each)) for each in re.findall(r"\d+", branch.continuation)]
            places = [m.span() for m in re.finditer(r"\d+", text) if numbers and str(int(m[0])) == numbers[0]]
            assert branch.answer == (numbers[0] if numbers else None)
            assert branch.span == (places[-1] if places else None)
            aligned += branch.span is not None
    assert aligned > 0, "no answer is in its branch: the test shows less than it should"


class Listener:
    """Stands for a `Generator`: keeps what it is asked to go on from."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, texts: list[list[int]], *_: Any, **__: Any) -> list[Generated]:
        self.texts = texts
        return [Generated([], [], True, [], 0, []) for _ in texts]


@pytest.mark.parametrize("cut", [" the 5", " the€ 5 😀", "", " ", "then 5", " the\n"])
@pytest.mark.parametrize("stop", [".", "~ and", "\nQ:", "en."])
def test_what_a_stop_string_leaves_is_continued_as_it_stands(cut: str, stop: str) -> None:
    tokenizer, prompt = sentence_piece(), "Q: 2 + 3?\nA:"
    before = begin(tokenizer, prompt)
    tokens = tokenizer.encode(f"\n{cut}{stop} more")[2:]  # without the line's blank and end
    completion = completion_of(tokenizer, prompt, Generated(tokens, [], False, [], 0, []), 99, (stop,))
    assert (completion.text, completion.finished) == (cut, "stop")
    listener: Any = Listener(tokenizer)
    continue_texts(listener, [before], [completion], "So", GenerationConfig(99))
    (asked,) = listener.texts
    # Where there is no text, the tokenizer itself puts a blank before the continuation.
    blank = "" if cut and cut[-1].isspace() else " "
    assert tokenizer.decode(asked) == f"{prompt}{cut}{blank}So"
    own_blank = ids_continued(tokenizer, before, completion, "\nTrue?", blank=False)
    if cut:  # of an empty branch nothing is asked
        assert tokenizer.decode(own_blank) == f"{prompt}{cut}\nTrue?", "the question of P(True) begins its own line"
    if cut.startswith(" the"):
        assert asked[: len(before) + 1] == [*before, tokens[0]], "tokens before the cut stay as they are"


@pytest.mark.parametrize("subject", ["dense"], indirect=True)
def test_self_consistency_votes_over_independent_samples(subject: Subject) -> None:
    found = self_consistency(
        subject.generator, PROMPTS, GenerationConfig(NEW, Sampling(1.5), branches=K, seed=3), NUMBER, encoded=ENCODED
    )
    plain = subject.generator.generate(ENCODED, GenerationConfig(NEW, Sampling(1.5), seed=3, branches=K))
    for number, result in enumerate(found):
        texts = [TOKENIZER.decode(each.tokens) for each in plain[number * K : (number + 1) * K]]
        assert [branch.completion.text for branch in result.branches] == texts
        assert len(set(texts)) > 3
        votes = Counter(branch.answer for branch in result.branches if branch.dropped is None)
        assert result.votes() == votes
        if votes:
            assert votes[result.majority_answer()] == max(votes.values())
    for sampling in (Sampling(0), Sampling(1, branch=True)):
        with pytest.raises(InputError, match=r"^sampling = Sampling\(.*must draw every token"):
            self_consistency(subject.generator, PROMPTS, GenerationConfig(NEW, sampling), NUMBER, encoded=ENCODED)


def test_answers_to_p_true_must_differ() -> None:
    listener: Any = Listener(TOKENIZER)
    made = completion_of(TOKENIZER, "?", Generated(TOKENIZER.encode("8"), [], True, [], 0, []), NEW)
    for true, false in ((" 1", " 1"), (" 1", " 12")):
        with pytest.raises(InputError, match=r"^p_true = TrueQuestion\(.*must differ in a token"):
            p_true(listener, [[0]], [made], TrueQuestion("?", true, false))
    assert p_true(listener, [], [], QUESTION) == []


@pytest.mark.parametrize("subject", ["dense"], indirect=True)
def test_bad_requests_are_refused_before_anything_is_compiled(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input must be found before anything is compiled")

    monkeypatch.setattr("mod_star.decoding.programs.prefill", compiles)

    def ask(subject: Subject, how: dict[str, Any], finder: Any, own: dict[str, Any]) -> None:
        config = GenerationConfig(**({"new_tokens": NEW} | how))
        cot_decode(subject.generator, PROMPTS, config, finder, encoded=ENCODED, **own)

    room = CONTEXT - 30 - 3 - ANSWER_TOKENS
    question = ConfidenceConfig(p_true=QUESTION)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"branches": VOCAB + 1}, f"branches = {VOCAB + 1}: must be at most the vocabulary, {VOCAB}"),
        ({"branches": 0}, "branches = 0: must be at least 1"),
        ({"new_tokens": 40}, r"prompt 2 = 9 tokens: must have 1 to 8"),
        ({"finder": Phrase()}, "continuation = None: must be given"),
        ({"continuation": " "}, "continuation = ' ': must not be empty"),
        ({"continuation": "=>", "new_tokens": 30}, rf"prompt 1 = 3 tokens: must have at most {max(0, room)} "),
        ({"confidence": question, "new_tokens": 38}, r"prompt 2 = 9 tokens: must have at most 5 .*of the question of"),
        ({"stop": ("",)}, "stop = "),
        ({"stop": "."}, "stop = '.': must be a tuple of texts"),
        ({"sampling": Sampling(0.7)}, r"sampling = Sampling\(.*must be left out"),
        ({"rows": K - 1, "branches": K}, f"rows = {K - 1}: must be at least the number of branches, {K}"),
        ({"think": Think("always")}, "think.when = 'always': must be never"),
    ]
    for change, message in cases:
        own: dict[str, Any] = {name: change[name] for name in ("continuation", "confidence") if name in change}
        finder = change.get("finder", NUMBER)
        how = {name: value for name, value in change.items() if name not in ("continuation", "confidence", "finder")}
        with pytest.raises(InputError, match=f"^{message}"):
            ask(subject, how, finder, own)


def test_a_continuation_ends_at_stop_strings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a base model asks itself next is no answer."""
    made = Generated(TOKENIZER.encode("8 9"), [-0.1] * 3, True, [], 0, [0.5] * 3, -0.1, 0.5)
    completions = [completion_of(TOKENIZER, "?", made, NEW)] * 2
    generator: Any = Listener(TOKENIZER)  # what it would be asked for is given here
    for stop, answers in ((("\nQ:", "never"), ["8", None]), ((), ["8", "9"])):
        monkeypatch.setattr("mod_star.decoding.cot.continue_texts", lambda *_: [" 8\nQ: 9", " \nQ: 9, never"])
        config = GenerationConfig(NEW, branches=2, stop=stop)
        (found,) = read_branches(generator, completions, config, NUMBER, [[0]], Reading("So"))
        assert [branch.answer for branch in found.branches] == answers
