"""The update rule against numpy float64 written from the papers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sheepop_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


def config(small_config, **changes):
    return dataclasses.replace(small_config.optimizer, **changes)


def test_warmup_rises_to_the_peak_and_cosine_ends_at_the_floor(small_config):
    settings = config(small_config, learning_rate=2.0, warmup_steps=4, final_lr_fraction=0.1)
    schedule = make_schedule(settings, 11)
    rates = [float(schedule(n)) for n in range(11)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    cosine = [0.2 + 1.8 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    assert rates[4:] == pytest.approx(cosine)
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "middle", "last"), [("linear", 1.1, 0.2), ("constant", 2.0, 2.0), ("cosine", 1.1, 0.2)]
)
def test_each_schedule_without_warmup(small_config, name, middle, last):
    settings = config(
        small_config, learning_rate=2.0, warmup_steps=0, final_lr_fraction=0.1, schedule=name
    )
    schedule = make_schedule(settings, 9)
    assert [float(schedule(n)) for n in (0, 4, 8)] == pytest.approx([2.0, middle, last])


def test_a_warmup_of_one_step_begins_at_the_peak(small_config):
    schedule = make_schedule(config(small_config, learning_rate=3.0, warmup_steps=1), 3)
    assert float(schedule(0)) == 3.0


def test_adamw_clip_and_schedule_follow_the_formulas(small_config):
    settings = config(
        small_config,
        learning_rate=0.01,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        weight_decay=0.3,
        warmup_steps=2,
        max_grad_norm=1.5,
    )
    schedule = make_schedule(settings, 6)
    optimizer = make_optimizer(settings, schedule)
    draw = np.random.default_rng(1)
    params = {"kernel": draw.standard_normal((3, 5)), "bias": draw.standard_normal(5)}
    ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(ours)
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for step in range(6):
        grads = {name: (1 + step) * draw.standard_normal(p.shape) for name, p in params.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 1.5  # so that clipping is really tested
        rate = float(schedule(step))
        for name, g in grads.items():
            g = g * 1.5 / norm
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = (m[name] / (1 - 0.8 ** (step + 1))) / (
                np.sqrt(v[name] / (1 - 0.95 ** (step + 1))) + 1e-6
            )
            if name == "kernel":
                direction = direction + 0.3 * params[name]
            params[name] = params[name] - rate * direction
        updates, state = optimizer.update(
            jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, ours
        )
        ours = optax.apply_updates(ours, updates)
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=1e-5, atol=1e-6)


def test_small_gradients_are_not_clipped_and_zero_turns_clipping_off(small_config):
    params = {"kernel": jnp.ones((2, 3))}

    def first_moment(max_norm, gradient):
        settings = config(small_config, max_grad_norm=max_norm, b1=0.5)
        optimizer = make_optimizer(settings, make_schedule(settings, 3))
        _, state = optimizer.update({"kernel": gradient}, optimizer.init(params), params)
        return optax.tree.get(state, "mu")["kernel"]

    gradient = jnp.full((2, 3), 10.0)
    np.testing.assert_allclose(first_moment(0.0, gradient), 5.0)
    np.testing.assert_allclose(first_moment(1e9, gradient), 5.0)
    np.testing.assert_allclose(first_moment(1.0, gradient), 0.5 / math.sqrt(6), rtol=1e-6)


def test_decay_falls_on_matrices_only(small_config):
    names = {
        "embedding": (7, 3),
        "block_0": {
            "attention_norm": {"scale": (3,), "bias": (3,)},
            "attention": {"query": {"kernel": (3, 3), "bias": (3,)}},
        },
        "final_norm": {"scale": (3,), "bias": (3,)},
    }
    params = jax.tree.map(jnp.ones, names, is_leaf=lambda x: isinstance(x, tuple))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if is_decayed
    }
    assert decayed == {"embedding", "block_0/attention/query/kernel"}
    # And the optimizer uses it: without gradients, only these shrink.
    for name in ("adamw", "muon"):
        settings = config(small_config, name=name, weight_decay=0.5)
        optimizer = make_optimizer(settings, make_schedule(settings, 9))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        moved = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, update in jax.tree_util.tree_leaves_with_path(updates)
            if float(jnp.abs(update).max()) > 0
        }
        assert moved == decayed
        assert float(updates["embedding"].max()) < 0


def test_muon_orthogonalises_kernels_and_leaves_embeddings_to_adam(small_config):
    settings = config(small_config, name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0)
    optimizer = make_optimizer(settings, make_schedule(settings, 9))
    draw = np.random.default_rng(2)
    params = {
        "embedding": jnp.asarray(draw.standard_normal((17, 5)), jnp.float32),
        "up": {"kernel": jnp.asarray(draw.standard_normal((5, 11)), jnp.float32)},
    }
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    singular = np.linalg.svd(updates["up"]["kernel"], compute_uv=False)
    # All singular values come out alike, at RMS 0.2: 0.2 · √max(5, 11) (Newton-Schulz is rough).
    assert singular.min() > 0.6 * 0.2 * math.sqrt(11)
    assert singular.max() < 1.3 * 0.2 * math.sqrt(11)
    # Adam's first update is the sign of the gradient, up to nesterov's factor.
    np.testing.assert_array_equal(np.sign(updates["embedding"]), -np.sign(params["embedding"]))
    assert np.ptp(np.abs(updates["embedding"])) < 1e-3


def test_muon_gives_adam_the_betas_and_eps_of_the_configuration(small_config):
    betas = {"b1": 0.5, "b2": 0.7, "eps": 0.03}
    settings = config(
        small_config,
        name="muon",
        learning_rate=1.0,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0,
        max_grad_norm=0,
        **betas,
    )
    optimizer = make_optimizer(settings, make_schedule(settings, 9))
    adam = optax.scale_by_adam(**betas, nesterov=True)
    draw = np.random.default_rng(4)
    params = {"embedding": jnp.zeros((7, 5)), "up": {"kernel": jnp.zeros((5, 3))}}
    state, adam_state = optimizer.init(params), adam.init(params["embedding"])
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(draw.standard_normal(p.shape)), params)
        updates, state = optimizer.update(grads, state, params)
        expected, adam_state = adam.update(grads["embedding"], adam_state)
        np.testing.assert_allclose(updates["embedding"], -expected, rtol=1e-5)
