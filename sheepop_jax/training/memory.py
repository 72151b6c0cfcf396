"""How much device memory a run needs, by its shapes; and what to do when there is not enough."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sheepop_jax.config import Config
from sheepop_jax.errors import RunFailed

_GB = 1e9


class OutOfMemory(RunFailed):
    """The device has not enough memory for the run."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device, roughly: XLA may need less or more.

    Attributes:
        state: parameters, their gradients (twice with several microbatches), and the two moments of
            Adam, all fp32.
        activations: what the backward pass of one microbatch keeps.
    """

    state: float
    activations: float

    def __str__(self) -> str:
        return (
            f"about {self.state / _GB:.1f} GB of parameters, gradients and optimizer, and "
            f"{self.activations / _GB:.1f} GB of activations a device"
        )


def estimate_memory(params: Any, config: Config, model: Any, mesh_shape: Any) -> MemoryEstimate:
    """Adds up the large arrays.

    Args:
        params: arrays or their shapes.
        config: of the run.
        model: with its dtype and attention.
        mesh_shape: axis name → size.
    """
    m, train = config.model, config.train
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    sharded = mesh_shape["fsdp"] * mesh_shape["tensor"]
    rows = train.batch_size / (mesh_shape["data"] * mesh_shape["fsdp"])
    tokens = rows * config.data.seq_len
    size = np.dtype(model.dtype).itemsize
    # A block keeps its two norms' outputs, q, k, v, the attention's output, both sums, and the
    # feed-forward layer before and after its activation.
    block = tokens * (8 * m.d_model + 2 * m.d_ff) * size
    if model.implementation == "xla":  # the scores and weights of every pair of positions
        block += 2 * rows * m.num_heads * config.data.seq_len**2 * 4
    kept = tokens * m.d_model * size
    # With remat one block at a time is recomputed, and only its input is kept.
    blocks = m.num_layers * kept + block if m.remat else m.num_layers * block
    state = 16.0 + 4.0 * (train.grad_accum_steps > 1)
    return MemoryEstimate(state * count / sharded, float(blocks / mesh_shape["tensor"]))


def explain(error: jax.errors.JaxRuntimeError, estimate: MemoryEstimate) -> OutOfMemory | None:
    """The error that says what to do, if the device ran out of memory; else None."""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "out of memory" not in said.lower():
        return None
    return OutOfMemory(
        f"the device ran out of memory; the run needs {estimate}. Halve train.batch_size and "
        "double train.grad_accum_steps (the update stays the same), set model.remat=True, or "
        f"split the state over more devices with mesh.fsdp ({said.splitlines()[0][:120]})"
    )
