"""A feed-forward layer that planning has never seen: memory, traffic and FLOPs follow."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.model import transformer
from sheepop_jax.model.linear import linear as dense
from sheepop_jax.model.partitioning import abstract_mesh, make_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning import activations, memory
from sheepop_jax.planning.communication import bytes_sent
from sheepop_jax.planning.flops import flops_per_token
from sheepop_jax.planning.memory import abstract_state, estimate_memory
from tests.planning.test_memory import TOLERANCE, said_by_the_compiler, some

pytestmark = pytest.mark.usefixtures("fast_compile")

ROWS, TIME, WIDTH, HEADS, LAYERS, WIDE, VOCAB = 6, 96, 128, 4, 3, 640, 1000
FIELDS = {
    "model.d_model": WIDTH,
    "model.num_layers": LAYERS,
    "model.num_heads": HEADS,
    "model.num_kv_heads": 0,
    "model.d_ff": WIDE,
    "model.max_seq_len": TIME,
    "model.dropout": 0.0,
    "data.seq_len": TIME,
    "train.batch_size": ROWS,
    "train.grad_accum_steps": 1,
    "optimizer.name": "adamw",
}


class SwiGLU(nn.Module):
    """W₂ (silu(W₁ x) · W₃ x) (Shazeer 2020), written without a thought for memory."""

    config: transformer.ModelConfig
    dtype: object

    @nn.compact
    def __call__(self, x_BTD):
        b, t, d = x_BTD.shape

        def linear(features, axes, name):
            return dense(self.config, features, axes, name, self.dtype, 0.02)

        x_MD = x_BTD.reshape(b * t, d)
        gate = linear(self.config.d_ff, ("embed", "mlp"), "gate")(x_MD)
        up = linear(self.config.d_ff, ("embed", "mlp"), "up")(x_MD)
        return linear(d, ("mlp", "embed"), "down")(nn.silu(gate) * up).reshape(b, t, d)


@pytest.fixture(autouse=True)
def forget():
    """What was traced with one feed-forward layer is not the other's."""
    forget_all()
    yield
    forget_all()


def forget_all():
    activations.trace.cache_clear()
    memory._abstract_state.cache_clear()


def planned(config, platform="cpu", sizes=(1, 1, 1)):
    model = Transformer(config.model, VOCAB)
    mesh = abstract_mesh(MeshConfig(*sizes), int(np.prod(sizes)))
    shapes = abstract_state(config, model)
    sent = bytes_sent(config, model, mesh, platform, shapes)
    return estimate_memory(config, model, mesh, platform, shapes), sent["tensor"]


@pytest.mark.parametrize("remat", some(("none", "dots", "full"), ("none", "full")))
def test_memory_is_what_the_compiler_says(make_config, monkeypatch, remat):
    config = make_config({**FIELDS, "model.remat": remat})
    monkeypatch.setattr(transformer, "FeedForward", SwiGLU)
    estimate, _ = planned(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    said = said_by_the_compiler(config, Transformer(config.model, VOCAB), mesh)
    print(f"remat {remat}: {said / 1e6:.1f} MB, ratio {estimate.total / said:.3f}")
    assert abs(estimate.total / said - 1) < TOLERANCE


@pytest.mark.parametrize(("remat", "arrays"), [("none", 5 - 2), ("dots", 2 - 1), ("full", 0)])
def test_residuals_by_hand(make_config, monkeypatch, remat, arrays):
    """Gate, sigmoid, silu, up and the product, in place of up and its activation."""
    config = make_config({**FIELDS, "model.remat": remat})
    one = 4 * ROWS * TIME * WIDE / 2
    mesh = abstract_mesh(MeshConfig(1, 1, 2), 2)
    plain, gated = (
        activations.Activations.of(config, Transformer(config.model, VOCAB), mesh, "cpu")
        for patched in (False, True)
        if not patched or forget_and_patch(monkeypatch)
    )
    assert gated.block - plain.block == arrays * one
    assert gated.kept - plain.kept == LAYERS * arrays * one
    assert (gated.head, gated.loss) == (plain.head, plain.loss)


def forget_and_patch(monkeypatch):
    forget_all()
    monkeypatch.setattr(transformer, "FeedForward", SwiGLU)
    return True


def test_flops_by_hand(make_config, monkeypatch):
    config = make_config(FIELDS)
    plain = flops_per_token(Transformer(config.model, VOCAB), TIME)
    monkeypatch.setattr(transformer, "FeedForward", SwiGLU)
    gated = flops_per_token(Transformer(config.model, VOCAB), TIME)
    block = 4 * WIDTH**2 + 3 * WIDTH * WIDE + 4 * WIDTH
    weights = 1024 * WIDTH + LAYERS * block + 2 * WIDTH
    assert gated == 6 * weights + 12 * LAYERS * TIME * WIDTH
    assert gated - plain == 6 * LAYERS * WIDTH * WIDE


@pytest.mark.parametrize(("platform", "sums"), [("cpu", 7), ("cuda", 4)])
def test_traffic_by_hand(make_config, monkeypatch, platform, sums):
    """One more gradient of the norm's output, which GPUs add to the other before they send it."""
    config = make_config({**FIELDS, "train.batch_size": ROWS})
    monkeypatch.setattr(transformer, "FeedForward", SwiGLU)
    _, sent = planned(config, platform, (1, 1, 4))
    stream = 4 * ROWS * TIME * WIDTH
    assert sent == 2 * 3 / 4 * stream * (LAYERS * sums + 1 + 1)
