"""Where arrays live: the one table from logical axis names to the axes of the device mesh."""

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

# The vocabulary is padded to a multiple of this: good for hardware, and `tensor` can split it.
VOCAB_MULTIPLE = 128

# fsdp splits parameters along the width of the model, and the batch as `data` does.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "position": None,
}


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes of (data, fsdp, tensor); an axis of -1 takes what the others leave.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(max(size, 1) for size in sizes.values())
    rest = [name for name, size in sizes.items() if size == -1]
    if devices % known or (not rest and known != devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        rule = f"axes whose product is the number of devices, {devices}"
        raise InputError("mesh", shape, rule, "--config.mesh.data=-1")
    for name in rest:
        sizes[name] = devices // known
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices, of `axis_sizes`."""
    sizes = axis_sizes(config, len(devices))
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=axis_types
    )


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of so many devices that need not be here: for shapes and layouts, not for arrays."""
    sizes = axis_sizes(config, devices)
    axis_types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that does not divide the model or the batch, naming the field and the rule."""
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
            more = f"--config.{field}={-(-value // size) * size}"
            hint = more if field == "train.batch_size" else ""  # a model has rules of its own
            raise InputError(field, value, f"a multiple of the mesh's {axis} = {size}", hint)
    if VOCAB_MULTIPLE % tensor:
        rule = f"a divisor of {VOCAB_MULTIPLE}, of which the padded vocabulary is a multiple"
        raise InputError("mesh.tensor", tensor, rule)


def batch_sharding(mesh: Mesh, leading: int) -> NamedSharding:
    """Sharding of an array whose batch axis comes after `leading` others."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order.

    Processes share rows where `tensor` goes across them.
    """
    placed = batch_sharding(mesh, 0).addressable_devices_indices_map((batch_size,))
    return sorted(
        {row for index in placed.values() if index for row in range(batch_size)[index[0]]}
    )


def global_batch(mesh: Mesh, batch_size: int, leading: int, rows: Any) -> Any:
    """Arrays over all devices, from this process's `own_rows` on axis `leading`.

    Args:
        mesh: the devices.
        batch_size: B, over all processes.
        leading: axes before the batch's.
        rows: any tree of NumPy arrays of one shape.
    """
    shape = jax.tree.leaves(rows)[0].shape
    shape = (*shape[:leading], batch_size, *shape[leading + 1 :])
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading), rows, shape)


def state_shardings(boxed_params: Any, state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for every leaf of a training state.

    Args:
        boxed_params: abstract parameters with Flax's metadata of logical axes.
        state: any pytree that holds the parameters and trees shaped like them (an optimizer's
            moments): a leaf whose path ends in a parameter's path lives where that parameter does.
        mesh: the devices.

    Returns:
        A tree like `state` of `NamedSharding`; whatever is no parameter is replicated.
    """
    specs = nn.get_partition_spec(boxed_params)
    # Flax declares a Mesh and passes it on to NamedSharding, which takes either: hence the ignore.
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
    """Pins an activation's layout by logical axis names; outside a mesh, returns it unchanged.

    An axis that the devices do not divide, such as the few rows of a decoding step, stays whole.
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


# Mesh axes by which `sum_over_replicas` has split the rows of what is being traced.
_split_by: ContextVar[tuple[str, ...]] = ContextVar("_split_by", default=())


def _in_replica(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """A rule's mesh axes without those that already split the rows."""
    if axes is None or isinstance(axes, str):
        return axes
    return tuple(axis for axis in axes if axis not in _split_by.get())


def sum_over_replicas(
    axis: str, work: Callable[[Any, Any], Any], shared: Any, rows: Any, row_axis: int
) -> Any:
    """Σ `work(shared, rows)` over the replicas of a mesh axis, each with its own rows.

    What they return crosses devices once, however often `work` adds up, since each replica has sums
    of its own. Without a mesh, or with one replica, it is `work` itself.

    Args:
        axis: "data" or "fsdp".
        work: a sum over rows.
        shared: what all replicas see, parameters.
        rows: arrays whose rows are on `row_axis`, laid out as in `batch_sharding`.
        row_axis: which.
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
