"""The training state: the pytree that a step updates and a checkpoint saves."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The complete training state.

    Attributes:
        step: int32, batches consumed, the data cursor.
        updates: int32, updates applied: `step` minus skipped updates. Equals the optimizer's own
            counters.
        params: what is trained, fp32: the parameters, or adapters of them (`model/lora.py`).
        opt_state: the optimizer state.
    """

    step: jax.Array
    updates: jax.Array
    params: Any
    opt_state: Any
