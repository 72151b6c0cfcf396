"""Steps on eight devices: the curve of one device, and the collectives of the compiled step."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.data.loader import PackingConfig, TrainBatches
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.generation.engine import NO_END
from sheepop_jax.generation.requests import SamplingConfig
from sheepop_jax.model.partitioning import (
    batch_sharding,
    global_batch,
    make_mesh,
    own_rows,
    state_shardings,
)
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_state, make_train_step
from tests.writing import generate

pytestmark = pytest.mark.usefixtures("fast_compile")

VOCAB, STEPS, SEED = 501, 5, 5
# Dropout, microbatches, grouped heads, documents, and a loss in several chunks.
SHAPE = {
    "model.d_model": 64,
    "model.num_layers": 1,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.d_ff": 96,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "data.seq_len": 24,
    "train.batch_size": 8,
    "train.grad_accum_steps": 2,
    "optimizer.warmup_steps": 2,
}
CHUNK_ELEMENTS = 8 * 512 * 5
MESHES = {"data 8": (8, 1, 1), "all three": (2, 2, 2)}
# The largest relative difference of a loss or a gradient norm that was seen is 1.5e-7.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def eight_devices():
    if jax.device_count() != 8:  # XLA_FLAGS of the user's own win over conftest's
        pytest.skip("needs 8 devices (see conftest.py)")


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


class Training:
    """A small model on a mesh, with its compiled step."""

    def __init__(self, config, sizes):
        self.config, self.mesh = config, mesh_of(sizes)
        self.model = Transformer(config.model, VOCAB)
        schedule = make_schedule(config.optimizer, STEPS)
        optimizer = make_optimizer(config.optimizer, schedule)
        step = make_train_step(self.model, optimizer, schedule, SEED, chunk_elements=CHUNK_ELEMENTS)

        def fresh():
            return init_state(self.model, optimizer, SEED)

        abstract = jax.eval_shape(fresh)
        boxed = boxed_shapes(self.model)
        self.shardings = state_shardings(boxed, abstract, self.mesh)
        self.target = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, self.shardings)
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(fresh, out_shardings=self.shardings)()
            jitted = jax.jit(step, out_shardings=(self.shardings, None))
            self.step = jitted.lower(self.state, self.batch(0)).compile()

    def batch(self, step):
        """Windows with borders of documents; some targets have weight 0."""
        tokens = np.random.default_rng(SEED).integers(1, VOCAB, 4000).astype(np.int32)
        tokens[::37] = 0
        layout = PackingConfig(self.config.data.seq_len, end_of_text=0, document_mask=True)
        size = self.config.train.batch_size
        batches = TrainBatches(
            [TokenStream.from_array(tokens, 1, 1)],
            layout,
            seed=SEED,
            accum=self.config.train.grad_accum_steps,
            batch_size=size,
            rows=own_rows(self.mesh, size),
        )
        batch = batches.batch_at(step)
        weights = batch.weights.reshape(-1, layout.seq_len).copy()
        weights[::3, 17:] = 0
        batch = batch._replace(weights=weights.reshape(batch.weights.shape))
        return global_batch(self.mesh, size, 1, batch)

    def curve(self):
        """Loss and gradient norm of each step, the tokens seen, and the last state."""
        state, numbers, seen = self.state, [], []
        with jax.set_mesh(self.mesh):
            for step in range(STEPS):
                batch = self.batch(step)
                state, metrics = self.step(state, batch)
                numbers.append((float(metrics.loss), float(metrics.grad_norm)))
                seen.append(np.asarray(batch.inputs).reshape(-1, self.config.data.seq_len))
        return np.array(numbers), np.array(seen), state


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(SHAPE)


@pytest.fixture(scope="module")
def one_device(config):
    """The same sixteen rows in one microbatch: dropout does not depend on the split either."""
    train = dataclasses.replace(config.train, batch_size=16, grad_accum_steps=1)
    return Training(dataclasses.replace(config, train=train), (1, 1, 1)).curve()


@pytest.fixture(scope="module")
def trained(config):
    """Mesh → its training, compiled once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Training(config, MESHES[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", MESHES)
def test_steps_are_those_of_one_device(trained, one_device, name):
    numbers, seen, state = trained(name).curve()
    expected, expected_seen, _ = one_device
    np.testing.assert_array_equal(seen, expected_seen)
    np.testing.assert_allclose(numbers, expected, rtol=TOLERANCE)
    assert int(state.step) == STEPS


def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "parts"), [("all three", 4), ("data 8", 1)])
def test_each_device_holds_its_part_of_parameters_and_optimizer(trained, one_device, name, parts):
    state = trained(name).state
    held = bytes_on_a_device((state.params, state.opt_state))
    whole = bytes_on_a_device((one_device[2].params, one_device[2].opt_state))
    assert abs(held * parts / whole - 1) < 0.1


