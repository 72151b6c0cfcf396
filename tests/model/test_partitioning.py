"""The mesh, the layout of parameters and activations on it, and that no layout changes a number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.errors import InputError
from sheepop_jax.model import partitioning
from sheepop_jax.model import transformer as tf
from tests import reference

pytestmark = pytest.mark.usefixtures("fast_compile")

VOCAB = 131
# Sizes that 2 divides, and every kind of parameter that there is.
DIVISIBLE = {
    "model.num_kv_heads": 2,
    "model.d_ff": 74,
    "model.use_bias": True,
    "model.position": "learned",
    "model.tie_embeddings": False,
    "model.num_layers": 1,
    "train.batch_size": 4,
}


@pytest.fixture(autouse=True)
def eight_devices():
    if jax.device_count() != 8:  # XLA_FLAGS of the user's own win over conftest's
        pytest.skip("needs 8 devices (see conftest.py)")


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return partitioning.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices())


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((2, 2, 2), 8, (2, 2, 2)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((1, 4, -1), 8, (1, 4, 2)),
        ((-1, 2, 4), 8, (1, 2, 4)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((3, -1, 1), 6, (3, 2, 1)),
    ],
)
def test_mesh_sizes(sizes, devices, expected):
    mesh = partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices()[:devices])


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 1, 1), (2, 2, 4), (-1, 3, 1), (-1, 16, 1)])
def test_a_mesh_that_leaves_out_or_lacks_devices_is_refused(sizes):
    with pytest.raises(InputError) as error:
        mesh_of(*sizes)
    assert error.value.field == "mesh"
    for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
        assert f"{name} {size}" in error.value.got
    assert "8" in error.value.expected


@pytest.mark.parametrize(
    ("sizes", "overrides", "field", "got", "axes"),
    [
        ((4, 2, 1), {"train.batch_size": 4}, "train.batch_size", 4, "8 (mesh size data x fsdp)"),
        ((1, 8, 1), {"train.batch_size": 8}, "model.d_model", 60, "8 (mesh size fsdp)"),
        ((1, 1, 8), {}, "model.num_heads", 6, "8 (mesh size tensor)"),
        ((4, 1, 2), {"model.num_kv_heads": 3}, "model.num_kv_heads", 3, "2 (mesh size tensor)"),
        ((4, 1, 2), {"model.d_ff": 79}, "model.d_ff", 79, "2 (mesh size tensor)"),
    ],
)
def test_check_mesh_names_the_field_and_the_rule(make_config, sizes, overrides, field, got, axes):
    config = make_config(DIVISIBLE | overrides)
    with pytest.raises(InputError) as error:
        partitioning.check_mesh(config, mesh_of(*sizes))
    assert (error.value.field, error.value.got) == (field, got)
    assert axes in error.value.expected


def test_check_mesh_names_an_axis_that_does_not_divide_the_vocabulary(make_config):
    options = {"model.num_heads": 6, "model.num_kv_heads": 6, "model.d_ff": 78}
    mesh = partitioning.make_mesh(MeshConfig(1, 1, 6), jax.devices()[:6])
    with pytest.raises(InputError) as error:
        partitioning.check_mesh(make_config(DIVISIBLE | options), mesh)
    assert (error.value.field, error.value.got) == ("mesh.tensor", 6)
    assert str(tf.VOCAB_MULTIPLE) in error.value.expected


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (1, 4, 2), (4, 2, 1), (1, 1, 1)])
def test_check_mesh_lets_what_fits_pass(make_config, sizes):
    config = make_config(DIVISIBLE | {"train.batch_size": 8})
    mesh = partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    partitioning.check_mesh(config, mesh)


@struct.dataclass
class State:
    """What a training state looks like from here: parameters, moments and counters."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def abstract_state(config):
    """The boxed parameters, and a whole training state, both abstract."""
    model = tf.Transformer(config.model, VOCAB)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def make(params):
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return boxed, jax.eval_shape(make, nn.unbox(boxed))


def by_name(tree) -> dict[str, NamedSharding]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


SPECS = {
    "embedding": ("tensor", "fsdp"),
    "output_embedding": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),
    "final_norm.scale": ("fsdp",),
    "final_norm.bias": ("fsdp",),
    "block_0.attention_norm.scale": ("fsdp",),
    "block_0.attention_norm.bias": ("fsdp",),
    "block_0.feed_forward_norm.scale": ("fsdp",),
    "block_0.feed_forward_norm.bias": ("fsdp",),
    "block_0.attention.query.kernel": ("fsdp", "tensor"),
    "block_0.attention.query.bias": ("tensor",),
    "block_0.attention.key.kernel": ("fsdp", "tensor"),
    "block_0.attention.key.bias": ("tensor",),
    "block_0.attention.value.kernel": ("fsdp", "tensor"),
    "block_0.attention.value.bias": ("tensor",),
    "block_0.attention.output.kernel": ("tensor", "fsdp"),
    "block_0.attention.output.bias": ("fsdp",),
    "block_0.feed_forward.up.kernel": ("fsdp", "tensor"),
    "block_0.feed_forward.up.bias": ("tensor",),
    "block_0.feed_forward.down.kernel": ("tensor", "fsdp"),
    "block_0.feed_forward.down.bias": ("fsdp",),
}


