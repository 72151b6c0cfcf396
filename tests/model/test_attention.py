"""Attention's pure functions against closed forms, literal tables and numpy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax.model import attention as attn
from sheepop_jax.model import flash_attention, kv_cache
from sheepop_jax.model import positions as pos
from tests import reference

B, T, S, H, K, C = 2, 5, 7, 6, 2, 10


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "attention_dropout", "expected"),
    [
        ("cuda", jnp.bfloat16, 64, 0.0, "cudnn"),
        ("cuda", jnp.dtype("bfloat16"), 8, 0.0, "cudnn"),
        ("cuda", jnp.bfloat16, 128, 0.0, "cudnn"),
        ("cuda", jnp.bfloat16, 136, 0.0, "xla"),
        ("cuda", jnp.bfloat16, 60, 0.0, "xla"),
        ("cuda", jnp.bfloat16, 64, 0.1, "xla"),
        ("cuda", jnp.float32, 64, 0.0, "xla"),
        ("cpu", jnp.bfloat16, 64, 0.0, "xla"),
        ("tpu", jnp.bfloat16, 64, 0.0, "xla"),
        ("cpu", jnp.float32, 64, 0.0, "xla"),
    ],
)
def test_choose_implementation(platform, dtype, head_dim, attention_dropout, expected):
    conditions = platform, dtype, head_dim, attention_dropout
    assert flash_attention.choose_implementation(*conditions) == expected
    assert flash_attention.choose_implementation(*conditions, document_mask=False) == expected
    assert flash_attention.choose_implementation(*conditions, document_mask=True) == "xla"
    assert flash_attention.choose_implementation(*conditions, flash_attention=False) == "xla"


def rope(make_config, theta=10000.0):
    config = make_config({"model.rope_theta": theta}).model
    assert config.head_width == config.rotary_width == C
    return config


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rope_tables_are_the_closed_form(make_config, theta):
    positions = np.array([[0, 1, 2], [3, 11, 400]], np.int32)
    cos, sin = pos.rope_tables(jnp.asarray(positions), rope(make_config, theta))
    angles = [
        [[p * theta ** (-2 * i / C) for i in range(C // 2)] for p in row] for row in positions
    ]
    assert cos.dtype == sin.dtype == jnp.float32
    assert cos.shape == sin.shape == (2, 3, 1, C // 2)
    # An angle is rounded to fp32, so its error grows with the position.
    np.testing.assert_allclose(cos[:, :, 0], np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin[:, :, 0], np.sin(angles), atol=1e-4)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles[0]), atol=1e-6)


def test_rope_is_a_product_of_complex_numbers(make_config):
    """With positions of each row's own, as in the cached case, and with one row for all."""
    x_BTHC = normal(B, T, H, C)

    @jax.jit
    def rotate(positions):
        return pos.apply_rope(x_BTHC, *pos.rope_tables(positions, rope(make_config)))

    firsts = (3, 17)
    positions_BT = jnp.asarray(firsts)[:, None] + jnp.arange(T)
    rotated_BTHC = rotate(positions_BT)
    assert rotated_BTHC.dtype == jnp.float32
    for b, first in enumerate(firsts):
        for h in range(H):
            x_TC = np.asarray(x_BTHC[b, :, h], np.float64)
            expected_TC = reference.rotate(x_TC, 10000.0, first_position=first)
            np.testing.assert_allclose(rotated_BTHC[b, :, h], expected_TC, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(rotate(positions_BT[1])[1], rotated_BTHC[1], rtol=1e-5, atol=2e-6)


def test_rope_in_bf16_is_the_fp32_rotation_rounded_once(make_config):
    x_BTHC = normal(B, T, H, C).astype(jnp.bfloat16)
    tables = pos.rope_tables(100 + jnp.arange(T), rope(make_config))
    rotated_BTHC = pos.apply_rope(x_BTHC, *tables)
    assert rotated_BTHC.dtype == jnp.bfloat16
    expected_BTHC = pos.apply_rope(x_BTHC.astype(jnp.float32), *tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        rotated_BTHC.astype(jnp.float32), expected_BTHC.astype(jnp.float32)
    )


def test_sinusoidal_is_the_closed_form():
    table_TD = pos.sinusoidal_embedding(jnp.arange(11), 14)
    assert table_TD.dtype == jnp.float32
    np.testing.assert_allclose(table_TD, reference.sinusoids(11, 14), atol=2e-6)
    rows_BTD = pos.sinusoidal_embedding(jnp.array([[0, 1], [7, 10]]), 14)
    np.testing.assert_array_equal(rows_BTD, np.asarray(table_TD)[[[0, 1], [7, 10]]])


def test_causal_mask_is_a_literal_table():
    expected = [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    windowed = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(attn.causal_mask(4, 2), np.array([windowed], bool))
    mask = attn.causal_mask(4)
    assert mask.dtype == jnp.bool_
    np.testing.assert_array_equal(mask, np.array(expected, bool))


SEGMENTS = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 2, 3]], np.int32)


