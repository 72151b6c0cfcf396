"""cuDNN flash attention: where it can be used, and the call."""

import jax
import jax.numpy as jnp

from sheepop_jax.model.attention import Implementation


def choose_implementation(
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    attention_dropout: float,
    document_mask: bool = False,
    flash_attention: bool = True,
) -> Implementation:
    """Selects the attention implementation of a training step. Decoding always uses XLA.

    cuDNN flash attention requires an NVIDIA GPU (Ampere or newer), bf16, and a head width that is a
    multiple of 8 and at most 128. It supports neither attention dropout nor any mask other than the
    causal one, so no document mask.

    Args:
        platform: "cpu", "cuda" or "tpu".
        dtype: dtype of the activations.
        head_dim: C.
        attention_dropout: dropout rate of the attention weights.
        document_mask: whether attention stops at document boundaries.
        flash_attention: whether the GPU supports flash attention (Ampere or newer).
    """
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    causal_alone = attention_dropout == 0 and not document_mask
    there = platform == "cuda" and flash_attention
    return "cudnn" if there and fits and causal_alone else "xla"


def attend_causal_cudnn(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, window: int = 0
) -> jax.Array:
    """Causal `attend` by cuDNN flash attention, which never materializes the scores."""
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        is_causal=True,
        implementation="cudnn",
        local_window_size=(window - 1, 0) if window else None,  # keys before and after a query
    )
