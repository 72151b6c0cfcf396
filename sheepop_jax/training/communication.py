"""How much the devices of a mesh send each other in one update, by the mesh's axis.

Alphabet: A microbatches, M tokens of one on one device, D model width, N layers, n devices of an
axis. An all-reduce of X bytes sends 2 (n - 1) / n X from each device, an all-gather or a
reduce-scatter to or from X bytes (n - 1) / n X (Patarasuk & Yuan 2009, "Bandwidth optimal
all-reduce algorithms"). Which there are was read from the compiled step on 8 CPU devices.
"""

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config import Config
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.memory import Shapes, held

_FP32 = 4  # bytes


def bytes_sent(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str, shapes: Shapes
) -> dict[str, float]:
    """Mesh axis → bytes that each device sends in one update.

    `data` adds up gradients, once. `fsdp` gathers the parameters, and scatters their gradients once
    a microbatch. `tensor` adds up what each of its devices has of a sublayer's output, and in the
    backward pass of its input.

    Args:
        config: of the run.
        model: with its vocabulary and dtype.
        mesh: the devices, here or imagined.
        platform: "cpu", "cuda" or "tpu". The CPU's XLA adds up whole gradients and then takes a
            shard; the others' make a reduce-scatter of that.
        shapes: from `memory.abstract_state`.
    """
    m, accum = config.model, config.train.grad_accum_steps
    remat = m.remat != "none"
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    table, parameters = held(shapes, mesh).table, sum(held(shapes, mesh).parameters)
    tokens = config.train.batch_size / (data * fsdp) * config.data.seq_len
    stream = tokens * m.d_model * np.dtype(model.dtype).itemsize
    # Tied, the table is gathered and its gradient scattered twice, for the lookup and the logits.
    scattered = parameters + (table if m.tie_embeddings else 0.0)
    # Gathered for the forward pass: once, since microbatches change no parameter and XLA moves it
    # out of their loop. Recomputing gathers the blocks' again, in the loop.
    blocks = parameters - table * (1 if m.tie_embeddings else 2)
    gathered = scattered + (accum * blocks if remat else 0.0)
    # Forward: the attention's output and the feed-forward layer's. Backward: the inputs of the
    # feed-forward layer and of q, k and v, each by itself. Recomputed: the attention's output.
    sums = m.num_layers * (6 + remat) + 1  # and the input of the logits
    twice = 2 if platform == "cpu" else 1
    lookup = tokens * m.d_model * _FP32
    return {
        "data": 2 * _others(data) * parameters,
        "fsdp": _others(fsdp) * fsdp * (gathered + accum * twice * scattered),
        "tensor": accum * 2 * _others(tensor) * (sums * stream + lookup),
    }


def _others(count: int) -> float:
    """(n - 1) / n: what of an array the others of an axis have."""
    return (count - 1) / count
