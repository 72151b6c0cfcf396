"""Attention: positions, masks, softmax attention and the key/value cache, as pure functions.

Alphabet: B batch, T query time, S key time, H query heads, K key/value heads, C head
width, G = H / K.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "cudnn"]

# Queries of one causal block: at least, so that products stay large; and the most blocks, so that a
# long context does not compile for ever.
CAUSAL_BLOCK, CAUSAL_BLOCKS = 128, 8


def choose_implementation(
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    attention_dropout: float,
    document_mask: bool = False,
    flash_attention: bool = True,
) -> Implementation:
    """Decides which attention a training step uses; decoding always uses XLA's.

    cuDNN's flash attention takes bf16 on NVIDIA (cards from Ampere on), heads of a multiple of 8 up
    to 128 wide, and neither dropout on the weights nor a mask other than causal, so no borders of
    documents.
    """
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    causal_alone = attention_dropout == 0 and not document_mask
    there = platform == "cuda" and flash_attention
    return "cudnn" if there and fits and causal_alone else "xla"


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE's angles: position · theta^(-2i / C), i = 0 … C/2 - 1.

    Args:
        positions: integers [..., T].
        head_dim: C, even.
        theta: the base of the wavelengths.

    Returns:
        Two fp32 arrays [..., T, 1, C/2], that broadcast over heads.

    Source: Su et al. 2021, "RoFormer", equation 34.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) / theta**exponents
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def apply_rope(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of each head by their angles; keeps shape and dtype.

    The half-split pairing is the one that public checkpoints use. Computed in fp32, since bf16
    cannot tell neighbouring angles apart.
    """
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)


def sinusoidal_embedding(positions: jax.Array, d_model: int) -> jax.Array:
    """Sines in even and cosines in odd components: fp32 [..., T, D] for integers [..., T].

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    exponents = jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model
    angles = positions[..., None].astype(jnp.float32) / 10000.0**exponents
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], d_model)


def causal_mask(length: int) -> jax.Array:
    """Boolean [1, T, S]: query t sees key s when s <= t."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """Positions within each document of a packed window, 0 at every border.

    Args:
        segments_BT: int32, which document of its window a token belongs to; rising along T. The
            first may have begun before the window: its positions count from the window's start.

    Returns:
        int32 [B, T].
    """
    slots = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = segments_BT != jnp.roll(segments_BT, 1, axis=1)
    # Slot 0 compares itself with the row's last, and begins at 0 either way.
    return slots - jax.lax.cummax(jnp.where(begins_BT, slots, 0), axis=1)


def segment_mask(segments_BT: jax.Array) -> jax.Array:
    """Boolean [B, T, S]: query t sees key s when s <= t, and both are of one document.

    With `segment_positions` it makes a packed window (int32 [B, T]) what its documents are alone.
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTS & causal_mask(segments_BT.shape[1])


# Scores are the large array. XLA multiplies batches of matrices as [M, K] x [K, N], and transposes
# what lies otherwise: on a CPU that takes longer than the product. So no product here, and none of
# its derivatives, asks for scores with queries and keys exchanged: hence the order of factors, and
# this derivative written out.
@jax.custom_vjp
def _scores(q_BKGTC, k_BSKC):
    """Q Kᵀ, fp32 [B, K, G, T, S]."""
    contracted, batch = ((4,), (3,)), ((0, 1), (0, 2))
    return jax.lax.dot_general(
        q_BKGTC, k_BSKC, (contracted, batch), preferred_element_type=jnp.float32
    )


def _scores_forward(q_BKGTC, k_BSKC):
    return _scores(q_BKGTC, k_BSKC), (q_BKGTC, k_BSKC)


def _scores_backward(factors, d_BKGTS):
    q_BKGTC, k_BSKC = factors
    d_BKGTS = d_BKGTS.astype(q_BKGTC.dtype)
    dq_BKGTC = jax.lax.dot_general(d_BKGTS, k_BSKC, (((4,), (1,)), ((0, 1), (0, 2))))
    # (Qᵀ dS)ᵀ, where autodiff takes dSᵀ Q.
    dk_BKCS = jax.lax.dot_general(q_BKGTC, d_BKGTS, (((2, 3), (2, 3)), ((0, 1), (0, 1))))
    return dq_BKGTC, dk_BKCS.transpose(0, 3, 1, 2)


