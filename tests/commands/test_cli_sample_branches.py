"""`mod-star sample --decoding cot, self-consistency, beam, greedy`: what is written, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.decoding import Completion
from mod_star.decoding.answers import EVEN_ODD, HarnessNumber, LastNumber, Phrase
from mod_star.decoding.branches import Branches, read_branch


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mod_star.commands.sample.keep_compiled_programs", lambda: None)  # it would stay set


def sample(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[str, str]:
    with pytest.raises(SystemExit) as left:
        main(["sample", *map(str, argv)])
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    return out, err


def branch(text: str, gap: float) -> Any:
    made = Completion(
        prompt="How many?", text=text, tokens=[ord(c) for c in text], log_probs=[-0.1] * len(text), finished="end",
        routed_fraction=[], overflow=0, gaps=[gap] * len(text), starts=list(range(len(text))), end_log_prob=-0.1,
        end_gap=0.5,
    )  # fmt: skip
    return read_branch(made, text[:1], LastNumber())


class Asked:
    """Stands for `cot_decode`: five wins by its sum, seven by its best branch."""

    def __call__(self, *args: Any, **options: Any) -> list[Branches]:
        self.args, self.options = args, options
        made = [branch("It is 5.", 0.4), branch("Is it?", 0.9), branch("Say 7.", 0.6), branch("5 it is", 0.3)]
        return [Branches("How many?", made)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr("mod_star.commands.sample_branches.cot_decode", found)
    return found


COT = ("--prompt", "How many?", "--decoding", "cot")


def test_the_text_that_won(capsys: pytest.CaptureFixture[str], trained_run: Path, asked: Asked) -> None:
    out, err = sample(capsys, trained_run, *COT)
    assert out == "How many?Say 7.\n"
    assert "max path   7  branch 2, Δ 0.600\naggregated 5  ΣΔ 0.700 of 2 branches\n" in err
    assert asked.args[2].branches == 10 and asked.options["continuation"] is None
    out, _ = sample(capsys, trained_run, *COT, "--aggregate", "--branches", "4", "--new-tokens", "9", "--stop", "Q:")
    assert out == "How many?It is 5.\n"
    config = asked.args[2]
    assert (config.branches, config.stop, config.new_tokens) == (4, ("Q:",), 9)
    assert (asked.args[1], asked.args[3]) == (("How many?",), LastNumber())
    out, _ = sample(
        capsys, trained_run, *COT, "--ranking", "normalised-log-prob", "--answer", "even-odd", "--skip-first"
    )
    assert out == "How many?It is 5.\n", "all are equal, the first wins"
    assert asked.args[3] == EVEN_ODD and asked.options["skip_first"]
    sample(capsys, trained_run, *COT, "--answer", "gsm8k-flexible")
    assert asked.args[3] == HarnessNumber("flexible")


MINE = """
def last_word(text):
    start = text.rstrip(" .?").rfind(" ") + 1
    return (start, len(text.rstrip(" .?"))) if text.strip() else None

def early(branch):
    return 0.0 if branch.span is None else 1 / (1 + branch.span[0])

