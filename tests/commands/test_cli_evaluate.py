"""`mod-star evaluate` as a user meets it: a real process, interrupted and gone on with; and every error in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fork_server import shared_server, succeed

from mod_star.cli import main
from mod_star.decoding.answers import HarnessNumber
from mod_star.errors import InputError
from mod_star.evaluation.intervals import accuracy
from mod_star.evaluation.records import require_evaluation
from mod_star.inspection.calibration import Calibration, write_calibration

OPTIONS = (
    "--question", "{q}", "--answer", "{a}", "--kind", "number", "--limit", "60", "--decoding", "self-consistency",
    "--branches", "2", "--new-tokens", "40", "--temperature", "1.5", "--seed", "1", "--batch-size", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"{n} + {n}?", "a": 2 * n}) for n in range(80)))
    return path


def records_of(out: Path) -> dict[str, Any]:
    """By id; without the time that they took."""
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().split("\n")[:-1]]
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


@pytest.mark.nightly
def test_an_interrupted_evaluation_goes_on_to_the_same_records(trained_run: Path, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = succeed("evaluate", trained_run, "--data", data, *OPTIONS, "--out", whole)
    out, err = done.out, done.err
    expected = records_of(whole)
    assert len(expected) == 60
    results = json.loads((whole / "results.json").read_text())
    right = [record["correct"] for record in expected.values()]
    estimate = accuracy(right)
    assert results["measures"]["self-consistency"] == pytest.approx(
        {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": 60}
    )
    assert results["config"]["--branches"] == 2 and results["items"] == 60
    assert re.search(r"self-consistency +\d+\.\d % +\d+\.\d – \d+\.\d", out), out
    assert "one sample" in out and "60 of 60  self-consistency: " in err
    for record in expected.values():
        assert record["prompt"].startswith("Q: ") and record["prompt"].endswith("?\nA:")
        assert record["gold"] == str(2 * int(record["prompt"][3:].split(" ")[0]))
        assert len(record["branches"]) == 2
        assert record["correct"] == (record["answer"] == record["gold"])

    records = parts / "records.jsonl"
    for _ in range(5):  # it may be faster than this process, on a machine with much else to do
        shutil.rmtree(parts, ignore_errors=True)
        process = shared_server().start(
            "evaluate", trained_run, "--data", data, *OPTIONS, "--out", parts, before="os.nice(10)"
        )
        process.wait_for(lambda: records.exists() and os.path.getsize(records) > 0)
        process.send(signal.SIGINT)
        stopped = process.wait()
        if stopped.code != 0:
            break
    assert stopped.code == 130 and "what was saved before is kept" in stopped.err, stopped.err
    kept = records_of(parts)
    assert 0 < len(kept) < 60 and not (parts / "results.json").exists()
    with (parts / "records.jsonl").open("a") as file:  # as if it had been killed while it wrote
        file.write('{"id": "80", "corr')
    resumed = succeed("evaluate", trained_run, "--data", data, *OPTIONS, "--out", parts)
    assert f"{len(kept)} of 60 questions are done already" in resumed.out
    assert records_of(parts) == expected
    strip = lambda path: {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}  # noqa: E731
    assert strip(parts / "results.json") == strip(whole / "results.json")


@pytest.mark.nightly
def test_likelihood_protocols_and_thinking(
    thinking_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mod_star.commands.evaluate.keep_compiled_programs", lambda: None)  # it would stay set
    data = tmp_path / "words.jsonl"
    data.write_text("\n".join(json.dumps({"q": f"{n}?", "a": "no" if n % 3 else "yes"}) for n in range(6)))
    words = ("--data", data, "--question", "{q}", "--answer", "{a}", "--kind", "choice", "--choices", "yes", "no")
    scores = {}
    for protocol, think in (("choice", "never"), ("choice", "always"), ("expected", "never")):
        out = tmp_path / f"{protocol}-{think}"
        argv = [thinking_run, *words, "--protocol", protocol, "--think", think, "--out", out]
        with pytest.raises(SystemExit) as left:
            main(["evaluate", *map(str, argv)])
        shown = capsys.readouterr()
        assert left.value.code == 0, shown.err
        assert "words, 6 questions" in shown.out
        scores[protocol, think] = [
            record.get("log_likelihoods", record["scores"]) for record in records_of(out).values()
        ]  # fmt: skip
    assert scores["choice", "never"] != scores["choice", "always"], "thoughts change what is said"
    assert all(0 < each["expected probability"] < 1 for each in scores["expected", "never"])
    out = tmp_path / "batch"
    argv = [thinking_run, *words, "--protocol", "choice", "--budget-over", "batch", "--out", out]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, argv)])
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    overflow = sum(record["overflow"] for record in records_of(out).values())
    assert overflow > 0, "slots were never all taken: the test shows less than it should"
    assert f"note: {overflow} times a token passed by because all slots of a batch were taken" in shown.err


@pytest.mark.nightly
def test_another_calibration_is_another_evaluation(
    thinking_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("keep_compiled_programs", "_ask", "report"):  # what is asked doesn't matter here
        monkeypatch.setattr(f"mod_star.commands.evaluate.{name}", lambda *_: None)
    run, data = tmp_path / "run", tmp_path / "words.jsonl"
    shutil.copytree(thinking_run, run)
    data.write_text(json.dumps({"q": "1?", "a": "no"}))
    words = ("--data", data, "--question", "{q}", "--answer", "{a}", "--kind", "choice", "--choices", "yes", "no")
    argv = (run, *words, "--protocol", "choice", "--think", "auto", "--out", tmp_path / "out")
    write_calibration(run, Calibration(1.25, 0.5, 0.48, 3, 1000))
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(["evaluate", *map(str, argv)])
        assert left.value.code == 0, capsys.readouterr().err
    write_calibration(run, Calibration(1.5, 0.25, 0.26, 3, 1000))
    capsys.readouterr()
    assert "another configuration: think_threshold: 1.25 → 1.5\n" in error_of(capsys, *argv)


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What it says on stderr."""
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, argv)])
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    return shown.err


