"""Positions: rotary and sinusoidal embeddings, and positions within packed documents.

Alphabet: B batch, T time, H heads, C head width, D model width.
"""

import jax
import jax.numpy as jnp


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the RoPE angles position · theta^(-2i / C), i = 0 … C/2 - 1.

    Args:
        positions: integers [..., T].
        head_dim: C, even.
        theta: base of the wavelengths.

    Returns:
        Two fp32 arrays [..., T, 1, C/2] that broadcast over heads.

    Source: Su et al. 2021, "RoFormer", equation 34.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) / theta**exponents
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def apply_rope(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of each head by their angles; keeps shape and dtype.

    Uses the half-split pairing of public checkpoints. Computed in fp32, since bf16 cannot
    distinguish neighboring angles.
    """
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)


def sinusoidal_embedding(positions: jax.Array, d_model: int) -> jax.Array:
    """Sinusoidal embedding, sines in even and cosines in odd components.

    Args:
        positions: integers [..., T].
        d_model: D, even.

    Returns:
        fp32 [..., T, D].

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    exponents = jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model
    angles = positions[..., None].astype(jnp.float32) / 10000.0**exponents
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], d_model)


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """Positions within each document of a packed window; each document starts at 0.

    Args:
        segments_BT: int32, document index of each token within its window, nondecreasing along T.
            A first document that began before the window counts from the window's start.

    Returns:
        int32 [B, T].
    """
    slots = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = segments_BT != jnp.roll(segments_BT, 1, axis=1)
    # `roll` compares slot 0 with the last slot; its position is 0 either way.
    return slots - jax.lax.cummax(jnp.where(begins_BT, slots, 0), axis=1)
