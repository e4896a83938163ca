"""Sphinx configuration. `make docs` builds the pages offline: no web font, no script and no inventory is fetched."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import mod_star  # noqa: E402

project = "mod_star"
author = "The mod_star authors"
copyright = "2026, the mod_star authors"  # noqa: A001
release = version = mod_star.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "field_docstrings",
    "generated_reference",
    "own_references",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # of `names` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "no-value": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Types of other libraries: their inventories would have to be fetched. Our own names must resolve.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|flax|optax|numpy|np|npt|grain|chex|collections|pathlib|typing|concurrent|dataclasses)\..*"),
    ("py:.*", r"(Array|ArrayLike|Any|Path|Callable|Sequence|Mapping|Iterator|Mesh|Literal.*|optional|PartitionSpec)"),
]

html_theme = "furo"
html_title = f"mod_star {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
copybutton_prompt_text = "$ "
