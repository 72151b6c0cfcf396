"""The whole model against the float64 reference, and the laws that it must keep."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.model import attention as attn
from sheepop_jax.model import transformer as tf
from sheepop_jax.model.dropout import dropout
from sheepop_jax.model.transformer import ATTENTION_WEIGHTS
from tests import reference

VOCAB = 131  # padded to 256
B, T = 3, 11
MODEL = {
    "position": ("rope", "sinusoidal", "learned"),
    "use_bias": (False, True),
    "num_kv_heads": (0, 2),
}
OPTIONS = [
    pytest.param(
        {f"model.{name}": value for name, value in zip(MODEL, values, strict=True)},
        id="-".join(map(str, values)),
    )
    for values in itertools.product(*MODEL.values())
]
EVERYTHING = {"model.use_bias": True, "model.num_kv_heads": 2, "model.position": "learned"}


@pytest.fixture
def make_model(make_config):
    """`make_model({"model.position": …}, dtype=…)`: the small model with fields changed."""

    def make(overrides=None, vocab_size=VOCAB, **attributes) -> tf.Transformer:
        return tf.Transformer(make_config(overrides).model, vocab_size, **attributes)

    return make


def token_ids(rows=B, length=T, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), np.int32)


@functools.cache  # compiling is what these tests spend their time on: once for each model
def jit_logits(model):
    """(params, tokens, cache) → (logits of the real vocabulary, cache)."""

    @jax.jit
    def logits(params, tokens_BT, cache=None):
        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, cache)
        embedding_VD = tf.output_embedding(params)
        return tf.unembed(hidden_BTD, embedding_VD, VOCAB)[..., :VOCAB], cache

    return logits


@functools.cache
def jit_hidden(model, **options):
    """(params, tokens, dropout key) → hidden states."""

    @jax.jit
    def hidden(params, tokens_BT, key=None):
        keys_B = None if key is None else jax.random.split(key, len(tokens_BT))
        return model.apply({"params": params}, tokens_BT, dropout_keys_B=keys_B, **options)[0]

    return hidden


def empty_cache(model, start, slots, dtype=jnp.float32) -> attn.Cache:
    cfg = model.config
    start_B = jnp.asarray(start, jnp.int32)
    return attn.init_cache(cfg.num_layers, start_B, slots, cfg.kv_heads, cfg.head_dim, dtype)


def relative_error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


# --- the formulas ---


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_the_reference(make_model, random_params, options):
    model = make_model(options)
    params, tokens_BT = random_params(model), token_ids()
    got_BTV, cache = jit_logits(model)(params, tokens_BT)
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert cache is None
    assert relative_error(got_BTV, expected_BTV) < 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_and_output_layers_are_the_reference(
    make_model, random_params, activation, tied
):
    model = make_model(
        {
            "model.activation": activation,
            "model.tie_embeddings": tied,
            "model.num_layers": 1,
            "model.rope_theta": 500.0,
            "model.norm_eps": 0.1,
        }
    )
    params, tokens_BT = random_params(model), token_ids()
    assert ("output_embedding" in params) != tied
    got_BTV, _ = jit_logits(model)(params, tokens_BT)
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert relative_error(got_BTV, expected_BTV) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_are_the_closed_form(activation):
    x = np.linspace(-9, 9, 101)
    expected = reference.ACTIVATIONS[activation](x)
    np.testing.assert_allclose(tf.activate(jnp.float32(x), activation), expected, atol=1e-6)
    step = 1e-4
    slope = (reference.ACTIVATIONS[activation](x + step) - expected) / step
    found = jax.vmap(jax.grad(lambda x: tf.activate(x, activation)))(jnp.float32(x))
    off_the_kink = x != 0  # of relu
    np.testing.assert_allclose(found[off_the_kink], slope[off_the_kink], atol=2e-4)


def test_gelu_in_bf16_loses_no_more_than_its_input_and_output():
    x = jnp.linspace(-4, 4, 801, dtype=jnp.bfloat16)
    expected = reference.ACTIVATIONS["gelu"](np.asarray(x, np.float64))
    found = np.asarray(tf.activate(x, "gelu"), np.float64)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)


def test_what_the_configuration_refuses_the_model_does_not_guess(make_model):
    with pytest.raises(ValueError, match="swish"):
        tf.activate(jnp.zeros(1), "swish")
    model = make_model()
    config = dataclasses.replace(model.config)
    object.__setattr__(config, "position", "alibi")  # past the configuration's own rules
    with pytest.raises(ValueError, match="alibi"):
        jax.eval_shape(model.copy(config=config).init, jax.random.key(0), token_ids())


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)], ids=str)
def test_unembed_is_a_product_with_the_padded_rows_at_minus_infinity(shape):
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((*shape, 60), np.float32)
    embedding_VD = generator.standard_normal((256, 60), np.float32)
    logits = tf.unembed(jnp.asarray(hidden), jnp.asarray(embedding_VD), VOCAB)
    assert logits.dtype == jnp.float32 and logits.shape == (*shape, 256)
    expected = hidden.astype(np.float64) @ embedding_VD.astype(np.float64).T
    np.testing.assert_allclose(logits[..., :VOCAB], expected[..., :VOCAB], rtol=1e-5, atol=1e-4)
    assert np.isneginf(logits[..., VOCAB:]).all()


def test_unembed_without_padded_rows_masks_nothing():
    ones = jnp.ones((128, 60))
    np.testing.assert_allclose(tf.unembed(ones[:1], ones, 128), np.full((1, 128), 60.0))


def test_unembed_in_bf16_sums_in_fp32():
    generator = np.random.default_rng(0)
    hidden_MD = jnp.asarray(generator.standard_normal((7, 512)), jnp.bfloat16)
    embedding_VD = jnp.asarray(generator.standard_normal((128, 512)), jnp.float32)
    logits_MV = tf.unembed(hidden_MD, embedding_VD, 128)
    rounded_VD = np.asarray(embedding_VD.astype(jnp.bfloat16), np.float64)
    assert logits_MV.dtype == jnp.float32
    assert relative_error(logits_MV, np.asarray(hidden_MD, np.float64) @ rounded_VD.T) < 1e-5


# --- causality ---


@pytest.mark.parametrize("position", MODEL["position"])
def test_no_position_sees_its_future_or_another_row(make_model, random_params, position):
    """By gradients: exactly zero for s > t and in other rows, and not zero for s <= t."""
    model = make_model({"model.position": position, "model.num_kv_heads": 2})
    params = random_params(model)
    rows, length = 2, 5
    tokens_BT = np.random.default_rng(0).permutation(VOCAB)[: rows * length].astype(np.int32)
    tokens_BT = tokens_BT.reshape(rows, length)  # all different: one embedding row each
    probe_BTD = np.random.default_rng(1).standard_normal((rows, length, 60)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def gradients(embedding_VD):
        changed = params | {"embedding": embedding_VD}
        hidden_BTD, _ = model.apply({"params": changed}, tokens_BT)
        return (hidden_BTD * probe_BTD).sum(-1)

    gradients_BTBSD = np.asarray(gradients(params["embedding"]))[:, :, tokens_BT]
    sees_BTBS = np.abs(gradients_BTBSD).max(-1) > 0
    expected_BTBS = np.einsum("bc,ts->btcs", np.eye(rows), np.tril(np.ones((length, length))))
    np.testing.assert_array_equal(sees_BTBS, expected_BTBS.astype(bool))


# --- documents ---

# The window's first document may have begun before it; documents of one token at both ends.
LENGTHS = ((11,), (4, 7), (1, 5, 4, 1))
SEGMENTS_BT = np.array([np.repeat(np.arange(len(row)), row) for row in LENGTHS], np.int32)


def by_document(function, tokens_BT) -> np.ndarray:
    """What `function` gives for each document alone ([1, t]), side by side again: [B, T, …]."""
    rows = []
    for tokens_T, lengths in zip(tokens_BT, LENGTHS, strict=True):
        pieces = np.split(tokens_T, np.cumsum(lengths)[:-1])
        rows.append(np.concatenate([np.asarray(function(piece[None]))[0] for piece in pieces]))
    return np.stack(rows)


@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize("position", MODEL["position"])
def test_a_packed_window_is_its_documents_alone(make_model, random_params, position, kv_heads):
    model = make_model({"model.position": position, "model.num_kv_heads": kv_heads})
    params, tokens_BT = random_params(model), token_ids()

    @jax.jit
    def logits(params, tokens_BT, segments_BT):
        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, segments_BT=segments_BT)
        assert cache is None
        return tf.unembed(hidden_BTD, tf.output_embedding(params), VOCAB)[..., :VOCAB]

    got_BTV = logits(params, tokens_BT, SEGMENTS_BT)
    expected_BTV = by_document(lambda one: reference.logits(params, model.config, one), tokens_BT)
    assert relative_error(got_BTV, expected_BTV[..., :VOCAB]) < 1e-5
    unmasked_BTV = logits(params, tokens_BT, None)
    assert relative_error(got_BTV[:1], unmasked_BTV[:1]) < 1e-6  # a window of one document
    assert relative_error(got_BTV[1:], unmasked_BTV[1:]) > 1e-2


@pytest.mark.parametrize("position", MODEL["position"])
def test_no_gradient_crosses_a_documents_border(make_model, random_params, position):
    """Exactly zero, and not zero for what comes before in the same document."""
    model = make_model({"model.position": position, "model.num_kv_heads": 2})
    params = random_params(model)
    segments_BT = SEGMENTS_BT[1:]
    tokens_BT = np.random.default_rng(0).permutation(VOCAB)[: 2 * T].astype(np.int32)
    tokens_BT = tokens_BT.reshape(2, T)  # all different: one embedding row each
    probe_BTD = np.random.default_rng(1).standard_normal((2, T, 60)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def gradients(embedding_VD):
        changed = params | {"embedding": embedding_VD}
        hidden_BTD, _ = model.apply({"params": changed}, tokens_BT, segments_BT=segments_BT)
        return (hidden_BTD * probe_BTD).sum(-1)

    gradients_BTBSD = np.asarray(gradients(params["embedding"]))[:, :, tokens_BT]
    for row, other in np.ndindex(2, 2):
        sees_TS = np.abs(gradients_BTBSD[row, :, other]).max(-1) > 0
        same_TS = segments_BT[row][:, None] == segments_BT[row]
        np.testing.assert_array_equal(sees_TS, np.tril(same_TS) & (row == other))


def test_segments_are_refused_where_they_would_be_ignored(make_model, random_params):
    model = make_model()
    params, tokens_BT = random_params(model), token_ids()
    with pytest.raises(ValueError, match="segments with a cache"):
        cache = empty_cache(model, [0] * B, slots=T)
        model.apply({"params": params}, tokens_BT, cache, segments_BT=SEGMENTS_BT)
    with pytest.raises(ValueError, match="segments with cuDNN"):
        on_cudnn = model.copy(implementation="cudnn")
        on_cudnn.apply({"params": params}, tokens_BT, segments_BT=SEGMENTS_BT)


# --- the cache ---


@pytest.mark.parametrize("options", OPTIONS)
def test_cached_logits_are_the_full_forward_logits(make_model, random_params, options):
    """Token by token, and a prefill with steps after it, at every position."""
    model = make_model(options)
    params, tokens_BT = random_params(model), token_ids()
    logits = jit_logits(model)
    full_BTV, _ = logits(params, tokens_BT)
    for prefill in (1, 4):
        cache = empty_cache(model, [0] * B, slots=T + 2)
        piece, cache = logits(params, tokens_BT[:, :prefill], cache)
        pieces = [piece]
        for t in range(prefill, T):
            piece, cache = logits(params, tokens_BT[:, t : t + 1], cache)
            pieces.append(piece)
        assert relative_error(jnp.concatenate(pieces, axis=1), full_BTV) < 1e-5
        assert cache.index == T and cache.index.dtype == jnp.int32
        np.testing.assert_array_equal(cache.start, [0] * B)
        for layer in cache.keys + cache.values:
            assert layer[:, :T].all() and not layer[:, T:].any()
    assert logits._cache_size() == 3  # the whole, the prefill, and one program for all steps


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_decoding_goes_on_beyond_the_trained_length(make_model, random_params, position):
    options = {"model.position": position, "model.max_seq_len": 5, "data.seq_len": 5}
    model = make_model(options)
    params, tokens_BT = random_params(model), token_ids()
    logits = jit_logits(model)
    cache, pieces = empty_cache(model, [0] * B, slots=T), []
    for t in range(T):
        piece, cache = logits(params, tokens_BT[:, t : t + 1], cache)
        pieces.append(piece)
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert relative_error(jnp.concatenate(pieces, axis=1), expected_BTV) < 1e-5


@pytest.mark.parametrize("position", MODEL["position"])
def test_a_padded_prompt_in_a_batch_is_the_same_prompt_alone(make_model, random_params, position):
    model = make_model({"model.position": position, "model.num_kv_heads": 2})
    params, tokens_BT = random_params(model), token_ids(rows=4)
    logits, bucket = jit_logits(model), 8
    start = [5, 0, 3, 8]  # slots of padding; the last row is nothing else
    answers = []
    for seed in (1, 2):
        padded_BT = token_ids(rows=4, seed=seed)  # what pads are must not matter
        for row, pads in enumerate(start):
            padded_BT[row, pads:] = tokens_BT[row, : T - pads]
        cache = empty_cache(model, start, slots=T + 1)
        piece, cache = logits(params, padded_BT[:, :bucket], cache)
        pieces = [piece]
        for t in range(bucket, T):
            piece, cache = logits(params, padded_BT[:, t : t + 1], cache)
            pieces.append(piece)
        answers.append(np.asarray(jnp.concatenate(pieces, axis=1)))
        assert np.isfinite(answers[-1]).all()  # in padding too
        for layer in cache.keys + cache.values:
            assert np.isfinite(layer).all()
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    for row, pads in enumerate(start):
        np.testing.assert_array_equal(answers[0][row, pads:], answers[1][row, pads:])
        assert relative_error(answers[0][row, pads:], expected_BTV[row, : T - pads]) < 1e-5


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_cudnn_attention_is_for_whole_contexts_alone(
    monkeypatch, make_model, random_params, cached
):
    calls = []

    def stand_in(q_BTHC, k_BTKC, v_BTKC):
        calls.append(q_BTHC.shape)
        return attn.attend(q_BTHC, k_BTKC, v_BTKC, attn.causal_mask(q_BTHC.shape[1]))

    model = make_model({"model.num_layers": 3}, implementation="xla")
    params, tokens_BT = random_params(model), token_ids()
    model = model.copy(implementation="cudnn")
    monkeypatch.setattr(attn, "attend_causal_cudnn", stand_in)
    cache = empty_cache(model, [0] * B, slots=T) if cached else None
    got_BTV, _ = jit_logits(model)(params, tokens_BT, cache)
    assert len(calls) == (0 if cached else model.config.num_layers)
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert relative_error(got_BTV, expected_BTV) < 1e-5


# --- parameters ---


def shapes_of(model) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path → (shape, dtype) of every parameter, without computing one."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)["params"])
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): (x.shape, str(x.dtype))
        for p, x in leaves
    }


def count(model) -> int:
    return sum(math.prod(shape) for shape, _ in shapes_of(model).values())


def test_base_has_44_6_million_parameters():
    from configs import base
    from sheepop_jax.config import Config

    model = tf.Transformer(Config.from_dict(base.get_config()).model, 50257)
    d, f, n = 512, 2048, 6
    layer = 4 * d * d + 2 * d * f + 2 * 2 * d  # q k v o, up and down, two LayerNorms
    total = count(model)
    assert total == 50304 * d + n * layer + 2 * d
    # Without the 47 padded rows, which no output depends on.
    assert round((total - 47 * d) / 1e6, 1) == round(total / 1e6, 1) == 44.6


def test_every_parameter_by_name_and_shape(make_model):
    model = make_model(EVERYTHING | {"model.tie_embeddings": False, "model.num_layers": 1})
    d, f, hc, kc, v, p = 60, 79, 60, 20, 256, 29
    expected = {
        "embedding": (v, d),
        "output_embedding": (v, d),
        "positions": (p, d),
        "final_norm.scale": (d,),
        "final_norm.bias": (d,),
        "block_0.attention_norm.scale": (d,),
        "block_0.attention_norm.bias": (d,),
        "block_0.feed_forward_norm.scale": (d,),
        "block_0.feed_forward_norm.bias": (d,),
        "block_0.attention.query.kernel": (d, hc),
        "block_0.attention.query.bias": (hc,),
        "block_0.attention.key.kernel": (d, kc),
        "block_0.attention.key.bias": (kc,),
        "block_0.attention.value.kernel": (d, kc),
        "block_0.attention.value.bias": (kc,),
        "block_0.attention.output.kernel": (hc, d),
        "block_0.attention.output.bias": (d,),
        "block_0.feed_forward.up.kernel": (d, f),
        "block_0.feed_forward.up.bias": (f,),
        "block_0.feed_forward.down.kernel": (f, d),
        "block_0.feed_forward.down.bias": (d,),
    }
    assert shapes_of(model) == {name: (shape, "float32") for name, shape in expected.items()}


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_padded_vocab_size(vocab_size, padded):
    assert tf.padded_vocab_size(vocab_size) == padded


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padded_rows_never_matter(make_model, random_params, tied):
    model = make_model({"model.tie_embeddings": tied, "model.num_layers": 1})
    params = random_params(model)
    names = ["embedding"] if tied else ["embedding", "output_embedding"]
    changed = params | {name: params[name].at[VOCAB:].set(1e6) for name in names}

    @jax.jit
    def nll(params):
        hidden_BTD, _ = model.apply({"params": params}, token_ids())
        logits_BTV = tf.unembed(hidden_BTD, tf.output_embedding(params), VOCAB)
        return -jax.nn.log_softmax(logits_BTV)[..., :VOCAB]

    np.testing.assert_array_equal(nll(params), nll(changed))
    gradients = jax.jit(jax.grad(lambda params: nll(params)[..., 0].mean()))(params)
    for name in names:
        assert np.isfinite(gradients[name]).all() and not gradients[name][VOCAB:].any()
    assert gradients[names[-1]][:VOCAB].any(axis=1).all()


def test_init_statistics(make_model):
    options = {"model.d_model": 180, "model.d_ff": 331, "model.num_layers": 2}
    model = make_model(EVERYTHING | options | {"model.tie_embeddings": False})
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token_ids()))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        name, x = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
        if name.endswith("bias"):
            assert not x.any(), name
        elif name.endswith("scale"):
            assert (x == 1).all(), name
        else:
            residual = name.endswith(("output.kernel", "down.kernel"))
            stddev = 0.02 / math.sqrt(2 * 2) if residual else 0.02
            error = 5 / math.sqrt(x.size)  # five standard errors of the mean
            assert abs(x.mean()) < error * stddev, name
            assert abs(x.std() / stddev - 1) < error / math.sqrt(2), name
            tail = math.erfc(math.sqrt(2))  # beyond two standard deviations: normal, not truncated
            assert abs((np.abs(x) > 2 * stddev).mean() - tail) < 1.1 * error * math.sqrt(tail), name
    drawn = [leaf.ravel()[0] for path, leaf in leaves if leaf.ndim == 2]
    assert len(np.unique(drawn)) == len(drawn)  # a draw for each parameter, not one for several


# --- dropout ---


def test_dropout_off_is_deterministic_and_needs_no_key(make_model, random_params):
    model = make_model({"model.dropout": 0.5, "model.attention_dropout": 0.5})
    none = make_model({"model.dropout": 0.0, "model.attention_dropout": 0.0})
    params, tokens_BT = random_params(model), token_ids()
    off = jit_hidden(model)(params, tokens_BT)
    np.testing.assert_array_equal(off, jit_hidden(model)(params, tokens_BT))
    np.testing.assert_array_equal(off, jit_hidden(none)(params, tokens_BT))
    # At a rate of 0 it is off with keys too.
    hidden = jit_hidden(none)(params, tokens_BT, jax.random.key(1))
    np.testing.assert_array_equal(off, hidden)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_each_dropout_is_a_function_of_the_key(make_model, random_params, field):
    rates = {"model.dropout": 0.0, "model.attention_dropout": 0.0, f"model.{field}": 0.3}
    model = make_model(rates | {"model.num_layers": 1})
    params, tokens_BT = random_params(model), token_ids()
    hidden = jit_hidden(model)
    one, again = (hidden(params, tokens_BT, jax.random.key(1)) for _ in range(2))
    other, off = hidden(params, tokens_BT, jax.random.key(2)), jit_hidden(model)(params, tokens_BT)
    np.testing.assert_array_equal(one, again)
    assert relative_error(one, other) > 0.01 and relative_error(one, off) > 0.01


def silent(params):
    """All parameters 0 but γ = 1: each block adds its biases, now 0, to what comes in."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if path[-1].key == "scale" else x, zeros
    )