NUMBERS = ("--question", "{q}", "--answer", "{a}", "--kind", "number")


@pytest.mark.nightly
def test_beams_end_at_stop_strings_and_are_ranked_by_their_mean(
    trained_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mod_star.commands.evaluate.keep_compiled_programs", lambda: None)
    beam = (trained_run, "--data", data, *NUMBERS, "--limit", "3", "--decoding", "beam", "--branches", "3")
    evaluate(capsys, *beam, "--new-tokens", "12", "--out", tmp_path / "free")
    texts = [branch["text"] for record in records_of(tmp_path / "free").values() for branch in record["branches"]]
    (stop, _), *_ = Counter(text[5] for text in texts if len(text) > 5).most_common(1)
    stops = ("--new-tokens", "12", "--stop", stop, "--stop", "QZ")
    evaluate(capsys, *beam, *stops, "--out", tmp_path / "a")
    evaluate(capsys, *beam, *stops, "--length-penalty", "0", "--out", tmp_path / "b")
    ends = []
    for name, score in (("a", "normalised_log_prob"), ("b", "log_prob")):
        for record in records_of(tmp_path / name).values():
            scores = [branch[score] for branch in record["branches"]]
            assert scores == sorted(scores, reverse=True), "nothing after a stop string is in its score"
            for branch in record["branches"]:
                assert stop not in branch["text"]
                ends.append((branch["finished"], branch["tokens"] < 12))
    assert ("stop", True) in ends
    config = json.loads((tmp_path / "b" / "results.json").read_text())["config"]
    assert config["--length-penalty"] == 0 and config["stop strings"] == [stop, "QZ"]


def test_defaults_that_belong_to_the_template_and_the_context_are_told(
    trained_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mod_star.commands.evaluate._ask", lambda *given: asked.append(given))
    for name in ("keep_compiled_programs", "report"):
        monkeypatch.setattr(f"mod_star.commands.evaluate.{name}", lambda *_: None)
    run = (trained_run, "--data", data, *NUMBERS, "--limit", "3", "--new-tokens", "5")
    for number, (options, stop, note) in enumerate(
        (
            ((), ("\nQ:",), r'texts end at "\nQ:" ('),
            (("--prompt-template", "Question: {question}\nAnswer:"), ("\nQuestion:",), r'end at "\nQuestion:" ('),
            (("--prompt-template", "{question} ="), (), "texts end at end tokens only ("),
            (("--prompt-template", "{question} =", "--few-shot", "2"), ("\n\n",), r'texts end at "\n\n" ('),
            (("--stop", "x"), ("x",), None),
        )
    ):
        err = evaluate(capsys, *run, *options, "--out", tmp_path / str(number))
        _, protocol, *_ = asked.pop()
        assert protocol.stop == stop
        assert err == "" if note is None else (note in err and err.count("\n") == 1)
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["stop strings"] == list(stop)
    err = evaluate(capsys, *run[:-2], "--out", tmp_path / "room")
    room = asked.pop()[1].new_tokens
    assert 30 < room < 64 and f"at most {room} new tokens, all that the context has room for" in err

    worked = tmp_path / "worked.jsonl"
    worked.write_text("\n".join(json.dumps({"question": f"{n}?", "answer": f"<<{n}>>\n#### {n}"}) for n in range(3)))
    strict = ("--task", "gsm8k", "--few-shot", "1", "--limit", "1", "--answer-rule", "gsm8k-strict")
    evaluate(capsys, trained_run, "--data", worked, *strict, "--out", tmp_path / "strict")
    subject, protocol, *_ = asked.pop()
    assert protocol.rule == HarnessNumber("strict")
    assert re.fullmatch(r"<<\d>>\n#### \d", subject.prompts.examples[0].solution), "as published"


@pytest.mark.nightly
def test_confidences_are_counted_and_early_stops_replayed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained_run: Path, data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("mod_star.commands.evaluate.keep_compiled_programs", lambda: None)  # it would stay set
    few = ("--limit", "8", "--branches", "3", "--batch-size", "8", "--new-tokens", "30", "--stop", " ")
    asked = ("--confidence", "--early-stop", "1", "--window", "2", "--vote-temperature", "0.5", "--keep", "0.7")
    argv = [trained_run, "--data", data, *OPTIONS, *few, *asked, "--out", tmp_path]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, argv)])
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    results = json.loads((tmp_path / "results.json").read_text())
    weighed = [f"self-consistency, {name}" for name in ("Δ", "mean confidence", "bottom 10 % of groups", "tail")]
    assert {"self-consistency", "self-consistency, stopped early", "any branch right", *weighed} < set(
        results["measures"]
    )
    assert results["measures"]["any branch right"]["n"] == 8
    records = list(records_of(tmp_path).values())
    saved = sum(record["tokens"] - record["tokens_early"] for record in records)
    assert results["early_stop"]["tokens saved"]["value"] == pytest.approx(
        saved / sum(record["tokens"] for record in records)
    )
    assert saved > 0 and "tokens saved" in shown.out and "accuracy gained" in shown.out
    for record in records:
        assert record["tokens"] == sum(each["tokens"] for each in record["branches"])
        assert all(each["confidence"]["lowest_group"] > 0 for each in record["branches"] if each["tokens"])


