"""Weights as int8: how far they move, what the compiled loop reads, and what quality it costs."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sheepop_jax.data.batch import Batch
from sheepop_jax.data.loader import PackingConfig
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.evaluation import Evaluator
from sheepop_jax.generation.engine import NO_END
from sheepop_jax.generation.requests import GenerationConfig
from sheepop_jax.model.linear import Quantized, dot_general, quantized
from sheepop_jax.model.transformer import Transformer, logits
from sheepop_jax.training.step import init_state, make_train_step
from tests import reference
from tests.generation.conftest import VOCAB
from tests.generation.test_decode import GREEDY, PROMPTS, Build, uncached
from tests.writing import decoding_loop, generate

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIONS: list[dict[str, Any]] = [
    {"model.position": "rope"},  # 6 query heads, 3 key/value heads, tied
    {"model.position": "learned", "model.num_kv_heads": 0, "model.use_bias": True},
    {"model.position": "sinusoidal", "model.num_kv_heads": 2, "model.tie_embeddings": False},
]


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def dequantized(params: Any) -> Any:
    """The matrices that int8 stands for, written from the formula: round(W / s) s, s = max / 127.

    A kernel [in, out] has its s for each column, a table [V, D] for each row.
    """

    def through_int8(path: tuple[Any, ...], w: jax.Array) -> np.ndarray:
        axis = {"kernel": 0, "embedding": 1, "output_embedding": 1}.get(path[-1].key)
        w = np.asarray(w)
        if axis is None:
            return w
        s = np.abs(w).max(axis, keepdims=True) / np.float32(127)
        return np.round(w / s) * s

    return jax.tree_util.tree_map_with_path(through_int8, params)


def test_values_and_scales_of_small_matrices() -> None:
    """Closed form: each column of a kernel and each row of a table has its own largest weight."""
    kernel = np.array([[127, 0, -0.7, 0], [-63.6, 0, 1.2, 1e-39]], np.float32)
    params = {"a": {"kernel": kernel, "bias": kernel[0]}, "embedding": kernel, "positions": kernel}
    found = quantized(jax.tree.map(jnp.asarray, params))
    assert found["a"]["kernel"].values.tolist() == [[127, 0, -74, 0], [-64, 0, 127, 0]]
    np.testing.assert_allclose(found["a"]["kernel"].scale[::2], [1, 1.2 / 127], rtol=1e-6)
    assert found["embedding"].values.tolist() == [[127, 0, -1, 0], [-127, 0, 2, 0]]
    np.testing.assert_allclose(found["embedding"].scale, [1, 63.6 / 127], rtol=1e-6)
    assert not is_quantized(found["positions"])
    assert (np.asarray(found["a"]["kernel"].scale) > 0).all()  # also of a channel of zeros


@pytest.mark.parametrize("options", OPTIONS)
def test_no_weight_moves_by_more_than_half_a_step(build: Build, options: dict[str, Any]) -> None:
    """Matrices and token tables only: norms, biases and learned positions are what they were."""
    _, params = build(options | {"model.num_layers": 1})
    paths = jax.tree_util.tree_leaves_with_path(quantized(params), is_leaf=is_quantized)
    for (path, found), (_, w) in zip(
        paths, jax.tree_util.tree_leaves_with_path(params), strict=True
    ):
        if not is_quantized(found):
            assert path[-1].key in ("scale", "bias", "positions")
            np.testing.assert_array_equal(found, w)
            continue
        assert path[-1].key in ("kernel", "embedding", "output_embedding")
        axis = 0 if path[-1].key == "kernel" else 1
        assert found.values.dtype == jnp.int8 and found.scale.dtype == jnp.float32
        assert found.scale.shape == (w.shape[1 - axis],)
        assert (np.abs(found.values).max(axis) == 127).all() and np.min(found.values) == -127
        step = np.expand_dims(np.asarray(found.scale, np.float64), axis)
        moved = np.abs(np.asarray(w, np.float64) - found.values * step) / step
        assert 0.49 < moved.max() < 0.5 + 1e-4


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(OPTIONS[0], jnp.bfloat16), (OPTIONS[1], jnp.float32), (OPTIONS[2], jnp.float32)],
    ids=["bf16", "fp32", "fp32, untied"],
)
def test_logits_are_those_of_the_formula(build: Build, options: dict[str, Any], dtype: Any) -> None:
    """In float64 with the matrices that int8 stands for; and near those of the weights trained."""
    model, params = build(options | {"model.num_layers": 1}, dtype)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (3, 11), np.int32)

    @jax.jit
    def compute(params: Any) -> jax.Array:
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        assert hidden_BTD.dtype == dtype  # activations keep their dtype
        return logits(model, params, hidden_BTD)[..., :VOCAB]

    got = np.asarray(compute(quantized(params)), np.float64)
    formula = reference.logits(dequantized(params), model.config, tokens_BT)[..., :VOCAB]
    trained = reference.logits(params, model.config, tokens_BT)[..., :VOCAB]
    largest = np.abs(trained).max()
    assert np.abs(got - formula).max() / largest < (1e-4 if dtype == jnp.float32 else 0.05)
    assert 1e-3 < np.abs(formula - trained).max() / largest < 0.03


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_products_are_exact_to_the_second_digit_of_the_activations(dtype: Any) -> None:
    """An x is off by at most 1/508 of its own vector's largest / 127, whatever the others hold."""
    generator = np.random.default_rng(0)
    x_MI = jnp.asarray(generator.standard_normal((3, 59)) * [[1], [1e-20], [0]], dtype)
    w_IO = jnp.asarray(generator.standard_normal((59, 83)), jnp.float32)
    params = quantized({"kernel": w_IO, "embedding": w_IO.T})
    w = np.asarray(params["kernel"].values) * np.asarray(params["kernel"].scale, np.float64)
    x = np.asarray(x_MI, np.float64)
    bound = np.abs(x).max(1, keepdims=True) / 127 / 508 * np.abs(w).sum(0) + 1e-6 * np.abs(x @ w)
    linear = dot_general(x_MI, params["kernel"], (((1,), (0,)), ((), ())))
    assert linear.dtype == dtype
    table = dot_general(params["embedding"], x_MI, (((1,), (1,)), ((), ())))
    assert table.dtype == jnp.float32
    for got in (table.T, linear) if dtype == jnp.float32 else (table.T,):
        off = np.abs(np.asarray(got, np.float64) - x @ w)
        assert (off <= bound).all()
    assert off[0].max() > bound[0].max() / 100  # the bound is not a wide one


