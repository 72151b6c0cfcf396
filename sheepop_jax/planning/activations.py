"""Activation and logit memory per device, from the traced forward and backward pass.

`jax.vjp` of the model is traced with one block and with two; the difference is the cost of a block.
A new norm, activation or feed-forward layer needs no change here.

Alphabet: T time, M tokens of a microbatch on one device, D model width, V vocabulary (padded).
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sheepop_jax.config.schema import Config
from sheepop_jax.model.loss import chunk_elements, chunk_length
from sheepop_jax.model.partitioning import RULES
from sheepop_jax.model.transformer import Transformer, boxed_shapes, output_embedding
from sheepop_jax.planning.arrays import Analysis, Array
from sheepop_jax.planning.program import flatten

FP32 = 4  # bytes

_BOUNDARY = "backward"  # names the first operation of the backward pass


class Activations(NamedTuple):
    """Activation memory of one device, in bytes except `tokens`.

    Attributes:
        tokens: M, the number of tokens.
        block: residuals of one block.
        kept: residuals of all blocks.
        head: residuals of the embeddings and the final norm, plus the hidden states.
        backward: peak working set of the backward pass, in addition to residuals.
        loss: one chunk of logits and its gradient, plus the carry of the loop over chunks.
        loss_grads: gradients returned by the loss.
    """

    tokens: float
    block: float
    kept: float
    head: float
    backward: float
    loss: float
    loss_grads: float

    @classmethod
    def of(
        cls, config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str
    ) -> "Activations":
        """Traces one sequence and scales the result to the sequences of a microbatch."""
        tensor = mesh.shape["tensor"]
        rows = config.train.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
        tokens = rows * config.data.seq_len
        one, two = traced(model, config.data.seq_len, tensor)
        block = rows * (two.kept - one.kept)
        hidden = rows * one.hidden
        loss, loss_grads = _loss(one, mesh, platform, tokens)
        return cls(
            tokens=tokens,
            block=block,
            kept=config.model.num_layers * block,
            head=rows * one.kept - block + hidden,
            backward=rows * two.working,
            loss=loss,
            loss_grads=loss_grads,
        )


def _loss(
    sizes: "Sizes", mesh: Mesh | AbstractMesh, platform: str, tokens: float
) -> tuple[float, float]:
    """Returns the peak bytes of the loss, and the bytes of the gradients that it returns."""
    tensor, (padded, width) = mesh.shape["tensor"], sizes.table
    hidden = tokens * width * sizes.itemsize
    chunk = chunk_length(int(tokens), padded, chunk_elements(platform))
    table = FP32 * padded * width / tensor  # its gradient, before fsdp shards it
    logits = chunk * padded / tensor
    # CPU: logits and their exponentials. GPU, TPU: logits and their gradients; the rest is fused.
    total, second = FP32 * logits, (FP32 if platform == "cpu" else sizes.itemsize) * logits
    if platform == "cpu" and mesh.size > 1:  # a copy, to gather the target logits
        total += FP32 * logits
    if chunk < tokens:
        if platform == "cpu":  # logit gradients, then their contribution to the table's gradient
            second = max(second, table)
        total += table + hidden  # the scan's carry and its stacked output
    return total + second, table + hidden


class Sizes(NamedTuple):
    """Memory of one sequence on one device, in bytes.

    Attributes:
        kept: residuals, from the forward pass to the backward pass.
        working: peak working set of the backward pass, without residuals and parameter gradients.
        hidden: the model's output.
        itemsize: bytes per element of the output.
        table: shape [V, D] of the output embedding.
        sums: partial matmul results that are all-reduced over the `tensor` axis.
        joint_sums: the same, if results of one shape are added before the all-reduce.
    """

    kept: float
    working: float
    hidden: float
    itemsize: int
    table: tuple[int, ...]
    sums: float
    joint_sums: float


def traced(model: Transformer, time: int, tensor: int) -> tuple[Sizes, Sizes]:
    """Traces the model with one block and with two."""
    one, two = (
        trace(model.clone(config=replace(model.config, num_layers=layers)), time, tensor)
        for layers in (1, 2)
    )
    return one, two


@lru_cache(maxsize=64)
def trace(model: Transformer, time: int, tensor: int) -> Sizes:
    """Traces the forward and backward pass of one sequence, without computing it.

    Args:
        model: the model, with its number of blocks.
        time: T, the sequence length.
        tensor: size of the mesh's `tensor` axis.
    """
    fused = model.implementation == "cudnn"
    model = model.clone(implementation="xla")  # cuDNN attention cannot be traced without cuDNN
    boxed = boxed_shapes(model)
    params = nn.meta.unbox(boxed)
    drops = model.config.dropout > 0 or model.config.attention_dropout > 0
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)) if drops else None
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
    hidden = jax.ShapeDtypeStruct((1, time, model.config.d_model), model.dtype)

    def gradients(params: Any, tokens: Any, keys: Any, cotangent: Any) -> Any:
        def forward(params: Any) -> Any:
            return model.apply({"params": params}, tokens, dropout_keys_B=keys)[0]

        backward = jax.vjp(forward, params)[1]
        return backward(checkpoint_name(cotangent, _BOUNDARY))

    program = flatten(jax.make_jaxpr(gradients)(params, tokens, keys, hidden))
    last = program.inputs[-1]
    specs = nn.get_partition_spec(boxed)
    axes = [_tensor_axis(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)]
    given = [Array(v, parameter=True, axis=a) for v, a in zip(program.inputs, axes, strict=False)]
    given += [Array(v, sources=frozenset({v})) for v in program.inputs[len(axes) : -1]]
    itemsize = np.dtype(hidden.dtype).itemsize
    size = float(hidden.size * itemsize)
    given.append(Array(last, size, sources=frozenset({last})))
    found = Analysis(program, given, tensor)
    boundary = next(at for at, op in enumerate(program.ops) if op.params.get("name") == _BOUNDARY)
    return Sizes(
        _kept(found, boundary, fused),
        _working(found, boundary, fused),
        size,
        itemsize,
        output_embedding(params).shape,
        found.sums,
        found.joint_sums,
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _tensor_axis(spec: Any) -> int | None:
    found = [i for i, name in enumerate(spec) if name and RULES[name] == "tensor"]
    return found[0] if found else None


def _residuals(found: Analysis, boundary: int) -> list[Array]:
    """Arrays that the forward pass computes and the backward pass reads, in program order."""
    program = found.program
    made = {v for op in program.ops[:boundary] for v in op.outputs}
    read = dict.fromkeys(v for op in program.ops[boundary:] for v in op.inputs if v in made)
    arrays = {found.arrays[v].number: found.arrays[v] for v in sorted(read)}
    return [array for array in arrays.values() if array.bytes and not array.parameter]


def _kept(found: Analysis, boundary: int, fused: bool) -> float:
    """Bytes of the residuals that XLA keeps.

    XLA keeps residuals that the forward pass writes to memory. It recomputes booleans from their
    sources, which it keeps, and any array whose sources are all kept. It writes the rest.
    """
    in_memory = {w.array.number for w in found.written if w.at < boundary}
    residuals = _residuals(found, boundary)
    scores = frozenset[int]().union(*(array.scores for array in residuals))
    residuals = [array for array in residuals if not array.scores]
    kept = {array.number: array.bytes for array in residuals if array.number in in_memory}
    for array in residuals:
        sources = {n: found.memory[n].bytes for n in array.sources if n in found.memory}
        boolean = found.program.shapes[array.number].dtype == bool
        if boolean:
            kept |= sources
        elif not sources.keys() <= kept.keys():
            kept[array.number] = array.bytes
    return sum(kept.values()) + sum(_scores_bytes(found, n, fused) for n in scores)


def _scores_bytes(found: Analysis, number: int, fused: bool) -> float:
    """XLA keeps the fp32 exponentials and the weights; a fused kernel keeps one sum per row."""
    shape, elements, itemsize = found.scores[number]
    return FP32 * elements / shape[-1] if fused else (FP32 + itemsize) * elements


def _working(found: Analysis, boundary: int, fused: bool) -> float:
    """Peak bytes of arrays that the backward pass has written and will still read."""
    gradients = {found.get(v).number for v in found.program.outputs}
    steps = [w for w in found.written if w.at >= boundary]
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys((step.array.number, *step.read), i)
    cotangent = found.program.inputs[-1]
    live = {cotangent: found.arrays[cotangent].bytes}
    most = 0.0
    for i, step in enumerate(steps):
        # Recomputed random bits are consumed immediately.
        drawn = found.program.ops[step.at].name == "random_bits"
        if not (drawn or step.array.number in gradients or (fused and step.array.scores)):
            # The result reuses the buffer of an array that is read for the last time.
            live = {n: size for n, size in live.items() if last.get(n, 0) > i or n not in step.read}
            live[step.array.number] = step.array.bytes
            most = max(most, sum(live.values()))
        live = {n: size for n, size in live.items() if last.get(n, 0) > i}
    return most
