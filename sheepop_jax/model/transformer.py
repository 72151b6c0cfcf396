"""The decoder-only transformer: token ids → hidden states, and `unembed`: hidden states → logits.

Alphabet: B batch, T time, S key time, D model width, H query heads, K key/value heads, C head
width, F feed-forward width, V vocabulary (padded), M = B·T tokens.

Parameters are fp32; `dtype` is that of the activations. Linear layers see their tokens flattened to
[M, D]: a product over one axis, forward and backward, is what XLA compiles best on a CPU.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.model import attention as attn
from sheepop_jax.model.dropout import dropout, fold
from sheepop_jax.model.norms import LayerNorm
from sheepop_jax.model.partitioning import VOCAB_MULTIPLE, constrain
from sheepop_jax.model.quantize import dot_general, promote_dtype

INIT_STDDEV = 0.02

# What the backward pass of a block finds there, rather than computes again: the results of its
# matrices' products with the tokens ("dots"; not attention's scores), or nothing but its input.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


def padded_vocab_size(vocab_size: int) -> int:
    """V, the rows of the embedding: the vocabulary rounded up to what hardware multiplies well."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _linear(
    config: ModelConfig, features: int, axes: tuple[str, str], name: str, dtype: Any, stddev: float
) -> nn.Dense:
    """x W (+ b), W [in, out] ~ N(0, stddev)."""
    return nn.Dense(
        features,
        use_bias=config.use_bias,
        dtype=dtype,
        promote_dtype=promote_dtype,
        dot_general=dot_general,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(stddev), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def _residual_stddev(config: ModelConfig) -> float:
    """Keeps the residual stream's variance at init from growing with depth (GPT-2)."""
    return INIT_STDDEV / math.sqrt(2 * config.num_layers)


# Sites of a block, where it drops; attention weights, block by block of queries, from the last on.
_ATTENTION_OUTPUT, _FEED_FORWARD_OUTPUT, ATTENTION_WEIGHTS = range(3)


class Attention(nn.Module):
    """Multi-head causal self-attention, from the cache when there is one."""

    config: ModelConfig
    dtype: Any
    implementation: attn.Implementation

    @nn.compact
    def __call__(self, x_BTD, rope, mask, layer_cache, index, dropout_keys_B):
        cfg = self.config
        b, t, d = x_BTD.shape
        h, k, c = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        x_MD = x_BTD.reshape(b * t, d)

        def project(heads: int, axis: str, name: str) -> jax.Array:
            y = _linear(cfg, heads * c, ("embed", axis), name, self.dtype, INIT_STDDEV)(x_MD)
            return y.reshape(b, t, heads, c)

        q_BTHC = project(h, "heads", "query")
        k_BTKC = project(k, "kv_heads", "key")
        v_BTKC = project(k, "kv_heads", "value")
        if rope is not None:
            q_BTHC, k_BTKC = attn.apply_rope(q_BTHC, *rope), attn.apply_rope(k_BTKC, *rope)

        def drop(first_query: int, weights: jax.Array) -> jax.Array:
            site = ATTENTION_WEIGHTS + first_query
            return dropout(weights, cfg.attention_dropout, dropout_keys_B, site)

        if layer_cache is not None:
            keys, values = layer_cache
            keys = attn.write_cache(keys, k_BTKC, index)
            values = attn.write_cache(values, v_BTKC, index)
            layer_cache = (keys, values)
            out_BTHC = attn.attend(q_BTHC, keys, values, mask)
        elif self.implementation == "cudnn":
            out_BTHC = attn.attend_causal_cudnn(q_BTHC, k_BTKC, v_BTKC)
        else:
            out_BTHC = attn.attend_causal(q_BTHC, k_BTKC, v_BTKC, mask, drop)
        stddev = _residual_stddev(cfg)
        out = _linear(cfg, d, ("heads", "embed"), "output", self.dtype, stddev)
        return out(out_BTHC.reshape(b * t, h * c)).reshape(b, t, d), layer_cache


class FeedForward(nn.Module):
    """W₂ activation(W₁ x), position by position."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.config
        b, t, d = x_BTD.shape
        up = _linear(cfg, cfg.d_ff, ("embed", "mlp"), "up", self.dtype, INIT_STDDEV)
        down = _linear(cfg, d, ("mlp", "embed"), "down", self.dtype, _residual_stddev(cfg))
        act = activate if cfg.remat != "none" else _activate_again
        return down(act(up(x_BTD.reshape(b * t, d)), cfg.activation)).reshape(b, t, d)


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU x Φ(x) (Hendrycks & Gimpel 2016), exact or by its tanh approximation, or ReLU."""
    match activation:
        case "gelu":
            # By erf, not by erfc as in jax.nn.gelu: a third of the time on a CPU, and more on GPUs.
            # In fp32, where 1 + erf loses nothing that counts: at most 1e-6 below zero.
            wide = x.astype(jnp.float32)
            return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
    raise ValueError(f"unknown activation {activation!r}")


# The backward pass finds the derivative from its input: keeping Φ(x) for it would cost another
# array as large, and its way to memory and back. Not for a block that is computed again as a whole:
# the gradient of `down` would want it once more, and XLA's GPU backend puts that off until the end,
# for all blocks, with what it comes from.
_activate_again = jax.checkpoint(activate, static_argnums=1)


class Block(nn.Module):
    """Pre-norm: x + Dropout(MHA(LN x)), then x + Dropout(FFN(LN x))."""

    config: ModelConfig
    dtype: Any
    implementation: attn.Implementation

    @nn.compact
    def __call__(self, x_BTD, rope, mask, layer_cache, index, dropout_keys_B):
        cfg = self.config
        attention = Attention(cfg, self.dtype, self.implementation, name="attention")
        feed_forward = FeedForward(cfg, self.dtype, name="feed_forward")

        def add(y_BTD: jax.Array, site: int) -> jax.Array:
            y_BTD = x_BTD + dropout(y_BTD, cfg.dropout, dropout_keys_B, site)
            return constrain(y_BTD, "batch", "length", "activation")

        y_BTD, layer_cache = attention(
            LayerNorm(cfg.norm_eps, self.dtype, name="attention_norm")(x_BTD),
            rope,
            mask,
            layer_cache,
            index,
            dropout_keys_B,
        )
        x_BTD = add(y_BTD, _ATTENTION_OUTPUT)
        norm = LayerNorm(cfg.norm_eps, self.dtype, name="feed_forward_norm")
        y_BTD = feed_forward(norm(x_BTD))
        return add(y_BTD, _FEED_FORWARD_OUTPUT), layer_cache


class Transformer(nn.Module):
    """The whole model up to, but without, the logits.

    Attributes:
        config: the architecture.
        vocab_size: the tokenizer's true size; the embedding has `padded_vocab_size` rows.
        dtype: of the activations.
        implementation: the attention of a training step, from `attention.choose_implementation`.
    """

    config: ModelConfig
    vocab_size: int
    dtype: Any = jnp.float32
    implementation: attn.Implementation = "xla"

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: attn.Cache | None = None,
        dropout_keys_B: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, attn.Cache | None]:
        """Maps token ids to hidden states.

        Args:
            tokens_BT: int32 ids below `vocab_size`.
            cache: with one, the tokens are the next T slots of each row; without, a whole context.
            dropout_keys_B: a random key for each row; without them dropout is off.
            segments_BT: int32, which document of its window each token belongs to: attention stops
                at the borders and positions begin again. None: the window is one text.

        Returns:
            Hidden states [B, T, D] after the final LayerNorm, in `dtype`; and the cache, advanced
            by T, or None.

        Raises:
            ValueError: more tokens than the table of learned positions has rows (with a cache,
                whoever makes it sees to that); or segments with a cache, or with cuDNN's attention,
                which would see across the borders.
        """
        cfg = self.config
        t = tokens_BT.shape[1]
        if cache is None and cfg.position == "learned" and t > cfg.max_seq_len:
            raise ValueError(f"{t} tokens for a table of {cfg.max_seq_len} learned positions")
        if segments_BT is not None and (cache is not None or self.implementation == "cudnn"):
            where = "a cache" if cache is not None else "cuDNN's attention"
            raise ValueError(f"segments with {where}: it knows no borders of documents")
        index = None
        if segments_BT is not None:
            positions, mask = attn.segment_positions(segments_BT), attn.segment_mask(segments_BT)
        elif cache is None:
            positions, mask = jnp.arange(t, dtype=jnp.int32), attn.causal_mask(t)
        else:
            positions, mask, index = cache.positions(t), cache.mask(t), cache.index

        embedding_VD = self._table("embedding", padded_vocab_size(self.vocab_size), "vocab")
        # Whole rows for the lookup: in a table split along D it would send the tokens round. Its
        # gradient comes back the same way, and is split before it goes anywhere else.
        split_VD = constrain(embedding_VD, "vocab", "embed")
        x_BTD = constrain(split_VD, "vocab", "activation")[tokens_BT]
        if not cfg.tie_embeddings:  # read by `output_embedding`
            self._table("output_embedding", padded_vocab_size(self.vocab_size), "vocab")
        rope = None
        match cfg.position:
            case "rope":
                rope = attn.rope_tables(positions, cfg.head_dim, cfg.rope_theta)
            case "sinusoidal":
                x_BTD = x_BTD + attn.sinusoidal_embedding(positions, cfg.d_model)
            case "learned":
                x_BTD = x_BTD + self._table("positions", cfg.max_seq_len, "position")[positions]
            case _:
                raise ValueError(f"unknown position {cfg.position!r}")
        x_BTD = constrain(x_BTD.astype(self.dtype), "batch", "length", "activation")
        x_BTD = dropout(x_BTD, cfg.dropout, dropout_keys_B, cfg.num_layers)

        layers = []
        block = Block
        if cfg.remat != "none" and cache is None:
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat])
        for i in range(cfg.num_layers):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x_BTD, layer_cache = block(cfg, self.dtype, self.implementation, name=f"block_{i}")(
                x_BTD, rope, mask, layer_cache, index, fold(dropout_keys_B, i)
            )
            layers.append(layer_cache)
        if cache is not None:
            keys, values = zip(*layers, strict=True)
            cache = dataclasses.replace(cache, keys=keys, values=values, index=cache.index + t)
        return LayerNorm(cfg.norm_eps, self.dtype, name="final_norm")(x_BTD), cache

    def _table(self, name: str, rows: int, axis: str) -> jax.Array:
        normal = nn.initializers.normal(INIT_STDDEV)
        init: Any = nn.with_logical_partitioning(normal, (axis, "embed"))
        return self.param(name, init, (rows, self.config.d_model), jnp.float32)


def output_embedding(params: dict[str, Any]) -> jax.Array:
    """The output layer's weights, fp32 [V, D]: their own, or the token embedding's when tied."""
    return params.get("output_embedding", params["embedding"])


def unembed(hidden_D: jax.Array, embedding_VD: jax.Array, vocab_size: int) -> jax.Array:
    """Logits, fp32 [..., V]: hidden states [..., D] times the embedding, padded rows at -inf.

    The embedding is cast to the hidden states' dtype; products are summed in fp32.
    """
    d = hidden_D.shape[-1]
    hidden_MD = hidden_D.reshape(-1, d)
    # [V, D] x [D, M], transposed, rather than [M, D] x [D, V]: with one row to decode, XLA's CPU
    # backend reads the embedding five times as fast this way round.
    (embedding_VD,) = promote_dtype(embedding_VD, dtype=hidden_D.dtype)
    logits_VM = dot_general(
        embedding_VD, hidden_MD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    logits_MV = logits_VM.T
    if vocab_size < logits_MV.shape[-1]:
        padding = jnp.arange(logits_MV.shape[-1]) >= vocab_size
        logits_MV = jnp.where(padding, -jnp.inf, logits_MV)
    return logits_MV.reshape(*hidden_D.shape[:-1], -1)