def test_segment_positions_are_a_literal_table():
    positions_BT = pos.segment_positions(jnp.asarray(SEGMENTS))
    assert positions_BT.dtype == jnp.int32
    expected = [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(positions_BT, expected)


def test_segment_mask_is_a_literal_table():
    two = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    four = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    mask_BTS = attn.segment_mask(jnp.asarray(SEGMENTS))
    assert mask_BTS.dtype == jnp.bool_
    np.testing.assert_array_equal(mask_BTS[:1], attn.causal_mask(5))
    np.testing.assert_array_equal(mask_BTS[1:], np.array([two, four], bool))


MASK_SHARED = [
    [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 1],
    ]
]
MASK_PER_ROW = MASK_SHARED + [
    [
        [0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 1, 0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 1],
    ]
]


def attend_in_float64(q_BTHC, k_BSKC, v_BSKC, mask_BTS) -> np.ndarray:
    """Softmax over the visible keys alone, one query of one head at a time."""
    q_BTHC, k_BSKC, v_BSKC = (np.asarray(x, np.float64) for x in (q_BTHC, k_BSKC, v_BSKC))
    b, t, h, c = q_BTHC.shape
    group = h // k_BSKC.shape[2]
    mask_BTS = np.broadcast_to(np.asarray(mask_BTS, bool), (b, t, k_BSKC.shape[1]))
    out_BTHC = np.empty((b, t, h, c))
    for row, query, head in np.ndindex(b, t, h):
        seen = mask_BTS[row, query]
        k_SC, v_SC = k_BSKC[row, seen, head // group], v_BSKC[row, seen, head // group]
        weights_S = reference.softmax(k_SC @ q_BTHC[row, query, head] / math.sqrt(c))
        out_BTHC[row, query, head] = weights_S @ v_SC
    return out_BTHC


def gradients_in_float64(q_BTHC, k_BSKC, v_BSKC, mask_BTS, d_BTHC):
    """Of Σ d · attend, in queries, keys and values: one query of one head at a time."""
    q_BTHC, k_BSKC, v_BSKC = (np.asarray(x, np.float64) for x in (q_BTHC, k_BSKC, v_BSKC))
    dq_BTHC, dk_BSKC, dv_BSKC = map(np.zeros_like, (q_BTHC, k_BSKC, v_BSKC))
    b, t, h, c = q_BTHC.shape
    group = h // k_BSKC.shape[2]
    mask_BTS = np.broadcast_to(np.asarray(mask_BTS, bool), (b, t, k_BSKC.shape[1]))
    for row, query, head in np.ndindex(b, t, h):
        seen = row, mask_BTS[row, query], head // group
        q_C, d_C = q_BTHC[row, query, head], np.asarray(d_BTHC, np.float64)[row, query, head]
        weights_S = reference.softmax(k_BSKC[seen] @ q_C / math.sqrt(c))
        d_weights_S = v_BSKC[seen] @ d_C
        d_scores_S = weights_S * (d_weights_S - weights_S @ d_weights_S) / math.sqrt(c)
        dq_BTHC[row, query, head] = d_scores_S @ k_BSKC[seen]
        dk_BSKC[seen] += np.outer(d_scores_S, q_C)
        dv_BSKC[seen] += np.outer(weights_S, d_C)
    return dq_BTHC, dk_BSKC, dv_BSKC


@pytest.mark.parametrize(
    ("kv_heads", "mask", "dtype"),
    [
        (1, MASK_SHARED, "float32"),
        (2, MASK_PER_ROW, "float32"),
        (3, MASK_PER_ROW, "bfloat16"),
        (6, MASK_SHARED, "bfloat16"),
    ],
    ids=["one", "two", "three", "all"],
)
def test_attend_and_its_gradients_are_the_formula_in_float64(kv_heads, mask, dtype):
    shapes = (B, T, H, C), (B, S, kv_heads, C), (B, S, kv_heads, C), (B, T, H, C)
    q, k, v, d = (normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes))

    @jax.jit
    def attend(q, k, v):
        out, gradients = jax.vjp(lambda *qkv: attn.attend(*qkv, jnp.array(mask, bool)), 3 * q, k, v)
        return out, *gradients(d)

    expected = (
        attend_in_float64(3 * q, k, v, mask),
        *gradients_in_float64(3 * q, k, v, mask, d),
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for found, wanted in zip(attend(q, k, v), expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            found.astype(jnp.float32), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
        )


def test_scores_are_multiplied_and_differentiated_as_they_lie():
    """No transposition of [T, S] scores: on a CPU those took most of a long context's time."""
    t, c = 256, 16
    q, k, v = (normal(1, t, 2, c, seed=i) for i in range(3))

    def total(q_BTHC, k_BSKC, v_BSKC):
        return jnp.sum(attn.attend(q_BTHC, k_BSKC, v_BSKC, attn.causal_mask(t)) ** 2)

    program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
    lines = program.splitlines()
    transposed = [line for line in lines if f"{t},{t}" in line and " transpose(" in line]
    assert not transposed


@pytest.mark.parametrize(
    ("length", "blocks", "segments", "window"),
    [(3, 1, True, 0), (4, 2, False, 0), (11, 4, True, 0), (29, 4, False, 0), (29, 4, True, 7)],
)
def test_causal_blocks_are_the_whole_without_hidden_scores(
    monkeypatch, length, blocks, segments, window
):
    monkeypatch.setattr(attn, "CAUSAL_BLOCK", 3)
    monkeypatch.setattr(attn, "CAUSAL_BLOCKS", 4)
    q_BTHC, k_BTKC, v_BTKC = (normal(B, length, heads, C, seed=heads) for heads in (H, K, K))
    mask_BTT = attn.causal_mask(length, window)
    if segments:
        segments_BT = jnp.repeat(jnp.arange(length) // 5, B).reshape(length, B).T
        mask_BTT = attn.segment_mask(segments_BT, window)
    whole_BTHC = attend_in_float64(
        q_BTHC, k_BTKC, v_BTKC, np.broadcast_to(mask_BTT, (B, length, length))
    )
    seen = []

    def drop(first_query, weights_BKGTS):
        assert first_query == sum(queries for queries, _ in seen)
        seen.append(weights_BKGTS.shape[-2:])
        return weights_BKGTS

    out_BTHC = jax.jit(lambda *qkv: attn.attend_causal(*qkv, mask_BTT, drop, window))(
        q_BTHC, k_BTKC, v_BTKC
    )
    np.testing.assert_allclose(out_BTHC, whole_BTHC, rtol=1e-5, atol=2e-6)
    assert len(seen) == blocks
    assert sum(queries for queries, _ in seen) == length
    ends = np.cumsum([queries for queries, _ in seen])
    before = [min(window - 1, end - queries) for end, (queries, _) in zip(ends, seen, strict=True)]
    expected = [n + queries for n, (queries, _) in zip(before, seen, strict=True)]
    assert [keys for _, keys in seen] == (expected if window else list(ends))


def test_a_query_that_sees_nothing_gives_the_mean_and_no_nan():
    q_BTHC, k_BSKC, v_BSKC = (normal(1, 3, 2, 4, seed=seed) for seed in range(3))
    mask_BTS = jnp.array([[[1, 0, 0], [0, 0, 0], [1, 1, 1]]], bool)

    def total(q_BTHC, k_BSKC, v_BSKC):
        out_BTHC = attn.attend(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
        return out_BTHC.sum(), out_BTHC

    gradients, out_BTHC = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(
        q_BTHC, k_BSKC, v_BSKC
    )
    np.testing.assert_allclose(out_BTHC[:, 1], v_BSKC.mean(axis=1), rtol=1e-5, atol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_attend_in_bf16_keeps_scores_and_softmax_in_fp32():
    """Scores of 100 and 100.2 are one number in bf16, and two different weights in fp32."""
    q_BTHC = jnp.full((1, 1, 1, 2), 10.0, jnp.bfloat16)
    near = 10.0 + np.array([0.0, 0.0625])  # bf16's spacing at 10
    k_BSKC = jnp.asarray(near[None, :, None, None] * np.ones(2), jnp.bfloat16)
    v_BSKC = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]], jnp.bfloat16)
    out = attn.attend(q_BTHC, k_BSKC, v_BSKC, jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    expected = attend_in_float64(q_BTHC, k_BSKC, v_BSKC, np.ones((1, 1, 2)))
    assert expected[0, 0, 0, 1] > 0.69
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2**-8)


def test_dropout_is_applied_to_the_weights_after_the_softmax():
    q_BTHC = normal(B, T, H, C, seed=1)
    k_BSKC, v_BSKC = normal(B, S, K, C, seed=2), normal(B, S, K, C, seed=3)
    mask_BTS, seen = jnp.array(MASK_PER_ROW, bool), []

    def keep_half(weights: jax.Array) -> jax.Array:
        seen.append(weights)
        return weights * (jnp.arange(S) < 4)

    out_BTHC = attn.attend(q_BTHC, k_BSKC, v_BSKC, mask_BTS, keep_half)
    (weights,) = seen
    np.testing.assert_allclose(weights.sum(axis=-1), np.ones(weights.shape[:-1]), rtol=1e-5)
    hidden = np.asarray(weights) * ~np.asarray(mask_BTS)[:, None, None]
    assert weights.dtype == jnp.float32 and not hidden.any()
    without_BTHC = attend_in_float64(q_BTHC, k_BSKC, v_BSKC.at[:, 4:].set(0), mask_BTS)
    np.testing.assert_allclose(out_BTHC, without_BTHC, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [0, 1, 3, T])
def test_the_cudnn_call_means_causal_attention(monkeypatch, window):
    """With XLA in cuDNN's place, since the call is ours and the kernel is not."""
    real = jax.nn.dot_product_attention

    def on_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    q_BTHC = normal(B, T, H, C, seed=1)
    k_BTKC, v_BTKC = normal(B, T, K, C, seed=2), normal(B, T, K, C, seed=3)
    np.testing.assert_allclose(
        jax.jit(flash_attention.attend_causal_cudnn, static_argnums=3)(
            q_BTHC, k_BTKC, v_BTKC, window
        ),
        attend_in_float64(q_BTHC, k_BTKC, v_BTKC, attn.causal_mask(T, window)),
        rtol=1e-5,
        atol=2e-6,
    )


def cache_of(start: list[int], index: int, slots: int = 5) -> kv_cache.Cache:
    keys = (jnp.zeros((len(start), slots, K, C)),)
    return kv_cache.Cache(keys, keys, jnp.int32(index), jnp.array(start, jnp.int32))


def test_a_new_cache(make_config):
    config = make_config({"model.num_layers": 3, "model.num_kv_heads": K}).model
    cache = kv_cache.init_cache(config, jnp.array([0, 2], jnp.int32), 5, jnp.bfloat16)
    assert len(cache.keys) == len(cache.values) == 3
    for layer in cache.keys + cache.values:
        assert layer.shape == (2, 5, K, C) and layer.dtype == jnp.bfloat16
        assert not layer.any()
    assert cache.index.shape == () and cache.index.dtype == jnp.int32 and cache.index == 0
    assert cache.start.dtype == jnp.int32
    np.testing.assert_array_equal(cache.start, [0, 2])


def test_cache_positions_are_a_literal_table():
    np.testing.assert_array_equal(
        cache_of([0, 2, 3], index=0).positions(4), [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]
    )
    positions = cache_of([0, 2, 4], index=3).positions(2)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, [[3, 4], [1, 2], [0, 0]])


def test_cache_mask_is_a_literal_table():
    prefill = [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
    ]
    mask_BTS = cache_of([0, 1, 2], index=0).mask(3, 0)
    assert mask_BTS.dtype == jnp.bool_
    np.testing.assert_array_equal(mask_BTS, np.array(prefill, bool))
    step = [[[1, 1, 1, 1, 0]], [[0, 1, 1, 1, 0]], [[0, 0, 1, 1, 0]]]
    np.testing.assert_array_equal(cache_of([0, 1, 2], index=3).mask(1, 0), np.array(step, bool))


def test_write_cache_writes_the_rows_and_nothing_else():
    buffer_BSKC = normal(B, S, K, C)
    rows_BTKC = normal(B, 2, K, C, seed=1)
    written_BSKC = kv_cache.write_cache(buffer_BSKC, rows_BTKC, jnp.int32(3))
    expected_BSKC = np.array(buffer_BSKC)
    expected_BSKC[:, 3:5] = rows_BTKC
    np.testing.assert_array_equal(written_BSKC, expected_BSKC)
    half = kv_cache.write_cache(buffer_BSKC.astype(jnp.bfloat16), rows_BTKC, jnp.int32(0))
    assert half.dtype == jnp.bfloat16
