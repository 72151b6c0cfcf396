"""The estimate of memory, against the compiler's own figures; and the error that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.data.batch import Batch
from sheepop_jax.model.lora import trained_shapes
from sheepop_jax.model.partitioning import (
    abstract_mesh,
    batch_sharding,
    make_mesh,
    state_shardings,
)
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.planning.memory import (
    MemoryEstimate,
    abstract_state,
    estimate_memory,
)
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_state, jit_step, make_train_step

pytestmark = pytest.mark.usefixtures("fast_compile")

SEED = 20261124
TOLERANCE = 0.15  # of the compiler's figure
MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2))


def draw(seed, mesh=(1, 1, 1)):
    """A random shape, as overrides, and a vocabulary: arrays of 5 to 200 MB in all."""
    generator = np.random.default_rng(seed)

    def pick(*values):
        return values[generator.integers(len(values))]

    replicas = mesh[0] * mesh[1]
    heads = pick(4, 8)
    width = heads * pick(16, 32, 48)
    return int(generator.integers(300, 6000)), {
        "model.d_model": width,
        "model.num_layers": pick(2, 3),
        "model.num_heads": heads,
        "model.num_kv_heads": pick(0, heads // 2),
        "model.d_ff": width * pick(2, 3, 4),
        "model.max_seq_len": 512,
        "model.dropout": pick(0.0, 0.1),
        "model.use_bias": pick(False, True),
        "model.tie_embeddings": pick(False, True),
        "model.remat": pick("none", "dots", "full"),
        "data.seq_len": pick(96, 128, 192, 256),
        "train.batch_size": replicas * pick(2, 3, 4, 6),
        "train.grad_accum_steps": pick(1, 1, 2, 3),
        "optimizer.name": pick("adamw", "muon"),
    }


def compiled(config, model, mesh):
    """The train step as the trainer compiles it: the state donated, everything laid out."""
    schedule = make_schedule(config.optimizer, 9)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    shardings = state_shardings(trained_shapes(model), state, mesh)

    def laid_out(tree, places):
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), tree, places)

    state, frozen = laid_out(state, shardings), None
    if model.lora:
        boxed = boxed_shapes(model)
        frozen = nn.meta.unbox(boxed)
        frozen = laid_out(frozen, state_shardings(boxed, frozen, mesh))
    train = config.train
    shape = (train.grad_accum_steps, train.batch_size, config.data.seq_len)
    place = batch_sharding(mesh, 1)
    kinds = (np.int32, np.int32, np.float32)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, kind, sharding=place) for kind in kinds))
    step = make_train_step(model, optimizer, schedule, 0)
    with jax.set_mesh(mesh):
        jitted = jit_step(step, shardings, mesh, config.model.remat)
        return jitted.lower(state, batch, frozen).compile()


def said_by_the_compiler(config, model, mesh):
    """Bytes of one device: arguments and results (the state once, it is donated), temporaries."""
    found = compiled(config, model, mesh).memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def check(make_config, vocab, fields, sizes=(1, 1, 1)):
    config = make_config(fields)
    model = Transformer(config.model, vocab, lora=config.train.lora)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    expected = estimate_memory(config, model, mesh, "cpu", abstract_state(config, model))
    said = said_by_the_compiler(config, model, mesh)
    ratio = expected.total / said
    print(f"seed {SEED}, mesh {sizes} V {vocab} {fields}: {said / 1e6:.1f} MB, ratio {ratio:.3f}")
    assert abs(ratio - 1) < TOLERANCE, (ratio, expected, fields)


def some(values, quick):
    """All of them, of which `make test` runs only the quick ones."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.mark.parametrize("number", some(range(20), (0, 1, 3)))
def test_the_estimate_is_within_15_percent_of_what_the_compiler_says(make_config, number):
    check(make_config, *draw(SEED + number))


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "rmsnorm", "feed_forward": "gated", "activation": "silu", "qk_norm": True,
         "head_dim": 48, "num_kv_heads": 2},
        {"parallel_residual": True, "partial_rotary": 0.5, "use_bias": True, "sliding_window": 64,
         "logit_softcap": 15.0, "activation": "relu2", "num_kv_heads": 0},
    ],
    ids=["qwen3", "gpt_neox"],
)  # fmt: skip
@pytest.mark.parametrize("remat", some(("none", "dots", "full"), ("none",)))
def test_options_of_the_architecture(make_config, options, remat):
    fields = {"d_model": 128, "num_heads": 4, "d_ff": 384, "max_seq_len": 512, "num_layers": 3}
    model = {f"model.{name}": value for name, value in {**fields, **options}.items()}
    more = {"model.remat": remat, "data.seq_len": 256, "train.batch_size": 4}
    check(make_config, 1000, model | more)


@pytest.mark.parametrize("microbatches", some((1, 3), (1,)))
def test_where_the_update_holds_most(make_config, microbatches):
    """Few tokens and wide matrices: the moment at which there are gradients and little else."""
    fields = {"model.d_model": 384, "model.num_heads": 8, "model.d_ff": 1536}
    few = {"train.batch_size": 1, "train.grad_accum_steps": microbatches, "model.num_kv_heads": 0}
    check(make_config, 1000, fields | few)


@pytest.mark.parametrize("sizes", some(MESHES, ((2, 2, 2),)))
def test_the_estimate_on_a_mesh(make_config, sizes):
    if jax.device_count() != 8:  # XLA_FLAGS of the user's own win over conftest's
        pytest.skip("needs 8 devices (see conftest.py)")
    check(make_config, *draw(SEED + 100 + MESHES.index(sizes), sizes), sizes)


