"""Cross-entropy over the vocabulary, in chunks of tokens, so that the logits never exist whole.

Alphabet: B batch, T time, M = B·T tokens, D model width, V vocabulary (padded), Mc tokens of a
chunk. Devices that split the rows each go through their own (`partitioning.sum_over_replicas`).

Everything is a weighted sum; whoever holds all the sums divides once, so that microbatches, devices
and padded rows all give the same number.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sheepop_jax.model.partitioning import constrain
from sheepop_jax.model.transformer import unembed

# Logits of one chunk, in fp32 elements. Every chunk rewrites the whole gradient of the embedding:
# its three products must be large enough to outweigh that. 128 MB of logits suffice on a CPU; a
# GPU, whose products are faster relative to its memory, needs 1 GB.
CHUNK_ELEMENTS = 1 << 25
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 28


def chunk_elements(platform: str) -> int:
    """Logits of one chunk on "cpu", "cuda" or "tpu"."""
    return CHUNK_ELEMENTS if platform == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS


def chunk_length(tokens: int, vocab: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Mc: the largest chunk of at most so many logits, evened out.

    Up to twice as many chunks as needed are made where so many divide the tokens without a rest.
    """
    needed = -(-tokens // max(1, min(tokens, elements // vocab)))
    even = (chunks for chunks in range(needed, 2 * needed) if tokens % chunks == 0)
    return -(-tokens // next(even, needed))


class EvaluationSums(NamedTuple):
    """Sums over counted tokens, fp32 scalars: divide by `weight` once, at the end."""

    loss: jax.Array  # nats
    correct: jax.Array  # tokens whose most probable prediction was right
    weight: jax.Array


def _join(one, other):
    """(max, Σ exp(x - max)) of two parts together: that of the smaller maximum is scaled down."""
    (x, total), (y, other_total) = one, other
    scale = jnp.where(x == y, 1.0, jnp.exp(-jnp.abs(x - y)))  # both may be -inf
    joined = jnp.where(x > y, total + scale * other_total, scale * total + other_total)
    return jnp.maximum(x, y), joined


def _partition_in_one_pass(x_MV):
    """`_partition`, reading each x once."""
    none = jnp.finfo(jnp.float32).min, jnp.zeros((), jnp.float32)
    return jax.lax.reduce((x_MV, jnp.ones_like(x_MV)), none, _join, (1,))


def _partition(x_MV):
    """max x and Σ exp(x - max x) along V."""
    largest_M = x_MV.max(-1)
    return largest_M, jnp.exp(x_MV - largest_M[:, None]).sum(-1)


def _terms(hidden_MD, embedding_VD, targets_M, vocab_size):
    """Of one chunk: logits, their maximum, Σ exp(logit - maximum), -log p(target); all fp32."""
    logits_MV = unembed(hidden_MD, embedding_VD, vocab_size)
    # A GPU waits for memory here. On a CPU two passes of plain sums were faster than one (by hand).
    largest_M, total_M = jax.lax.platform_dependent(
        logits_MV, cuda=_partition_in_one_pass, default=_partition
    )
    target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return logits_MV, largest_M, total_M, largest_M + jnp.log(total_M) - target_M


def _over_chunks(
    body: Callable[..., tuple[Any, Any]], carry: Any, arrays: tuple[jax.Array, ...], chunk: int
) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, *chunks)` over the tokens of [B, T, …] arrays.

    Stacked outputs [Mc, …] come back joined to [B, T, …]. M is padded with zeros, hence weight
    zero, to a multiple of the chunk.
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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """Σ weight · -log softmax(h Eᵀ)[target], in nats; an fp32 scalar.

    Differentiable in the hidden states and the embedding. The gradients are formed while the logits
    of a chunk are at hand, in the forward pass, so that nothing is computed twice and no logits are
    kept: d logits = weight · (softmax - onehot).

    Args:
        hidden_BTD: in the activations' dtype.
        embedding_VD: fp32; V is padded.
        targets_BT: int32 below `vocab_size`.
        weights_BT: fp32; 0 where a target does not count.
        vocab_size: the true vocabulary size.
        chunk: Mc, from `chunk_length`.
    """
    return evaluation_sums(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, chunk).loss


def _forward(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, chunk):
    dtype = hidden_BTD.dtype
    # Whole rows, once for all chunks.
    embedding_in_dtype = constrain(embedding_VD.astype(dtype), "vocab", "activation")

    def body(carry, hidden, targets, weights):
        loss, d_embedding = carry
        logits, largest, total, nll = _terms(hidden, embedding_in_dtype, targets, vocab_size)
        # A comparison and no index: part of the same loop over the logits.
        is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
        probabilities = jnp.exp(logits - largest[:, None]) * (1 / total)[:, None]
        d_logits = ((probabilities - is_target) * weights[:, None]).astype(dtype)
        d_hidden = d_logits @ embedding_in_dtype
        d_embedding += jnp.matmul(d_logits.T, hidden, preferred_element_type=jnp.float32)
        return (loss + jnp.sum(weights * nll), d_embedding), d_hidden

    carry = jnp.zeros((), jnp.float32), jnp.zeros(embedding_VD.shape, jnp.float32)
    arrays = (hidden_BTD, targets_BT, weights_BT)
    (loss, d_embedding), d_hidden = _over_chunks(body, carry, arrays, chunk)
    return loss, (d_hidden, d_embedding)


def _backward(vocab_size, chunk, gradients, cotangent):
    d_hidden, d_embedding = gradients
    return cotangent.astype(d_hidden.dtype) * d_hidden, cotangent * d_embedding, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def evaluation_sums(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    chunk: int,
) -> EvaluationSums:
    """The same loss, with the count of right predictions and without any gradient."""

    def body(sums, hidden, targets, weights):
        logits, *_, nll = _terms(hidden, embedding_VD, targets, vocab_size)
        correct = jnp.argmax(logits, axis=-1) == targets
        added = EvaluationSums(jnp.sum(weights * nll), jnp.sum(weights * correct), jnp.sum(weights))
        return jax.tree.map(jnp.add, sums, added), None

    zero = EvaluationSums(*(jnp.zeros((), jnp.float32) for _ in EvaluationSums._fields))
    sums, _ = _over_chunks(body, zero, (hidden_BTD, targets_BT, weights_BT), chunk)
    return sums
