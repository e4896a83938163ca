"""Pictures are drawn whatever the environment says, and where that can't be it costs a line, never a result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import succeed
from PIL import Image

from mod_star.views.pictures import save_figure, try_to_draw
from mod_star.views.plots import plot_curves

RECORDS = [{"step": step, "loss": 9 / step, "eval_loss": 8 / step} for step in (1, 2, 3)]
FORGET = (
    "import sys; [sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'matplotlib']; "
    "os.environ.pop('MPLCONFIGDIR', None)\n"
)
"""The commands' server has imported matplotlib; a user's process has not."""


def drawn(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Draws curves.png in a process of its own, whose working directory is `folder`."""
    code = f"from mod_star.views.plots import plot_curves; plot_curves({{'a': {RECORDS!r}}}, 'curves.png'); {words}"
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False, cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "HOME": str(folder)} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "nonsense", "MPLCONFIGDIR": "/dev/null/nowhere"},
    ],
)
@pytest.mark.nightly
def test_the_environment_has_no_say(environment: dict[str, str], tmp_path: Path) -> None:
    # Read where it stands: a backend that isn't there, and text by a program that isn't.
    (tmp_path / "matplotlibrc").write_text("backend: nonsense\ntext.usetex: True\nfont.family: Nowhere Sans\n")
    done = drawn("import os; print(os.environ['MPLBACKEND'])", tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, environment["MPLBACKEND"] + "\n"), done.stderr
    assert done.stderr == ""
    plot_curves({"a": RECORDS}, tmp_path / "here.png")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_what_is_set_for_a_picture_is_set_back(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 7.0}):
        plot_curves({"a": RECORDS}, tmp_path / "mine.png")
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
    plot_curves({"a": RECORDS}, tmp_path / "default.png")
    assert (tmp_path / "mine.png").read_bytes() == (tmp_path / "default.png").read_bytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a$b$c", r"$\nosuch$", "_hidden", "模型", "two\nlines", "a[bold]b", "%s {0}"])
def test_a_runs_name_is_no_formula(name: str, tmp_path: Path) -> None:
    plot_curves({name: RECORDS}, tmp_path / "curves.png", title=name if name.isascii() else "")
    plot_curves({"another": RECORDS}, tmp_path / "other.png")
    assert (tmp_path / "curves.png").read_bytes() != (tmp_path / "other.png").read_bytes(), "the legend names it"


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "picture.png"
    save_figure(Figure(), path)
    before = path.read_bytes()
    broken = Figure()
    broken.text(0, 0, r"$\nosuch$")
    said = try_to_draw(path, lambda: save_figure(broken, path))
    assert said is not None and said.startswith(f"{path}: cannot be drawn: ")
    assert capsys.readouterr().err == f"warning: {said}\n"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.nightly
def test_a_training_keeps_its_results_where_no_picture_can_be(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run[red]"
    shutil.copytree(trained_run, run)
    (run / "summary.json").unlink()
    (run / "curves.png").unlink()
    (run / "curves.png.new").mkdir()  # in the way
    config = json.loads((run / "config.json").read_text())["config"]
    words = [f"--{group}.{name}={value}" for group in ("model", "train", "routing") for name, value in sorted(
        config[group].items()) if not isinstance(value, list | bool)]  # fmt: skip
    words += ["--optimizer.warmup-steps", str(config["optimizer"]["warmup_steps"])]
    words = ["train", str(run), "--preset", "tiny", *words]
    done = succeed(*words, before=FORGET, environment={"MPLBACKEND": "nonsense"})
    assert done.err == f"warning: {run}/curves.png: cannot be drawn: Is a directory\n"
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    assert "curves:" not in done.out

    # The next time it is made up for.
    (run / "curves.png.new").rmdir()
    done = succeed(*words, before=FORGET, environment={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert done.err == "" and "is complete already" in done.out
    assert Image.open(run / "curves.png").width > 1000


def test_nothing_draws_but_through_here() -> None:
    root = Path(__file__).parents[2]
    files = [path for folder in ("mod_star", "experiments") for path in (root / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "import matplotlib.pyplot" not in text and "matplotlib.use(" not in text, path
        assert path.name == "pictures.py" or ".savefig(" not in text, path
