"""The whole model against the float64 reference, and the laws that it must keep."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.model import attention as attn
from sheepop_jax.model import feed_forward, flash_attention, kv_cache
from sheepop_jax.model import transformer as tf
from sheepop_jax.model.dropout import ATTENTION_WEIGHTS, dropout
from tests import reference

VOCAB = 131  # padded to 256
B, T = 3, 11
POSITIONS = ("rope", "sinusoidal", "learned")
FIELDS = "position", "use_bias", "num_kv_heads", "tie_embeddings", "activation", "num_layers"
# Every pair of values of two fields, but of the activation and the depth with the others.
OPTIONS = [
    pytest.param(
        {f"model.{name}": value for name, value in zip(FIELDS, values, strict=True)},
        id="-".join(map(str, values)),
    )
    for values in [
        ("rope", False, 0, True, "gelu", 2),
        ("rope", True, 2, False, "gelu_tanh", 1),
        ("sinusoidal", False, 2, False, "relu", 1),
        ("sinusoidal", True, 0, True, "gelu", 1),
        ("learned", False, 0, False, "gelu_tanh", 1),
        ("learned", True, 2, True, "relu", 1),
    ]
]
# For the cache and for documents, that only positions and heads have to do with.
GROUPED = [("rope", 2), ("sinusoidal", 0), ("learned", 2)]
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
        return tf.logits(model, params, hidden_BTD)[..., :VOCAB], cache

    return logits


@functools.cache
def jit_hidden(model, **options):
    """(params, tokens, dropout key) → hidden states."""

    @jax.jit
    def hidden(params, tokens_BT, key=None):
        keys_B = None if key is None else jax.random.split(key, len(tokens_BT))
        return model.apply({"params": params}, tokens_BT, dropout_keys_B=keys_B, **options)[0]

    return hidden


def empty_cache(model, start, slots, dtype=jnp.float32) -> kv_cache.Cache:
    return kv_cache.init_cache(model.config, jnp.asarray(start, jnp.int32), slots, dtype)


def relative_error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


# --- the formulas ---


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_the_reference(make_model, random_params, options):
    model = make_model(options | {"model.rope_theta": 500.0, "model.norm_eps": 0.1})
    params, tokens_BT = random_params(model), token_ids()
    assert ("output_embedding" in params) != model.config.tie_embeddings
    got_BTV, cache = jit_logits(model)(params, tokens_BT)
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert cache is None
    assert relative_error(got_BTV, expected_BTV) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
def test_activations_are_the_closed_form(activation):
    x = np.linspace(-9, 9, 101, dtype=np.float32).astype(np.float64)
    expected = reference.ACTIVATIONS[activation](x)
    step = 1e-4
    slope = (reference.ACTIVATIONS[activation](x + step) - expected) / step
    value_and_slope = jax.vmap(jax.value_and_grad(lambda x: feed_forward.activate(x, activation)))
    value, found = jax.jit(value_and_slope)(jnp.float32(x))
    np.testing.assert_allclose(value, expected, atol=1e-6)
    off_the_kink = x != 0  # of relu
    np.testing.assert_allclose(found[off_the_kink], slope[off_the_kink], atol=2e-4)


def test_gelu_in_bf16_loses_no_more_than_its_input_and_output():
    x = jnp.linspace(-4, 4, 801, dtype=jnp.bfloat16)
    expected = reference.ACTIVATIONS["gelu"](np.asarray(x, np.float64))
    found = np.asarray(feed_forward.activate(x, "gelu"), np.float64)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)


def test_what_the_configuration_refuses_the_model_does_not_guess(make_model):
    with pytest.raises(ValueError, match="swish"):
        feed_forward.activate(jnp.zeros(1), "swish")
    model = make_model()
    config = dataclasses.replace(model.config)
    object.__setattr__(config, "position", "alibi")  # past the configuration's own rules
    with pytest.raises(ValueError, match="alibi"):
        jax.eval_shape(model.copy(config=config).init, jax.random.key(0), token_ids())


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_unembed_is_a_product_with_the_padded_rows_at_minus_infinity(shape):
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((*shape, 60), np.float32)
    embedding_VD = generator.standard_normal((256, 60), np.float32)
    logits = tf.unembed(jnp.asarray(hidden), jnp.asarray(embedding_VD), VOCAB, 0.0)
    assert logits.dtype == jnp.float32 and logits.shape == (*shape, 256)
    expected = hidden.astype(np.float64) @ embedding_VD.astype(np.float64).T
    np.testing.assert_allclose(logits[..., :VOCAB], expected[..., :VOCAB], rtol=1e-5, atol=1e-4)
    assert np.isneginf(logits[..., VOCAB:]).all()


def test_unembed_without_padded_rows_masks_nothing():
    ones = jnp.ones((128, 60))
    np.testing.assert_allclose(tf.unembed(ones[:1], ones, 128, 0.0), np.full((1, 128), 60.0))


def test_unembed_in_bf16_sums_in_fp32():
    generator = np.random.default_rng(0)
    hidden_MD = jnp.asarray(generator.standard_normal((7, 512)), jnp.bfloat16)
    embedding_VD = jnp.asarray(generator.standard_normal((128, 512)), jnp.float32)
    logits_MV = tf.unembed(hidden_MD, embedding_VD, 128, 0.0)
    rounded_VD = np.asarray(embedding_VD.astype(jnp.bfloat16), np.float64)
    assert logits_MV.dtype == jnp.float32
    assert relative_error(logits_MV, np.asarray(hidden_MD, np.float64) @ rounded_VD.T) < 1e-5


# --- causality ---

# The window's first document may have begun before it; documents of one token at both ends.
LENGTHS = ((11,), (4, 7), (1, 5, 4, 1))
SEGMENTS_BT = np.array([np.repeat(np.arange(len(row)), row) for row in LENGTHS], np.int32)


def who_sees_whom(model, params, segments_BT) -> np.ndarray:
    """By gradients: whether hidden state [b, t] depends at all on token [c, s]: [B, T, B, S]."""
    rows = len(segments_BT)
    tokens_BT = np.random.default_rng(0).permutation(VOCAB)[: rows * T].astype(np.int32)
    tokens_BT = tokens_BT.reshape(rows, T)  # all different: one embedding row each
    probe_BTD = np.random.default_rng(1).standard_normal((rows, T, 60)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def gradients(embedding_VD):
        changed = params | {"embedding": embedding_VD}
        segments = segments_BT if segments_BT.any() else None
        hidden_BTD, _ = model.apply({"params": changed}, tokens_BT, segments_BT=segments)
        return (hidden_BTD * probe_BTD).sum(-1)

    gradients_BTBSD = np.asarray(gradients(params["embedding"]))[:, :, tokens_BT]
    return np.abs(gradients_BTBSD).max(-1) > 0


@pytest.mark.parametrize(
    ("position", "segments"), [("rope", False), ("learned", True)], ids=["whole", "documents"]
)
def test_no_position_sees_its_future_another_document_or_another_row(
    make_model, random_params, position, segments
):
    """Exactly zero there, and not zero for what comes before in the same document."""
    model = make_model({"model.position": position, "model.num_kv_heads": 2, "model.num_layers": 1})
    segments_BT = SEGMENTS_BT[1:] * segments
    sees_BTBS = who_sees_whom(model, random_params(model), segments_BT)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None]
    expected_BTBS = np.einsum("bc,bts->btcs", np.eye(len(segments_BT)), np.tril(same_BTS))
    np.testing.assert_array_equal(sees_BTBS, expected_BTBS.astype(bool))


# --- documents ---


def by_document(function, tokens_BT) -> np.ndarray:
    """What `function` gives for each document alone ([1, t]), side by side again: [B, T, …]."""
    rows = []
    for tokens_T, lengths in zip(tokens_BT, LENGTHS, strict=True):
        pieces = np.split(tokens_T, np.cumsum(lengths)[:-1])
        rows.append(np.concatenate([np.asarray(function(piece[None]))[0] for piece in pieces]))
    return np.stack(rows)


@pytest.mark.parametrize(("position", "kv_heads"), GROUPED)
def test_a_packed_window_is_its_documents_alone(make_model, random_params, position, kv_heads):
    """The first row is one document: to it segments change nothing."""
    model = make_model(
        {"model.position": position, "model.num_kv_heads": kv_heads, "model.num_layers": 1}
    )
    params, tokens_BT = random_params(model), token_ids()

    @jax.jit
    def logits(params, tokens_BT, segments_BT):
        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, segments_BT=segments_BT)
        assert cache is None
        return tf.logits(model, params, hidden_BTD)[..., :VOCAB]

    got_BTV = logits(params, tokens_BT, SEGMENTS_BT)
    expected_BTV = by_document(lambda one: reference.logits(params, model.config, one), tokens_BT)
    assert relative_error(got_BTV, expected_BTV[..., :VOCAB]) < 1e-5


def test_segments_are_refused_where_they_would_be_ignored(make_model):
    model, key = make_model({"model.num_layers": 1}), jax.random.key(0)
    with pytest.raises(ValueError, match="segments are not supported with a cache"):
        cache = empty_cache(model, [0] * B, slots=T)
        jax.eval_shape(model.init, key, token_ids(), cache, None, SEGMENTS_BT)
    with pytest.raises(ValueError, match="segments are not supported with cuDNN"):
        on_cudnn = model.copy(implementation="cudnn")
        jax.eval_shape(on_cudnn.init, key, token_ids(), None, None, SEGMENTS_BT)


# --- the cache ---


@pytest.mark.parametrize(("position", "kv_heads"), GROUPED)
def test_cached_logits_are_the_full_forward_logits(make_model, random_params, position, kv_heads):
    """From a padded prefill and from an empty cache; computed positions beyond those trained."""
    options = {"model.position": position, "model.num_kv_heads": kv_heads}
    if position != "learned":
        options |= {"model.max_seq_len": 5, "data.seq_len": 5}
    model = make_model(options)
    params, tokens_BT = random_params(model), token_ids(rows=4)
    logits, bucket, slots = jit_logits(model), 8, T + 2

    def decode(start, padded_BT, prefill):
        """Logits [B, T, V] of a prefill, and of one token at a time after it."""
        cache = empty_cache(model, start, slots)
        widths = [prefill] * (prefill > 0) + [1] * (T - prefill)
        pieces = []
        for piece_BT in np.split(padded_BT, np.cumsum(widths)[:-1], axis=1):
            piece, cache = logits(params, piece_BT, cache)
            pieces.append(piece)
        assert cache.index == T and cache.index.dtype == jnp.int32
        np.testing.assert_array_equal(cache.start, start)
        for layer in cache.keys + cache.values:
            assert np.isfinite(layer).all() and layer[:, :T].all() and not layer[:, T:].any()
        return np.asarray(jnp.concatenate(pieces, axis=1))

    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    assert relative_error(decode([0] * 4, tokens_BT, prefill=0), expected_BTV) < 1e-5

    start = [5, 0, 3, 8]  # slots of padding; the last row's prefill is nothing else
    answers = []
    for seed in (1, 2):
        padded_BT = token_ids(rows=4, seed=seed)  # what pads are must not matter
        for row, pads in enumerate(start):
            padded_BT[row, pads:] = tokens_BT[row, : T - pads]
        answers.append(decode(start, padded_BT, prefill=bucket))
        assert np.isfinite(answers[-1]).all()  # in padding too
    for row, pads in enumerate(start):
        np.testing.assert_array_equal(answers[0][row, pads:], answers[1][row, pads:])
        assert relative_error(answers[0][row, pads:], expected_BTV[row, : T - pads]) < 1e-5
    assert logits._cache_size() == 2  # the prefill, and one program for all steps


def test_cudnn_attention_is_for_whole_contexts_alone(monkeypatch, make_model, random_params):
    calls = []

    def stand_in(q_BTHC, k_BTKC, v_BTKC, window):
        calls.append((q_BTHC.shape, k_BTKC.shape, v_BTKC.shape))
        return attn.attend(q_BTHC, k_BTKC, v_BTKC, attn.causal_mask(q_BTHC.shape[1], window))

    monkeypatch.setattr(flash_attention, "attend_causal_cudnn", stand_in)
    model = make_model({"model.num_layers": 1}, implementation="cudnn")
    params, tokens_BT = random_params(model), token_ids()
    calls.clear()
    cache = empty_cache(model, [0] * B, slots=T)
    jax.eval_shape(jit_logits(model), params, tokens_BT, cache)
    assert not calls
    got_BTV, _ = jit_logits(model)(params, tokens_BT)
    assert calls == [((B, T, 6, 10), (B, T, 3, 10), (B, T, 3, 10))]
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
    from sheepop_jax.config.schema import Config

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


def test_padded_rows_never_matter(make_model, random_params):
    """Of both tables; a tied model has one in both places."""
    model = make_model({"model.tie_embeddings": False, "model.num_layers": 1})
    params = random_params(model)
    names = ["embedding", "output_embedding"]
    changed = params | {name: params[name].at[VOCAB:].set(1e6) for name in names}

    @jax.jit
    def nll_and_gradients(params):
        def mean(params):
            hidden_BTD, _ = model.apply({"params": params}, token_ids())
            logits_BTV = tf.logits(model, params, hidden_BTD)
            nll_BTV = -jax.nn.log_softmax(logits_BTV)[..., :VOCAB]
            return nll_BTV[..., 0].mean(), nll_BTV

        return jax.grad(mean, has_aux=True)(params)

    gradients, nll_BTV = nll_and_gradients(params)
    np.testing.assert_array_equal(nll_BTV, nll_and_gradients(changed)[1])
    for name in names:
        assert np.isfinite(gradients[name]).all() and not gradients[name][VOCAB:].any()
    assert gradients["output_embedding"][:VOCAB].any(axis=1).all()


@pytest.mark.usefixtures("fast_compile_once")
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


@pytest.mark.usefixtures("fast_compile_once")
def test_dropout_is_off_without_keys_and_at_a_rate_of_0(make_model, random_params):
    rates = "model.dropout", "model.attention_dropout"
    model, none = (
        make_model({name: rate for name in rates} | {"model.num_layers": 1}) for rate in (0.5, 0.0)
    )
    params, tokens_BT = random_params(model), token_ids()
    off = jit_hidden(model)(params, tokens_BT)
    np.testing.assert_array_equal(off, jit_hidden(none)(params, tokens_BT, jax.random.key(1)))


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


RATE, WIDTH = 0.4, 360


@pytest.fixture
def dropping(make_model):
    """Two layers, one compiled program for all the sites where it drops."""
    options = {
        "model.dropout": RATE,
        "model.norm_eps": 1.0,  # so large an ε lets the scale through LayerNorm
        "model.use_bias": True,
        "model.d_model": WIDTH,
    }
    return make_model(options)


@pytest.mark.usefixtures("fast_compile_once")
@pytest.mark.parametrize("site", ["embedding", "attention", "feed_forward"])
def test_dropout_rate_and_scale_at_each_site(dropping, random_params, site):
    """One part of the model puts out ones, the others zeros: what is dropped can be read off."""
    params = silent(random_params(dropping))
    match site:
        case "embedding":
            params["embedding"] += 1
        case "attention":
            params["block_0"]["attention"]["output"]["bias"] += 1
        case "feed_forward":
            params["block_0"]["feed_forward"]["down"]["bias"] += 1
    tokens_BT = token_ids(rows=53, length=47)
    hidden = jit_hidden(dropping)
    hidden_BTD = hidden(params, tokens_BT, jax.random.key(0))
    kept_BTD = np.asarray(hidden_BTD) > 0
    error = 5 * math.sqrt(RATE * (1 - RATE) / kept_BTD.size)
    assert abs(kept_BTD.mean() - (1 - RATE)) < error
    for axis in range(3):  # drawn for every component, none shared along an axis
        assert kept_BTD.any(axis).all() and not kept_BTD.all(axis).any()
    expected_BTD = normalized(kept_BTD / (1 - RATE), dropping.config.norm_eps)  # the mean is kept
    np.testing.assert_allclose(hidden_BTD, expected_BTD, rtol=1e-4, atol=1e-5)
    # A function of the key.
    np.testing.assert_array_equal(hidden_BTD, hidden(params, tokens_BT, jax.random.key(0)))
    other_BTD = np.asarray(hidden(params, tokens_BT, jax.random.key(1))) > 0
    assert abs((other_BTD == kept_BTD).mean() - (RATE**2 + (1 - RATE) ** 2)) < 2 * error


def test_dropout_keeps_the_mean_in_bf16():
    """What is kept is x / (1 - rate), rounded once; with 1 - rate in bf16 it is off by 0.2%."""
    rate = 0.1
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (1, 1 << 14)), jnp.bfloat16)
    found = dropout(x, rate, jax.random.split(jax.random.key(0), 1), 0)
    kept = np.asarray(found, np.float64) != 0
    wanted = np.asarray(x, np.float64)[kept] / (1 - rate)
    assert np.mean(np.asarray(found, np.float64)[kept]) == pytest.approx(wanted.mean(), rel=3e-4)


@pytest.mark.usefixtures("fast_compile_once")
def test_dropouts_of_the_sublayers_and_layers_are_independent(dropping, random_params):
    """Sublayers i of 2 layers put out 4^i: base 4 digits tell which were kept."""
    params = silent(random_params(dropping))
    for i in range(2):
        params[f"block_{i}"]["attention"]["output"]["bias"] += 4.0 ** (2 * i)
        params[f"block_{i}"]["feed_forward"]["down"]["bias"] += 4.0 ** (2 * i + 1)
    tokens_BT = token_ids(rows=53, length=47)
    hidden_BTD = np.asarray(jit_hidden(dropping)(params, tokens_BT, jax.random.key(0)))
    counts = np.zeros(2**4)
    hidden_MD = hidden_BTD[0]
    for hidden_D in hidden_MD:
        values, found = np.unique(hidden_D.round(4), return_counts=True)
        assert len(values) == 2**4  # LayerNorm keeps the order of a row
        counts += found
    kept = np.array([number.bit_count() for number in range(2**4)])
    shares = (1 - RATE) ** kept * RATE ** (4 - kept)
    assert (np.abs(counts / hidden_MD.size - shares) < 5 * np.sqrt(shares / hidden_MD.size)).all()


@pytest.mark.usefixtures("fast_compile_once")
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
    one, again, other = (
        hidden(params, token_ids(rows, 1), jax.random.key(seed))[:, 0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert relative_error(one, other) > 0.01
    hidden_BD = one
    kept_BHC = (np.asarray(hidden_BD) > 0).reshape(rows, 6, 10)
    all_kept = (np.asarray(hidden_BD) == 0).all(axis=1)  # LayerNorm of equal numbers is 0
    all_kept &= np.random.default_rng(0).random(rows) >= rate**6 / ((1 - rate) ** 6 + rate**6)
    kept_BHC = kept_BHC | all_kept[:, None, None]
    kept_BH = kept_BHC[:, :, 0]
    np.testing.assert_array_equal(kept_BHC, np.repeat(kept_BH[:, :, None], 10, axis=2))
    assert abs(kept_BH.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept_BH.size)
    expected_BD = normalized(kept_BHC.reshape(rows, 60) / (1 - rate), eps)
    np.testing.assert_allclose(hidden_BD, expected_BD, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fast_compile_once")
def test_attention_dropout_of_each_block_of_queries_is_its_own(make_model):
    """Queries that see the same keys, in two blocks: one mask for both would keep the same."""
    model = make_model({"model.dropout": 0.0, "model.attention_dropout": 0.5})
    drawn = []

    def drop(first_query):
        keys_B = jax.random.split(jax.random.key(0), 2)
        ones = jnp.ones((2, 3, 2, 4, 4))
        return np.asarray(dropout(ones, 0.5, keys_B, ATTENTION_WEIGHTS + first_query))

    def record(weights, rate, keys_B, site):
        drawn.append((weights.ndim, site))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attn, "CAUSAL_BLOCK", 4)
        patch.setattr(attn, "dropout", record)
        keys_B = jax.random.split(jax.random.key(0), B)
        jax.eval_shape(model.init, keys_B[0], token_ids(), None, keys_B)
    sites = [site for ndim, site in drawn if ndim == 5]
    assert len(set(sites)) > 1 and len(sites) == len(set(sites)) * model.config.num_layers
    assert (drop(0) != drop(4)).any()


# --- memory and precision ---


@pytest.mark.usefixtures("fast_compile_once")
def test_remat_keeps_less_and_changes_neither_values_nor_gradients(
    make_model, random_params, monkeypatch
):
    """With "dots" only the products with matrices are kept, with "full" not even those."""
    monkeypatch.setattr(attn, "CAUSAL_BLOCK", 8)  # two blocks
    rows = 24  # so many that activations take more memory than gradients
    probe_BTD = np.random.default_rng(0).standard_normal((rows, T, 60)).astype(np.float32)
    layers, results, exponentials, kept = 3, [], [], {}
    for remat in ("none", "dots", "full"):
        options = {"model.dropout": 0.0, "model.attention_dropout": 0.2}
        model = make_model(options | {"model.num_layers": layers, "model.remat": remat})
        params = random_params(model)

        def loss(params, model=model):
            key = jax.random.key(1, impl="unsafe_rbg")  # threefry compiles for seconds
            hidden_BTD, _ = model.apply(
                {"params": params},
                token_ids(rows),
                dropout_keys_B=jax.random.split(key, rows),
                segments_BT=np.tile(SEGMENTS_BT, (rows // B, 1)),
            )
            return (hidden_BTD * probe_BTD).sum()

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        text = str(traced.jaxpr)
        # The block, or the activation; never one in another.
        assert text.count(" remat2[") == layers
        exponentials.append(text.count(" exp "))
        compiled = traced.lower().compile()
        kept[remat] = compiled.memory_analysis().temp_size_in_bytes
        results.append(compiled(params))
    assert min(exponentials[1:]) > exponentials[0]
    assert kept["full"] < 0.8 * kept["dots"] < 0.6 * kept["none"], kept
    for plain, *rematerialized in zip(*map(jax.tree.leaves, results), strict=True):
        for other in rematerialized:
            np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-4)


def test_remat_keeps_the_parameters_names(make_model):
    assert shapes_of(make_model({"model.remat": "dots"})) == shapes_of(make_model())


@pytest.mark.parametrize(
    ("position", "dtype", "cached"),
    [
        ("rope", jnp.float32, False),
        ("rope", jnp.bfloat16, True),
        ("sinusoidal", jnp.bfloat16, False),
        ("sinusoidal", jnp.float32, True),
        ("learned", jnp.bfloat16, True),
    ],
)
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
        logits_BTV = tf.logits(model, params, hidden_BTD)
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


def test_bf16_is_near_the_reference(make_model, random_params):
    model = make_model({"model.num_layers": 1}, dtype=jnp.bfloat16)
    params, tokens_BT = random_params(model), token_ids()
    expected_BTV = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    for cache in (None, empty_cache(model, [0] * B, slots=T, dtype=jnp.bfloat16)):
        got_BTV, _ = jit_logits(model)(params, tokens_BT, cache)
        assert 1e-4 < relative_error(got_BTV, expected_BTV) < 0.03
