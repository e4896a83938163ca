"""Reading what Orbax wrote: items of a checkpoint, and the parameters of one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from mod_star.distributed.sharding import placed_shapes
from mod_star.errors import InputError
from mod_star.runs.plain_paths import plain_path
from mod_star.storage import is_address


def orbax_path(directory: Path) -> Path:
    """RUN/checkpoints as Orbax is told of it."""
    return directory if is_address(directory) else plain_path(directory)


def restore_params_of_training(directory: Path, step: int, like: Any, mesh: Mesh | None = None) -> dict[str, Any]:
    """`mod_star.runs.saved_checkpoints.restore_params` of a checkpoint that Orbax wrote."""
    return restore_items(directory, step, params=ocp.args.StandardRestore(placed_like(like, mesh)))["params"]


def restore_items(directory: Path, step: int, **items: Any) -> Any:
    """Items of a checkpoint.

    Args:
      directory: RUN/checkpoints.
      step: which checkpoint.
      items: Orbax's arguments for reading each, by the item's name.

    Raises:
      InputError: the checkpoint cannot be read, or does not fit.
    """
    checkpoint = directory / str(step)
    place = orbax_path(directory) / str(step)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(place, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax, tensorstore and JSON each have their own
        raise _not_loaded(checkpoint if is_address(checkpoint) else checkpoint.absolute(), error) from error


def placed_like(like: Any, mesh: Mesh | None) -> Any:
    """Shapes with their places; without them Orbax would look for the devices that saved them."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), like)
    return placed_shapes(mesh, like)


def _not_loaded(checkpoint: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {reason}")
