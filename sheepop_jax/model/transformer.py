"""The decoder-only transformer: token ids → hidden states, and `unembed`: hidden states → logits.

Alphabet: B batch, T time, S key time, D model width, H query heads, K key/value heads, C head
width, F feed-forward width, V vocabulary (padded), M = B·T tokens.

Parameters are fp32; `dtype` is the dtype of the activations. Tokens are flattened to [M, D] before
each linear layer, because XLA's CPU backend compiles plain 2-D matmuls best.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import LoraConfig, ModelConfig
from sheepop_jax.model.attention import Attention, Implementation, causal_mask, segment_mask
from sheepop_jax.model.dropout import (
    ATTENTION_OUTPUT,
    FEED_FORWARD_OUTPUT,
    dropout,
    fold,
)
from sheepop_jax.model.feed_forward import FeedForward
from sheepop_jax.model.kv_cache import Cache
from sheepop_jax.model.linear import INIT_STDDEV, dot_general, promote_dtype
from sheepop_jax.model.norms import norm
from sheepop_jax.model.partitioning import VOCAB_MULTIPLE, constrain
from sheepop_jax.model.positions import rope_tables, segment_positions, sinusoidal_embedding

# The residuals saved per block for the backward pass: the outputs of the weight matmuls ("dots",
# without attention scores), or only the block's input ("full").
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


# Parameters with a row for each token.
TABLES = ("embedding", "output_embedding")


def padded_vocab_size(vocab_size: int) -> int:
    """V, the rows of the embedding: the vocabulary size rounded up to `VOCAB_MULTIPLE`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Block(nn.Module):
    """Pre-norm transformer block: x + Dropout(MHA(norm x)), then x + Dropout(FFN(norm x)).

    With a parallel residual, both read the block's input: x + Dropout(MHA(norm x)) +
    Dropout(FFN(norm' x)) (Wang & Komatsuzaki 2021; with two norms as in GPT-NeoX).
    """

    config: ModelConfig
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BTD, rope, mask, layer_cache, index, dropout_keys_B):
        cfg = self.config
        attention = Attention(cfg, self.dtype, self.implementation, name="attention")
        feed_forward = FeedForward(cfg, self.dtype, name="feed_forward")

        def add(x_BTD: jax.Array, y_BTD: jax.Array, site: int) -> jax.Array:
            y_BTD = x_BTD + dropout(y_BTD, cfg.dropout, dropout_keys_B, site)
            return constrain(y_BTD, "batch", "length", "activation")

        normed_BTD = norm(cfg, "attention_norm", self.dtype)(x_BTD)
        y_BTD, layer_cache = attention(normed_BTD, rope, mask, layer_cache, index, dropout_keys_B)
        sum_BTD = add(x_BTD, y_BTD, ATTENTION_OUTPUT)
        read_BTD = x_BTD if cfg.parallel_residual else sum_BTD
        y_BTD = feed_forward(norm(cfg, "feed_forward_norm", self.dtype)(read_BTD))
        return add(sum_BTD, y_BTD, FEED_FORWARD_OUTPUT), layer_cache