def normalized(x_BTD, eps):
    """LayerNorm with γ = 1 and β = 0."""
    ones = {"scale": np.ones(x_BTD.shape[-1]), "bias": np.zeros(x_BTD.shape[-1])}
    return reference.layer_norm(np.asarray(x_BTD, np.float64), ones, eps)


@pytest.mark.parametrize("site", ["embedding", "attention", "feed_forward"])
def test_dropout_rate_and_scale_at_each_site(make_model, random_params, site):
    """One part of the model puts out ones, the others zeros: what is dropped can be read off."""
    rate, eps = 0.3, 1.0  # so large an ε lets the scale through LayerNorm
    model = make_model(
        {
            "model.dropout": rate,
            "model.norm_eps": eps,
            "model.use_bias": True,
            "model.num_layers": 1,
        }
    )
    params = silent(random_params(model))
    match site:
        case "embedding":
            params["embedding"] += 1
        case "attention":
            params["block_0"]["attention"]["output"]["bias"] += 1
        case "feed_forward":
            params["block_0"]["feed_forward"]["down"]["bias"] += 1
    tokens_BT = token_ids(rows=53, length=47)
    hidden = jit_hidden(model)
    hidden_BTD = hidden(params, tokens_BT, jax.random.key(0))
    kept_BTD = np.asarray(hidden_BTD) > 0
    error = 5 * math.sqrt(rate * (1 - rate) / kept_BTD.size)
    assert abs(kept_BTD.mean() - (1 - rate)) < error
    for axis in range(3):  # drawn for every component, none shared along an axis
        assert kept_BTD.any(axis).all() and not kept_BTD.all(axis).any()
    expected_BTD = normalized(kept_BTD / (1 - rate), eps)  # the mean is kept
    np.testing.assert_allclose(hidden_BTD, expected_BTD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.2, 0.3])
