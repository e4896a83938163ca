"""The notebooks are those of the tutorials, whose blocks test_blocks.py runs; the shortest also runs as a notebook."""

import os
import re
import runpy
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
MAKE = runpy.run_path(str(ROOT / "docs/notebooks/make.py"))
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


def test_notebooks_are_those_of_the_tutorials() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(MAKE["TUTORIALS"])
    for path in NOTEBOOKS:
        assert path.read_text(encoding="utf-8") == MAKE["notebook"](path.stem), "run python docs/notebooks/make.py"
        content = nbformat.read(path, as_version=4)
        nbformat.validate(content)
        page = (ROOT / f"docs/tutorials/{path.stem}.md").read_text(encoding="utf-8")
        blocks = [block.strip() for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
        assert blocks and [cell.source for cell in content.cells if cell.cell_type == "code"] == blocks


@pytest.mark.nightly
def test_a_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    content = nbformat.read(ROOT / "docs/notebooks/first_model.ipynb", as_version=4)
    client = nbclient.NotebookClient(content, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert cells and all(cell.execution_count for cell in cells)
    assert any(output.get("name") == "stdout" and output.text.strip() for cell in cells for output in cell.outputs)
    assert any(tmp_path.glob("runs/*/summary.json"))
