"""Cross-entropy over the vocabulary, in chunks along time, so that the logits never exist whole.

Alphabet: B batch, T time, D model width, V vocabulary (padded), Tc the time of one chunk.

Everything is a weighted sum; whoever holds all the sums divides once, so that microbatches, devices
and padded rows all give the same number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sheepop_jax.model.partitioning import constrain
from sheepop_jax.model.transformer import unembed

# Logits of one chunk, in fp32 elements. Each chunk reads and writes the embedding's gradient once,
# beside three products of as many tokens: with 64 MB of logits that is little on a CPU. A GPU,
# whose products are fast beside its memory, wants 1 GB.
CHUNK_ELEMENTS = 1 << 24
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 28


def chunk_elements(platform: str) -> int:
    """Logits of one chunk on "cpu", "cuda" or "tpu"."""
    return CHUNK_ELEMENTS if platform == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS


def chunk_length(shape: tuple[int, ...], vocab: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Tc for targets [B, T]: the longest chunk of at most so many logits, evened out."""
    batch, time = shape
    longest = max(1, min(time, elements // (batch * vocab)))
    chunks = -(-time // longest)
    return -(-time // chunks)


class EvaluationSums(NamedTuple):
    """Sums over counted tokens, fp32 scalars: divide by `weight` once, at the end."""

    loss: jax.Array  # nats
    correct: jax.Array  # tokens whose most probable prediction was right
    weight: jax.Array


def _terms(hidden_BtD, embedding_VD, targets_Bt, vocab_size):
    """Logits, log-partition and negative log-likelihood of one chunk; all fp32."""
    logits_BtV = unembed(hidden_BtD, embedding_VD, vocab_size)
    # A comparison rather than an index: with the vocabulary split over devices it stays local.
    is_target_BtV = jnp.arange(logits_BtV.shape[-1]) == targets_Bt[..., None]
    log_partition_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    nll_Bt = log_partition_Bt - jnp.where(is_target_BtV, logits_BtV, 0).sum(-1)
    return logits_BtV, is_target_BtV, log_partition_Bt, nll_Bt


def _over_chunks(
    body: Callable[..., tuple[Any, Any]], carry: Any, arrays: tuple[jax.Array, ...], chunk: int
) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, *chunks)` over axis 1 of [B, T, …] arrays.

    Stacked outputs [B, Tc, …] come back joined to [B, T, …]. T is padded with zeros, hence weight
    zero, to a multiple of the chunk.
    """
    time = arrays[0].shape[1]
    if chunk >= time:
        return body(carry, *arrays)
    n = -(-time // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, n * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], n * chunk, *y.shape[3:])[:, :time]

    carry, ys = jax.lax.scan(lambda c, xs: body(c, *xs), carry, tuple(map(split, arrays)))
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
        chunk: Tc, from `chunk_length`.
    """
    return evaluation_sums(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, chunk).loss


def _forward(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, chunk):
    dtype = hidden_BTD.dtype
    # Whole rows, once for all chunks.
    embedding_in_dtype = constrain(embedding_VD.astype(dtype), "vocab", "activation")

    def body(carry, hidden, targets, weights):
        loss, d_embedding = carry
        logits, is_target, log_partition, nll = _terms(
            hidden, embedding_in_dtype, targets, vocab_size
        )
        probabilities = jnp.exp(logits - log_partition[..., None])
        d_logits = ((probabilities - is_target) * weights[..., None]).astype(dtype)
        d_logits_MV = d_logits.reshape(-1, d_logits.shape[-1])
        hidden_MD = hidden.reshape(-1, hidden.shape[-1])
        d_hidden = (d_logits_MV @ embedding_in_dtype).reshape(hidden.shape)
        d_embedding += jnp.matmul(d_logits_MV.T, hidden_MD, preferred_element_type=jnp.float32)
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
        logits, _, _, nll = _terms(hidden, embedding_VD, targets, vocab_size)
        correct = jnp.argmax(logits, axis=-1) == targets
        added = EvaluationSums(jnp.sum(weights * nll), jnp.sum(weights * correct), jnp.sum(weights))
        return jax.tree.map(jnp.add, sums, added), None

    zero = EvaluationSums(*(jnp.zeros((), jnp.float32) for _ in EvaluationSums._fields))
    sums, _ = _over_chunks(body, zero, (hidden_BTD, targets_BT, weights_BT), chunk)
    return sums
