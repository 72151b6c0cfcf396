"""The estimate of memory, against XLA's own figures; and the error that names it."""

import jax
import numpy as np
import pytest

from sheepop_jax.data.batches import Batch
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.memory import MemoryEstimate, estimate_memory
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_params, init_state, make_train_step

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
LARGE = {
    "model.d_model": 96,
    "model.num_heads": 4,
    "model.num_kv_heads": 0,
    "model.d_ff": 384,
    "model.num_layers": 4,
    "model.max_seq_len": 128,
    "data.seq_len": 128,
    "train.batch_size": 8,
    "train.grad_accum_steps": 1,
}


def estimate(config, mesh=ONE):
    model = Transformer(config.model, 301)
    params = jax.eval_shape(lambda: init_params(model, 0))
    return model, params, estimate_memory(params, config, model, mesh)


@pytest.mark.parametrize("remat", [False, True])
def test_the_estimate_is_near_what_xla_says(make_config, remat):
    config = make_config({**LARGE, "model.remat": remat})
    model, params, found = estimate(config)
    schedule = make_schedule(config.optimizer, 9)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    shape = (1, 8, 128)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, t) for t in (np.int32, np.int32, np.float32)))
    step = jax.jit(make_train_step(model, optimizer, schedule, 0), donate_argnums=0)
    said = step.lower(state, batch).compile().memory_analysis()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.state == 16 * count
    # XLA's temporaries hold the gradients too, and what it fuses away it does not keep.
    ours = found.activations + 4 * count
    assert 0.4 < ours / said.temp_size_in_bytes < 2.5


def test_what_lowers_it(make_config):
    whole = estimate(make_config(LARGE))[2]
    assert estimate(make_config({**LARGE, "train.batch_size": 4}))[2].activations == (
        whole.activations / 2
    )
    assert estimate(make_config({**LARGE, "model.remat": True}))[2].activations < (
        whole.activations / 2
    )
    split = estimate(make_config(LARGE), {"data": 1, "fsdp": 4, "tensor": 1})[2]
    assert (split.state, split.activations) == (whole.state / 4, whole.activations / 4)
    assert str(MemoryEstimate(12.34e9, 5e8)) == (
        "about 12.3 GB of parameters, gradients and optimizer, and 0.5 GB of activations a device"
    )
