"""How much the devices of a mesh send each other in one update, by the mesh's axis.

Alphabet: A microbatches, M tokens of one on one device, D model width, N layers, n devices of an
axis. An all-reduce of X bytes sends 2 (n - 1) / n X from each device, an all-gather or a
reduce-scatter to or from X bytes (n - 1) / n X (Patarasuk & Yuan 2009, "Bandwidth optimal
all-reduce algorithms"). Which there are was read from the compiled step: on 8 CPU devices, and for
8 H100 and 8 TPU v5e, whose compilers need no device (`benchmarks/aot.py`).
"""

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
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
        platform: "cpu", "cuda" or "tpu": their compilers gather and add up at different places.
        shapes: from `memory.abstract_state`.
    """
    m, accum, cpu = config.model, config.train.grad_accum_steps, platform == "cpu"
    remat = m.remat != "none"
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    table, parameters = held(shapes, mesh).table, sum(held(shapes, mesh).parameters)
    tokens = config.train.batch_size / (data * fsdp) * config.data.seq_len
    stream = tokens * m.d_model * np.dtype(model.dtype).itemsize
    narrow = np.dtype(model.dtype).itemsize / _FP32
    tables = table * (1 if m.tie_embeddings else 2)
    blocks = parameters - tables
    if cpu:
        # Tied, the table is gathered and its gradient scattered twice, for the lookup and the
        # logits. Gathered for the forward pass: once, since microbatches change no parameter and
        # XLA moves it out of their loop. Recomputing gathers the blocks' again, in the loop. A
        # gradient is added up whole, and then each device takes its shard.
        gathered = blocks + 2 * table + (accum * blocks if remat else 0.0)
        scattered = 2 * (blocks + 2 * table)
    else:
        # In the loop, and in the activations' dtype what is used in it: the logits' table (with
        # the loss in several chunks) and the blocks', whose gradients stay in it. A TPU gathers
        # the blocks' for the backward pass too, and the logits' table before the loop.
        tpu = platform == "tpu"
        lookup_table = table * (narrow if tpu and tensor == 1 else 1)
        gathered = accum * (narrow * (1 + tpu + remat) * blocks + lookup_table)
        gathered += narrow * table * (1 if tpu else accum)
        scattered = narrow * blocks + tables
    # Forward: the attention's output and the feed-forward layer's. Backward: the inputs of the
    # feed-forward layer and of q, k and v, on the CPU each by itself. Recomputed: the attention's
    # output.
    sums = m.num_layers * ((6 if cpu else 4) + remat) + 1  # and the input of the logits
    lookup = stream if platform == "tpu" else tokens * m.d_model * _FP32
    return {
        "data": 2 * _others(data) * parameters,
        "fsdp": _others(fsdp) * fsdp * (gathered + accum * scattered),
        "tensor": accum * 2 * _others(tensor) * (sums * stream + lookup),
    }


def _others(count: int) -> float:
    """(n - 1) / n: what of an array the others of an axis have."""
    return (count - 1) / count