def test_an_option_that_an_old_evaluation_did_not_have_was_not_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"--limit": 5}')
    for not_given in (None, False):
        require_evaluation(tmp_path, {"--limit": 5, "--new": not_given})
    with pytest.raises(InputError, match=r"another configuration: --new: none → 1$"):
        require_evaluation(tmp_path, {"--limit": 5, "--new": 1})


def error_of(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, argv)])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


@pytest.mark.slow
def test_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained_run: Path, data: Path, tmp_path: Path
) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input must be found before anything is compiled")

    monkeypatch.setattr("mod_star.decoding.programs.prefill", trace)
    monkeypatch.setattr("mod_star.commands.evaluate.keep_compiled_programs", lambda: None)
    good = ("--question", "{q}", "--answer", "{a}", "--kind", "number", "--new-tokens", "12")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for argv, message in (
        ((), "--question is missing: give --task, or --question, --answer and --kind"),
        (("--question", "{q}"), "--answer is missing"),
        (("--task", "gsm8k"), "sums.jsonl, line 1: field 'answer' is missing, there are 'q', 'a'"),
        (("--task", "gsm8k", "--kind", "number"), "--kind: cannot be combined with --task"),
        (("--task", "gsm9k"), "--task"),
        ((*good, "--question", "{p}"), "sums.jsonl, line 1: --question names 'p', the record has fields q, a"),
        ((*good, "--temperature", "1"), "--temperature: cannot be combined with --decoding greedy"),
        ((*good, "--decoding", "self-consistency", "--temperature", "0"), "--temperature = 0.0: must be above 0"),
        (
            (*good, "--length-penalty", "1"),
            "--length-penalty: cannot be combined with --decoding greedy, only with beam",
        ),
        ((*good, "--decoding", "beam", "--length-penalty", "-1"), "length_penalty = -1.0: must be at least 0"),
        ((*good[:-4], "--kind", "text", "--answer-rule", "gsm8k-strict"), "--answer-rule: finds numbers; the answers"),
        (
            (*good, "--protocol", "expected", "--answer-rule", "gsm8k-strict"),
            "--new-tokens: cannot be combined with --pro",
        ),
        ((*good, "--decoding", "cot", "--continuation", " "), "--continuation = ' ': must not be empty"),
        ((*good, "--confidence"), "--confidence: cannot be combined with --decoding greedy, only with self-consis"),
        ((*good, "--decoding", "cot", "--p-true"), "--p-true = True: needs --confidence"),
        ((*good, "--decoding", "cot", "--window", "9"), "--window = 9: needs --confidence"),
        ((*good, "--decoding", "cot", "--keep", "2"), "--keep = 2.0: must lie in (0, 1]"),
        ((*good, "--decoding", "self-consistency", "--early-stop", "4"), "--early-stop = 4: needs --confidence"),
        (
            (*good, "--decoding", "self-consistency", "--early-stop", "0", "--continuation", "So"),
            "--early-stop = 0: must be positive with --continuation",
        ),
        ((*good, "--decoding", "cot", "--branches", "5000"), "--branches = 5000: must be at most the vocabulary"),
        ((*good, "--protocol", "choice"), "--new-tokens: cannot be combined with --protocol choice"),
        ((*good, "--limit", "0"), "--limit = 0: must be positive"),
        ((*good, "--budget-over", "batch"), "--budget-over = 'batch': needs --protocol choice or expected"),
        ((*good, "--budget-over", "row"), "--budget-over"),
        (
            (*good[:-2], "--protocol", "expected", "--budget-over", "batch", "--think", "always"),
            "--budget-over = 'batch': cannot be combined with --think",
        ),
        ((*good, "--new-tokens", "60"), "item '1' = 13 tokens with its prompt: must be at most 4 (context 64 minus 60"),
        ((*good, "--chat"), "--chat: the model's tokenizer has no chat template"),
        ((*good, "--prompt-template", "Q:"), "--prompt-template = 'Q:': it names no field"),
        ((*good, "--few-shot", "3"), "--few-shot = 3: there are only 0 questions in"),
        ((*good, "--few-shot", "1", "--few-shot-data", "none.jsonl"), "none.jsonl: cannot be read"),
        ((*good, "--think", "always"), "--think = 'always'"),
        ((*good, "--out", str(tmp_path / "full")), "is neither empty nor an evaluation"),
        ((*good, "--step", "7"), "7"),
        ((*good, "--batch-size", "0"), "--batch-size = 0: must be at least 1"),
        ((*good, "--seed", "-1"), "--seed = -1: must lie in [0, 2^31)"),
        ((*good, "--decodin", "cot"), "unknown option --decodin; perhaps you meant --decoding"),
    ):
        assert message in error_of(capsys, trained_run, "--data", data, *argv), argv
    assert "none.jsonl: cannot be read" in error_of(capsys, trained_run, "--data", "none.jsonl", *good)
    assert "is not a run" in error_of(capsys, tmp_path / "none", "--data", data, *good)
    assert not (trained_run / "evaluations").exists() and len(list((tmp_path / "full").iterdir())) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"--limit": 5}')
    error = error_of(capsys, trained_run, "--data", data, *good, "--out", tmp_path / "other")
    assert "holds an evaluation of another configuration: --limit: 5 → null; --run: none → " in error