ADAPTED = {"train.init_from": "another", "train.lora_rank": 8, "model.num_kv_heads": 0}


def test_adapters_within_15_percent(make_config):
    fields = {"d_model": 256, "num_heads": 4, "d_ff": 768, "max_seq_len": 512}
    wide = {f"model.{name}": value for name, value in fields.items()}
    check(make_config, 1000, {**ADAPTED, **wide, "data.seq_len": 64, "train.batch_size": 4})


def test_only_adapters_have_gradients_and_optimizer_state(make_config):
    config = make_config({**ADAPTED, "train.batch_size": 1, "model.d_ff": 80})
    model = Transformer(config.model, 97, lora=config.train.lora)
    found = estimate_memory(
        config, model, abstract_mesh(MeshConfig(1, 1, 1), 1), "cuda", abstract_state(config, model)
    )
    d, f, layers, rank = 60, 80, 2, 8
    trained = layers * rank * (4 * 2 * d + 2 * (d + f))
    frozen = 128 * d + layers * (4 * d * d + 2 * d * f + 4 * d) + 2 * d
    assert found.parameters == 4 * (trained + frozen)
    assert found.optimizer == 4 * (2 * trained + 128 + 3)
    assert found.gradients <= 4 * 2 * trained


def test_what_lowers_it(make_config):
    fields = {"model.dropout": 0.0, "model.num_layers": 8, "train.batch_size": 64}

    def planned(**changed):
        config = make_config(fields | {name.replace("_", ".", 1): v for name, v in changed.items()})
        model = Transformer(config.model, 300)
        mesh = abstract_mesh(config.mesh, 4)
        return estimate_memory(config, model, mesh, "cuda", abstract_state(config, model))

    whole = planned()
    assert planned(train_batch_size=32).activations == whole.activations / 2
    dots, full = planned(model_remat="dots"), planned(model_remat="full")
    assert full.activations < 0.6 * dots.activations < 0.4 * whole.activations
    split = planned(mesh_fsdp=2, model_remat="full", train_grad_accum_steps=1)
    assert (split.parameters, 2 * split.optimizer) == (
        whole.parameters / 2,
        whole.optimizer + 4 * (128 + 3),  # the optimizer's norms and counts are not split
    )


def test_as_an_error_says_it():
    parts = {"parameters": 4e9, "optimizer": 8e9, "gradients": 0.3e9}
    estimate = MemoryEstimate(**parts, activations=0.4e9, loss=0.05e9, batch=0.05e9)
    assert estimate.total == pytest.approx(12.8e9)
    assert str(estimate) == (
        "about 12.8 GB: 12.3 GB of parameters, gradients and optimizer, 500 MB of activations and "
        "logits"
    )


def test_the_formula_by_hand(make_config):
    """The moment of the loss, on a mesh: docs/scaling.md, term by term."""
    rows, time, width, layers, wide, vocab = 32, 13, 60, 5, 80, 3072
    config = make_config(
        {
            "model.num_layers": layers,
            "model.num_kv_heads": 2,
            "model.d_ff": wide,
            "model.dropout": 0.1,
            "train.batch_size": 4 * rows,
            "train.grad_accum_steps": 3,
            "mesh.data": 2,
            "mesh.fsdp": 2,
            "mesh.tensor": 2,
        }
    )
    model = Transformer(config.model, 3000)
    mesh = abstract_mesh(config.mesh, 8)
    shapes = abstract_state(config, model)
    found = estimate_memory(config, model, mesh, "cuda", shapes)
    tokens = rows * time
    one = 4 * tokens * width
    block = 4 * one + 2 * one / 2 + 2 * (4 * tokens * 20) / 2 + 2 * (4 * tokens * wide) / 2
    block += 2 * (4 * rows * 3 * time**2) + 2 * (2 * one)  # scores of three heads; random words
    norm = 2 * 4 * tokens  # a mean and an inverse deviation of each row
    assert found.activations == layers * (block + 2 * norm) + norm + 2 * one + 2 * one
    assert found.loss == 2 * 4 * rows * time * vocab / 2  # logits and their gradients, fp32
    assert found.batch == 3 * 3 * 4 * tokens
    # The sums; and gathered over fsdp the parameters, the table for the logits.
    assert found.gradients == found.parameters + 2 * found.parameters
    matrices = vocab * width + layers * (2 * width**2 + 2 * width * 20 + 2 * width * wide)
    vectors = (4 * layers + 2) * width
    assert found.parameters == 4 * (matrices / 4 + vectors / 2)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_gradients_on_a_gpu_by_hand(make_config, microbatches):
    """One microbatch's stay in the dtype of the activations, but for the table's; sums are fp32."""
    few = {"train.batch_size": 1, "train.grad_accum_steps": microbatches}
    config = make_config({"model.d_model": 384, "model.num_heads": 6, "model.remat": "full"} | few)
    model = Transformer(config.model, 1000, jnp.bfloat16)
    mesh = abstract_mesh(config.mesh, 1)
    found = estimate_memory(config, model, mesh, "cuda", abstract_state(config, model))
    table = 4 * 1024 * 384
    half = table + (found.parameters - table) / 2
    assert found.gradients == (half if microbatches == 1 else found.parameters)