def test_dropout_keeps_the_mean_in_bf16(rate):
    """What is kept is x / (1 - rate), rounded once; with 1 - rate in bf16 it is off by 0.2%."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (1, 1 << 14)), jnp.bfloat16)
    found = dropout(x, rate, jax.random.split(jax.random.key(0), 1), 0)
    kept = np.asarray(found, np.float64) != 0
    wanted = np.asarray(x, np.float64)[kept] / (1 - rate)
    assert np.mean(np.asarray(found, np.float64)[kept]) == pytest.approx(wanted.mean(), rel=3e-4)


def test_dropouts_of_the_sublayers_and_layers_are_independent(make_model, random_params):
    """Sublayers i of 2 layers put out 4^i: base 4 digits tell which were kept."""
    rate = 0.5
    options = {"model.dropout": rate, "model.use_bias": True, "model.d_model": 360}
    model = make_model(options)
    params = silent(random_params(model))
    for i in range(2):
        params[f"block_{i}"]["attention"]["output"]["bias"] += 4.0 ** (2 * i)
        params[f"block_{i}"]["feed_forward"]["down"]["bias"] += 4.0 ** (2 * i + 1)
    hidden = jit_hidden(model)
    hidden_BTD = np.asarray(hidden(params, token_ids(), jax.random.key(0)))
    for hidden_D in hidden_BTD.reshape(-1, 360):
        values = np.unique(hidden_D.round(4))  # LayerNorm keeps the order of a row
        assert len(values) == 2**4
        shares = [(np.abs(hidden_D - value) < 1e-3).mean() for value in values]
        assert max(shares) < 0.16  # 1/16, and five standard errors of 360 draws


def test_attention_dropout_rate_and_scale(make_model, random_params):
    """With one token, each head has one weight, 1: a head that is dropped puts out zeros."""
    rate, eps, rows = 0.3, 1.0, 997
    model = make_model(
        {
            "model.dropout": 0.0,
            "model.attention_dropout": rate,
            "model.norm_eps": eps,
            "model.use_bias": True,
            "model.num_layers": 1,
        }
    )
    params = silent(random_params(model))
    params["block_0"]["attention"]["value"]["bias"] += 1
    params["block_0"]["attention"]["output"]["kernel"] += jnp.eye(60)
    hidden = jit_hidden(model)
    hidden_BD = hidden(params, token_ids(rows, 1), jax.random.key(0))[:, 0]
    kept_BHC = (np.asarray(hidden_BD) > 0).reshape(rows, 6, 10)
    all_kept = (np.asarray(hidden_BD) == 0).all(axis=1)  # LayerNorm of equal numbers is 0
    all_kept &= np.random.default_rng(0).random(rows) >= rate**6 / ((1 - rate) ** 6 + rate**6)
    kept_BHC = kept_BHC | all_kept[:, None, None]
    kept_BH = kept_BHC[:, :, 0]
    np.testing.assert_array_equal(kept_BHC, np.repeat(kept_BH[:, :, None], 10, axis=2))
    assert abs(kept_BH.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept_BH.size)
    expected_BD = normalized(kept_BHC.reshape(rows, 60) / (1 - rate), eps)
    np.testing.assert_allclose(hidden_BD, expected_BD, rtol=1e-4, atol=1e-5)


def test_attention_dropout_of_each_block_of_queries_is_its_own(make_model, random_params):
    """Queries that see the same keys, in two blocks: one mask for both would keep the same."""
    model = make_model({"model.dropout": 0.0, "model.attention_dropout": 0.5})
    params, drawn = random_params(model), []

    def drop(first_query):
        keys_B = jax.random.split(jax.random.key(0), 2)
        ones = jnp.ones((2, 3, 2, 4, 4))
        return np.asarray(dropout(ones, 0.5, keys_B, ATTENTION_WEIGHTS + first_query))

    def record(weights, rate, keys_B, site):
        drawn.append((weights.ndim, site))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attn, "CAUSAL_BLOCK", 4)
        patch.setattr(tf, "dropout", record)
        keys_B = jax.random.split(jax.random.key(0), B)
        model.apply({"params": params}, token_ids(), dropout_keys_B=keys_B)
    sites = [site for ndim, site in drawn if ndim == 5]
    assert len(set(sites)) > 1 and len(sites) == len(set(sites)) * model.config.num_layers
    assert (drop(0) != drop(4)).any()


# --- memory and precision ---


@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["whole", "segments"])
def test_remat_changes_neither_values_nor_gradients(
    make_model, random_params, segments_BT, monkeypatch
):
    monkeypatch.setattr(attn, "CAUSAL_BLOCK", 4)  # several blocks
    probe_BTD = np.random.default_rng(0).standard_normal((B, T, 60)).astype(np.float32)
    tokens_BT, results, exponentials = token_ids(), [], []
    for remat in ("none", "dots", "full"):
        options = {"model.attention_dropout": 0.2, "model.num_layers": 1}
        model = make_model(options | {"model.remat": remat})
        params = random_params(model)

        def loss(params, model=model):
            key = jax.random.key(1, impl="rbg")  # threefry compiles for seconds
            hidden_BTD, _ = model.apply(
                {"params": params},
                tokens_BT,
                dropout_keys_B=jax.random.split(key, B),
                segments_BT=segments_BT,
            )
            return (hidden_BTD * probe_BTD).sum()

        step = jax.value_and_grad(loss)
        program = str(jax.make_jaxpr(step)(params))
        assert program.count(" remat2[") == 1  # the block, or the activation; never one in another
        exponentials.append(program.count(" exp "))
        results.append(jax.jit(step)(params))
    assert min(exponentials[1:]) > exponentials[0]
    for plain, *rematerialized in zip(*map(jax.tree.leaves, results), strict=True):
        for other in rematerialized:
            np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-4)


def test_remat_keeps_less_for_the_backward_pass(make_model, random_params):
    """With "dots" only the products with matrices, with "full" not even those."""
    kept = {}
    for remat in ("none", "dots", "full"):
        model = make_model({"model.remat": remat, "model.num_layers": 6})
        tokens_BT = jax.ShapeDtypeStruct((8, T), np.int32)

        def loss(params, tokens_BT, model=model):
            return (model.apply({"params": params}, tokens_BT)[0] ** 2).sum()

        program = jax.jit(jax.grad(loss)).lower(random_params(model), tokens_BT).compile()
        kept[remat] = program.memory_analysis().temp_size_in_bytes
    assert kept["full"] < 0.8 * kept["dots"] < 0.6 * kept["none"], kept


def test_remat_keeps_the_parameters_names(make_model):
    assert shapes_of(make_model({"model.remat": "dots"})) == shapes_of(make_model())


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("position", MODEL["position"])
def test_dtypes(make_model, position, dtype, cached):
    """Parameters and logits are fp32; the residual stream and the cache are what is asked for."""
    model = make_model({"model.position": position, "model.use_bias": True}, dtype=dtype)
    assert {name for _, name in shapes_of(model).values()} == {"float32"}

    def forward(key):
        params = nn.unbox(model.init(key, token_ids()))["params"]
        cache = empty_cache(model, [0] * B, T, dtype) if cached else None
        (hidden_BTD, cache), state = model.apply(
            {"params": params},
            token_ids(),
            cache,
            capture_intermediates=lambda module, _: isinstance(module, tf.Block),
        )
        logits_BTV = tf.unembed(hidden_BTD, tf.output_embedding(params), VOCAB)
        return hidden_BTD, logits_BTV, cache, state["intermediates"]

    hidden_BTD, logits_BTV, cache, inside = jax.eval_shape(forward, jax.random.key(0))
    for block in ("block_0", "block_1"):
        ((residual_BTD, _),) = inside[block]["__call__"]
        assert residual_BTD.dtype == dtype
    assert hidden_BTD.shape == (B, T, 60) and hidden_BTD.dtype == dtype
    assert logits_BTV.shape == (B, T, 256) and logits_BTV.dtype == jnp.float32
    if cached:
        assert {layer.dtype for layer in cache.keys + cache.values} == {jnp.dtype(dtype)}
        assert cache.index.dtype == cache.start.dtype == jnp.int32


def test_bf16_is_near_fp32(make_model, random_params):
    exact, model = make_model(), make_model(dtype=jnp.bfloat16)
    params, tokens_BT = random_params(model), token_ids()
    expected_BTV, _ = jit_logits(exact)(params, tokens_BT)
    for cache in (None, empty_cache(model, [0] * B, slots=T, dtype=jnp.bfloat16)):
        got_BTV, _ = jit_logits(model)(params, tokens_BT, cache)
        assert 1e-4 < relative_error(got_BTV, expected_BTV) < 0.03


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"), [(jnp.float32, 8192, 2e-3), (jnp.bfloat16, 256, 2**-7)]
)
def test_the_norms_statistics_survive_a_large_mean(
    make_model, random_params, dtype, mean, tolerance
):
    """E[x²] - E[x]² would lose the variance in fp32, and any sum would lose it in bf16."""
    model = make_model({"model.num_layers": 1}, dtype=dtype)
    params = silent(random_params(model))
    x_VD = mean + 2.0 * np.random.default_rng(0).integers(0, 3, (256, 60))  # exact in bf16
    params["embedding"] = jnp.asarray(x_VD, jnp.float32)
    hidden_BTD = jit_hidden(model)(params, token_ids())
    expected_BTD = normalized(x_VD[token_ids()], model.config.norm_eps)
    np.testing.assert_allclose(np.float32(hidden_BTD), expected_BTD, atol=tolerance)
