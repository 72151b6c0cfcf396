"""sheepop_jax as a contender: `python -m benchmarks.lib.ours WORK SHAPE …`, run by `contest`."""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.lib.contest import first_tokens, serve
from benchmarks.lib.shapes import SHAPES, Shape
from sheepop_jax.config.schema import ADDED, ModelConfig, OptimizerConfig
from sheepop_jax.runtime import platform
from sheepop_jax.runtime.allocator import tune_allocator

SIZES = [field.name for field in dataclasses.fields(Shape)]
Work = tuple[Callable[[], Any], dict[str, Any]]


# Explicit instead of configs/base.py, so that these benchmarks run without ml_collections.
ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=3e-4,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    warmup_steps=1000,
    schedule="cosine",
    final_lr_fraction=0.1,
    max_grad_norm=1.0,
    max_grad_zscore=0.0,
)


def model_config(shape: Shape, context: int = 0) -> ModelConfig:
    """Returns the model configuration of a shape, without dropout, like the peers'."""
    return ModelConfig(
        d_model=shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=0,
        d_ff=shape.feed_forward,
        max_seq_len=max(context, shape.time),
        dropout=0.0,
        attention_dropout=0.0,
        activation="gelu",
        position="rope",
        rope_theta=10000.0,
        norm_eps=1e-5,
        use_bias=False,
        tie_embeddings=True,
        remat=shape.remat,
        **ADDED["model"],
    )


def train_step(shape: Shape, flags: argparse.Namespace) -> Work:
    """The train step, compiled as in training; a turn is `flags.steps` steps."""
    if flags.devices > 1:
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    machine = platform.prepare(flags.platform)
    import jax

    from sheepop_jax.config.schema import MeshConfig
    from sheepop_jax.data.batch import Batch
    from sheepop_jax.model.flash_attention import choose_implementation
    from sheepop_jax.model.loss import chunk_elements
    from sheepop_jax.model.partitioning import batch_sharding, make_mesh, state_shardings
    from sheepop_jax.model.transformer import Transformer, boxed_shapes
    from sheepop_jax.training.optimizer import make_optimizer, make_schedule
    from sheepop_jax.training.step import init_state, jit_init, jit_step, make_train_step

    config = model_config(shape)
    dtype = machine.compute_dtype(flags.dtype)
    attention = choose_implementation(machine.platform, dtype, config.head_width, 0.0)
    model = Transformer(config, shape.vocab, dtype, attention)
    schedule = make_schedule(ADAMW, 10_000)
    optimizer = make_optimizer(ADAMW, schedule)
    mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices())
    jax.set_mesh(mesh)

    def new() -> Any:
        return init_state(model, optimizer, 0)

    boxed = boxed_shapes(model)
    shardings = state_shardings(boxed, jax.eval_shape(new), mesh)
    state = jit_init(new, shardings)()
    del new  # frees its program, as the trainer does
    batches = []
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(
            0, shape.vocab, (1, shape.batch, shape.time + 1), np.int32
        )
        weights = np.ones((1, shape.batch, shape.time), np.float32)
        batch = Batch(ids[..., :-1], ids[..., 1:], weights)
        batches.append(jax.device_put(batch, batch_sharding(mesh, 1)))
    started = time.perf_counter()
    elements = chunk_elements(machine.platform)
    function = make_train_step(model, optimizer, schedule, 0, chunk_elements=elements)
    step = jit_step(function, shardings, mesh, config.remat).lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - started

    def work() -> float:
        nonlocal state
        for i in range(flags.steps):
            state, metrics = step(state, batches[i % len(batches)])
        return float(metrics.loss)

    memory = step.memory_analysis()
    tune_allocator(shape.step_flops, memory.temp_size_in_bytes)  # as the pipeline does
    return work, {
        "compile_s": round(compile_seconds, 1),
        "temporaries_MB": round(memory.temp_size_in_bytes / 1e6),
    }


