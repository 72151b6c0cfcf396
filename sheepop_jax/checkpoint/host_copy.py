"""Copies of the training state for saving, and checks that parameters are finite."""

from typing import Any

import jax
import jax.numpy as jnp

from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.runtime import distributed


def host_copy(state: TrainState) -> TrainState:
    """Copies the state, since the next step donates its buffers.

    Copies to host memory, to spare device memory. Exceptions copy on the device: on CPU
    `device_get` does not copy, and with several processes only device arrays can be sharded.
    """
    if jax.default_backend() != "cpu" and distributed.count() == 1:
        on_host: TrainState = jax.device_get(state)
        return on_host
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


@jax.jit
def all_finite(params: Any) -> jax.Array:
    """Whether every parameter is finite, as a bool on the device."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def not_finite(params: Any) -> str:
    """The names of parameters that are not finite."""
    found = (
        storage.name_of(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.isfinite(leaf).all()
    )
    return storage.few(list(found))
