"""Commands that README and documentation show: their options exist, and they run at a small size or say why not."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import gguf_files
import pytest
import tyro
from fork_server import succeed

from mod_star.cli import COMMANDS
from mod_star.config import RunConfig
from mod_star.runs.directory import created
from mod_star.tokenization import ByteTokenizer

ROOT = Path(__file__).parents[2]
GENERATED = {"configuration", "command_line"}  # of docs/reference, by docs/_ext
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and page.stem not in GENERATED]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```console\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
REASONS = re.compile(r"(the network|a TPU|a TPU's compiler|a GPU|a bucket|a pretrained model) is needed|"
                     r"eight devices are needed|it takes (minutes|hours)")  # fmt: skip
SMALL_MODEL = ("--model.width", "16", "--model.heads", "2")
SMALL_TRAINING = ("--model.context", "64", "--train.batch-size", "2", "--train.eval-batches", "1", "--quiet")


def blocks(page: Path) -> list[tuple[str | None, list[str]]]:
    """(why it is not run, lines) of the console blocks of a page; continued lines are one."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match["reason"], match["text"].replace("\\\n", " ").splitlines()) for match in found]


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word != "..."]


def commands(line: str) -> Iterator[list[str]]:
    """The mod-star commands and the experiments of a line, those that are handed to another program included."""
    words = words_of(line)
    for number, word in enumerate(words):
        if word == "mod-star" or (word == "-m" and words[number + 1].startswith("experiments.")):
            rest = words[number:]
            yield rest[: rest.index("&&")] if "&&" in rest else rest
        elif "mod-star " in word:
            yield from commands(word.partition("=")[2] if word.startswith("--") else word)


ALL = [(page, line) for page in PAGES for _, lines in blocks(page) for line in lines if any(commands(line))]


class Read(BaseException):
    """The options have been read."""


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end when they have read their options; the runs that pages start from are there."""
    cli = tyro.cli

    def read(*args: Any, **options: Any) -> NoReturn:
        cli(*args, **options)
        raise Read

    monkeypatch.setattr(tyro, "cli", read)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "smollm2", "upcycled", "kept"):
        with created(tmp_path / "runs" / name, RunConfig(), ByteTokenizer()):
            pass


@pytest.mark.parametrize(("page", "line"), ALL, ids=lambda value: value.stem if isinstance(value, Path) else None)
def test_options_of_commands_are_known(
    page: Path, line: str, only_read: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for program, name, *options in commands(line):
        if name == "harness":
            continue  # its options are lm_eval's
        if program == "mod-star":
            assert name in COMMANDS
            module = importlib.import_module(f"mod_star.commands.{'import_model' if name == 'import' else name}")
            run = partial(module.run, options)
        else:
            monkeypatch.setattr(sys, "argv", [name, *options])
            is_folder = (ROOT / name.replace(".", "/") / "run.py").is_file()
            run = importlib.import_module(f"{name}.run" if is_folder else name).main
        with pytest.raises(Read):
            run()


def test_an_option_that_is_not_there_is_noticed(only_read: None) -> None:
    with pytest.raises(Exception, match="steppes"):
        importlib.import_module("mod_star.commands.train").run(["runs/x", "--train.steppes", "3"])


def test_what_is_not_run_says_why_and_is_little() -> None:
    reasons = [(page, reason) for page in PAGES for reason, _ in blocks(page) if reason is not None]
    assert [reason for _, reason in reasons if not REASONS.fullmatch(reason)] == []
    of_experiments = Counter(page for page, _ in reasons if page.parent.parent.name == "experiments")
    assert max(of_experiments.values()) <= 2, "an experiment's page has a command, and one to report again"
    assert len(reasons) - sum(of_experiments.values()) <= 30
    for page in PAGES:
        for reason, lines in blocks(page):
            assert reason or all(words_of(line)[:1] == ["mod-star"] for line in lines), f"{page}: {lines}"


def test_shell_scripts_are_shell() -> None:
    scripts = [
        script
        for page in PAGES
        for script in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def run_small(line: str, there: Path) -> None:
    """Runs a line at a size that takes seconds: of an option that is given twice, the last counts."""
    (words,) = commands(line)
    more: list[str] = []
    if words[1] == "sample":
        more += ["--new-tokens", "4"]
    if words[1] == "train":
        more += SMALL_TRAINING
        if "--init-from" not in words:
            layers = ["2"] if "--routing.every" in words else ["1", "--routing.every", "1"]
            more += [*SMALL_MODEL, "--model.layers", *layers]
        more += ["--train.flops", "1e8"] if "--train.flops" in words else ["--train.steps", "4"]
    succeed(*words[1:], *more, before=f"os.chdir({str(there)!r})")


def makes(line: str) -> str | None:
    """The run that a line makes."""
    words = words_of(line)
    return {"train": words[2], "import": words[3], "upcycle": words[3]}.get(words[1]) if len(words) > 3 else None


def lines_to_run(page: Path) -> list[str]:
    return [line for reason, lines in blocks(page) for line in lines if reason is None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands have been run."""
    there = tmp_path_factory.mktemp("home")
    for name in ("notes", "mail"):
        (there / name).mkdir()
        text = "".join(f"On day {number} we counted {number * 7 % 31} birds.\n\n" for number in range(200))
        (there / name / "one.txt").write_text(text)
    gguf_files.write_model(there / "SmolLM2-135M-Instruct.Q4_1.gguf", metadata={"llama.context_length": 2048})
    for line in lines_to_run(ROOT / "README.md"):
        run_small(line, there)
    return there


@pytest.mark.nightly
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if lines_to_run(page) and page.name not in ("README.md", "extend.md")],
    ids=lambda page: page.stem,
)
def test_commands_of_a_page_run_one_after_the_other(page: Path, home: Path, tmp_path: Path) -> None:
    """But those that README has already, be it with fewer options; `extend.md` is test_blocks.py's."""
    there = tmp_path / "home"
    shutil.copytree(home, there)
    known = tuple(lines_to_run(ROOT / "README.md"))
    lines = [line for line in lines_to_run(page) if not line.startswith(known)]
    for line in lines:
        if (run := makes(line)) is not None:
            shutil.rmtree(there / run, ignore_errors=True)
    for line in lines:
        run_small(line, there)