_scores.defvjp(_scores_forward, _scores_backward)


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """softmax(Q Kᵀ / √C + mask) V for grouped heads, with the softmax in fp32.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h reads key/value head h // G.
        k_BSKC: keys.
        v_BSKC: values.
        mask_BTS: boolean, true where a query may see a key; B may be 1.
        dropout: applied to the attention weights.

    Returns:
        [B, T, H, C] in the dtype of the values. A query that sees nothing gets the mean of the
        values rather than NaN; such rows are padding.

    Source: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023.
    """
    b, t, h, c = q_BTHC.shape
    k = k_BSKC.shape[2]
    q_BKGTC = q_BTHC.reshape(b, t, k, h // k, c).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = _scores(q_BKGTC, k_BSKC)
    mask = mask_BTS[:, None, None]
    scores_BKGTS = jnp.where(mask, scores_BKGTS * c**-0.5, jnp.finfo(jnp.float32).min)
    weights_BKGTS = dropout(jax.nn.softmax(scores_BKGTS, axis=-1)).astype(v_BSKC.dtype)
    out_BKGTC = jax.lax.dot_general(weights_BKGTS, v_BSKC, (((4,), (1,)), ((0, 1), (0, 2))))
    return out_BKGTC.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def attend_causal(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    mask_BTT: jax.Array,
    drop: Callable[[int, jax.Array], jax.Array] = lambda first_query, weights: weights,
) -> jax.Array:
    """`attend` where no query sees a later key, without most of the scores that it would hide.

    Queries go in n blocks, each with the keys up to its own end: (n + 1) / 2n of all scores.
    `drop` is `attend`'s dropout, told the block's first query, since each has weights of its own.
    """
    outs = [
        attend(
            q_BTHC[:, begin:end],
            k_BTKC[:, :end],
            v_BTKC[:, :end],
            mask_BTT[:, begin:end, :end],
            functools.partial(drop, begin),
        )
        for begin, end in _causal_blocks(q_BTHC.shape[1])
    ]
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def causal_share(length: int) -> float:
    """The part of all T · T scores that `attend_causal` forms."""
    return sum((end - begin) * end for begin, end in _causal_blocks(length)) / length**2


def _causal_blocks(length: int) -> list[tuple[int, int]]:
    size = max(CAUSAL_BLOCK, -(-length // CAUSAL_BLOCKS))
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def attend_causal_cudnn(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array) -> jax.Array:
    """The causal case of `attend` by cuDNN's flash attention, which never forms the scores."""
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSKC, v_BSKC, is_causal=True, implementation="cudnn"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the positions decoded so far, in arrays whose shape never changes.

    Attributes:
        keys: one [B, S, K, C] array a layer; RoPE is already applied.
        values: likewise.
        index: int32 scalar, the slot that is written next, shared by all rows.
        start: int32 [B], each row's first slot that is not padding. A row's position is its slot
            minus its start.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    index: jax.Array
    start: jax.Array

    def positions(self, length: int) -> jax.Array:
        """Positions [B, T] of the next T slots; padding, before a row's start, gets 0."""
        slots = self.index + jnp.arange(length, dtype=jnp.int32)
        return jnp.maximum(slots - self.start[:, None], 0)

    def mask(self, length: int) -> jax.Array:
        """Boolean [B, T, S]: the next T slots see slots from their row's start to themselves."""
        queries = (self.index + jnp.arange(length, dtype=jnp.int32))[:, None]
        keys = jnp.arange(self.keys[0].shape[1], dtype=jnp.int32)
        return (keys <= queries) & (keys >= self.start[:, None, None])


def init_cache(
    num_layers: int, start: jax.Array, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """An empty cache of S = `slots` for the rows of `start` (int32 [B])."""
    shape = (start.shape[0], slots, kv_heads, head_dim)
    layers = [jnp.zeros(shape, dtype) for _ in range(2 * num_layers)]
    keys, values = tuple(layers[:num_layers]), tuple(layers[num_layers:])
    return Cache(keys, values, jnp.zeros((), jnp.int32), start.astype(jnp.int32))


def write_cache(buffer_BSKC: jax.Array, rows_BTKC: jax.Array, index: jax.Array) -> jax.Array:
    """Writes T new rows from slot `index` on, in one update."""
    zero = jnp.zeros((), index.dtype)
    return jax.lax.dynamic_update_slice(
        buffer_BSKC, rows_BTKC.astype(buffer_BSKC.dtype), (zero, index, zero, zero)
    )
