"""Python that README and documentation show works as it stands there."""

import json
import re
from pathlib import Path

import pytest
from fork_server import succeed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_blocks_to_run() -> None:
    assert {page.name for page in PAGES if blocks(page)} >= {"README.md", "extend.md", "first_model.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
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


def test_the_parts_of_the_how_to_train_and_sample_through_the_cli(tmp_path: Path) -> None:
    source = blocks(ROOT / "docs/how-to/extend.md")[0]
    (tmp_path / "my_parts.py").write_text(source)
    tiny = ["--preset", "tiny", "--train.steps", "2", "--train.log-every", "1", "--model.context", "32", "--quiet"]
    there = f"os.chdir({str(tmp_path)!r})"
    succeed("train", "run", *tiny, "--parts", "my_parts.py:parts", before=there)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in steps} == {1, 2}

    (tmp_path / "my_parts.py").unlink()  # the run has its own copy
    done = succeed("sample", "run", "--prompt", "A", "--new-tokens", "4", "--json", before=there)
    assert len(json.loads(done.out)["routed_fraction"]) == 1
