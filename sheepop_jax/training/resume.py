"""The state that a run begins with: the newest whole checkpoint, or fresh parameters."""

import logging
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from sheepop_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint
from sheepop_jax.errors import InputError
from sheepop_jax.model.partitioning import state_shardings
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import distributed
from sheepop_jax.training.step import TrainState, boxed_shapes, init_state, jit_init

log = logging.getLogger(__name__)


def restore_or_init(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Any, dict[str, Any]]:
    """The state, laid out over the mesh; its shardings; and the figures saved with it.

    A damaged checkpoint is set aside with a warning, and the one before it is taken: the first
    process decides.

    Raises:
        InputError: all checkpoints are damaged, or the newest is another model's.
    """

    def fresh() -> TrainState:
        return init_state(model, optimizer, seed)

    abstract = jax.eval_shape(fresh)
    boxed = boxed_shapes(model)
    shardings = state_shardings(boxed, abstract, mesh)
    target = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, shardings)
    newest = distributed.broadcast_from_main(lambda: _newest_whole(checkpoints))
    if newest is None:
        log.info("no checkpoint yet: beginning at step 0")
        return jit_init(fresh, shardings)(), shardings, {}
    state = checkpoints.restore(newest["step"], target)
    log.info("going on from step %d", newest["step"])
    if distributed.is_main_process():
        checkpoints.tidy()
    return state, shardings, newest["figures"]


def _newest_whole(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint that is whole; the damaged ones are set aside."""
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.verify(step)
        except DamagedCheckpoint as damage:
            aside = checkpoints.quarantine(step, damage)
            log.warning("checkpoint %d is damaged (%s); moved to %s", step, damage, aside)
    if checkpoints.aside():  # by this process or by one before: never a silent start from zero
        hint = "a new --workdir, or delete damaged-* there, to begin again"
        raise InputError(
            str(checkpoints.directory), "only damaged checkpoints", "a whole one", hint
        )
    return None
