"""Python that README and documentation show works as it stands there."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fork_server import succeed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_blocks_to_run() -> None:
    assert {page.name for page in PAGES if blocks(page)} >= {"README.md", "extend.md", "first_model.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.nightly] if page.stem == "quiet_star" else [])
        for page in PAGES
        if blocks(page)
    ],
)
@pytest.mark.slow
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    if page.name == "README.md":
        assert (tmp_path / "runs/first/summary.json").is_file()
        assert len(capsys.readouterr().out.splitlines()) >= 2
    if page.parent.name == "tutorials":
        assert any(tmp_path.glob("runs/*/summary.json"))
        assert capsys.readouterr().out.strip()


@pytest.mark.nightly
def test_the_parts_of_the_how_to_train_and_sample_through_the_cli(tmp_path: Path) -> None:
    source = next(block for block in blocks(ROOT / "docs/how-to/extend.md") if block.startswith("# my_parts.py"))
    (tmp_path / "my_parts.py").write_text(source)
    tiny = ["--preset", "tiny", "--train.steps", "2", "--train.log-every", "1", "--model.context", "32", "--quiet"]
    tiny += ["--model.layers", "1", "--routing.every", "1", "--train.eval-batches", "1"]
    there = f"os.chdir({str(tmp_path)!r})"
    succeed("train", "run", *tiny, "--parts", "my_parts.py:parts", before=there)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in steps} == {1, 2}

    (tmp_path / "my_parts.py").unlink()  # the run has its own copy
    done = succeed("sample", "run", "--prompt", "A", "--new-tokens", "4", "--json", before=there)
    assert len(json.loads(done.out)["routed_fraction"]) == 1


@pytest.mark.nightly
def test_the_objective_and_the_reward_of_the_how_to_train_go_on_and_sample_through_the_cli(tmp_path: Path) -> None:
    tiny = ["--preset", "tiny", "--train.log-every", "1", "--model.context", "32", "--model.width", "16", "--quiet"]
    tiny += ["--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0", "--train.batch-size", "2"]
    tiny += ["--model.layers", "1", "--routing.every", "1"]
    tiny += ["--thinking.thought-length", "2", "--thinking.n-true", "2", "--train.eval-batches", "1"]
    there = f"os.chdir({str(tmp_path)!r})"
    succeed("train", "runs/teacher", *tiny, "--train.steps", "1", before=there)
    for name, objective, metric in (("distil", "next_token", "kl"), ("terse", "quiet_star", "reward_mean")):
        page = blocks(ROOT / "docs/how-to/extend.md")
        source = next(block for block in page if block.startswith(f"# {name}.py"))
        assert len(source.splitlines()) <= 25
        (tmp_path / f"{name}.py").write_text(source)
        options = [*tiny, "--train.objective", objective, "--parts", f"{name}.py:parts"]
        for steps in ("1", "2") if name == "distil" else ("2",):  # goes on
            succeed("train", f"runs/{name}", *options, "--train.steps", steps, before=there)
            (tmp_path / f"{name}.py").unlink(missing_ok=True)  # the run has its own copy
        records = [json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if metric in record] == [1, 2]
    shutil.rmtree(tmp_path / "runs/teacher")
    for name in ("distil", "terse"):
        done = succeed("sample", f"runs/{name}", "--prompt", "A", "--new-tokens", "2", "--json", before=there)
        assert json.loads(done.out)
