"""From text to text: stop strings, characters spread over tokens, and what is shown while a text grows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from decoding_models import Model
from tokenizers import decoders, models, pre_tokenizers

from mod_star.decoding import (
    Completion,
    Generated,
    GenerationConfig,
    Generator,
    Sampling,
    Think,
    complete,
    encode_prompts,
)
from mod_star.errors import InputError
from mod_star.tokenization import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

BYTES = ByteTokenizer()
END = BYTES.eos_id


class Scripted:
    """Stands for a `Generator`: each row generates a fixed list of tokens."""

    tokenizer = BYTES

    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows
        self.prompts: Sequence[Sequence[int]] = []
        self.seen = [0] * len(rows)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        stop: Callable[[list[Generated]], Sequence[bool]],
    ) -> Iterator[list[Generated]]:
        assert len(self.rows) == len(prompts) * config.rows_per_prompt
        new_tokens, burst, think = config.new_tokens, config.burst or 8, config.think
        self.prompts = prompts
        done = [False] * len(self.rows)
        for until in range(burst, new_tokens + burst, burst):
            self.seen = [seen if end else min(until, new_tokens) for seen, end in zip(self.seen, done, strict=True)]
            results = [self._result(row[:seen], think) for row, seen in zip(self.rows, self.seen, strict=True)]
            told = stop(results)
            yield results
            done = [end or result.finished for end, result in zip(told, results, strict=True)]
            if all(done):
                return

    @staticmethod
    def _result(tokens: list[int], think: Think) -> Generated:
        """A thought of a row that thinks, behind every other token, is the token three times."""
        ended = END in tokens
        tokens = tokens[: tokens.index(END)] if ended else tokens
        result = Generated(
            tokens, [-float(i) for i in range(len(tokens))], ended, [0.5], 1, [float(i) for i in range(len(tokens))]
        )
        if think.when == "never":
            return result
        thoughts = [[token] * 3 if i % 2 else None for i, token in enumerate(tokens)]
        weights = [0.5 if thought else None for thought in thoughts]
        return replace(result, entropies=[float(token) for token in tokens], thoughts=thoughts, mixing_weights=weights)


def run(generator: Any, prompts: Sequence[str], new_tokens: int, **options: Any) -> list[list[Completion]]:
    return list(complete(generator, prompts, GenerationConfig(new_tokens, **options)))


def test_prompts_begin_with_bos_and_an_empty_one_is_bos_alone() -> None:
    assert encode_prompts(BYTES, ["", "é"]) == [[256], [256, 0xC3, 0xA9]]
    generator = Scripted(list(b"abcd"), list(b"efgh"))
    run(generator, ["", "é"], 4)
    assert generator.prompts == [[256], [256, 0xC3, 0xA9]]


@pytest.mark.parametrize("burst", [1, 2, 3, 7, 100])
def test_three_ways_to_finish(burst: int) -> None:
    rows = (b"one|two and so on", b"no end in sight here", b"short")
    generator = Scripted(list(rows[0]), list(rows[1]), [*rows[2], END, *b"xxxxxxxxxxx"])
    bursts = run(generator, ["a", "b", "c"], 16, stop=("|", "never"), burst=burst)
    assert [completion.text for completion in bursts[-1]] == ["one", "no end in sight ", "short"]
    assert [completion.finished for completion in bursts[-1]] == ["stop", "length", "end"]
    assert [bytes(completion.tokens) for completion in bursts[-1]] == [b"one|", b"no end in sight ", b"short"]
    for completion in bursts[-1]:
        assert completion.log_probs == [-float(i) for i in range(len(completion.tokens))]
        assert (completion.routed_fraction, completion.overflow) == ([0.5], 1)
    assert generator.seen[0] <= 4 + burst, "a stopped row goes on to the end of the burst, no further"
    for earlier, later in itertools.pairwise(bursts):
        for before, after in zip(earlier, later, strict=True):
            assert after.text.startswith(before.text), "what was shown stands"
            assert before.finished in (None, after.finished)


@pytest.mark.parametrize("burst", [1, 2, 5])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a\n\nb", ("\n\n",), "a"),
        ("a\nb\n", ("\n\n",), "a\nb\n"),
        ("aab", ("ab", "b"), "a"),
        ("xaabaac", ("aac",), "xaab"),
        ("xyz", ("yz", "xyz", "z"), ""),
        ("é→é!", ("→",), "é"),
        ("stop", ("stop and",), "stop"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, burst: int) -> None:
    tokens = list(text.encode())
    bursts = run(Scripted(tokens), ["p"], len(tokens), stop=stop, burst=burst)
    (last,) = bursts[-1]
    assert last.text == expected
    assert last.finished == ("length" if expected == text else "stop")
    for (completion,) in bursts:
        assert expected.startswith(completion.text), "never a piece of a stop string"


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    ((last,),) = run(Scripted(list(b"|b")), ["a|"], 2, stop=("||",))
    assert (last.text, last.finished) == ("|b", "length")


def test_characters_are_never_cut() -> None:
    tokens = list("aé→𝄞b".encode())
    texts = [completion.text for (completion,) in run(Scripted(tokens), ["p"], len(tokens), burst=1)]
    assert texts == ["a", "a", "aé", "aé", "aé", "aé→", "aé→", "aé→", "aé→", "aé→𝄞", "aé→𝄞b"]
    ((cut,),) = run(Scripted(tokens[:5]), ["p"], 5)
    assert cut.text == "aé\ufffd", "the limit may come in the middle of one"


def test_a_first_word_keeps_its_space(tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "▁hello": 1, "▁world": 2}, unk_token="<s>"))
    plain.add_special_tokens(["<s>"])
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer: Tokenizer = HuggingFaceTokenizer(tmp_path)
    generator: Any = Scripted([2])
    generator.tokenizer = tokenizer
    ((after,),) = complete(generator, ["hello"], GenerationConfig(1, Sampling()))
    ((alone,),) = complete(generator, [""], GenerationConfig(1, Sampling()))
    assert (after.text, alone.text) == (" world", "world")


@pytest.mark.parametrize("burst", [1, 3, 100])
def test_thoughts_stand_beside_the_tokens_they_led_to(burst: int) -> None:
    tokens = list("aé→b|c".encode())
    bursts = run(Scripted(tokens), ["p"], len(tokens), stop=("|",), burst=burst, think=Think("always"))
    for (completion,) in bursts:
        count = len(completion.tokens)
        assert completion.tokens == tokens[:count]
        assert completion.entropies == tokens[:count]
        assert completion.thoughts == [None if i % 2 == 0 else [token] * 3 for i, token in enumerate(tokens)][:count]
        assert completion.mixing_weights == [None if i % 2 == 0 else 0.5 for i in range(count)]
        decoded = [None if thought is None else BYTES.decode(thought) for thought in completion.thoughts]
        assert completion.thought_texts == decoded
        # A token begins where the text ends that those before it have completed.
        assert completion.starts == [0, 1, 1, 2, 2, 2, 3, 4][:count]
    assert len(bursts[-1][0].tokens) == 8, "up to the one that completes the stop string"
    ((never,),) = run(Scripted(tokens[:2]), ["p"], 2)
    assert [*never.thoughts, *never.thought_texts, *never.entropies, *never.mixing_weights] == []


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match=r"stop = \('a', ''\): must not be an empty string"):
        run(Scripted([1]), ["p"], 1, stop=("a", ""))


def test_with_a_real_generator() -> None:
    model = Model({"every": 0, "capacity": 1.0})
    ids = [[1, 2, 3], [4]]

    class Letters(ByteTokenizer):
        """Ids 1 to 26 are letters, 0 starts a text."""

        bos_id = 0

        def encode(self, text: str) -> list[int]:
            return [ord(c) - 96 for c in text]

        def decode(self, ids: Any) -> str:
            return "".join(chr(96 + i) for i in ids if 1 <= i <= 26)

    generator: Generator = model.generator(tokenizer=Letters())
    whole = generator.generate([[0, *row] for row in ids], GenerationConfig(9, Sampling(0)))
    *_, last = complete(generator, ["abc", "d"], GenerationConfig(9, Sampling(0), burst=4))
    for completion, expected in zip(last, whole, strict=True):
        assert completion.tokens == expected.tokens
        assert completion.text == Letters().decode(expected.tokens)
        assert completion.finished == "length"
    stop = Letters().decode(whole[0].tokens[5:7])
    *_, last = complete(generator, ["abc", "d"], GenerationConfig(9, Sampling(0), stop=(stop,), burst=2))
    assert last[0].finished == "stop"
    assert last[0].text == Letters().decode(whole[0].tokens).partition(stop)[0]
