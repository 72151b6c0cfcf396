"""One update: what it computes, what it leaves alone, and what it never does twice."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from sheepop_jax.config import MeshConfig
from sheepop_jax.data.batch import Batch
from sheepop_jax.model.partitioning import batch_sharding, make_mesh, state_shardings
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training import optimizer as optimizer_module
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import (
    boxed_shapes,
    init_params,
    init_state,
    jit_init,
    jit_step,
    make_train_step,
)

VOCAB = 101


def random_batch(microbatches, batch, time, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (microbatches, batch, time + 1), dtype=np.int32)
    weights = np.ones((microbatches, batch, time), np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights)


def packed_batch(microbatches, batch, time, seed=0):
    """A random batch with a border of documents in each row, elsewhere in each."""
    rows = random_batch(microbatches, batch, time, seed)
    draw = np.random.default_rng(seed + 1)
    borders = draw.integers(1, time, (microbatches, batch, 1))
    return rows._replace(segments=(np.arange(time) >= borders).astype(np.int32))


class Setup:
    """A small model, its optimizer and its step."""

    def __init__(self, config, seed=3, **changes):
        self.model = Transformer(dataclasses.replace(config.model, **changes), VOCAB)
        schedule = make_schedule(config.optimizer, 50)
        self.optimizer = make_optimizer(config.optimizer, schedule)
        self.step = make_train_step(self.model, self.optimizer, schedule, seed)

    def state(self, seed=3):
        return init_state(self.model, self.optimizer, seed)


def assert_trees_close(first, second, rtol):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-6))


def assert_trees_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_unequal_microbatches_equal_one_batch(small_config):
    setup = Setup(small_config, dropout=0.0)
    split = random_batch(3, 2, 7)
    split.weights[0, 0, 2:] = 0  # microbatches with 9, 14 and 3 counted tokens
    split.weights[2] = 0
    split.weights[2, 1, 4:] = 1
    joined = jax.tree.map(lambda array: array.reshape(1, 6, 7), split)
    one, one_metrics = jax.jit(setup.step)(setup.state(), joined)
    three, three_metrics = jax.jit(setup.step)(setup.state(), split)
    assert float(three_metrics.tokens) == split.weights.sum() == 26
    assert float(one_metrics.loss) == pytest.approx(float(three_metrics.loss), rel=1e-6)
    assert float(one_metrics.grad_norm) == pytest.approx(float(three_metrics.grad_norm), rel=1e-5)
    # The first moment is the clipped gradient, without Adam's division that magnifies noise.
    moments = [optax.tree.get(s.opt_state, "mu") for s in (one, three)]
    assert_trees_close(*moments, rtol=1e-5)


def test_padding_does_not_change_the_gradient(small_config):
    setup = Setup(small_config, dropout=0.0)
    short = random_batch(1, 2, 5)
    padded = jax.tree.map(lambda array: np.pad(array, ((0, 0), (0, 1), (0, 3))), short)
    _, expected = jax.jit(setup.step)(setup.state(), short)
    _, found = jax.jit(setup.step)(setup.state(), padded)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_packed_batch_is_its_documents_alone(small_config, microbatches):
    setup = Setup(small_config, dropout=0.0)
    packed = packed_batch(microbatches, 4 // microbatches, 9)
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
    step = jax.jit(setup.step)
    after_packed, found = step(setup.state(), packed)
    after_alone, expected = step(setup.state(), alone)
    assert float(found.tokens) == float(expected.tokens) == 32
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    moments = [optax.tree.get(s.opt_state, "mu") for s in (after_packed, after_alone)]
    assert_trees_close(*moments, rtol=1e-5)
    _, unmasked = step(setup.state(), packed._replace(segments=None))
    assert float(found.grad_norm) != pytest.approx(float(unmasked.grad_norm), rel=1e-3)


def test_windows_of_one_document_train_as_windows_without_segments(small_config):
    setup = Setup(small_config)
    plain = random_batch(2, 3, 5)
    whole = plain._replace(segments=np.zeros((2, 3, 5), np.int32))
    step = jax.jit(setup.step)
    (one, one_metrics), (two, two_metrics) = (step(setup.state(), x) for x in (plain, whole))
    assert float(one_metrics.loss) == pytest.approx(float(two_metrics.loss), rel=1e-6)
    moments = [optax.tree.get(s.opt_state, "mu") for s in (one, two)]
    assert_trees_close(*moments, rtol=1e-5)


def test_non_finite_gradients_touch_nothing_but_the_cursor(make_config):
    config = make_config({"optimizer.warmup_steps": 5})  # the first rates all differ
    setup = Setup(config)
    step = jax.jit(setup.step)
    state, _ = step(setup.state(), random_batch(2, 3, 5))
    poisoned = random_batch(2, 3, 5, seed=1)
    poisoned.weights[1, 0, 0] = np.inf
    after, metrics = step(state, poisoned)
    assert bool(metrics.skipped)
    assert (int(after.step), int(after.updates)) == (2, 1)
    assert_trees_equal((after.params, after.opt_state), (state.params, state.opt_state))
    going_on, metrics = step(after, random_batch(2, 3, 5, seed=2))
    assert not bool(metrics.skipped)
    assert (int(going_on.step), int(going_on.updates)) == (3, 2)
    # The schedule follows the optimizer's count, not the cursor.
    schedule = make_schedule(config.optimizer, 50)
    assert float(metrics.learning_rate) == pytest.approx(float(schedule(1)))
    counts = [
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(going_on.opt_state)
        if ".count" in str(path[-1])
    ]
    assert counts and set(counts) == {2}


def test_second_step_compiles_nothing_and_the_state_is_donated(small_config):
    setup = Setup(small_config)
    step = jax.jit(setup.step, donate_argnums=0)
    state, _ = step(setup.state(), random_batch(2, 3, 5))
    assert step._cache_size() == 1
    old = state.params["embedding"]
    state, _ = step(state, random_batch(2, 3, 5, seed=1))
    assert step._cache_size() == 1
    assert old.is_deleted()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_moments_are_updated_in_place(small_config, microbatches):
    """Of what is updated XLA copies nothing, on a CPU by a flag of `runtime.xla_flags`."""
    setup = Setup(small_config)
    batch = random_batch(microbatches, 3, 5)

    def copied(**options):
        step = jax.jit(setup.step, donate_argnums=0).lower(setup.state(), batch)
        text = step.compile(compiler_options=options).as_text()
        rows, width = setup.state().params["embedding"].shape
        return text.count(f"= f32[{rows},{width}]{{1,0}} copy(")

    assert copied() == 0
    assert copied(xla_cpu_copy_insertion_use_region_analysis=False) > 0  # they can be seen


def test_dropout_is_a_function_of_seed_and_step(small_config):
    setup = Setup(small_config, dropout=0.3)
    step = jax.jit(setup.step)
    batch = random_batch(2, 3, 5)
    state = setup.state()
    losses = [float(step(state, batch)[1].loss) for _ in range(2)]
    assert losses[0] == losses[1]
    later = dataclasses.replace(state, step=state.step + 1)
    assert float(step(later, batch)[1].loss) != losses[0]
    other_seed = Setup(small_config, seed=4, dropout=0.3)
    assert float(jax.jit(other_seed.step)(state, batch)[1].loss) != losses[0]


def test_microbatches_have_dropout_of_their_own(small_config):
    setup = Setup(small_config, dropout=0.3)
    batch = random_batch(1, 3, 5)
    twice = jax.tree.map(lambda array: np.concatenate([array, array]), batch)
    state = setup.state()
    one = float(jax.jit(setup.step)(state, batch)[1].loss)
    both = float(jax.jit(setup.step)(state, twice)[1].loss)
    assert one != both


def test_overfits_one_batch(make_config):
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
    batch, state = random_batch(1, 4, 13), setup.state()
    first = None
    for _ in range(50):
        state, metrics = step(state, batch)
        first = first or float(metrics.loss)
    assert first == pytest.approx(np.log(VOCAB), rel=0.05)
    assert float(metrics.loss) < 0.05


def test_a_mesh_computes_the_same_update_of_packed_windows(small_config):
    """Other batches and meshes: test_meshes.py."""
    mesh = (2, 2, 2)
    setup = Setup(small_config, dropout=0.2, num_kv_heads=2, d_ff=78)
    batch = packed_batch(2, 8, 7)
    batch.weights[0, 3:, 4:] = 0
    _, expected = jax.jit(setup.step)(setup.state(), batch)

    devices = jax.devices()[: int(np.prod(mesh))]
    device_mesh = make_mesh(MeshConfig(*mesh), devices)
    with jax.set_mesh(device_mesh):
        boxed = boxed_shapes(setup.model)
        shardings = state_shardings(boxed, jax.eval_shape(setup.state), device_mesh)
        state = jax.jit(setup.state, out_shardings=shardings)()
        placed = jax.device_put(batch, batch_sharding(device_mesh, 1))
        step = jax.jit(setup.step, out_shardings=(shardings, None))
        state, metrics = step(state, placed)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    kernel = state.params["block_0"]["feed_forward"]["up"]["kernel"]
    shard = kernel.sharding.shard_shape(kernel.shape)
    assert shard == (60 // mesh[1], 78 // mesh[2])


def test_init_is_plain_arrays_in_fp32(small_config):
    setup = Setup(small_config)
    state = setup.state()
    for leaf in jax.tree.leaves(state.params):
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
    assert_trees_equal(init_params(setup.model, 3), state.params)
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
    made = Setup(small_config)
    schedule = make_schedule(small_config.optimizer, 50)
    guarded = jax.jit(make_train_step(made.model, made.optimizer, schedule, 3, 5.0))
    free = jax.jit(make_train_step(made.model, made.optimizer, schedule, 3))
    state = made.state()
    for index in range(5):
        state, metrics = guarded(state, random_batch(1, 4, 7, index))
        assert not metrics.skipped
    spike = random_batch(1, 1, 1, 99)  # one token alone has a far larger norm than 28 together
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