def test_moments_live_where_their_parameters_do_and_the_rest_is_replicated(make_config):
    mesh = mesh_of(2, 2, 2)
    boxed, state = abstract_state(make_config(DIVISIBLE))
    got = by_name(partitioning.state_shardings(boxed, state, mesh))
    assert got.keys() == by_name(state).keys()
    expected = {"step": ()}
    for name, leaf in by_name(state.opt_state).items():
        if leaf.ndim == 0:
            expected[f"opt_state.{name}"] = ()
    counters = len(expected)
    for name, spec in SPECS.items():
        for place in ("params", "opt_state.1.0.mu", "opt_state.1.0.nu"):
            expected[f"{place}.{name}"] = spec
    assert counters >= 2  # the step and AdamW's count
    assert {name: tuple(sharding.spec) for name, sharding in got.items()} == expected
    assert all(sharding.mesh == mesh for sharding in got.values())


def test_batch_sharding_splits_the_batch_over_data_and_fsdp():
    mesh = mesh_of(2, 2, 2)
    batch_ABT = jax.device_put(np.zeros((3, 8, 5)), partitioning.batch_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in batch_ABT.addressable_shards} == {(3, 2, 5)}
    batch_BT = jax.device_put(np.zeros((8, 5)), partitioning.batch_sharding(mesh, leading=0))
    assert {shard.data.shape for shard in batch_BT.addressable_shards} == {(2, 5)}


def test_constrain_outside_a_mesh_returns_its_argument():
    x = jnp.ones((4, 3, 2))
    assert partitioning.constrain(x, "batch", "length", "activation") is x


def test_rows_that_the_devices_do_not_divide_stay_whole():
    """As in decoding: split, they would be padded, and XLA would move whole arrays about."""
    with jax.set_mesh(mesh_of(2, 2, 2)):
        pin = jax.jit(lambda x: partitioning.constrain(x, "batch", "length", "mlp"))
        text = pin.lower(jnp.ones((3, 5, 6))).as_text()
    assert '[{}, {}, {"tensor"}]' in text and '"data", "fsdp"' not in text


def test_constrain_inside_a_mesh_decides_the_layout():
    """`with_logical_constraint` without `set_mesh` does nothing and says nothing."""

    def double(x):
        return partitioning.constrain(2 * x, "batch", "length", "mlp")

    mesh = mesh_of(2, 2, 2)
    x = jax.device_put(jnp.ones((8, 3, 6)), NamedSharding(mesh, P()))
    assert jax.jit(double)(x).sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        y = jax.jit(double)(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)


def test_the_forward_pass_pins_the_embedding_and_each_sublayers_output(make_config):
    config = make_config(DIVISIBLE | {"model.num_layers": 2})
    model = tf.Transformer(config.model, VOCAB)
    boxed, state = abstract_state(config)

    def constraints() -> int:
        forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
        tokens_BT = jax.ShapeDtypeStruct((4, 7), jnp.int32)
        text = forward.lower(state.params, tokens_BT).as_text()
        lines = [line for line in text.splitlines() if "sharding_constraint" in line]
        table = [line for line in lines if "256x60xf32" in line]
        for line in lines:
            assert '[{"data", "fsdp"}, {}, {}]' in line or line in table
        # Whole rows of the embedding for the lookup, and the way its gradient comes back.
        assert [re.search(r"\[\{.*\}\]", line)[0] for line in table] in (
            [],
            ['[{"tensor"}, {"fsdp"}]', '[{"tensor"}, {}]'],
        )
        return len(lines) - len(table)

    assert constraints() == 0
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert constraints() == 1 + 2 * 2


def test_a_mesh_changes_neither_logits_nor_gradients(make_config, random_params):
    """Rotary positions and a tied output: training/test_meshes.py."""
    config = make_config(DIVISIBLE)
    mesh = mesh_of(2, 2, 2)
    partitioning.check_mesh(config, mesh)
    model = tf.Transformer(config.model, VOCAB)
    params = random_params(model)
    generator = np.random.default_rng(0)
    tokens_BT = generator.integers(0, VOCAB, (4, 7), np.int32)
    probe_BTV = generator.standard_normal((4, 7, VOCAB)).astype(np.float32)

    def loss(params, tokens_BT):
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        logits_BTV = tf.logits(model, params, hidden_BTD)[..., :VOCAB]
        return (logits_BTV * probe_BTV).mean(), logits_BTV

    step = jax.value_and_grad(loss, has_aux=True)
    (_, logits_BTV), gradients = jax.jit(step)(params, tokens_BT)

    boxed, state = abstract_state(config)
    shardings = partitioning.state_shardings(boxed, state, mesh).params
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        batch_BT = jax.device_put(tokens_BT, partitioning.batch_sharding(mesh, leading=0))
        (_, on_mesh_BTV), on_mesh = jax.jit(step)(sharded, batch_BT)
    assert sharded["embedding"].addressable_shards[0].data.shape == (256 // 2, 60 // 2)

    expected_BTV = reference.logits(params, config.model, tokens_BT)[..., :VOCAB]
    for got_BTV in (logits_BTV, on_mesh_BTV):
        scale = np.abs(expected_BTV).max()
        np.testing.assert_allclose(got_BTV / scale, expected_BTV / scale, atol=1e-5)
    # The keys' bias has a gradient of 0 (it adds the same to all scores), which is all noise.
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for one, many in zip(*map(jax.tree.leaves, (gradients, on_mesh)), strict=True):
        scale = max(np.abs(one).max(), floor)
        np.testing.assert_allclose(many / scale, one / scale, atol=1e-4)
