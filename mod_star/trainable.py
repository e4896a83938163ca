"""Which parameters a run trains, by patterns of their paths. All others are frozen.

A frozen parameter is an input of the training step like the batch: no gradient is computed for it, and the optimizer
keeps no state of it. `train.trainable` lists the patterns. A pattern is one name or several in a row of a parameter's
path, joined by "/": "router" means all that is under a router, "routed/block" the routed blocks without their routers,
"block/query" one matrix of every block. *, ? and [...] stand for parts of a name, as in file names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from mod_star.config import RunConfig
from mod_star.errors import InputError

NEW = ("router", "predictor", "adapter", "thinking")
"""What a pretrained model lacks: trained beside adapters if nothing else is asked for."""
Names = tuple[str, ...]
"""The path of a parameter: names from the root of the tree on."""


def path_names(path: tuple[Any, ...]) -> Names:
    """Names along a key path of the params tree, outermost first."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def leaves_by_path(params: Any) -> dict[Names, Any]:
    """Arrays or shapes of a tree of parameters, by their paths."""
    return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def matches(pattern: str, names: Names) -> bool:
    """Whether a pattern names a parameter, or something that the parameter is a part of."""
    words = pattern.split("/")
    starts = range(len(names) - len(words) + 1)
    return any(all(map(fnmatch.fnmatchcase, names[i : i + len(words)], words)) for i in starts)


def matching(field: str, patterns: Sequence[str], paths: Iterable[Names], what: str = "parameter") -> frozenset[Names]:
    """The paths that any of the patterns matches.

    Args:
      field: that holds the patterns, for the error.
      patterns: see the head of this module.
      paths: of the parameters that may be meant.
      what: they are, for the error.

    Raises:
      InputError: a pattern matches nothing; names the pattern and what there is.
    """
    paths = sorted(paths)
    for pattern in patterns:
        if not any(matches(pattern, names) for names in paths):
            listed = ", ".join(sorted({name for names in paths for name in names}))
            raise InputError(
                f"{field} = {tuple(patterns)!r}: {pattern!r} matches no {what}; a pattern must be names of a path, "
                f"joined by '/', such as {'/'.join(paths[0])!r}; the names are {listed}"
            )
    return frozenset(names for names in paths if any(matches(pattern, names) for pattern in patterns))


def trains_all(run: RunConfig) -> bool:
    """Whether a run freezes nothing."""
    return not run.train.trainable and run.lora.rank == 0


def trained_paths(run: RunConfig, params: Any) -> frozenset[Names]:
    """Paths of the parameters that a run trains.

    Args:
      run: its `train.trainable` and `lora`. Adapters are trained always.
      params: arrays or shapes, thinking and adapters included.

    Raises:
      InputError: a pattern matches nothing. So patterns that would freeze everything are refused.
    """
    paths = leaves_by_path(params)
    if trains_all(run):
        return frozenset(paths)
    adapters = frozenset(names for names in paths if names[0] == "lora")
    if not run.train.trainable:
        return adapters | {names for names in paths if any(matches(pattern, names) for pattern in NEW)}
    return adapters | matching("train.trainable", run.train.trainable, paths.keys() - adapters)


def trained_part(run: RunConfig, params: Any) -> Any:
    """The parameters that a run trains: the tree without the frozen ones, a nested dict with the same paths.

    Args:
      run: its `train.trainable` and `lora`.
      params: arrays or shapes. They are returned as they are if all of them are trained.

    Raises:
      InputError: as for `trained_paths`.
    """
    if trains_all(run):
        return params
    trained = trained_paths(run, params)
    return unflatten_dict({names: leaf for names, leaf in leaves_by_path(params).items() if names in trained})


def with_trained_part(run: RunConfig, params: Any, part: Any) -> Any:
    """`params` with the leaves of `part`, which `trained_part` gave, in place of its own."""
    if trains_all(run):
        return part
    leaves = leaves_by_path(part)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_names(path), leaf), params)