LINE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?[\w.\-]+ \(.*\{\s*$")


def collectives(compiled):
    """Of each: kind, shapes without axes of one, whether once an update, op_name."""
    once, found = False, []
    for line in compiled.as_text().splitlines():
        if begins := COMPUTATION.match(line):
            once = bool(begins[1])
        if match := LINE.search(line):
            sizes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            shapes = [tuple(int(n) for n in s.split(",") if n not in ("", "1")) for s in sizes]
            name = re.search(r'op_name="([^"]*)"', match[3])
            found.append((match[2], shapes, once, name[1] if name else ""))
    assert found
    return found


def test_gradients_cross_data_once_an_update(trained):
    """Eight replicas, two microbatches: all that is sent is one sum of all gradients, outside."""
    training = trained("data 8")
    found = collectives(training.step)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    assert all(once for _, _, once, _ in found)
    sent = sum(math.prod(shape) for _, shapes, _, _ in found for shape in shapes)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(training.state.params))
    assert parameters <= sent <= 1.01 * parameters


@pytest.mark.parametrize("name", MESHES)
def test_nothing_is_gathered_but_parameters(trained, name):
    """Not the batch, no hidden states, and no gradient of the embedding."""
    training = trained(name)
    tensor = training.mesh.shape["tensor"]
    found = collectives(training.step)
    assert not [kind for kind, *_ in found if kind == "all-to-all"]
    # A parameter's shape, or that with one axis split by tensor.
    shapes = {leaf.shape for leaf in jax.tree.leaves(training.state.params)}
    shapes |= {(*s[:i], s[i] // tensor, *s[i + 1 :]) for s in shapes for i in range(len(s))}
    gathered = [(s, op) for kind, all_, _, op in found for s in all_ if kind == "all-gather"]
    assert {shape for shape, _ in gathered} <= shapes
    tables = [op for shape, op in gathered if shape == (512 // tensor, 64)]
    assert not [op for op in tables if "transpose(" in op or "scatter" in op]
    if training.mesh.shape["fsdp"] > 1:
        assert len(tables) == 2  # for the lookup and for the logits
    else:
        assert not gathered


@pytest.mark.parametrize("to", [(1, 1, 1), (1, 4, 1)], ids=str)
def test_a_checkpoint_of_eight_devices_fits_any_other_number_and_back(trained, tmp_path, to):
    training = trained("all three")
    checkpoints = CheckpointSaver(tmp_path)
    checkpoints.save(training.state, {})
    checkpoints.wait()
    boxed = boxed_shapes(training.model)
    shardings = state_shardings(boxed, training.target, mesh_of(to))
    target = jax.tree.map(lambda x, s: x.update(sharding=s), training.target, shardings)
    moved = checkpoints.restore(0, target)
    back = CheckpointSaver(tmp_path / "back")
    back.save(moved, {})
    back.wait()
    again = back.restore(0, training.target)
    for first, second, third in zip(
        *map(jax.tree.leaves, (training.state, moved, again)), strict=True
    ):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()
        assert np.asarray(first).tobytes() == np.asarray(third).tobytes()
        assert first.sharding == third.sharding
    assert jax.tree.leaves(moved)[-1].sharding.mesh.size == math.prod(to)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40}])
def test_decoding_on_a_mesh_gives_the_tokens_of_one_device(config, random_params, sampling):
    model = Transformer(config.model, VOCAB)
    params = random_params(model)
    prompts = [[1, 2, 3], [400, 7], [5] * 9]

    def tokens(params):
        found = generate(
            model,
            params,
            prompts,
            sampling=SamplingConfig(**sampling),
            end_of_text=NO_END,
            max_new_tokens=12,
        )
        return [completion.tokens for completion in found]

    mesh = mesh_of(MESHES["all three"])
    split = jax.device_put(params, state_shardings(boxed_shapes(model), params, mesh))
    assert split["embedding"].addressable_shards[0].data.shape == (256, 32)
    expected = tokens(params)
    with jax.set_mesh(mesh):
        assert tokens(split) == expected


def test_processes_hold_their_devices_rows():
    """Which rows those are is the sharding's to say: here two halves of a mesh."""
    assert own_rows(mesh_of((2, 2, 2)), 8) == list(range(8))
    sharding = batch_sharding(mesh_of((2, 2, 2)), 0)
    index = sharding.devices_indices_map((8,))
    assert [index[d][0] for d in jax.devices()] == [
        slice(2 * (i // 2), 2 * (i // 2) + 2) for i in range(8)
    ]
