"""Links names of this project in signatures to where they are documented.

Autodoc writes a type as the module that defines it, `mod_star.config.RunConfig`. The configuration's groups are
documented on the generated page, and what one module re-exports from another under one of the two names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from docutils import nodes
from generated_reference import DEVICES
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from mod_star.config import RunConfig

CONFIGURATION = "reference/configuration"
_VALUES = {field.name: getattr(RunConfig(), field.name) for field in dataclasses.fields(RunConfig)}
GROUPS = {type(value).__name__: name for name, value in _VALUES.items() if dataclasses.is_dataclass(value)}
GROUPS |= {group.__name__: name for name, group in DEVICES.items()}


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """A link to the configuration's page, or to the only object of that name; None where neither is there."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    name, page = target.rpartition(".")[2], str(node["refdoc"])
    if name == "RunConfig" or name in GROUPS:
        return make_refnode(app.builder, page, CONFIGURATION, GROUPS.get(name, ""), content, target)
    documented = [full for full in env.domains["py"].objects if full.rpartition(".")[2] == name]  # type: ignore[attr-defined]
    if len(documented) != 1:
        return None
    entry = env.domains["py"].objects[documented[0]]  # type: ignore[attr-defined]
    return make_refnode(app.builder, page, entry.docname, entry.node_id, content, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls it."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
