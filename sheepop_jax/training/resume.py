"""The initial state of a run: the newest valid checkpoint, or new or given parameters.

The parameters below adapters (`model/lora.py`) are no part of it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from sheepop_jax.checkpoint.checkpoints import DamagedCheckpoint
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.errors import InputError
from sheepop_jax.model.lora import trained_shapes
from sheepop_jax.model.partitioning import state_shardings
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.runtime import distributed
from sheepop_jax.training.step import init_state, jit_init

log = logging.getLogger(__name__)


def restore_or_init(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    checkpoints: CheckpointSaver,
    load_params: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, Any, dict[str, Any]]:
    """Restores the newest valid checkpoint, or initializes a new state.

    Damaged checkpoints are quarantined with a warning. The main process chooses the step.

    Args:
        model: the model.
        optimizer: the optimizer.
        seed: of new parameters.
        mesh: the devices.
        checkpoints: those of the run.
        load_params: abstract parameters with shardings → the parameters of a new state; None draws
            them.

    Returns:
        The state, sharded over the mesh; its shardings; and the figures saved with it.

    Raises:
        InputError: all checkpoints are damaged, or the newest does not match the model.
    """

    def fresh() -> TrainState:
        return init_state(model, optimizer, seed)

    abstract = jax.eval_shape(fresh)
    shardings = state_shardings(trained_shapes(model), abstract, mesh)
    target = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, shardings)
    newest = distributed.broadcast_from_main(lambda: _newest_whole(checkpoints))
    if newest is None:
        log.info("no checkpoint: starting at step 0")
        if load_params is None:
            return jit_init(fresh, shardings)(), shardings, {}
        params = load_params(target.params)

        def others(params: Any) -> TrainState:  # without the parameters, which it would copy
            zero, other_zero = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
            return TrainState(zero, other_zero, None, optimizer.init(params))

        state = jit_init(others, replace(shardings, params=None))(params)
        return replace(state, params=params), shardings, {}
    state = checkpoints.restore(newest["step"], target)
    log.info("resuming from step %d", newest["step"])
    if distributed.is_main_process():
        checkpoints.tidy()
    return state, shardings, newest["figures"]


def load_frozen(model: Transformer, mesh: Mesh, load_params: Callable[[Any], Any]) -> Any:
    """The parameters below a model's adapters, sharded over the mesh.

    Args:
        model: a model with adapters.
        mesh: the devices.
        load_params: abstract parameters with shardings → the parameters.
    """
    boxed = boxed_shapes(model)
    abstract = nn.meta.unbox(boxed)
    shardings = state_shardings(boxed, abstract, mesh)
    return load_params(jax.tree.map(lambda x, at: x.update(sharding=at), abstract, shardings))


def _newest_whole(checkpoints: CheckpointSaver) -> dict[str, Any] | None:
    """The manifest of the newest valid checkpoint; quarantines damaged ones."""
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.verify(step)
        except DamagedCheckpoint as damage:
            aside = checkpoints.quarantine(step, damage)
            log.warning("checkpoint %d is damaged (%s); moved to %s", step, damage, aside)
    if checkpoints.aside():  # never silently restart from step 0
        hint = "a new `workdir`, or deleting damaged-* there to start over"
        raise InputError(
            str(checkpoints.directory), "only damaged checkpoints", "a valid checkpoint", hint
        )
    return None
