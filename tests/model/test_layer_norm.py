"""LayerNorm and its written-out derivative against numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.model.norms import LayerNorm, layer_norm
from tests.reference import layer_norm as reference

SHAPE, EPSILON = (3, 5, 60), 1e-5


def draw(mean=0.0):
    generator = np.random.default_rng(0)
    x, dy = generator.standard_normal((2, *SHAPE)).astype(np.float32)
    scale, bias = generator.standard_normal((2, SHAPE[-1])).astype(np.float32)
    return x + np.float32(mean), dy, scale, bias


def gradients(x, dy, scale):
    """Of Σ y dy, through mean and variance as functions of x, in float64."""
    x, dy, scale = (np.asarray(a, np.float64) for a in (x, dy, scale))
    width = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True) + EPSILON
    d_normed = dy * scale
    d_variance = (d_normed * centred).sum(-1, keepdims=True) * -0.5 * variance**-1.5
    d_centred = d_normed * variance**-0.5 + d_variance * 2 * centred / width
    dx = d_centred - d_centred.mean(-1, keepdims=True)
    return dx, (dy * centred * variance**-0.5).sum((0, 1)), dy.sum((0, 1))


def found(x, dy, scale, bias, dtype):
    def total(x, scale, bias):
        return (layer_norm(x, scale, bias, EPSILON, dtype) * dy).sum()

    return jax.jit(jax.grad(total, (0, 1, 2)))(x, scale, bias)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_value_and_gradients_follow_the_formula(mean):
    x, dy, scale, bias = draw(mean)
    value = jax.jit(layer_norm, static_argnums=(3, 4))(x, scale, bias, EPSILON, jnp.float32)
    wide = {"scale": scale, "bias": bias}
    expected = np.stack([reference(row.astype(np.float64), wide, EPSILON) for row in x])
    tolerance = 2e-6 * (1 + mean)  # x itself holds a large mean to 1 part in 1e7
    np.testing.assert_allclose(value, expected, atol=5 * tolerance)
    for got, wanted in zip(
        found(x, dy, scale, bias, jnp.float32), gradients(x, dy, scale), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=20 * tolerance)


def test_bf16_in_and_out_with_fp32_between():
    x, dy, scale, bias = draw()
    half = jnp.asarray(x, jnp.bfloat16)
    got = found(half, jnp.asarray(dy, jnp.bfloat16), scale, bias, jnp.bfloat16)
    assert [leaf.dtype for leaf in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    given = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float64)
    expected = gradients(np.asarray(half, np.float64), given, scale)
    np.testing.assert_allclose(np.asarray(got[0], np.float64), expected[0], atol=0.03)
    for sums, wanted in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-5)  # no sum in bf16


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"), [(jnp.float32, 8192, 2e-3), (jnp.bfloat16, 256, 2**-7)]
)
def test_statistics_survive_a_large_mean(dtype, mean, tolerance):
    """E[x²] - E[x]² would lose the variance in fp32, and any sum would lose it in bf16."""
    x = mean + 2.0 * np.random.default_rng(0).integers(0, 3, SHAPE)  # exact in bf16
    ones, zeros = np.ones(SHAPE[-1], np.float32), np.zeros(SHAPE[-1], np.float32)
    value = layer_norm(jnp.asarray(x, dtype), ones, zeros, EPSILON, dtype)
    assert value.dtype == dtype
    expected = reference(x, {"scale": ones, "bias": zeros}, EPSILON)
    np.testing.assert_allclose(np.float32(value), expected, atol=tolerance)


def test_it_is_flax_s_layer_norm():
    x, _, scale, bias = draw()
    params = {"params": {"scale": scale, "bias": bias}}
    flax = nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False).apply(params, x)
    ours = LayerNorm(EPSILON, jnp.float32).apply(params, x)
    np.testing.assert_allclose(ours, flax, atol=1e-6)
    made = nn.meta.unbox(LayerNorm(EPSILON, jnp.float32).init(jax.random.key(0), x))["params"]
    assert (made["scale"] == 1).all() and (made["bias"] == 0).all()
