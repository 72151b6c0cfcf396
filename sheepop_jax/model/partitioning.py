"""Sharding: the mapping from logical axis names to device mesh axes."""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sheepop_jax.config.schema import Config, MeshConfig
from sheepop_jax.errors import InputError

# The vocabulary is padded to a multiple of this for efficient matmuls and sharding by `tensor`.
VOCAB_MULTIPLE = 128

# fsdp shards parameters along the model width, and the batch like `data`.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "mlp": "tensor",
    "position": None,
}


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes (data, fsdp, tensor); -1 takes the remaining devices.

    Raises:
        InputError: the product of the sizes is not the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(max(size, 1) for size in sizes.values())
    rest = [name for name, size in sizes.items() if size == -1]
    if devices % known or (not rest and known != devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        rule = f"axes whose product is the number of devices, {devices}"
        raise InputError("mesh", shape, rule, "`mesh.data=-1`")
    for name in rest:
        sizes[name] = devices // known
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Builds the mesh (data, fsdp, tensor) over the devices."""
    sizes = axis_sizes(config, len(devices))
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=axis_types
    )


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """A mesh for hypothetical devices, for shapes and shardings only."""
    sizes = axis_sizes(config, devices)
    axis_types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the mesh divides the model dimensions and the batch.

    Raises:
        InputError: a dimension is not a multiple of its mesh axis.
    """
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    model, fsdp, tensor = config.model, mesh.shape["fsdp"], mesh.shape["tensor"]
    for field, value, axis, size in (
        ("train.batch_size", config.train.batch_size, "data x fsdp", replicas),
        ("model.d_model", model.d_model, "fsdp", fsdp),
        ("model.num_heads", model.num_heads, "tensor", tensor),
        ("model.num_kv_heads", model.kv_heads, "tensor", tensor),
        ("model.d_ff", model.d_ff, "tensor", tensor),
    ):
        if value % size:
            more = f"`{field}={-(-value // size) * size}`"
            hint = more if field == "train.batch_size" else ""  # models have further constraints
            raise InputError(field, value, f"a multiple of {size} (mesh size {axis})", hint)
    if VOCAB_MULTIPLE % tensor:
        rule = f"a divisor of {VOCAB_MULTIPLE} (the vocabulary is padded to a multiple of it)"
        raise InputError("mesh.tensor", tensor, rule)


def batch_sharding(mesh: Mesh, leading: int) -> NamedSharding:
    """Sharding of an array with `leading` axes before the batch axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Sorted rows of a global batch that are addressable by this process.

    Processes share rows if the `tensor` axis spans several of them.
    """
    placed = batch_sharding(mesh, 0).addressable_devices_indices_map((batch_size,))
    return sorted(
        {row for index in placed.values() if index for row in range(batch_size)[index[0]]}
    )


def global_batch(mesh: Mesh, batch_size: int, leading: int, rows: Any) -> Any:
    """Builds global arrays from the rows that this process holds (`own_rows`).

    Args:
        mesh: the devices.
        batch_size: B, over all processes.
        leading: number of axes before the batch axis.
        rows: pytree of NumPy arrays of equal shape.
    """
    shape = jax.tree.leaves(rows)[0].shape
    shape = (*shape[:leading], batch_size, *shape[leading + 1 :])
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading), rows, shape)


def state_shardings(boxed_params: Any, state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for every leaf of a training state.

    Args:
        boxed_params: abstract parameters boxed with their logical axis names (Flax metadata).
        state: a pytree with the parameters and trees of the same structure, such as optimizer
            moments. A leaf whose path ends in a parameter's path gets that parameter's sharding.
        mesh: the devices.

    Returns:
        A pytree of `NamedSharding` with the structure of `state`; other leaves are replicated.
    """
    specs = nn.get_partition_spec(boxed_params)
    # Flax annotates `Mesh` but passes it to NamedSharding, which accepts both: hence the ignore.
    shardings = nn.logical_to_mesh_sharding(specs, mesh, list(RULES.items()))  # type: ignore[arg-type]
    by_path = dict(jax.tree_util.tree_leaves_with_path(shardings))

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for cut in range(len(path)):
            found = by_path.get(path[cut:])
            if found is not None and len(found.spec) <= leaf.ndim:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains an activation's sharding by logical axis names; a no-op without a mesh.

    An axis whose size is not divisible by its devices, such as the rows of a decoding step, is
    replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        split_by = _in_replica(RULES[axis]) or ()
        names = (split_by,) if isinstance(split_by, str) else split_by
        devices = math.prod(mesh.shape[name] for name in names)
        spec.append(split_by if size % devices == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


# Mesh axes over which an enclosing `sum_over_replicas` has already split the rows.
_split_by: ContextVar[tuple[str, ...]] = ContextVar("_split_by", default=())


def _in_replica(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """A rule's mesh axes without those in `_split_by`."""
    if axes is None or isinstance(axes, str):
        return axes
    return tuple(axis for axis in axes if axis not in _split_by.get())


def sum_over_replicas(
    axis: str, work: Callable[[Any, Any], Any], shared: Any, rows: Any, row_axis: int
) -> Any:
    """Σ `work(shared, rows)` over the replicas of a mesh axis, by `vmap` over the replicas.

    Each replica accumulates its own sums, so the result is reduced across devices once, however
    many partial sums `work` adds. Without a mesh or with one replica, calls `work` directly.

    Args:
        axis: "data" or "fsdp".
        work: computes a pytree of sums over rows.
        shared: pytree passed to every replica, such as parameters.
        rows: pytree of arrays, sharded as in `batch_sharding`.
        row_axis: axis of the rows in each array.

    Returns:
        The pytree of `work`, summed over the replicas.
    """
    mesh = jax.sharding.get_abstract_mesh()
    replicas = 1 if mesh.empty else mesh.shape[axis]
    if replicas == 1:
        return work(shared, rows)
    token = _split_by.set((*_split_by.get(), axis))
    try:
        rest = _in_replica(RULES["batch"])

        def split(x: jax.Array) -> jax.Array:
            before, count, after = x.shape[:row_axis], x.shape[row_axis], x.shape[row_axis + 1 :]
            x = x.reshape(*before, replicas, count // replicas, *after)
            spec = PartitionSpec(axis, *(None,) * row_axis, rest)
            return jax.lax.with_sharding_constraint(jnp.moveaxis(x, row_axis, 0), spec)

        each = jax.vmap(work, in_axes=(None, 0), spmd_axis_name=axis)
        sums = each(shared, jax.tree.map(split, rows))
    finally:
        _split_by.reset(token)
    return jax.tree.map(lambda x: x.sum(0), sums)
