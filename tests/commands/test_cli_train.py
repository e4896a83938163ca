"""`mod-star train` as a user meets it: real processes, their output and exit codes."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from fault_runs import options
from fork_server import succeed

from mod_star import presets
from mod_star.cli import main
from mod_star.config import MeshConfig, ProcessesConfig, RunConfig, to_dict
from mod_star.config_checks import field_ranges
from mod_star.runs.directory import load_run, read_config
from mod_star.runs.metrics import read_metrics

COMMAND = [sys.executable, "-m", "mod_star"]
# Such that a process that imports JAX all the same fails.
WITHOUT_JAX = "import sys; sys.modules['jax'] = None; from mod_star.cli import main; main(sys.argv[1:])"


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WITHOUT_JAX, *argv]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(["train", *argv])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def test_help_needs_no_jax_and_names_every_field() -> None:
    top = call("--help")
    assert top.returncode == 0 and "mod-star train runs/first" in top.stdout
    found = call("train", "--help")
    assert found.returncode == 0, found.stderr
    for group, fields in to_dict(RunConfig()).items():
        if isinstance(fields, dict):
            assert f"{group} options" in found.stdout
            for name in fields:
                assert f"--{group}.{name.replace('_', '-')}" in found.stdout
    for option in ("--parts", "--init-from"):  # named once, examples apart
        assert len(re.findall(rf"^│ {option} ", found.stdout, re.MULTILINE)) == 1
    # The help shows the defaults of the preset that is asked for.
    tiny = " ".join(call("train", "--preset", "tiny", "--help").stdout.replace("│", " ").split())
    assert "--model.width INT Width D of the residual stream. (at least 1; default: 32)" in tiny


def test_help_shows_every_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    groups = {field.name: type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
    groups |= {"mesh": MeshConfig, "processes": ProcessesConfig}
    options = {
        f"--{group}.{name.replace('_', '-')}": allowed.text
        for group, kind in groups.items() if dataclasses.is_dataclass(kind)
        for name, allowed in field_ranges(kind).items()
    }  # fmt: skip
    assert len(options) > 50
    for option, text in options.items():
        own_help = re.split(r" --\w", words.rpartition(f" {option} ")[2])[0]
        assert f" ({text}; default: " in own_help, option


def test_options_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for argv, message in (
        ([run, "--model.widht", "3"], "unknown option --model.widht; perhaps you meant --model.width;"),
        ([run, "--model.width", "wide"], "--model.width: invalid literal for int"),
        ([run, "--routing.gate", "relu"], "'relu' for argument '--routing.gate'. Expected one of ('sigmoid',"),
        ([run, "--model.kv_heads"], "missing value for argument '--model.kv-heads'"),
        ([run, "--preset", "huge"], "--preset = 'huge': must be one of tiny, small, base"),
        ([run, "--routing.capacity", "1.5"], "routing.capacity = 1.5: must lie in (0, 1]"),
        ([run, "--model.heads", "3"], "model.heads = 3: must divide model.width = 256"),
        ([run, "--model.layers", "5"], "model.layers = 5: must be a multiple of routing.every = 2"),
        ([run, "twice"], "unknown option twice"),
        ([], "RUN is missing"),
    ):
        assert message in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_underscores_hyphens_and_presets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr("mod_star.training.train.train", lambda run, directory, **_: seen.append((run, directory)))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    argv = "train runs/x --preset=tiny --model.kv_heads 1 --model.head-dim 8 --data.pack False --data.source a b"
    with pytest.raises(SystemExit) as left:
        main([*argv.split(), "--train.flops", "1e15"])
    assert left.value.code == 0
    (run, directory) = seen[0]
    tiny = presets.tiny()
    assert directory == Path("runs/x")
    assert (run.model.kv_heads, run.model.head_dim, run.model.width) == (1, 8, tiny.model.width)
    assert (run.data.pack, run.data.source, run.train.flops) == (False, ("a", "b"), 1e15)
    assert run.optimizer == tiny.optimizer


@pytest.mark.nightly
def test_a_run_to_start_from_gives_the_defaults(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("mod_star.training.train.train", lambda run, *_, **__: seen.append(run))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    for words in (f"new --init-from {trained_run}", f"--init_from={trained_run} new"):
        with pytest.raises(SystemExit) as left:
            main(["train", *words.split(), "--train.steps", "3"])
        assert left.value.code == 0
    stored = read_config(trained_run)
    assert stored != presets.tiny()
    assert seen == 2 * [replace(stored, init_from=str(trained_run), train=replace(stored.train, steps=3))]
    with pytest.raises(SystemExit):
        main(["train", "new", "--preset", "tiny", "--init-from", "None"])
    assert seen[2] == presets.tiny()

    # Without JAX: help, and what is wrong with the options.
    shown = " ".join(call("train", "--init-from", str(trained_run), "--help").stdout.replace("│", " ").split())
    assert "--model.width INT Width D of the residual stream. (at least 1; default: 16)" in shown
    for words, message in (
        (
            f"--init-from {trained_run} --preset tiny",
            "--preset = 'tiny': cannot be combined with --init-from, whose fields are the",
        ),
        (
            f"--preset=tiny --init-from={trained_run}",
            "--preset = 'tiny': cannot be combined with --init-from, whose fields are the",
        ),
        (f"--init-from {tmp_path}/none", f"{tmp_path}/none: is not a run (there is no such directory)"),
        (f"--init-from={trained_run}/checkpoints", "/checkpoints: is not a run (it has no config.json)"),
        ("--init-from", "missing value for argument '--init-from'"),
        (f"--init-from {trained_run} --model.heads 3", "model.heads = 3: must divide model.width = 16"),
    ):
        found = call("train", "new", *words.split())
        assert (found.returncode, found.stdout) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", found.stderr) and message in found.stderr, found.stderr


@pytest.mark.nightly
def test_starting_from_a_run_that_is_gone_later(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "base")
    # RUN need not come first.
    words = ["--init-from", "base", "fine", "--train.steps", "2", "--optimizer.learning-rate", "1e-4"]

    def trained(*more: str) -> str:
        done = succeed("train", *words, *more, before=f"os.chdir({str(tmp_path)!r})")
        assert done.err == ""
        return done.out

    refused = error_of(capsys, *words, "--model.width", "24")
    assert "model.width = 24: must be 16; model.head_dim = 12: must be 8, as in init_from = 'base'" in refused
    assert not Path("fine").exists()
    assert "fine starts from base (step 12): " in trained()
    assert load_run("fine").config.init_from == "base"

    # The same command is the same run, whatever becomes of the other one.
    config = Path("base/config.json")
    config.write_text(config.read_text().replace('"batch_size": 4', '"batch_size": 2'))
    assert "fine: is complete already" in trained()
    shutil.rmtree("base")
    assert "fine goes on from step 0: " in trained("--resume-from", "0")
    assert "train.batch_size: 4 → 8" in error_of(capsys, *words, "--train.batch-size", "8")


def test_unknown_command() -> None:
    found = call("trian")
    assert found.returncode == 2
    assert found.stderr.startswith("error: unknown command 'trian'; perhaps you meant train;")


def test_bad_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("42")
    before = sorted(tmp_path.rglob("*"))
    run = str(tmp_path / "run")
    for argv, message in (
        ([run, "--data.source", str(broken)], "broken.jsonl"),
        ([run, "--data.source", str(tmp_path / "none.txt")], "none.txt"),
        ([run, "--data.tokenizer", "none.json"], "none.json"),
        ([run, "--model.context", "100000000"], "context"),
        ([str(tmp_path / "thesis")], "neither empty nor a run"),
        ([str(broken)], "must be a directory, and is a file"),
        ([run, "--resume-from", "3"], "is not a run yet"),
    ):
        assert message in error_of(capsys, "--preset", "tiny", *argv)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.nightly
def test_sigterm_and_the_same_command_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(**{"steps": 300, "log-every": 20, "eval-every": 100, "checkpoint-every": 200})
    words = {name: ["train", str(tmp_path / name), *given] for name in ("straight", "stopped")}
    assert succeed(*words["straight"]).err == ""  # first, so that its steps are there for the others

    process = subprocess.Popen(
        ["nice", *COMMAND, *words["stopped"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step" in line and "loss" in line:  # the first step is done
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    said = re.fullmatch(r"SIGTERM: stopped after step (\d+) of 300, all of it saved. Go on with: (.+)\n", err)
    assert said, err
    assert said[2] == f"mod-star {' '.join(words['stopped'])}"
    assert load_run(tmp_path / "stopped").step == int(said[1]) < 300

    # Meanwhile another configuration is refused there, with the difference.
    message = error_of(capsys, *words["stopped"][1:], "--train.seed", "1")
    assert "holds a run of another configuration: train.seed: 0 → 1" in message

    done = succeed(*words["stopped"])
    assert done.err == "" and f"goes on from step {said[1]}:" in done.out
    records = [
        [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_metrics(tmp_path / name)]
        for name in words
    ]
    assert records[0] == records[1]
    stopped, straight = (load_run(tmp_path / name) for name in words)
    assert stopped.step == straight.step == 300
    chex.assert_trees_all_equal(stopped.params, straight.params)


def test_ctrl_c_outside_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mod_star.commands.train.run", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["train"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "aborted; what was saved before is kept\n"


def test_ctrl_c_that_jax_makes_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        """Compares to another as if someone pressed Ctrl-C meanwhile."""

        def __hash__(self) -> int:
            return 0

        def __eq__(self, other: object) -> bool:
            signal.raise_signal(signal.SIGINT)
            return True

    def compare(*_: object) -> None:
        program = jax.jit(lambda _: jnp.zeros(()), static_argnums=0)
        for _number in range(3):  # the first compiles, later ones compare
            program(Interrupting())

    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("mod_star.commands.train.run", compare)
    with pytest.raises(SystemExit) as left:
        main(["train"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "aborted; what was saved before is kept\n"
    assert signal.getsignal(signal.SIGINT) is usual