number = 5
"""


def test_a_finder_and_a_ranking_of_the_users(
    capsys: pytest.CaptureFixture[str], trained_run: Path, asked: Asked, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    out, err = sample(capsys, trained_run, *COT, "--answer", f"{file}:last_word", "--ranking", f"{file}:early")
    finder = asked.args[3]
    assert finder.canonical("Say  seven.") == "seven" and finder.canonical(" ") is None
    assert out == "How many?5 it is\n", "the branch whose answer comes first"
    assert "max path   5  branch 3, early 1.000\naggregated 5  Σ early 1.143 of 2 branches\n" in err
    record = json.loads(sample(capsys, trained_run, *COT, "--json", "--ranking", f"{file}:early")[0])
    assert record["ranking"] == "early" and [each["early"] for each in record["branches"]][3] == 1.0
    assert "must be a Finder, or a function" in error_of(capsys, trained_run, *COT, "--answer", f"{file}:number")
    assert "must be a function from a branch" in error_of(capsys, trained_run, *COT, "--ranking", f"{file}:number")


def test_the_table(
    capsys: pytest.CaptureFixture[str], trained_run: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        out, _ = sample(capsys, trained_run, *COT, "--show-branches")
        lines = out.splitlines()
        assert lines[0] == "How many?" and max(map(len, lines)) <= width
        assert ["2", "S", "7", "0.600", "max", "Say", "7."] in [line.split() for line in lines]
        assert "ends in a question mark: Is it?" in out
        assert "aggregated 5  ΣΔ 0.700 of 2 branches" in lines


def test_json(capsys: pytest.CaptureFixture[str], trained_run: Path, asked: Asked) -> None:
    for options, answer in (((), "7"), (("--aggregate",), "5")):
        out, err = sample(capsys, trained_run, *COT, "--json", *options)
        record = json.loads(out)
        assert err == ""
        assert record["answer"] == answer
        assert (record["prompt"], record["max_path"], record["aggregated_answer"]) == ("How many?", 2, "5")
        assert [each["answer"] for each in record["branches"]] == ["5", None, "7", "5"]


def test_any_words_are_found_by_a_continuation(
    capsys: pytest.CaptureFixture[str], trained_run: Path, asked: Asked
) -> None:
    sample(capsys, trained_run, *COT, "--answer", "text", "--new-tokens", "5")
    assert asked.args[3] == Phrase()
    assert asked.options["continuation"] == "So the answer is"
    sample(capsys, trained_run, *COT, "--continuation", "Hence")
    assert asked.options["continuation"] == "Hence"
    # The context is 64: 10 of the prompt with bos, 6 of " Hence", 32 for the answer.
    assert asked.args[2].new_tokens == 64 - 10 - 6 - 32, "the default leaves room for what comes after"


@pytest.mark.nightly
def test_cot_in_a_process(trained_run: Path) -> None:
    """The real thing; a model of 12 steps says nothing, so all that can be asked of it is to be asked right."""
    options = ["--decoding", "cot", "--branches", "3", "--new-tokens", "12", "--stop", "e", "--json"]
    done = succeed("sample", trained_run, "--prompt", "The", "--prompt", "In a list of", *options)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["prompt"] for record in records] == ["The", "In a list of"]
    for record in records:
        firsts = [each["log_probs"][0] for each in record["branches"]]
        assert firsts == sorted(firsts, reverse=True) and len(set(firsts)) == 3
        for each in record["branches"]:
            assert each["dropped"] in (None, "empty", "cut by the length limit", "no answer in it")
            assert each["finished"] in ("stop", "length", "end")
            assert len(each["gaps"]) == len(each["tokens"])


@pytest.mark.nightly
def test_samples_and_beams(capsys: pytest.CaptureFixture[str], trained_run: Path) -> None:
    prompt = ("--prompt", "The", "--new-tokens", "10", "--json")
    record = json.loads(sample(capsys, trained_run, *prompt, "--decoding", "self-consistency", "--branches", "3")[0])
    assert len(record["branches"]) == 3 and record["answer"] == record["majority"]
    assert len({each["text"] for each in record["branches"]}) == 3
    weighed = ("--decoding", "self-consistency", "--branches", "3", "--ranking", "lowest-group", "--keep", "0.7")
    record = json.loads(sample(capsys, trained_run, *prompt, *weighed, "--early-stop", "1", "--window", "2")[0])
    assert record["ranking"] == "lowest_group" and record["answer"] == record["aggregated_answer"]
    for each in record["branches"]:
        assert len(each["confidences"]) == len(each["certainties"]) == len(each["tokens"])
        assert each["lowest_group"] == (each["confidence"] and each["confidence"]["lowest_group"])
    beams = json.loads(sample(capsys, trained_run, *prompt, "--decoding", "beam", "--branches", "3")[0])
    assert len(beams["beams"]) == 3 and beams["text"] == beams["beams"][0]["text"]
    scores = [each["log_prob"] for each in beams["beams"]]
    assert scores == sorted(scores, reverse=True)
    greedy = json.loads(sample(capsys, trained_run, *prompt, "--decoding", "greedy")[0])
    zero = json.loads(sample(capsys, trained_run, *prompt, "--temperature", "0")[0])
    assert greedy == zero
    assert sum(greedy["log_probs"]) <= scores[0] + 1e-4


def error_of(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(["sample", *map(str, argv)])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def test_what_cannot_be(capsys: pytest.CaptureFixture[str], trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input must be found before anything is compiled")

    monkeypatch.setattr("mod_star.decoding.programs.prefill", trace)
    cot, votes = ("--decoding", "cot"), ("--decoding", "self-consistency")
    for argv, message in (
        (("--branches", "3"), "--branches: cannot be combined with --decoding temperature, only with self-cons"),
        ((*cot, "--temperature", "1"), "--temperature: cannot be combined with --decoding cot, only with temperatu"),
        ((*cot, "--top-k", "5"), "--top-k: cannot be combined with --decoding cot, only with temperature, self-"),
        (("--decoding", "greedy", "--answer", "number"), "--answer: cannot be combined with --decoding greedy, only"),
        ((*votes, "--aggregate"), "--aggregate: cannot be combined with --decoding self-consistency, only with cot"),
        ((*votes, "--keep", "0.5"), "--keep = 0.5: needs --ranking: it says which votes weigh more"),
        ((*votes, "--vote-temperature", "1"), "--vote-temperature = 1.0: needs --ranking"),
        ((*votes, "--early-stop", "10"), "--early-stop = 10: must lie in [0, 9] (--branches minus 1)"),
        ((*votes, "--early-stop", "0", "--ranking", "delta"), "--early-stop = 0: must be positive with --ranking"),
        ((*cot, "--early-stop", "2"), "--early-stop: cannot be combined with --decoding cot, only with self-cons"),
        ((*cot, "--vote-temperature", "0"), "--vote-temperature = 0.0: must be at least 1e-6 and finite"),
        ((*cot, "--keep", "0"), "--keep = 0.0: must lie in (0, 1]"),
        ((*cot, "--window", "0"), "--window = 0: must be at least 1"),
        (("--keep", "0.5"), "--keep: cannot be combined with --decoding temperature, only with self-cons"),
        ((*cot, "--length-penalty", "1"), "--length-penalty: cannot be combined with --decoding cot, only with beam"),
        ((*cot, "--aggregate", "--show-branches"), "--aggregate: cannot be combined with --show-branches"),
        ((*cot, "--show-thoughts"), "--show-thoughts: cannot be combined with --decoding cot, only with greedy"),
        ((*votes, "--temperature", "0"), "--temperature = 0.0: must be above 0"),
        ((*cot, "--branches", "0"), "--branches = 0: must be at least 1"),
        ((*cot, "--branches", "1000"), "branches = 1000: must be at most the vocabulary, "),
        (("--decoding", "beam", "--branches", "1000"), "beams = 1000: must be at most the vocabulary, "),
        (("--decoding", "beam", "--length-penalty", "-1"), "length_penalty = -1.0: must be at least 0"),
        ((*cot, "--answer", "colour"), "--answer = 'colour': must be number, yes-no, even-odd, letters, text, gsm"),
        ((*cot, "--answer", "red,"), "--answer = 'red,': options = ('red', ''): must be words"),
        ((*cot, "--continuation", " "), "--continuation = ' ': must not be empty"),
        ((*cot, "--prompt", "x" * 70), "prompt 1 = 71 tokens: must have 1 to 63"),
        ((*cot, "--prompt", "x" * 70, "--answer", "text"), "prompt 1 = 71 tokens: must have at most 14"),
        ((*cot, "--prompt", "x", "--ranking", "p-true"), "of the question of P(True))"),
        ((*cot, "--new-tokens", "64"), "new_tokens = 64: must lie in [1, 63]"),
        (("--chat", "--prompt", "x"), "has no chat template"),
        (("--decoding", "cots"), "--decoding"),
    ):
        assert message in error_of(capsys, trained_run, *argv), argv
