"""Causal self-attention: the Linen module, its masks, and attention as pure functions.

Alphabet: B batch, T query time, S key time, D model width, H query heads, K key/value heads, C head
width, G = H / K, M = B·T tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.model.dropout import ATTENTION_WEIGHTS, dropout
from sheepop_jax.model.kv_cache import extend
from sheepop_jax.model.linear import INIT_STDDEV, linear, residual_stddev
from sheepop_jax.model.norms import RMSNorm
from sheepop_jax.model.positions import apply_rope

Implementation = Literal["xla", "cudnn"]

# Minimum queries per causal block, so that the matmuls stay large; maximum number of blocks, which
# bounds the compile time of long contexts.
CAUSAL_BLOCK, CAUSAL_BLOCKS = 128, 8


def causal_mask(length: int, window: int = 0) -> jax.Array:
    """Boolean [1, T, S]: query t attends to key s if s <= t and, with a window, s > t - window."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    return mask & ~jnp.tril(mask, -window) if window else mask


def segment_mask(segments_BT: jax.Array, window: int = 0) -> jax.Array:
    """`causal_mask` within documents, boolean [B, T, S]: both tokens belong to the same one.

    With `segment_positions`, each document of a packed window (int32 [B, T]) gets the same outputs
    as in a window of its own.
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTS & causal_mask(segments_BT.shape[1], window)


# The scores are the largest array. XLA computes batched matmuls as [M, K] x [K, N] and transposes
# any other layout, which on a CPU takes longer than the matmul. The operand order and this custom
# derivative avoid transposing the scores in the forward and backward passes.
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
    # (Qᵀ dS)ᵀ; autodiff would compute dSᵀ Q and transpose dS.
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
    """Grouped-query attention, softmax(Q Kᵀ / √C + mask) V, with the softmax in fp32.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h uses key/value head h // G.
        k_BSKC: keys.
        v_BSKC: values.
        mask_BTS: boolean, true where a query attends to a key; B may be 1.
        dropout: applied to the attention weights.

    Returns:
        [B, T, H, C] in the dtype of the values. A fully masked query (padding) returns the mean of
        the values instead of NaN.

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
    window: int = 0,
) -> jax.Array:
    """Causal `attend`, computed in blocks of queries to skip most of the masked scores.

    Each of the n blocks attends to the keys up to its own end, so (n + 1) / 2n of all scores are
    computed; with a sliding window, to those from its first query's window on.

    Args:
        q_BTHC: queries, as in `attend`.
        k_BTKC: keys.
        v_BTKC: values.
        mask_BTT: boolean; must be false for every later key; B may be 1.
        drop: attention dropout; called with the block's first query and the block's weights.
        window: the sliding window that `mask_BTT` has; 0 for none.

    Returns:
        [B, T, H, C] in the dtype of the values.
    """
    outs = [
        attend(
            q_BTHC[:, begin:end],
            k_BTKC[:, first:end],
            v_BTKC[:, first:end],
            mask_BTT[:, begin:end, first:end],
            functools.partial(drop, begin),
        )
        for first, begin, end in _causal_blocks(q_BTHC.shape[1], window)
    ]
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def _causal_blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """Of each block: the first key, the first query, and the end of both."""
    size = max(CAUSAL_BLOCK, -(-length // CAUSAL_BLOCKS))
    return [
        (max(0, begin - window + 1) if window else 0, begin, min(begin + size, length))
        for begin in range(0, length, size)
    ]


class Attention(nn.Module):
    """Multi-head causal self-attention with an optional key/value cache."""

    config: ModelConfig
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BTD, rope, mask, layer_cache, index, dropout_keys_B):
        cfg = self.config
        b, t, d = x_BTD.shape
        h, k, c = cfg.num_heads, cfg.kv_heads, cfg.head_width
        x_MD = x_BTD.reshape(b * t, d)

        def project(heads: int, axis: str, name: str) -> jax.Array:
            bias = cfg.use_bias or cfg.qkv_bias
            y = linear(cfg, heads * c, ("embed", axis), name, self.dtype, INIT_STDDEV, bias)(x_MD)
            return y.reshape(b, t, heads, c)

        q_BTHC = project(h, "heads", "query")
        k_BTKC = project(k, "kv_heads", "key")
        v_BTKC = project(k, "kv_heads", "value")
        if cfg.qk_norm:
            q_BTHC = RMSNorm(cfg.norm_eps, self.dtype, "head_width", name="query_norm")(q_BTHC)
            k_BTKC = RMSNorm(cfg.norm_eps, self.dtype, "head_width", name="key_norm")(k_BTKC)
        if rope is not None:
            q_BTHC, k_BTKC = apply_rope(q_BTHC, *rope), apply_rope(k_BTKC, *rope)

        def drop(first_query: int, weights: jax.Array) -> jax.Array:
            site = ATTENTION_WEIGHTS + first_query
            return dropout(weights, cfg.attention_dropout, dropout_keys_B, site)

        if layer_cache is not None:
            keys, values = layer_cache
            keys, all_keys = extend(keys, k_BTKC, index, cfg.sliding_window)
            values, all_values = extend(values, v_BTKC, index, cfg.sliding_window)
            layer_cache = (keys, values)
            out_BTHC = attend(q_BTHC, all_keys, all_values, mask)
        elif self.implementation == "cudnn":
            from sheepop_jax.model.flash_attention import attend_causal_cudnn  # lazy: GPUs only

            out_BTHC = attend_causal_cudnn(q_BTHC, k_BTKC, v_BTKC, cfg.sliding_window)
        else:
            out_BTHC = attend_causal(q_BTHC, k_BTKC, v_BTKC, mask, drop, cfg.sliding_window)
        stddev = residual_stddev(cfg)
        out = linear(cfg, d, ("heads", "embed"), "output", self.dtype, stddev)
        return out(out_BTHC.reshape(b * t, h * c)).reshape(b, t, d), layer_cache