def decode(shape: Shape, flags: argparse.Namespace) -> Work:
    """Greedy decoding of random prompts; a turn is one call, including the prompt."""
    machine = platform.prepare(flags.platform)

    from sheepop_jax.generation.engine import NO_END, generate
    from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
    from sheepop_jax.model.transformer import Transformer, init_params
    from sheepop_jax.training.step import jit_init

    model = Transformer(model_config(shape, 1024), shape.vocab, machine.compute_dtype(flags.dtype))
    params = jit_init(lambda: init_params(model, 0))()
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (flags.rows, flags.prompt))

    def write(new_tokens: int) -> Any:
        return generate(
            model,
            params,
            prompts.tolist(),
            NO_END,
            GenerationConfig(SamplingConfig(temperature=0.0), max_new_tokens=new_tokens),
        )

    about = first_tokens(write, flags.new_tokens)

    def work() -> int:
        return sum(len(completion.tokens) for completion in write(flags.new_tokens))

    return work, about


def read(shape: Shape, flags: argparse.Namespace) -> Work:
    """The bandwidth limit of decoding: reads every weight once per new token, and nothing else."""
    machine = platform.prepare(flags.platform)
    import jax
    import jax.numpy as jnp

    rows = shape.weights // shape.width
    weights = jnp.ones((rows, shape.width), machine.compute_dtype(flags.dtype))

    @jax.jit
    def times(weights: Any, vector: Any) -> Any:
        def token(_: Any, x: Any) -> Any:  # each matmul depends on the previous one
            return x + 1e-9 * jnp.max(weights @ x)

        return jax.lax.fori_loop(0, flags.new_tokens, token, vector)

    vector = jnp.ones(shape.width, weights.dtype)

    def work() -> int:
        times(weights, vector).block_until_ready()
        return flags.new_tokens

    return work, {"GB_a_turn": round(weights.nbytes * flags.new_tokens / 1e9, 1)}


def loss(shape: Shape, flags: argparse.Namespace) -> Work:
    """The loss and its gradients for random hidden states, chunked or with full logits."""
    machine = platform.prepare(flags.platform)
    import jax
    import jax.numpy as jnp
    import optax

    from sheepop_jax.model.loss import chunk_elements, chunk_length, cross_entropy_sum
    from sheepop_jax.model.transformer import padded_vocab_size, unembed

    rows = padded_vocab_size(shape.vocab)
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.standard_normal((shape.batch, shape.time, shape.width)), "f4")
    table = jnp.asarray(0.02 * generator.standard_normal((rows, shape.width)), "f4")
    targets = jnp.asarray(generator.integers(0, shape.vocab, (shape.batch, shape.time)), "i4")
    weights = jnp.ones(targets.shape)

    def chunked(hidden: Any, table: Any) -> Any:
        chunk = chunk_length(targets.size, rows, chunk_elements(machine.platform))
        return cross_entropy_sum(hidden, table, targets, weights, shape.vocab, 0.0, chunk)

    def whole(hidden: Any, table: Any) -> Any:
        logits = unembed(hidden, table, shape.vocab, 0.0)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    function = jax.value_and_grad({"chunked": chunked, "whole": whole}[flags.way], (0, 1))
    program = jax.jit(function).lower(hidden, table).compile()

    def work() -> float:
        value, gradients = program(hidden, table)
        jax.block_until_ready(gradients)
        return float(value)

    temporaries = program.memory_analysis().temp_size_in_bytes
    return work, {"temporaries_MB": round(temporaries / 1e6)}


def main() -> None:
    """Serves the work selected by the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["train_step", "decode", "read", "loss"])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--platform", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=1, help="train_step: steps per turn")
    parser.add_argument("--rows", type=int, default=1, help="decode: prompts per batch")
    parser.add_argument("--prompt", type=int, default=16, help="decode: tokens per prompt")
    parser.add_argument("--new_tokens", type=int, default=128, help="decode: tokens to generate")
    parser.add_argument("--way", default="chunked", help="loss: chunked or whole")
    parser.add_argument("--devices", type=int, default=1, help="train_step: fake devices")
    for name in SIZES:
        kind = str if name == "remat" else int
        parser.add_argument(f"--{name}", type=kind, help="default: the shape's")
    flags = parser.parse_args()
    sizes = {name: getattr(flags, name) for name in SIZES if getattr(flags, name)}
    shape = dataclasses.replace(SHAPES[flags.shape], **sizes)
    serve(lambda: globals()[flags.work](shape, flags))


if __name__ == "__main__":
    main()
