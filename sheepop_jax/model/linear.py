"""Linear layers, their low-rank adapters, and int8 weight quantization for faster decoding.

Alphabet: V vocabulary (padded), D model width, M number of vectors.

An int8 matrix W ≈ values · scale has one fp32 scale per output channel. It is never converted to a
wider dtype: XLA would hoist the conversion out of the decode loop, and the loop would read the wide
copy. Matmuls are therefore int8 · int8. Each input vector is split into two int8 digits, which
lose less precision than bf16. Activations keep their dtype.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.model.dropout import dropout

LARGEST = 127  # symmetric range: -128 is not used


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """An int8 matrix that replaces a parameter.

    Attributes:
        values: int8 in [-127, 127]; [in, out] for a linear layer, [V, D] for an embedding table.
        scale: fp32, positive; [out] or [V].
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape

    def __getitem__(self, rows: jax.Array) -> jax.Array:
        """Dequantized rows of a table: integers [...] → fp32 [..., D]."""
        return self.values[rows] * self.scale[rows][..., None]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "lora_A", "lora_B", "keys_B"),
    meta_fields=("scale", "rate"),
)
@dataclass(frozen=True)
class Adapted:
    """A matrix with a low-rank adapter that replaces a parameter: W + scale · A B.

    The layer multiplies by A and then by B: their product is never formed.

    Attributes:
        kernel: W, fp32 [in, out]. First, since Flax compares the shape of the first leaf.
        lora_A: fp32 [in, r].
        lora_B: fp32 [r, out].
        keys_B: one random key per row of the batch, for dropout; None for none.
        scale: factor of the adapter.
        rate: probability of dropping an input of A.
    """

    kernel: jax.Array
    lora_A: jax.Array
    lora_B: jax.Array
    keys_B: jax.Array | None
    scale: float
    rate: float

    def astype(self, dtype: Any) -> "Adapted":
        """With the three matrices in another dtype."""
        w, a, b = (jnp.asarray(x, dtype) for x in (self.kernel, self.lora_A, self.lora_B))
        return replace(self, kernel=w, lora_A=a, lora_B=b)

    def low_rank(self, x_MI: jax.Array) -> jax.Array:
        """What the adapter adds to the layer's output: [M, in] → [M, out]."""
        if self.keys_B is not None:
            x_BTI = x_MI.reshape(len(self.keys_B), -1, x_MI.shape[1])
            x_MI = dropout(x_BTI, self.rate, self.keys_B, 0).reshape(x_MI.shape)
        return (x_MI @ self.lora_A) @ self.lora_B * self.scale


@jax.jit
def quantized(params: Any) -> Any:
    """Replaces each kernel and token embedding table with a `Quantized`; keeps other parameters.

    The error of a weight is at most half its scale; the scale is the channel's largest magnitude
    / 127.
    """

    def replace(path: tuple[Any, ...], w: jax.Array) -> Any:
        match path[-1].key:
            case "kernel":
                summed = 0
            case "embedding" | "output_embedding":
                summed = 1
            case _:
                return w
        scale = _unit(w, summed)
        steps = jnp.round(w / jnp.expand_dims(scale, summed))
        return Quantized(steps.astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(replace, params)


def promote_dtype(*arrays: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Replaces Flax's `promote_dtype`: casts arrays to `dtype`; a `Quantized` stays int8."""

    def cast(a: Any) -> Any:
        if isinstance(a, Adapted):
            return a.astype(dtype)
        return a if a is None or isinstance(a, Quantized) else jnp.asarray(a, dtype)

    return [cast(a) for a in arrays]


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of two matrices, one of which may be `Quantized` or `Adapted`.

    Supports [M, in] times quantized [in, out], with a result in the vectors' dtype, and a quantized
    table [V, D] times [M, D], with an fp32 result. Sums are exact in int32 for up to
    2^31 / 127² = 133,000 terms. Supports [M, in] times adapted [in, out].
    """
    if isinstance(rhs, Adapted):
        whole = dot_general(lhs, rhs.kernel, dimension_numbers, precision, preferred_element_type)
        return whole + rhs.low_rank(lhs)

    def sums(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, None, jnp.int32)

    if isinstance(rhs, Quantized):
        unit_M1, digits = _digits(lhs)
        product = _join(sums(digits, rhs.values)) * unit_M1 * rhs.scale
        return product.astype(lhs.dtype)
    if isinstance(lhs, Quantized):
        unit_M1, digits = _digits(rhs)
        return (_join(sums(lhs.values, digits).T) * unit_M1 * lhs.scale).T
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


def _digits(x_MI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits vectors into two int8 digits: x ≈ unit (high + low / 254), within 1.6e-5 max |x|.

    Returns:
        unit, fp32 [M, 1]; digits, int8 [2M, in] in [-127, 127], all high digits before the low.
    """
    x_MI = x_MI.astype(jnp.float32)
    unit_M1 = _unit(x_MI, axis=1)[:, None]
    high_MI = jnp.round(x_MI / unit_M1)
    low_MI = jnp.round((x_MI / unit_M1 - high_MI) * 2 * LARGEST)
    return unit_M1, jnp.concatenate([high_MI, low_MI]).astype(jnp.int8)


def _join(sums: jax.Array) -> jax.Array:
    """Combines the sums over high and low digits: int32 [2M, out] → fp32 [M, out]."""
    high, low = jnp.split(sums.astype(jnp.float32), 2)
    return high + low / (2 * LARGEST)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """The scale that maps the largest magnitude along an axis to 127; positive even for zeros."""
    return jnp.maximum(jnp.max(jnp.abs(x), axis) / LARGEST, jnp.finfo(jnp.float32).tiny)


INIT_STDDEV = 0.02


def linear(
    config: ModelConfig,
    features: int,
    axes: tuple[str, str],
    name: str,
    dtype: Any,
    stddev: float,
    use_bias: bool | None = None,
) -> nn.Dense:
    """A dense layer x W (+ b) with W [in, out] ~ N(0, stddev²) and logical axis names `axes`.

    `use_bias` None is that of the configuration.
    """
    return nn.Dense(
        features,
        use_bias=config.use_bias if use_bias is None else use_bias,
        dtype=dtype,
        promote_dtype=promote_dtype,
        dot_general=dot_general,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(stddev), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def residual_stddev(config: ModelConfig) -> float:
    """Init stddev of residual projections, so that variance does not grow with depth (GPT-2)."""
    return INIT_STDDEV / math.sqrt(2 * config.num_layers)
