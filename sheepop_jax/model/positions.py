"""Positions: rotary and sinusoidal embeddings, and positions within packed documents.

Alphabet: B batch, T time, H heads, C head width, R its components that RoPE rotates, D model width.
"""

import math

import jax
import jax.numpy as jnp

from sheepop_jax.config.schema import ModelConfig


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the RoPE angles position · theta^(-2i / R), i = 0 … R/2 - 1.

    With `rope_scaling` = linear, the angles are divided by s = `rope_scaling_factor`. With llama3,
    those of long wavelengths λ are: with n = `rope_original_length` / λ turns in the original
    context, an angle is multiplied by w + (1 - w) / s, where w rises linearly from 0 at n =
    `rope_low_freq_factor` to 1 at n = `rope_high_freq_factor`.

    Args:
        positions: integers [..., T].
        config: R, theta and the scaling.

    Returns:
        Two fp32 arrays [..., T, 1, R/2] that broadcast over heads.

    Sources: Su et al. 2021, "RoFormer", equation 34; linear: Chen et al. 2023; llama3: Grattafiori
    et al. 2024, with the numbers of Llama 3.1.
    """
    width = config.rotary_width
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions[..., None].astype(jnp.float32) / config.rope_theta**exponents
    match config.rope_scaling:
        case "linear":
            angles = angles / config.rope_scaling_factor
        case "llama3":
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            wavelengths = 2 * math.pi * config.rope_theta**exponents
            turns = config.rope_original_length / wavelengths
            kept = jnp.clip((turns - low) / (high - low), 0, 1)
            angles = angles * (kept + (1 - kept) / config.rope_scaling_factor)
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def apply_rope(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of each head by their angles; keeps shape and dtype.

    R is twice the tables' width; components from R on are unchanged. Uses the half-split pairing of
    public checkpoints. Computed in fp32, since bf16 cannot distinguish neighboring angles.
    """
    half = cos.shape[-1]
    wide = x_BTHC.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        parts.append(rest)
    return jnp.concatenate(parts, axis=-1).astype(x_BTHC.dtype)


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
