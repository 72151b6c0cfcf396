"""A state as it is saved: fit to go on from, and out of the next step's way."""

from typing import Any

import jax
import jax.numpy as jnp

from sheepop_jax.checkpoint import storage
from sheepop_jax.runtime import distributed
from sheepop_jax.training.step import TrainState


def host_copy(state: TrainState) -> TrainState:
    """A copy that the next step, which takes the state's buffers, leaves alone.

    In host memory, so that devices need not hold it twice. But on a CPU "device to host" is no
    copy, and of several processes each holds a part of an array, as only arrays on devices can.
    """
    if jax.default_backend() != "cpu" and distributed.count() == 1:
        on_host: TrainState = jax.device_get(state)
        return on_host
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


@jax.jit
def all_finite(params: Any) -> jax.Array:
    """Whether every parameter is a number; a bool on the device."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def not_finite(params: Any) -> str:
    """The names of those that are not."""
    found = (
        storage.name_of(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.isfinite(leaf).all()
    )
    return storage.few(list(found))