class Transformer(nn.Module):
    """Decoder-only transformer that returns hidden states; `unembed` maps them to logits.

    Attributes:
        config: the architecture.
        vocab_size: the tokenizer's vocabulary size; the embedding has `padded_vocab_size` rows.
        dtype: dtype of the activations.
        implementation: attention of a training step, from `flash_attention.choose_implementation`.
        lora: the adapters that training adds to the parameters (`lora.py`); None trains them all.
    """

    config: ModelConfig
    vocab_size: int
    dtype: Any = jnp.float32
    implementation: Implementation = "xla"
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        dropout_keys_B: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Maps token ids to hidden states.

        Args:
            tokens_BT: int32 ids below `vocab_size`.
            cache: key/value cache; the tokens are then the next T tokens of each row. None: the
                tokens are a full context.
            dropout_keys_B: one random key per row; None disables dropout.
            segments_BT: int32, document index of each token within its window. Attention stops at
                document boundaries and positions restart there. None: one document per window.

        Returns:
            Hidden states [B, T, D] after the final norm, in `dtype`; and the cache advanced by
            T, or None.

        Raises:
            ValueError: more tokens than learned positions (with a cache, the caller must check
                this); or segments combined with a cache or with cuDNN attention, neither of which
                masks document boundaries.
        """
        cfg = self.config
        t = tokens_BT.shape[1]
        if cache is None and cfg.position == "learned" and t > cfg.max_seq_len:
            raise ValueError(f"{t} tokens exceed the {cfg.max_seq_len} learned positions")
        if segments_BT is not None and (cache is not None or self.implementation == "cudnn"):
            where = "a cache" if cache is not None else "cuDNN attention"
            raise ValueError(f"segments are not supported with {where}: no document mask")
        index, window = None, cfg.sliding_window
        if segments_BT is not None:
            positions, mask = segment_positions(segments_BT), segment_mask(segments_BT, window)
        elif cache is None:
            positions, mask = jnp.arange(t, dtype=jnp.int32), causal_mask(t, window)
        else:
            positions, mask, index = cache.positions(t), cache.mask(t, window), cache.index

        embedding_VD = self._table("embedding", padded_vocab_size(self.vocab_size), "vocab")
        # Gather whole rows for the lookup: with a table sharded along D, XLA would exchange the
        # activations instead. The two constraints shard the gradient again right after the lookup.
        split_VD = constrain(embedding_VD, "vocab", "embed")
        x_BTD = constrain(split_VD, "vocab", "activation")[tokens_BT]
        if not cfg.tie_embeddings:  # read by `output_embedding`
            self._table("output_embedding", padded_vocab_size(self.vocab_size), "vocab")
        rope = None
        match cfg.position:
            case "rope":
                rope = rope_tables(positions, cfg)
            case "sinusoidal":
                x_BTD = x_BTD + sinusoidal_embedding(positions, cfg.d_model)
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
        return norm(cfg, "final_norm", self.dtype)(x_BTD), cache

    def _table(self, name: str, rows: int, axis: str) -> jax.Array:
        normal = nn.initializers.normal(INIT_STDDEV)
        init: Any = nn.with_logical_partitioning(normal, (axis, "embed"))
        return self.param(name, init, (rows, self.config.d_model), jnp.float32)


def output_embedding(params: dict[str, Any]) -> jax.Array:
    """Output layer weights, fp32 [V, D]: `output_embedding`, or the token embedding if tied."""
    return params.get("output_embedding", params["embedding"])


def logits(model: Transformer, params: dict[str, Any], hidden_D: jax.Array) -> jax.Array:
    """The model's logits, fp32 [..., V], of hidden states [..., D]; see `unembed`."""
    softcap = model.config.logit_softcap
    return unembed(hidden_D, output_embedding(params), model.vocab_size, softcap)


def unembed(
    hidden_D: jax.Array, embedding_VD: jax.Array, vocab_size: int, softcap: float
) -> jax.Array:
    """Maps hidden states to logits.

    The embedding is cast to the hidden states' dtype; the matmul accumulates in fp32.

    Args:
        hidden_D: hidden states [..., D].
        embedding_VD: output embedding; V is padded.
        vocab_size: vocabulary size without padding.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2, 2024); 0 for none.

    Returns:
        Logits, fp32 [..., V]; -inf for the padding.
    """
    d = hidden_D.shape[-1]
    hidden_MD = hidden_D.reshape(-1, d)
    # [V, D] x [D, M], then transposed, instead of [M, D] x [D, V]: when decoding one row, XLA's CPU
    # backend reads the embedding five times as fast in this order.
    (embedding_VD,) = promote_dtype(embedding_VD, dtype=hidden_D.dtype)
    logits_VM = dot_general(
        embedding_VD, hidden_MD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    logits_MV = logits_VM.T
    if softcap:
        logits_MV = softcap * jnp.tanh(logits_MV / softcap)
    if vocab_size < logits_MV.shape[-1]:
        padding = jnp.arange(logits_MV.shape[-1]) >= vocab_size
        logits_MV = jnp.where(padding, -jnp.inf, logits_MV)
    return logits_MV.reshape(*hidden_D.shape[:-1], -1)


def _boxed_params(model: Transformer, seed: int) -> Any:
    init_key = jax.random.fold_in(jax.random.key(seed), 0)
    return model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(model: Transformer, seed: int) -> Any:
    """Initializes the parameters: fp32 arrays without Flax metadata."""
    return nn.meta.unbox(_boxed_params(model, seed))


def boxed_shapes(model: Transformer) -> Any:
    """Shapes of the parameters, boxed with their logical axis names (Flax metadata)."""
    return jax.eval_shape(lambda: _boxed_params(model, 0))
