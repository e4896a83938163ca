"""`mod-star sample --think`: what a person sees of thoughts, what a program gets, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.decoding import Completion, Generator
from mod_star.inspection.calibration import (
    calibrated,
    calibration_batches,
    read_calibration,
    scores,
    write_calibration,
)
from mod_star.model.routing import causal_slots
from mod_star.runs.directory import load_run
from mod_star.thinking.decider import expected_gain
from mod_star.tokenization.tokenizers import begin
from mod_star.views.sample import Growing

PROMPT = "The é"
OPTIONS = ("--new-tokens", "16", "--seed", "3", "--temperature", "2")
THOUGHT = re.compile(r"⟨([^⟩]*)⟩")


@pytest.fixture(scope="module")
def run(thinking_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `thinking_run`, calibrated at a step that is not its own."""
    copy = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(thinking_run, copy)
    loaded = load_run(copy)
    found = np.concatenate(list(scores(loaded, calibration_batches(loaded))))
    write_calibration(copy, calibrated(found, 0.5, step=2))
    return copy


def sample(*argv: str | Path) -> tuple[str, str]:
    """What goes to stdout and stderr."""
    done = succeed("sample", *argv, *OPTIONS)
    return done.out, done.err


@pytest.fixture(scope="module")
def auto(run: Path) -> tuple[Any, str]:
    """One prompt's record, and stderr."""
    out, err = sample(run, "--prompt", PROMPT, "--think", "auto", "--json")
    return json.loads(out), err


def test_json_has_thoughts_weights_and_entropies(auto: tuple[Any, str], run: Path) -> None:
    record, _ = auto
    calibration = read_calibration(run)
    assert calibration is not None
    assert record.keys() == {
        "prompt", "text", "tokens", "log_probs", "finished", "routed_fraction", "overflow",
        "entropies", "thoughts", "thought_texts", "mixing_weights",
    }  # fmt: skip
    names = ("log_probs", "entropies", "thoughts", "thought_texts", "mixing_weights")
    assert {len(record[name]) for name in names} == {len(record["tokens"])}
    thought = [entropy > calibration.threshold for entropy in record["entropies"]]
    assert any(thought) and not all(thought), (record["entropies"], calibration.threshold)
    for i, expected in enumerate(thought):
        assert (record["mixing_weights"][i] is not None) == expected
        assert (record["thoughts"][i] is not None) == expected
        if expected:
            assert len(record["thoughts"][i]) == 3
            spelled = bytes(token for token in record["thoughts"][i] if token < 256).decode(errors="replace")
            assert record["thought_texts"][i] == spelled


