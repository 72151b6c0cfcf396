"""LayerNorm and RMSNorm with custom derivatives that reduce memory traffic in the backward pass.

Alphabet: D model width; … any leading axes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import ModelConfig


def norm(config: ModelConfig, name: str, dtype: Any) -> nn.Module:
    """The norm that `config.norm` names, over the model width."""
    match config.norm:
        case "layernorm":
            return LayerNorm(config.norm_eps, dtype, name=name)
        case "rmsnorm":
            return RMSNorm(config.norm_eps, dtype, "embed", name=name)
    raise ValueError(f"unknown norm {config.norm!r}")


class LayerNorm(nn.Module):
    """γ (x - mean) / √(variance + ε) + β over the last axis; γ and β are fp32 [D].

    Attributes:
        epsilon: ε.
        dtype: dtype of the result; statistics and arithmetic are fp32.

    Source: Ba et al. 2016.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = (
            nn.with_logical_partitioning(init, ("embed",))
            for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale_D = self.param("scale", ones, x.shape[-1:], jnp.float32)
        bias_D = self.param("bias", zeros, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale_D, bias_D, self.epsilon, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float, dtype: Any
) -> jax.Array:
    """Functional `LayerNorm`: [..., D] in any dtype → [..., D] in `dtype`."""
    return _forward(x, scale_D, bias_D, epsilon, dtype)[0]


def _forward(x, scale_D, bias_D, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    # E[x²] - E[x]² would cancel for a large mean.
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * inverse * scale_D + bias_D
    return y.astype(dtype), (x, scale_D, mean, inverse)


def _backward(epsilon, dtype, kept, dy):
    """With n = (x - mean) / √(variance + ε) and g = γ dy: dx = (g - ⟨g⟩ - n ⟨g n⟩) / √(…)."""
    x, scale_D, mean, inverse = kept
    # Read the two statistics per row instead of recomputing them: otherwise XLA's GPU backend
    # recomputes them in a separate row-wise kernel and passes n · dy to the sum over rows through
    # memory, in fp32.
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    normed = (x.astype(jnp.float32) - mean) * inverse
    dy = dy.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    g = dy * scale_D
    along_normed = normed * jnp.mean(g * normed, axis=-1, keepdims=True)
    dx = (g - jnp.mean(g, axis=-1, keepdims=True) - along_normed) * inverse
    return dx.astype(x.dtype), jnp.sum(dy * normed, rows), jnp.sum(dy, rows)


layer_norm.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """γ x / √(mean x² + ε) over the last axis; γ is fp32 [D].

    Attributes:
        epsilon: ε.
        dtype: dtype of the result; the mean square and arithmetic are fp32.
        axis: logical name of the last axis.

    Source: Zhang & Sennrich 2019.
    """

    epsilon: float
    dtype: Any
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale_D = self.param("scale", ones, x.shape[-1:], jnp.float32)
        return rms_norm(x, scale_D, self.epsilon, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    """Functional `RMSNorm`: [..., D] in any dtype → [..., D] in `dtype`."""
    return _rms_forward(x, scale_D, epsilon, dtype)[0]


def _rms_forward(x, scale_D, epsilon, dtype):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale_D).astype(dtype), (x, scale_D, inverse)


def _rms_backward(epsilon, dtype, kept, dy):
    """With n = x / √(mean x² + ε) and g = γ dy: dx = (g - n ⟨g n⟩) / √(…)."""
    x, scale_D, inverse = kept
    inverse = jax.lax.optimization_barrier(inverse)  # as in `_backward`
    normed = x.astype(jnp.float32) * inverse
    dy = dy.astype(jnp.float32)
    g = dy * scale_D
    dx = (g - normed * jnp.mean(g * normed, axis=-1, keepdims=True)) * inverse
    return dx.astype(x.dtype), jnp.sum(dy * normed, tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_forward, _rms_backward)
