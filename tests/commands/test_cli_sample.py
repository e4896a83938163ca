"""`mod-star sample` as a user meets it: real processes against a trained run, and every error in one line."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fork_server import succeed

from mod_star.cli import main

PROMPT = "The é"
OPTIONS = ("--new-tokens", "24", "--seed", "3", "--temperature", "2")


@pytest.fixture(scope="module")
def rows(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What --json gives for a file of two prompts."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text(f'{json.dumps(PROMPT)}\n\n"two\\nlines, longer than the other"\n')
    done = succeed("sample", trained_run, "--prompt-file", file, "--json", *OPTIONS)
    assert done.err == ""
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.mark.slow
def test_json_says_everything_about_each_prompt(rows: list[Any]) -> None:
    assert [row["prompt"] for row in rows] == [PROMPT, "two\nlines, longer than the other"]
    for row in rows:
        assert row.keys() == {"prompt", "text", "tokens", "log_probs", "finished", "routed_fraction", "overflow"}
        assert len(row["tokens"]) == len(row["log_probs"]) == 24 or row["finished"] == "end"
        assert max(row["log_probs"]) < 0
        assert row["text"] == bytes(token for token in row["tokens"] if token < 256).decode(errors="replace")
        assert len(row["routed_fraction"]) == 1
    assert rows[0]["text"] != rows[1]["text"]


@pytest.mark.slow
def test_one_prompt_is_streamed_as_plain_text(trained_run: Path, rows: list[Any]) -> None:
    done = succeed("sample", trained_run, "--prompt", PROMPT, *OPTIONS)
    assert done.out == f"{PROMPT}{rows[0]['text']}\n", "the same row as in a batch"
    shares = ", ".join(f"{share:.1%}" for share in rows[0]["routed_fraction"])
    assert re.match(rf"24 tokens · [\d,]+ tokens/s · routed blocks computed {shares} of the tokens", done.err)
    assert ("had no room for it: see --headroom" in done.err) == (rows[0]["overflow"] > 0)
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_a_terminal_gets_a_dim_prompt_and_no_control_characters(trained_run: Path, rows: list[Any]) -> None:
    ours, theirs = pty.openpty()
    to_the_terminal = f"os.dup2(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY), 1)"
    succeed("sample", trained_run, "--prompt", PROMPT, *OPTIONS, before=to_the_terminal)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    text = "".join(c if c.isprintable() or c in "\n\t" else "·" for c in rows[0]["text"])
    assert shown == f"\x1b[2m{PROMPT}\x1b[22m{text}\n"


@pytest.mark.slow
def test_several_prompts_stand_one_under_the_other_and_end_at_a_stop_string(trained_run: Path, rows: list[Any]) -> None:
    prompts = [word for row in rows for word in ("--prompt", row["prompt"])]
    stop = rows[1]["text"][len(rows[1]["text"]) // 2 :][:1]
    done = succeed("sample", trained_run, *prompts, *OPTIONS, "--stop", "no such text", "--stop", stop)
    texts = [row["prompt"] + row["text"].partition(stop)[0] for row in rows]
    assert done.out == f"{texts[0]}\n\n{texts[1]}\n"


@pytest.mark.nightly
def test_an_older_checkpoint_and_more_headroom_without_a_prompt(trained_run: Path) -> None:
    done = succeed("sample", trained_run, "--step", "6", "--headroom", "4", "--json")
    row = json.loads(done.out)
    assert row["prompt"] == ""
    assert len(row["tokens"]) == 63 or row["finished"] == "end", "it fills the context"
    assert row["overflow"] == 0, "headroom 4 is room for all"


def error_of(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(["sample", *map(str, argv)])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input must be found before anything is compiled")

    monkeypatch.setattr("mod_star.decoding.programs.prefill", trace)
    monkeypatch.setattr("mod_star.commands.sample.keep_compiled_programs", lambda: None)  # it would stay set


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.slow
def test_bad_options_and_prompts(capsys: pytest.CaptureFixture[str], trained_run: Path, tmp_path: Path) -> None:
    empty, broken, latin = (tmp_path / name for name in ("empty.txt", "broken.jsonl", "latin.txt"))
    empty.write_text("\n \n")
    broken.write_text('"fine"\n"broken\n')
    latin.write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "number.jsonl").write_text('"fine"\n\n3\n')
    for argv, message in (
        (("--prompt", "x" * 70), "prompt 1 = 71 tokens: must have 1 to 63 (context 64 minus 1 new tokens)"),
        (("--prompt", "x", "--prompt", "x" * 50, "--new-tokens", "20"), "prompt 2 = 51 tokens: must have 1 to 44"),
        (("--new-tokens", "64"), "new_tokens = 64: must lie in [1, 63]"),
        (("--new-tokens", "0"), "new_tokens = 0: must lie in [1, 63]"),
        (("--temperature", "-1"), "temperature = -1.0: must be 0 (greedy) or at least 1e-6"),
        (("--top-p", "1.5"), "top_p = 1.5: must lie in (0, 1]"),
        (("--min-p", "-1"), "min_p = -1.0: must lie in [0, 1]"),
        (("--top-k", "-1"), "top_k = -1: must be 0 (off) or positive"),
        (("--top-k", "many"), "--top-k: invalid literal for int"),
        (("--seed", "-1"), "--seed = -1: must lie in [0, 2^32)"),
        (("--headroom", "0.5"), "routing.headroom = 0.5: must be at least 1"),
        (("--stop", ""), "--stop = '': must not be empty"),
        (("--step", "7"), "7"),
        (("--promt", "x"), "unknown option --promt; perhaps you meant --prompt"),
        (("--prompt", "x", "--prompt-file", str(empty)), "--prompt-file: give either --prompt or --prompt-file"),
        (("--prompt-file", str(empty)), "empty.txt: is empty"),
        (("--prompt-file", str(tmp_path / "none.txt")), "none.txt: cannot be read (No such file or directory)"),
        (("--prompt-file", str(latin)), "latin.txt, line 2: not valid UTF-8 (byte 0xe9 at 8)"),
        (("--prompt-file", str(broken)), "broken.jsonl, line 2: not valid JSON"),
        (("--prompt-file", str(tmp_path / "number.jsonl")), "number.jsonl, line 3: must be a JSON string"),
        (("--prompt", "\udce9"), "unpaired surrogate"),
    ):
        assert message in error_of(capsys, trained_run, *argv)
    assert "RUN is missing" in error_of(capsys)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_bad_runs(capsys: pytest.CaptureFixture[str], trained_run: Path, tmp_path: Path) -> None:
    assert "is not a run (there is no such directory)" in error_of(capsys, tmp_path / "none")
    assert "is not a run (it has no config.json)" in error_of(capsys, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(trained_run, copy)
    params = copy / "checkpoints" / "12" / "params"  # sampling reads nothing else of it
    largest = max(params.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    error = error_of(capsys, copy)
    assert "checkpoints/12" in error and "--step 6" in error, error
    shutil.rmtree(copy / "checkpoints")
    assert "has no checkpoint yet" in error_of(capsys, copy)
