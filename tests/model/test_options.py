"""Each option of the architecture: values, gradients, cache, meshes and int8, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.errors import InputError
from sheepop_jax.model import kv_cache, norms, partitioning
from sheepop_jax.model import positions as pos
from sheepop_jax.model import transformer as tf
from sheepop_jax.model.linear import quantized
from tests import reference
from tests.conftest import draw_params
from tests.generation.test_quantize import dequantized
from tests.model.test_transformer import VOCAB, jit_logits, relative_error

B, T = 3, 13

QWEN3 = dict(norm="rmsnorm", feed_forward="gated", activation="silu", qk_norm=True, head_dim=14)
LLAMA = dict(norm="rmsnorm", feed_forward="gated", activation="silu", tie_embeddings=False)
LLAMA3 = dict(
    rope_scaling="llama3",
    rope_theta=50.0,
    rope_scaling_factor=3.0,
    rope_low_freq_factor=0.4,
    rope_high_freq_factor=2.5,
    rope_original_length=30,
)
MODELS = {
    "qwen2": LLAMA | {"qkv_bias": True, "num_kv_heads": 2},
    "qwen3": QWEN3,
    "llama3": LLAMA | LLAMA3,
    "gpt_neox": dict(parallel_residual=True, partial_rotary=0.4, use_bias=True, num_kv_heads=0),
    "linear": dict(rope_scaling="linear", rope_scaling_factor=2.5, activation="relu2"),
    "window": dict(sliding_window=4, num_kv_heads=2),
    "softcap": dict(logit_softcap=20.0, position="learned", feed_forward="gated", use_bias=True),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request, make_config) -> tf.Transformer:
    fields = {f"model.{name}": value for name, value in MODELS[request.param].items()}
    return tf.Transformer(make_config({"model.norm_eps": 0.1, **fields}).model, VOCAB)


@pytest.fixture
def params(model, random_params):
    return random_params(model)


def tokens(rows=B, length=T) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), np.int32)


@functools.cache
def expected_logits(model, rows=B, length=T):
    return reference.logits(draw_params(model), model.config, tokens(rows, length))[..., :VOCAB]


def test_logits_are_the_reference(model, params):
    got_BTV, _ = jit_logits(model)(params, tokens())
    assert relative_error(got_BTV, expected_logits(model)) < 1e-5


@pytest.mark.usefixtures("fast_compile_once")
def test_no_position_sees_its_future_or_what_left_its_window(model, params):
    """By gradients with one layer: exactly zero there, and not zero for what it may see."""
    one = model.clone(config=dataclasses.replace(model.config, num_layers=1))
    tokens_BT = np.random.default_rng(0).permutation(VOCAB)[:T].astype(np.int32)[None]
    probe_D = np.random.default_rng(1).standard_normal(60).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def gradients(embedding_VD):
        changed = params | {"embedding": embedding_VD}
        hidden_BTD, _ = one.apply({"params": changed}, tokens_BT)
        return hidden_BTD[0] @ probe_D

    sees_TS = np.abs(np.asarray(gradients(params["embedding"]))[:, tokens_BT[0]]).max(-1) > 0
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    window = model.config.sliding_window or T
    np.testing.assert_array_equal(sees_TS, (distance_TS >= 0) & (distance_TS < window))


@pytest.mark.usefixtures("fast_compile_once")
def test_the_cache_gives_what_the_whole_context_gives(model, params):
    """Rows padded on the left; a rolling cache holds fewer slots than the text has tokens."""
    check_cache(model, params, [0, 2, 5], (11, *[1] * (T - 6)))


@pytest.mark.usefixtures("fast_compile_once")
def test_a_rolling_cache_takes_pieces_of_any_length(make_config):
    model = tf.Transformer(
        make_config({"model.sliding_window": 4, "model.num_layers": 1}).model, VOCAB
    )
    check_cache(model, draw_params(model), [0, 0, 1], (2, 1, 3, 1, 1, 5, 1))


def check_cache(model, params, padding, lengths):
    cache = kv_cache.init_cache(model.config, jnp.array(padding), sum(lengths), jnp.float32)
    assert cache.keys[0].shape[1] == (model.config.sliding_window or sum(lengths))
    rows = np.zeros((B, sum(lengths)), np.int32)
    for row, pad, text in zip(rows, padding, tokens(B, sum(lengths)), strict=True):
        row[pad:] = text[: row.size - pad]
    pieces, at = [], 0
    for length in lengths:
        logits_BTV, cache = jit_logits(model)(params, rows[:, at : at + length], cache)
        pieces.append(logits_BTV)
        at += length
    got_BTV = np.concatenate(pieces, axis=1)
    expected_BTV = expected_logits(model, B, sum(lengths))
    for got, pad, expected in zip(got_BTV, padding, expected_BTV, strict=True):
        assert relative_error(got[pad:], expected[: len(got) - pad]) < 1e-5


@pytest.mark.usefixtures("fast_compile_once")
def test_int8_is_the_model_with_rounded_matrices(model, params):
    got_BTV, _ = jit_logits(model)(quantized(params), tokens())
    rounded = dequantized(params)
    assert (rounded["block_0"]["feed_forward"]["up"]["kernel"] != 0).any()
    expected_BTV = reference.logits(rounded, model.config, tokens())[..., :VOCAB]
    assert relative_error(got_BTV, expected_BTV) < 5e-4
    assert relative_error(got_BTV, expected_logits(model)) > 1e-3


@pytest.mark.usefixtures("fast_compile_once")
@pytest.mark.parametrize("model", ["qwen2", "qwen3", "gpt_neox"], indirect=True)
def test_a_mesh_of_eight_devices_gives_the_same_logits(model):
    """With every parameter split by the names of its axes."""
    mesh = partitioning.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    fields = dict(d_model=60, num_heads=6, num_kv_heads=2, d_ff=80)
    model = model.clone(config=dataclasses.replace(model.config, **fields))
    params = draw_params(model)
    boxed = tf.boxed_shapes(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    ):
        assert len(leaf.names) == leaf.value.ndim, path
    shardings = nn.logical_to_mesh_sharding(
        nn.get_partition_spec(boxed), mesh, list(partitioning.RULES.items())
    )
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens(4), partitioning.batch_sharding(mesh, leading=0))
        logits = jax.jit(
            lambda params, tokens: tf.logits(
                model, params, model.apply({"params": params}, tokens)[0]
            )[..., :VOCAB]
        )
        got_BTV = logits(jax.device_put(params, shardings), batch)
    expected_BTV = reference.logits(params, model.config, tokens(4))[..., :VOCAB]
    assert relative_error(got_BTV, expected_BTV) < 1e-5


# --- the parts ---


def test_rms_norm_and_its_gradients_follow_the_formula():
    generator = np.random.default_rng(0)
    x, dy = generator.standard_normal((2, 3, 5, 60)).astype(np.float32)
    scale = generator.standard_normal(60).astype(np.float32)
    eps = 0.01

    def total(x, scale):
        return (norms.rms_norm(x, scale, eps, jnp.float32) * dy).sum()

    value = norms.rms_norm(x, scale, eps, jnp.float32)
    np.testing.assert_allclose(value, reference.rms_norm(x, {"scale": scale}, eps), atol=1e-5)
    dx, dscale = jax.jit(jax.grad(total, (0, 1)))(x, scale)
    wide, dy64 = x.astype(np.float64), dy.astype(np.float64)
    square = (wide**2).mean(-1, keepdims=True) + eps
    # d(x / √s) = dx / √s - x / (2 s^1.5) ds, with s = mean x² + ε
    along = (dy64 * scale * wide).sum(-1, keepdims=True) / 60
    np.testing.assert_allclose(
        dx, dy64 * scale / np.sqrt(square) - wide * along * square**-1.5, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        dscale, (dy64 * wide / np.sqrt(square)).sum((0, 1)), rtol=1e-5, atol=1e-4
    )


def test_rms_norm_in_bf16_has_fp32_between():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 60)), jnp.bfloat16)
    ones = np.ones(60, np.float32)
    value = norms.rms_norm(x, ones, 1e-5, jnp.bfloat16)
    assert value.dtype == jnp.bfloat16
    expected = reference.rms_norm(np.asarray(x, np.float64), {"scale": ones}, 1e-5)
    np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=2**-8)
    gradient = jax.grad(lambda x: norms.rms_norm(x, ones, 1e-5, jnp.bfloat16).sum())(x)
    assert gradient.dtype == jnp.bfloat16


def test_llama3_scaling_has_all_three_bands(make_config):
    config = make_config({f"model.{name}": value for name, value in LLAMA3.items()}).model
    width = config.rotary_width
    factors = [
        reference.scaling(config.rope_theta ** (-2 * i / width), config) for i in range(width // 2)
    ]
    assert factors[0] == 1 and factors[-1] == 1 / 3
    assert any(1 / 3 < factor < 1 for factor in factors)
    plain = make_config({"model.rope_theta": config.rope_theta}).model
    cos, _ = pos.rope_tables(jnp.array([1]), config)
    unscaled, _ = pos.rope_tables(jnp.array([1]), plain)
    np.testing.assert_allclose(
        np.arccos(cos).ravel(), np.arccos(unscaled).ravel() * factors, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"model.head_dim": 7}, "model.head_dim", "even head width"),
        ({"model.position": "learned", "model.partial_rotary": 0.5}, "model.partial_rotary", "1"),
        ({"model.position": "sinusoidal", "model.rope_scaling": "linear"}, "model.rope_scaling",
         "none"),
        ({"model.use_bias": True, "model.qkv_bias": True}, "model.qkv_bias", "False"),
        ({"model.partial_rotary": 0.3}, "model.partial_rotary", "even number"),
        ({"model.num_heads": 7}, "model.num_heads", "model.head_dim"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(make_config, fields, field, expected):
    with pytest.raises(InputError) as error:
        make_config(fields)
    assert error.value.field == field and expected in error.value.expected


def test_a_head_width_of_its_own_needs_no_divisor(make_config):
    model = tf.Transformer(make_config({"model.num_heads": 7, "model.num_kv_heads": 7,
                                        "model.head_dim": 4}).model, VOCAB)  # fmt: skip
    shapes = nn.unbox(tf.boxed_shapes(model))["block_0"]["attention"]
    assert shapes["query"]["kernel"].shape == (60, 28)
    assert shapes["output"]["kernel"].shape == (28, 60)
