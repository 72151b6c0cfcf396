"""Chunked cross-entropy: the full logits are never materialized.

Alphabet: B batch, T time, M = B·T tokens, D model width, V vocabulary (padded), Mc tokens per
chunk. With sharded rows, each device iterates over its own (`partitioning.sum_over_replicas`).

Functions return weighted sums; the caller adds them up and divides once. The result therefore does
not depend on microbatches, devices or padded rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sheepop_jax.model.partitioning import constrain
from sheepop_jax.model.transformer import unembed

# Logits per chunk, in fp32 elements. Every chunk rewrites the full embedding gradient, so its three
# matmuls must be large enough to outweigh that. 128 MB of logits suffice on a CPU; a GPU, with
# more FLOPs per byte of memory bandwidth, needs 1 GB.
CHUNK_ELEMENTS = 1 << 25
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 28


def chunk_elements(platform: str) -> int:
    """Maximum logits per chunk on a platform: "cpu", "cuda" or "tpu"."""
    return CHUNK_ELEMENTS if platform == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS


def chunk_length(tokens: int, vocab: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Mc: tokens per chunk, such that a chunk has at most `elements` logits.

    Uses up to twice the required number of chunks if that number divides the tokens evenly.
    """
    needed = -(-tokens // max(1, min(tokens, elements // vocab)))
    even = (chunks for chunks in range(needed, 2 * needed) if tokens % chunks == 0)
    return -(-tokens // next(even, needed))


class EvaluationSums(NamedTuple):
    """Weighted sums over tokens, fp32 scalars; divide by `weight` once, at the end."""

    loss: jax.Array  # nats
    correct: jax.Array  # tokens predicted correctly by the argmax
    weight: jax.Array


def _join(one, other):
    """Combines (max, Σ exp(x - max)) of two parts; rescales the sum with the smaller maximum."""
    (x, total), (y, other_total) = one, other
    scale = jnp.where(x == y, 1.0, jnp.exp(-jnp.abs(x - y)))  # both may be -inf
    joined = jnp.where(x > y, total + scale * other_total, scale * total + other_total)
    return jnp.maximum(x, y), joined


def _partition_in_one_pass(x_MV):
    """`_partition`, reading each logit once."""
    none = jnp.finfo(jnp.float32).min, jnp.zeros((), jnp.float32)
    return jax.lax.reduce((x_MV, jnp.ones_like(x_MV)), none, _join, (1,))


def _partition(x_MV):
    """max x and Σ exp(x - max x) along V."""
    largest_M = x_MV.max(-1)
    return largest_M, jnp.exp(x_MV - largest_M[:, None]).sum(-1)


def _terms(hidden_MD, embedding_VD, targets_M, vocab_size, softcap):
    """Returns a chunk's logits, max logit, Σ exp(logit - max) and -log p(target), all fp32."""
    logits_MV = unembed(hidden_MD, embedding_VD, vocab_size, softcap)
    # Memory-bound on a GPU, so one pass. On a CPU two passes measured faster.
    largest_M, total_M = jax.lax.platform_dependent(
        logits_MV, cuda=_partition_in_one_pass, default=_partition
    )
    target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return logits_MV, largest_M, total_M, largest_M + jnp.log(total_M) - target_M


def over_chunks(
    body: Callable[..., tuple[Any, Any]], carry: Any, arrays: tuple[jax.Array, ...], chunk: int
) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, *chunks)` over the tokens of [B, T, …] arrays.

    Outputs [Mc, …] are reassembled to [B, T, …]. M is padded to a multiple of the chunk with zeros,
    which have weight 0.
    """
    rows = arrays[-1].shape
    tokens = math.prod(rows)
    n = -(-tokens // chunk)

    def split(x):
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, n * chunk - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, chunk, *x.shape[1:])

    def join(y):
        return y.reshape(n * chunk, *y.shape[2:])[:tokens].reshape(*rows, *y.shape[2:])

    xs = tuple(map(split, arrays))
    if n == 1:
        carry, ys = body(carry, *(x[0] for x in xs))
        ys = jax.tree.map(lambda y: y[None], ys)
    else:
        carry, ys = jax.lax.scan(lambda c, xs: body(c, *xs), carry, xs)
    return carry, jax.tree.map(join, ys)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    softcap: float,
    chunk: int,
) -> jax.Array:
    """Σ weight · -log softmax(logits)[target], in nats; an fp32 scalar. The logits are `unembed`'s.

    Differentiable with respect to the hidden states and the embedding. The forward pass computes
    the gradients of each chunk from its logits, so no logits are stored or recomputed:
    d logits = weight · (softmax - onehot), and with z = c tanh(u / c), du = (1 - (z / c)²) dz.

    Args:
        hidden_BTD: hidden states, in the activations' dtype.
        embedding_VD: output embedding, fp32; V is padded.
        targets_BT: int32 token ids below `vocab_size`.
        weights_BT: fp32; 0 for targets to ignore.
        vocab_size: vocabulary size without padding.
        softcap: c, `model.logit_softcap`; 0 for none.
        chunk: Mc, from `chunk_length`.
    """
    arrays = hidden_BTD, embedding_VD, targets_BT, weights_BT
    return evaluation_sums(*arrays, vocab_size, softcap, chunk).loss


def _forward(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, softcap, chunk):
    dtype = hidden_BTD.dtype
    # Gather the rows once for all chunks.
    embedding_in_dtype = constrain(embedding_VD.astype(dtype), "vocab", "activation")

    def body(carry, hidden, targets, weights):
        loss, d_embedding = carry
        logits, largest, total, nll = _terms(
            hidden, embedding_in_dtype, targets, vocab_size, softcap
        )
        # A comparison instead of a scatter: XLA fuses it into the loop over the logits.
        is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
        probabilities = jnp.exp(logits - largest[:, None]) * (1 / total)[:, None]
        d_logits = (probabilities - is_target) * weights[:, None]
        if softcap:  # the padding's logits are -inf, and their gradient 0
            d_logits *= jnp.where(jnp.isneginf(logits), 0, 1 - jnp.square(logits / softcap))
        d_logits = d_logits.astype(dtype)
        d_hidden = d_logits @ embedding_in_dtype
        d_embedding += jnp.matmul(d_logits.T, hidden, preferred_element_type=jnp.float32)
        return (loss + jnp.sum(weights * nll), d_embedding), d_hidden

    carry = jnp.zeros((), jnp.float32), jnp.zeros(embedding_VD.shape, jnp.float32)
    arrays = (hidden_BTD, targets_BT, weights_BT)
    (loss, d_embedding), d_hidden = over_chunks(body, carry, arrays, chunk)
    return loss, (d_hidden, d_embedding)


def _backward(vocab_size, softcap, chunk, gradients, cotangent):
    d_hidden, d_embedding = gradients
    return cotangent.astype(d_hidden.dtype) * d_hidden, cotangent * d_embedding, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def evaluation_sums(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    softcap: float,
    chunk: int,
) -> EvaluationSums:
    """The sum of `cross_entropy_sum` plus the correct predictions; computes no gradients."""

    def body(sums, hidden, targets, weights):
        logits, *_, nll = _terms(hidden, embedding_VD, targets, vocab_size, softcap)
        correct = jnp.argmax(logits, axis=-1) == targets
        added = EvaluationSums(jnp.sum(weights * nll), jnp.sum(weights * correct), jnp.sum(weights))
        return jax.tree.map(jnp.add, sums, added), None

    zero = EvaluationSums(*(jnp.zeros((), jnp.float32) for _ in EvaluationSums._fields))
    sums, _ = over_chunks(body, zero, (hidden_BTD, targets_BT, weights_BT), chunk)
    return sums
