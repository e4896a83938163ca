"""Makes the notebooks of this directory from the tutorials: Python blocks become cells, all else is text.

python docs/notebooks/make.py
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
TUTORIALS = ("first_model", "mixture_of_depths", "quiet_star")


def notebook(name: str) -> str:
    """The notebook of a tutorial, without outputs; the same text for the same tutorial."""
    text = (HERE.parent / f"tutorials/{name}.md").read_text(encoding="utf-8")
    text = re.sub(r"^<!-- .* -->\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\((\w+\.md)", r"](../tutorials/\1", text)  # a page that lies beside the tutorial
    made = jupytext.reads(text, fmt="md")
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made.nbformat, made.nbformat_minor = 4, 5
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        (HERE / f"{tutorial}.ipynb").write_text(notebook(tutorial), encoding="utf-8")
