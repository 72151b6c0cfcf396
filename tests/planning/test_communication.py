"""What the devices send each other, against the collectives of the compiled step."""

import jax
import pytest

from benchmarks.lib.collectives import sent_over
from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.model.partitioning import abstract_mesh, make_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.communication import bytes_sent
from sheepop_jax.planning.memory import abstract_state
from tests.planning.test_memory import compiled

pytestmark = pytest.mark.usefixtures("fast_compile")
VOCAB = 1999
SHAPE = {
    "model.d_model": 128,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.num_layers": 2,
    "model.d_ff": 512,
    "model.max_seq_len": 128,
    "data.seq_len": 96,
    "train.batch_size": 16,
    "train.grad_accum_steps": 1,
}


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param((8, 1, 1), {"train.grad_accum_steps": 3}, marks=pytest.mark.slow),
        ((2, 2, 2), {"train.grad_accum_steps": 3}),
        ((1, 8, 1), {"train.grad_accum_steps": 3, "model.remat": "full"}),
        pytest.param((1, 8, 1), {"model.remat": "full"}, marks=pytest.mark.slow),
        ((1, 1, 8), {"model.remat": "full", "train.grad_accum_steps": 2}),
        pytest.param((2, 4, 1), {"model.tie_embeddings": False}, marks=pytest.mark.slow),
        pytest.param((1, 1, 8), {"model.remat": "dots"}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), {}, marks=pytest.mark.slow),
    ],
)
def test_bytes_sent_are_those_of_the_compiled_step(make_config, sizes, overrides):
    if jax.device_count() != 8:  # XLA_FLAGS of the user's own win over conftest's
        pytest.skip("needs 8 devices (see conftest.py)")
    config = make_config(SHAPE | overrides)
    model = Transformer(config.model, VOCAB)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices())
    hlo = compiled(config, model, mesh).as_text()
    there = sum(sent_over(hlo, dict(mesh.shape)).values())
    expected = bytes_sent(config, model, mesh, "cpu", abstract_state(config, model))
    print(sizes, overrides, f"{there / 1e6:.2f} MB, ratio {sum(expected.values()) / there:.3f}")
    assert sum(expected.values()) == pytest.approx(there, rel=0.05)


def test_an_axis_of_one_sends_nothing(make_config):
    config = make_config(SHAPE)
    model = Transformer(config.model, VOCAB)
    shapes = abstract_state(config, model)
    for sizes, axis in (((4, 1, 1), "data"), ((1, 4, 1), "fsdp"), ((1, 1, 4), "tensor")):
        sent = bytes_sent(config, model, abstract_mesh(MeshConfig(*sizes), 4), "cpu", shapes)
        assert {name for name, bytes_ in sent.items() if bytes_} == {axis}
