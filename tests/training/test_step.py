"""One update: what it computes, what it leaves alone, and what it never does twice."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from sheepop_jax.data.batch import Batch
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.training import optimizer as optimizer_module
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import TrainState, init_state, jit_init, jit_step, make_train_step

VOCAB = 101


def random_batch(microbatches, batch, time, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (microbatches, batch, time + 1), dtype=np.int32)
    weights = np.ones((microbatches, batch, time), np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights)


def quick_params(model):
    """As `init_params` draws them, but by numpy: threefry compiles for seconds."""
    draw = np.random.default_rng(3)

    def make(path, leaf):
        match path[-1].key:
            case "scale":
                return jnp.ones(leaf.shape)
            case "bias":
                return jnp.zeros(leaf.shape)
        return jnp.asarray(0.02 * draw.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(make, nn.meta.unbox(boxed_shapes(model)))


class Setup:
    """A model of one layer, its optimizer and its step, and a state before the first one."""

    def __init__(self, config, seed=3, **changes):
        self.model = Transformer(dataclasses.replace(config.model, num_layers=1, **changes), VOCAB)
        self.schedule = make_schedule(config.optimizer, 50)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.step = make_train_step(self.model, self.optimizer, self.schedule, seed)
        params = quick_params(self.model)
        counters = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        self.state = TrainState(*counters, params, self.optimizer.init(params))


@pytest.fixture(scope="module")
def exact(make_config):
    """Without dropout; `step` is compiled, once for each shape of a batch."""
    setup = Setup(make_config({"optimizer.warmup_steps": 5}), dropout=0.0, attention_dropout=0.0)
    setup.step = jax.jit(setup.step)
    return setup


def assert_trees_close(first, second, rtol):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-6))


def assert_trees_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_update(setup, first, second, tokens):
    (one, one_metrics), (two, two_metrics) = (setup.step(setup.state, x) for x in (first, second))
    assert float(one_metrics.tokens) == float(two_metrics.tokens) == tokens
    assert float(one_metrics.loss) == pytest.approx(float(two_metrics.loss), rel=1e-6)
    assert float(one_metrics.grad_norm) == pytest.approx(float(two_metrics.grad_norm), rel=1e-5)
    # The first moment is the clipped gradient, without Adam's division that magnifies noise.
    moments = [optax.tree.get(state.opt_state, "mu") for state in (one, two)]
    assert_trees_close(*moments, rtol=1e-5)


def test_padded_microbatches_of_unequal_counts_equal_one_batch(exact):
    joined = random_batch(1, 8, 9)
    joined.weights[0, 0, 2:] = 0  # microbatches with 29 and 13 counted tokens
    joined.weights[0, 4:] = 0
    joined.weights[0, 5, 4:] = 1
    joined.weights[0, 7, 1:] = 1
    split = jax.tree.map(
        lambda array: np.pad(array.reshape(2, 4, 9), ((0, 0), (0, 1), (0, 3))), joined
    )
    assert split.weights.sum((1, 2)).tolist() == [29, 13]
    assert_same_update(exact, joined, split, tokens=42)


def test_a_packed_batch_is_its_documents_alone(exact):
    """Two documents in each row of two microbatches, with borders in different places."""
    packed = random_batch(2, 2, 9)
    borders = np.array([[[3], [8]], [[1], [5]]])
    packed = packed._replace(segments=(np.arange(9) >= borders).astype(np.int32))
    packed.weights[-1, -1, 5:] = 0
    # Each document in a row of its own, from the row's first slot on; weight 0 after it.
    alone = jax.tree.map(
        lambda array: np.zeros((1, 8, 9), array.dtype), packed._replace(segments=None)
    )
    arrays = [array.reshape(4, 9) for array in packed]
    for i, (*row, segments) in enumerate(zip(*arrays, strict=True)):
        for document in (0, 1):
            here = segments == document
            for field, values in zip(alone[:3], row, strict=True):
                field[0, 2 * i + document, : here.sum()] = values[here]
    assert_same_update(exact, packed, alone, tokens=32)


def test_non_finite_gradients_touch_nothing_but_the_cursor(exact):
    state, _ = exact.step(exact.state, random_batch(1, 8, 9))
    poisoned = random_batch(1, 8, 9, seed=1)
    poisoned.weights[0, 1, 0] = np.inf
    after, metrics = exact.step(state, poisoned)
    assert bool(metrics.skipped)
    assert (int(after.step), int(after.updates)) == (2, 1)
    assert_trees_equal((after.params, after.opt_state), (state.params, state.opt_state))
    going_on, metrics = exact.step(after, random_batch(1, 8, 9, seed=2))
    assert not bool(metrics.skipped)
    assert (int(going_on.step), int(going_on.updates)) == (3, 2)
    # The schedule follows the optimizer's count, not the cursor.
    rates = [float(exact.schedule(update)) for update in range(3)]
    assert len(set(rates)) == 3
    assert float(metrics.learning_rate) == pytest.approx(rates[1])
    counts = [
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(going_on.opt_state)
        if ".count" in str(path[-1])
    ]
    assert counts and set(counts) == {2}


def test_the_moments_are_updated_in_place(small_config):
    """Of what is updated XLA copies nothing, on a CPU by a flag of `runtime.xla_flags`."""
    setup, batch = Setup(small_config, dropout=0.0), random_batch(2, 3, 5)
    lowered = jax.jit(setup.step, donate_argnums=0).lower(setup.state, batch)
    rows, width = setup.state.params["embedding"].shape

    def copied(**options):
        text = lowered.compile(compiler_options=options).as_text()
        return text.count(f"= f32[{rows},{width}]{{1,0}} copy(")

    assert copied() == 0
    assert copied(xla_cpu_copy_insertion_use_region_analysis=False) > 0  # they can be seen


def test_dropout_is_a_function_of_seed_and_step(small_config):
    """And of the row, in whichever microbatch: test_meshes.py."""
    setup = Setup(small_config, dropout=0.3)

    @jax.jit
    def loss(seed, state, batch):
        step = make_train_step(setup.model, setup.optimizer, setup.schedule, seed)
        return step(state, batch)[1].loss

    batch, state = random_batch(1, 3, 5), setup.state
    first = float(loss(3, state, batch))
    assert float(loss(3, state, batch)) == first
    later = dataclasses.replace(state, step=state.step + 1)
    assert float(loss(3, later, batch)) != first
    assert float(loss(4, state, batch)) != first


def test_overfits_one_batch_and_compiles_once(make_config):
    config = make_config(
        {
            "model.dropout": 0.0,
            "optimizer.learning_rate": 1e-2,
            "optimizer.warmup_steps": 5,
            "optimizer.final_lr_fraction": 0.1,
        }
    )
    setup = Setup(config)
    step = jax.jit(setup.step, donate_argnums=0)
    batch, state = random_batch(1, 4, 13), setup.state
    first = None
    for _ in range(50):
        state, metrics = step(state, batch)
        first = first or float(metrics.loss)
    assert first == pytest.approx(np.log(VOCAB), rel=0.05)
    assert float(metrics.loss) < 0.05
    assert step._cache_size() == 1


def test_init_is_plain_arrays_in_fp32(small_config):
    setup = Setup(small_config)
    state = jax.eval_shape(lambda: init_state(setup.model, setup.optimizer, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    boxed = boxed_shapes(setup.model)
    assert any(
        isinstance(x, nn.LogicallyPartitioned)
        for x in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    )
    shapes = jax.tree.map(lambda x: x.shape, nn.meta.unbox(boxed))
    assert shapes == jax.tree.map(lambda x: x.shape, state.params)


def test_an_outlier_is_left_out_by_choice(small_config, monkeypatch):
    """One batch weighs much in one token: its gradient is large, and no part of the history."""
    monkeypatch.setattr(optimizer_module, "NORMS", 6)
    made = Setup(small_config, dropout=0.0)
    guarded = jax.jit(make_train_step(made.model, made.optimizer, made.schedule, 3, 5.0))
    free, state = jax.jit(made.step), made.state
    for index in range(5):
        state, metrics = guarded(state, random_batch(1, 4, 7, index))
        assert not metrics.skipped
    spike = random_batch(1, 4, 7, 99)  # one token alone has a far larger norm than 28 together
    spike.weights[0].flat[1:] = 0
    assert not guarded(state, spike)[1].skipped  # five norms: not enough to compare with
    state, _ = guarded(state, random_batch(1, 4, 7, 5))
    history = state.opt_state[0]
    norms = np.asarray(history.norms)
    after, metrics = guarded(state, spike)
    assert metrics.grad_norm > norms.mean() + 5 * norms.std()
    assert metrics.skipped and not free(state, spike)[1].skipped
    assert_trees_equal(
        (after.params, after.opt_state, after.updates),
        (state.params, state.opt_state, state.updates),
    )
    assert int(after.step) == int(state.step) + 1
    # The ring: the oldest norm makes room.
    later, metrics = guarded(after, random_batch(1, 4, 7, 6))
    assert not metrics.skipped
    np.testing.assert_array_equal(
        np.asarray(later.opt_state[0].norms), [float(metrics.grad_norm), *norms[1:]]
    )


def test_a_gpu_draws_each_array_by_itself_to_the_same_numbers(monkeypatch):
    """What keeps the compiler from minutes over one kernel (BENCHMARKS.md, On a GPU)."""
    options, jit = [], jax.jit

    def recorded(function, **named):
        options.append(named["compiler_options"])
        return jit(function, **named)

    def draw():
        return [jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3)]

    monkeypatch.setattr(jax, "jit", recorded)
    plain = jit_init(draw)()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    separate = jit_init(draw)()
    assert options == [None, {"xla_disable_hlo_passes": "multi_output_fusion"}]
    for one, other in zip(plain, separate, strict=True):
        np.testing.assert_array_equal(one, other)


GPU_ALONE = {"xla_gpu_enable_latency_hiding_scheduler": False}
TPUS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@pytest.mark.parametrize(
    "devices, platform, remat, options",
    [
        (1, "gpu", "none", GPU_ALONE),
        (1, "gpu", "full", GPU_ALONE),
        (2, "gpu", "full", None),
        (1, "cpu", "full", None),
        (8, "tpu", "full", TPUS),
        (8, "tpu", "dots", None),
        (1, "tpu", "full", None),
    ],
)
def test_the_compiler_does_not_spend_what_remat_saves(
    monkeypatch, devices, platform, remat, options
):
    """And XLA knows a GPU's option by its name: it refuses those that it does not."""
    found, jit = {}, jax.jit

    def recorded(function, **named):
        found.update(named)
        if platform == "tpu":  # a CPU's compiler has no options of a TPU's
            named["compiler_options"] = None
        return jit(function, **named)

    places = np.array([SimpleNamespace(platform=platform)] * devices)
    monkeypatch.setattr(jax, "jit", recorded)
    mesh = SimpleNamespace(size=devices, devices=places)
    step = jit_step(lambda state, batch: (state + batch, batch), None, mesh, remat)
    state = jnp.ones(3)
    step(state, jnp.ones(3))
    assert state.is_deleted()
    assert found["compiler_options"] == options