@pytest.mark.slow
def test_an_evaluation_that_was_moved_goes_on(
    trained_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first" / "run", tmp_path / "second" / "run"
    shutil.copytree(trained_run, first)
    few = ("--question", "{q}", "--answer", "{a}", "--kind", "number", "--limit", "2", "--new-tokens", "2")

    def evaluate(run: Path, file: Path, *more: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["evaluate", str(run), "--data", str(file), *few, "--batch-size", "1", *more])
        out, err = capsys.readouterr()
        return out if left.value.code == 0 else err

    evaluate(first, data)
    (out,) = (first / "evaluations").iterdir()
    records = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(records[0])
    first.parent.rename(second.parent)
    shutil.copy(data, second.parent / data.name)
    assert "1 of 2 questions are done already" in evaluate(second, second.parent / data.name)
    moved = second / "evaluations" / out.name
    texts = [
        [json.loads(line) | {"seconds": 0} for line in lines] for lines in (records, (moved / "records.jsonl").open())
    ]
    assert texts[0] == texts[1]
    # Other questions, and other parameters, are another evaluation.
    (second.parent / data.name).write_text(data.read_text() + "\n")
    refused = evaluate(second, second.parent / data.name)
    assert "another configuration: " in refused and "data_sha256: " in refused
    refused = evaluate(second, data, "--step", "6")
    assert "--step: 12 → 6" in refused and "checkpoint_sha256: " in refused