def test_what_two_digits_hold_is_multiplied_exactly() -> None:
    """Steps of 1/254 of a vector's unit, its largest / 127: here of 1 and of 2."""
    x_MI = np.array([[127, 0.5, -63 - 5 / 254, 1 / 254, 0], [3, -1, 2, -254, 9 / 127]], np.float32)
    w_IO = Quantized(jnp.eye(5, dtype=jnp.int8), jnp.full(5, 3, jnp.float32))
    got = dot_general(jnp.asarray(x_MI), w_IO, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(got, 3 * x_MI, rtol=1e-5)


def test_greedy_text_is_that_of_full_forward_passes(build: Build) -> None:
    """With the matrices that int8 stands for, in fp32 and without a cache."""
    model, params = build(OPTIONS[1] | {"model.num_layers": 1})
    got = generate(
        model, quantized(params), PROMPTS, sampling=GREEDY, end_of_text=NO_END, max_new_tokens=12
    )
    plain = jax.tree.map(jnp.asarray, dequantized(params))
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert completion.tokens == uncached(model, plain, prompt, 12, slots=29)


def test_int8_is_what_the_compiled_loop_reads(
    make_config: Callable[..., Any], random_params: Callable[..., Any]
) -> None:
    """A quarter of the bytes go in, and no matrix is there in a wider dtype, even for a moment."""
    model = Transformer(make_config({"model.num_layers": 1}).model, 4099)
    params = random_params(model)
    small = quantized(params)
    traced = decoding_loop(model, small, [[3]], GenerationConfig(GREEDY, 16))
    program = traced.lower().compile()
    memory = program.memory_analysis()

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(small) < 0.3 * size(params)
    cache = 2 * 32 * model.config.kv_heads * model.config.head_width * 4
    assert memory.argument_size_in_bytes < size(small) + cache + 1000
    assert memory.temp_size_in_bytes < 0.5 * size(params["embedding"])
    for w in jax.tree.leaves(params):
        if w.ndim == 2:
            shape = ",".join(map(str, w.shape))
            assert re.search(rf"s8\[{shape}\]", program.as_text())
            assert not re.search(rf"f32\[{shape}\]", program.as_text())


@pytest.fixture(scope="module")
def trained(make_config: Callable[..., Any]) -> tuple[Transformer, Any, TokenStream]:
    """A model that has learned which four tokens follow each token, and a text to try it on."""
    config = make_config({"model.dropout": 0.0, "model.num_layers": 1})
    model = Transformer(config.model, VOCAB)
    generator = np.random.default_rng(0)
    after = generator.integers(0, VOCAB, (VOCAB, 4))
    rows = np.empty((130, 300), np.int32)  # chains side by side
    rows[0] = generator.integers(0, VOCAB, 300)
    for t in range(1, len(rows)):
        rows[t] = after[rows[t - 1], generator.choice(4, 300, p=[0.4, 0.3, 0.2, 0.1])]
    text, is_val = rows.T[:290].reshape(-1), rows.T[290:].reshape(-1)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 200))
    step = jax.jit(make_train_step(model, optimizer, lambda step: jnp.float32(0), 0))
    state = init_state(model, optimizer, 0)
    starts = generator.integers(0, len(text) - 30, (200, 32))
    for window in starts:
        tokens = text[window[:, None] + np.arange(30)][None]
        batch = Batch(tokens[..., :-1], tokens[..., 1:], np.ones(tokens[..., 1:].shape, np.float32))
        state, _ = step(state, batch)
    return model, state.params, TokenStream.from_array(is_val, len(is_val), 1)


def test_held_out_loss_of_a_trained_model_is_within_half_a_percent(
    trained: tuple[Transformer, Any, TokenStream],
) -> None:
    model, params, stream = trained
    evaluate = Evaluator(model, stream, PackingConfig(13, 0), batch_size=16)
    loss = evaluate(params).loss
    assert loss < 2.2  # it has learned: ln 307 is 5.7, the chains' own entropy 1.28
    small = evaluate(quantized(params)).loss
    assert small != loss
    assert small == pytest.approx(loss, rel=0.005)
