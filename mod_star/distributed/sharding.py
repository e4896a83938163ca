"""How one program runs on many devices: a mesh of three axes, a table of rules for parameters, a few constraints.

    data    copies of the model, each with its own sequences
    fsdp    sequences too; parameters and optimizer state are cut up among these devices, and put together when needed
    tensor  every matrix product is cut up: heads of attention, hidden width of feed-forward layers, experts, vocabulary

What the rules speak of are the letters of the code's shape suffixes: D (width) lies on fsdp; V, H, K, F and X
(vocabulary, heads, key/value heads, hidden width, experts) lie on tensor. The compiler (GSPMD) derives the rest and
inserts communication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mod_star.config import MeshConfig, ModelConfig, RunConfig
from mod_star.errors import InputError, UnavailableError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""What the sequences of a batch are shared out over; also the `spmd_axis_name` of a `vmap` over them."""

LETTERS = {"D": "fsdp", "V": "tensor", "H": "tensor", "K": "tensor", "F": "tensor", "X": "tensor"}
"""The mesh axis of each dimension, by the letter of the shape suffixes. Others are not cut up."""

RULES = (
    (r"(embedding|head)$", "VD"),
    (r"block/query$", "DHE"),
    (r"block/(key|value)$", "DKE"),
    (r"block/output$", "HED"),
    (r"block/query_bias$", "HE"),
    (r"block/(key|value)_bias$", "KE"),
    (r"feed_forward/(gate|up)$", "DF"),
    (r"feed_forward/down$", "FD"),
    (r"feed_forward/experts/(gate|up)$", "XDI"),
    (r"feed_forward/experts/down$", "XID"),
    (r"(predictor|decider)/hidden$", "DP"),
    (r"adapter/down$", "DR"),
    (r"adapter/up$", "RD"),
    (r"mixing/(first|second)$", "DW"),
    (r"lora/.*(query|key|value|gate|up)/a$", "DR"),
    (r"lora/.*(query|key|value|gate|up)/b$", "RF"),
    (r"lora/.*(output|down)/a$", "FR"),
    (r"lora/.*(output|down)/b$", "RD"),
)
"""Dimensions of parameters by path, without the leading axis of stacked groups; the first match counts.

Optimizer state has the same paths after names of its own. Vectors and scalars are copied to all devices, and matrices
that no rule speaks of (a user's parts) are cut up along their largest dimension that fsdp divides.
"""


def all_devices() -> list[jax.Device]:
    """The devices of all processes. Starts JAX's backend, if nothing has.

    Raises:
      UnavailableError: JAX can't use the platform that JAX_PLATFORMS names, or none.
    """
    try:
        return list(jax.devices())
    except Exception as error:  # a RuntimeError; where it has tried nothing an AssertionError, without asserts any
        platforms = getattr(jax.config, "jax_platforms", None)
        named = f"JAX_PLATFORMS = {platforms!r}" if platforms else "JAX"
        reason = " ".join(str(error).split())[:300] if isinstance(error, RuntimeError) else ""
        reason = reason or "nothing that JAX has installed gives it such a device"
        raise UnavailableError(f"{named}: cannot be used here: {reason}") from error


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all the devices (those of all processes by default), neighbours along tensor close to one another.

    Raises:
      InputError: the axes don't multiply to the number of devices.
    """
    devices = all_devices() if devices is None else devices
    count, inner = len(devices), config.fsdp * config.tensor
    axes = f"data {config.data or '?'} x fsdp {config.fsdp} x tensor {config.tensor}"
    data = config.data or count // inner
    if data * inner != count:
        raise InputError(f"--mesh = {axes}: must multiply to the number of devices, {count}")
    shape = (data, config.fsdp, config.tensor)
    try:
        arranged = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis that no whole axis of the slice, nor several, make up
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_small_mesh(config: MeshConfig) -> Mesh | None:
    """A mesh over as many of the devices as are asked for, for work that needn't use all; None for a single one.

    Raises:
      InputError: there are too few devices.
    """
    devices: Sequence[jax.Device] = all_devices()
    if config.data:
        devices = devices[: config.data * config.fsdp * config.tensor]
    mesh = make_mesh(config, devices)
    return None if mesh.size == 1 else mesh


def require_fits(run: RunConfig, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, unless the mesh divides the run's batch and the model's dimensions."""
    sizes, train = mesh.shape, run.train
    shares = sizes["data"] * sizes["fsdp"]
    portion = train.batch_size // train.accumulation
    if portion % shares:
        of = f" / train.accumulation = {train.accumulation}" if train.accumulation > 1 else ""
        raise InputError(
            f"train.batch_size = {train.batch_size}{of}: must be a multiple of mesh.data x mesh.fsdp = "
            f"{sizes['data']} x {sizes['fsdp']} = {shares}"
        )
    require_model_fits(run.model, mesh)


