"""Weights as int8: each matrix as small whole numbers, with an fp32 scale for each output channel.

Alphabet: V vocabulary (padded), D model width, M vectors that are multiplied.

Of W ≈ values · scale no copy in a wider dtype is ever made: XLA would make it once, before the
decode loop, and the loop would read that. So products are sums of int8 · int8, and a vector goes in
as two int8 digits, which lose less of it than bf16 does. Activations keep their dtype.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 127  # -128 is left out: symmetric


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix in the place of a parameter.

    Attributes:
        values: int8 in [-127, 127]: [in, out] of a linear layer, [V, D] of a table.
        scale: fp32 above 0, [out] or [V].
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    def __getitem__(self, rows: jax.Array) -> jax.Array:
        """Rows of a table, fp32 [..., D] for integers [...]."""
        return self.values[rows] * self.scale[rows][..., None]


@jax.jit
def quantized(params: Any) -> Any:
    """The parameters with a `Quantized` for each kernel and token table; the rest is left alone.

    No weight moves by more than half its scale, which is its channel's largest magnitude / 127.
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
    """What Flax does in a linear layer, all in `dtype`; but a quantised matrix stays int8."""
    return [a if a is None or isinstance(a, Quantized) else jnp.asarray(a, dtype) for a in arrays]


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of two matrices, of which one may be quantised.

    That is [M, in] times [in, out] quantised, in the vectors' dtype; or a table [V, D] quantised
    times [M, D], fp32. Sums are exact in int32, for up to 2^31 / 127² = 133,000 terms.
    """

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
    """Vectors as whole numbers of two digits: x ≈ unit (high + low / 254), to 1.6e-5 of max |x|.

    Returns:
        unit, fp32 [M, 1]; the digits, int8 [2M, in] in [-127, 127], all the high ones first.
    """
    x_MI = x_MI.astype(jnp.float32)
    unit_M1 = _unit(x_MI, axis=1)[:, None]
    high_MI = jnp.round(x_MI / unit_M1)
    low_MI = jnp.round((x_MI / unit_M1 - high_MI) * 2 * LARGEST)
    return unit_M1, jnp.concatenate([high_MI, low_MI]).astype(jnp.int8)


def _join(sums: jax.Array) -> jax.Array:
    """Sums over high digits and over low ones, int32 [2M, out] → their value, fp32 [M, out]."""
    high, low = jnp.split(sums.astype(jnp.float32), 2)
    return high + low / (2 * LARGEST)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """What makes the largest magnitude along an axis 127; not 0, also of zeros."""
    return jnp.maximum(jnp.max(jnp.abs(x), axis) / LARGEST, jnp.finfo(jnp.float32).tiny)