@pytest.mark.nightly
def test_by_the_decider_it_thinks_where_a_gain_is_expected(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    succeed("calibrate", copy, "--by", "decider", "--share", "0.5")
    calibration = read_calibration(copy)
    assert calibration is not None and calibration.by == "decider"
    record = json.loads(sample(copy, "--prompt", PROMPT, "--think", "auto", "--json")[0])
    loaded = load_run(copy)
    prompt = begin(loaded.tokenizer, PROMPT)
    tokens = np.asarray([*prompt, *record["tokens"]], np.int32)
    slots = causal_slots(loaded.config.routing, loaded.config.model.context)

    @jax.jit
    def gains_of(params: Any) -> jax.Array:
        output: Any = loaded.decoder.apply({"params": params}, tokens, mode="causal", slots=slots)
        return expected_gain(params["thinking"]["decider"], output.hidden)

    gains = np.asarray(gains_of(loaded.params))[len(prompt) - 1 : -1]
    thought = [thought is not None for thought in record["thoughts"]]
    assert thought == list(gains > calibration.threshold) and len({*thought}) == 2, gains


def test_a_calibration_of_another_step_is_pointed_out(auto: tuple[Any, str], run: Path) -> None:
    advice = f"mod-star calibrate {run} renews it"
    assert auto[1] == f"note: the threshold was calibrated at step 2, this is step 3: {advice}\n"


def completion(text: str, starts: list[int], thoughts: list[str | None]) -> Completion:
    N = len(starts)
    ids = [None if thought is None else [1] for thought in thoughts]
    return Completion(
        "x", text, [0] * N, [0.0] * N, None, [0.5], 0, [0.5] * N, entropies=[0.0] * N, thoughts=ids,
        thought_texts=thoughts, mixing_weights=[0.5] * N, starts=starts,
    )  # fmt: skip


@pytest.mark.parametrize("prompts", [1, 2])
def test_thoughts_are_shown_in_a_terminal_or_if_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, thinking_run: Path, prompts: int
) -> None:
    grown = [completion("ab", [0, 1], ["one", None]), completion("abc", [0, 1, 2], ["one", None, "two"])]
    monkeypatch.setattr("mod_star.decoding.complete", lambda *_, **__: iter([[each] * prompts for each in grown]))
    monkeypatch.setattr(Generator, "warm_up", lambda *_: None)
    monkeypatch.setattr("mod_star.commands.sample.keep_compiled_programs", lambda: None)

    def shown(*options: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["sample", str(thinking_run), "--think", "always", *["--prompt", "x"] * prompts, *options])
        assert left.value.code == 0
        out, err = capsys.readouterr()
        assert re.match(rf"{3 * prompts} tokens · \S+ tokens/s · a thought before 66\.7% of them · routed blocks", err)
        return str(out)

    def whole(prompt: str, text: str) -> str:
        return "\n".join([f"{prompt}{text}\n"] * prompts)

    assert shown() == whole("x", "abc")
    assert shown("--show-thoughts") == whole("x", "⟨one⟩ab⟨two⟩c")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dim = "\x1b[2m{}\x1b[22m".format
    assert shown() == whole(dim("x"), f"{dim('⟨one⟩')}ab{dim('⟨two⟩')}c")


def test_growing_text_puts_each_thought_before_what_it_led_to(capsys: pytest.CaptureFixture[str]) -> None:
    growing = Growing(show_thoughts=True)
    # "c" may be the beginning of a stop string, the first byte of "é" shows nothing yet.
    for text, starts, shown in (
        ("ab", [0, 1, 2], "a⟨t\u21b5\u00b7⟩b"),
        ("abc", [0, 1, 2, 3], "⟨c?⟩c"),
        ("abc", [0, 1, 2, 3, 3], ""),
        ("abcé!", [0, 1, 2, 3, 3, 4], "⟨one⟩⟨two⟩é!"),
    ):
        growing.write(completion(text, starts, [None, "t\n\x1b", "c?", "one", "two", None][: len(starts)]))
        assert capsys.readouterr().out == shown
    clean = Growing(show_thoughts=False)
    clean.write(completion("ab", [0, 1], [None, "t"]))
    never = Growing(show_thoughts=True)
    never.write(completion("ab", [0, 1], []))
    assert capsys.readouterr().out == "abab"


def test_bad_ways_of_thinking_are_one_line_before_anything_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, thinking_run: Path, trained_run: Path
) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input must be found before anything is compiled")

    monkeypatch.setattr("mod_star.decoding.programs.prefill", trace)
    monkeypatch.setattr("mod_star.commands.sample.keep_compiled_programs", lambda: None)  # it would stay set
    cannot = f"must be never: {trained_run} has train.objective = 'next_token'"
    for argv, message in (
        ((trained_run, "--think", "always"), f"--think = 'always': {cannot}"),
        ((trained_run, "--think", "auto"), f"--think = 'auto': {cannot}"),
        ((thinking_run, "--think", "auto"), f"needs a threshold; run mod-star calibrate {thinking_run} first"),
        ((thinking_run, "--think", "maybe"), "'maybe' for argument '--think'"),
        ((thinking_run, "--think", "always", "--think-temperature", "-1"), "think.temperature = -1.0: must be 0"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["sample", *map(str, argv)])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert message in err