def require_model_fits(model: ModelConfig, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, unless the mesh divides the model's dimensions."""
    sizes = mesh.shape
    for axis, field, size in (
        ("fsdp", "model.width", model.width),
        ("tensor", "model.vocab_size", model.vocab_size),
        ("tensor", "model.heads", model.heads),
        ("tensor", "model.kv_heads", model.key_heads),
        ("tensor", "model.mlp_width", 0 if model.experts else model.hidden_width),
        ("tensor", "model.experts", model.experts),
    ):
        if size % sizes[axis]:
            raise InputError(f"mesh.{axis} = {sizes[axis]}: must divide {field} = {size}")


def spec_of(path: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """Where a parameter or a leaf of the optimizer state lies.

    Args:
      path: its keys joined by "/", such as "groups/full_0/block/query"; a prefix doesn't matter.
      shape: its shape.
      fsdp: size of that axis, for what no rule speaks of.
    """
    stacked = "groups/" in path and not re.search(r"groups/\d+/", path)
    own = tuple(shape[1:] if stacked else shape)
    if len(own) < 2:
        return PartitionSpec()
    for pattern, letters in RULES:
        if re.search(rf"(^|/){pattern}", path) and len(letters) == len(own):
            axes: list[str | None] = [LETTERS.get(letter) for letter in letters]
            break
    else:
        axes = [None] * len(own)
        largest = max((i for i, size in enumerate(own) if size % fsdp == 0), key=lambda i: own[i], default=None)
        if largest is not None:
            axes[largest] = "fsdp"
    return PartitionSpec(*([None] if stacked else []), *axes)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """`NamedSharding`s of parameters, optimizer state or a whole training state (arrays or shapes), by the rules."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(one, tree)


def placed_shapes(mesh: Mesh, tree: Any) -> Any:
    """Shapes and types of arrays (or shapes), with their places by the rules."""
    return jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree, shardings(mesh, tree)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its sequences shared out over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh, rows: int) -> range:
    """Rows of a global batch that the devices of this process hold. They are neighbours.

    Raises:
      InputError: they aren't, because other processes' devices lie in between.
    """
    held: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        held |= set(range(*index[0].indices(rows))) if index else set()
    first, last = min(held), max(held)
    if len(held) != last - first + 1:
        raise InputError(f"--mesh: the rows {sorted(held)} of process {jax.process_index()} are not neighbours")
    return range(first, last + 1)


def place(tree: Any, where: Any) -> Any:
    """Arrays of the host, which every process has in full, as arrays on a mesh.

    Args:
      tree: NumPy or JAX arrays.
      where: their `NamedSharding`s, or one for all.
    """

    def one(array: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda array: one(array, where), tree)
    return jax.tree.map(one, tree, where)


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Inside, programs are traced for this mesh: `constrain` is in force. None: one device, nothing changes."""
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x, told where it lies: the mesh axis of each of its dimensions, None for a dimension that isn't cut up.

    Without a mesh it does nothing. Under a `vmap` over sequences (with `batch_vmap`) the batch axis is added.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def batch_vmap(function: Any, in_axes: Any = 0) -> Any:
    """`jax.vmap` over the sequences of a batch, which are shared out over the mesh if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.vmap(function, in_axes)
    return jax.vmap(function, in_axes, spmd_axis_name=BATCH_AXES)


def put_together(params: Any) -> Any:
    """Parameters that no longer are cut up along fsdp: each device has them whole, but for what tensor cuts up.

    Args:
      params: arrays, by paths that the rules know. Without a mesh they stay what they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = spec_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh.shape["fsdp"])
        return constrain(leaf, *(None if axis == "fsdp" else axis for axis in spec))

    return jax.tree_util.tree_map_with_path(whole, params)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in force; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape[axis])


def for_own_rows(function: Callable[[Any, Any], Any], rows: Any, whole: Any) -> Any:
    """`function(rows, whole)`, on a mesh by each device for the rows that lie on it: no row is sent.

    Args:
      function: its results have the rows as leading axis. What depends on how many rows a device has of some kind is
        the same on all devices only after `most_of_all`.
      rows: leaves have the rows as leading axis, which data x fsdp must divide; else the mesh's compiler places them.
      whole: what all rows need, such as weights. It is put together where fsdp has cut it up; tensor stays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or jax.tree.leaves(rows)[0].shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return function(rows, whole)
    of_rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        function, axis_names=set(BATCH_AXES), in_specs=(of_rows, PartitionSpec()), out_specs=of_rows, check_vma=False
    )(rows, whole)


def most_of_all(count: jax.Array) -> jax.Array:
    """Inside `for_own_rows` the largest of the devices' counts, else the count itself."""
    mesh = jax.sharding.get_abstract_mesh()
    own = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual)
    return jax.lax.pmax(count, own) if own else count
