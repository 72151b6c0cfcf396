"""Communication volume of one update, per mesh axis.

Alphabet: A microbatches, M tokens of a microbatch on one device, D model width, N layers, n devices
of an axis. In an all-reduce of X bytes each device sends 2 (n - 1) / n X bytes, in an all-gather to
or a reduce-scatter from X bytes (n - 1) / n X (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce
algorithms"). The collectives were read from the compiled step: on 8 CPU devices, and compiled ahead
of time for 8 H100 and 8 TPU v5e (`benchmarks/aot.py`).
"""

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.activations import FP32, traced
from sheepop_jax.planning.memory import Shapes, held


def bytes_sent(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str, shapes: Shapes
) -> dict[str, float]:
    """Returns the bytes that each device sends in one update, per mesh axis.

    `data` all-reduces gradients once per update. `fsdp` all-gathers parameters and reduce-scatters
    gradients once per microbatch. `tensor` all-reduces each sublayer's output, and the gradient of
    its input.

    Args:
        config: the run's configuration.
        model: the model, with its vocabulary and dtype.
        mesh: the devices, real or abstract.
        platform: "cpu", "cuda" or "tpu"; their compilers place collectives differently.
        shapes: the result of `memory.abstract_state`.
    """
    m, accum, cpu = config.model, config.train.grad_accum_steps, platform == "cpu"
    remat = m.remat != "none"
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    state = held(shapes, mesh)
    table, trained = state.table, sum(state.parameters)
    parameters = trained + state.frozen
    rows = config.train.batch_size / (data * fsdp)
    one, two = traced(model, config.data.seq_len, tensor)
    stream = rows * one.hidden
    narrow = np.dtype(model.dtype).itemsize / FP32
    tables = table * (1 if m.tie_embeddings else 2)
    blocks = parameters - tables
    if cpu:
        # A tied table is gathered, and its gradient reduced, twice: for the lookup and the logits.
        # The forward gather runs once, since XLA hoists it out of the loop over microbatches; remat
        # gathers the blocks again inside the loop. Gradients are all-reduced, then sliced.
        gathered = blocks + 2 * table + (accum * blocks if remat else 0.0)
        scattered = 2 * (blocks + 2 * table)
    else:
        # Gathers run in the loop over microbatches. Blocks, their gradients and the logits' table
        # (if the loss has several chunks) cross in the activations' dtype. TPUs gather the blocks
        # again for the backward pass, and the logits' table once, before the loop.
        tpu = platform == "tpu"
        lookup_table = table * (narrow if tpu and tensor == 1 else 1)
        gathered = accum * (narrow * (1 + tpu + remat) * blocks + lookup_table)
        gathered += narrow * table * (1 if tpu else accum)
        scattered = narrow * blocks + tables
    if state.frozen:  # of adapters, only small gradients
        scattered = 2 * trained
    # All-reduced matmul results: those of each block (forward, recomputed, backward) and the
    # gradient of the logits' input. Only the CPU reduces the gradients of q, k and v separately.
    block = two.sums - one.sums if cpu else two.joint_sums - one.joint_sums
    sums = m.num_layers * rows * block + stream
    lookup = stream if platform == "tpu" else stream / narrow
    return {
        "data": 2 * _others(data) * trained,
        "fsdp": _others(fsdp) * fsdp * (gathered + accum * scattered),
        "tensor": accum * 2 * _others(tensor) * (sums + lookup),
    }


def _others(count: int) -> float:
    """Returns (n - 1) / n, the fraction of an array on the other devices of an axis."""
    return (count - 1) / count
