"""Whether bf16 with cuDNN's attention computes what fp32 without it does, on this card.

    python benchmarks/gpu_numbers.py [--shape base]

One model, the same parameters and tokens, both ways: loss and gradient, which should agree to what
bf16 can hold. Exit status 1 when they do not. Also asserts that cuDNN's attention was taken.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After the path is set, so that it runs from anywhere.
from benchmarks.lib.flags import parser
from benchmarks.lib.ours import model_config
from benchmarks.lib.report import publish
from benchmarks.lib.shapes import SHAPES
from sheepop_jax.runtime import platform

LOSS, GRADIENT = 2e-3, 3e-2  # relative: a few of bf16's steps of 2^-8


def main() -> None:
    """A row for each way; the last column compares with the first row."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="base")
    flags = made.parse_args()
    machine = platform.prepare(flags.platform)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from sheepop_jax.model.attention import choose_implementation
    from sheepop_jax.model.loss import chunk_length, cross_entropy_sum
    from sheepop_jax.model.transformer import Transformer, output_embedding
    from sheepop_jax.training.step import init_params, jit_init

    shape = dataclasses.replace(SHAPES[flags.shape], batch=2)
    config = model_config(shape)
    dtypes = {"float32": jnp.dtype("float32"), "bfloat16": jnp.dtype("bfloat16")}
    plain = Transformer(config, shape.vocab)
    params = jit_init(lambda: init_params(plain, 0))()
    ids = np.random.default_rng(0).integers(0, shape.vocab, (shape.batch, shape.time + 1))
    rows, norms = [], {}
    for name, dtype in dtypes.items():
        attention = choose_implementation(machine.platform, dtype, config.head_dim, 0.0)
        model = Transformer(config, shape.vocab, dtype, attention)

        def loss(params, model=model):
            hidden, _ = model.apply({"params": params}, ids[:, :-1])
            table, weights = output_embedding(params), jnp.ones(ids[:, 1:].shape)
            chunk = chunk_length(weights.size, table.shape[0])
            total = cross_entropy_sum(hidden, table, ids[:, 1:], weights, shape.vocab, chunk)
            return total / weights.size

        # Timing every way to multiply takes minutes in fp32, and changes no number that counts.
        options = {"xla_gpu_autotune_level": 0} if machine.platform == "cuda" else None
        with jax.default_matmul_precision("highest" if name == "float32" else "default"):
            step = jax.jit(jax.value_and_grad(loss), compiler_options=options)
            value, gradient = step(params)
        norms[name] = gradient
        leaves = zip(*map(jax.tree.leaves, (gradient, norms["float32"])), strict=True)
        off = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in leaves)
        rows.append({"dtype": name, "attention": attention, "loss": float(value), "gradient": off})
    off_loss = abs(rows[1]["loss"] / rows[0]["loss"] - 1)
    publish("gpu_numbers", rows, {"device": machine.device_kind, "loss_off": off_loss}, flags.out)
    if machine.platform == "cuda" and rows[1]["attention"] != "cudnn":
        raise SystemExit("bf16 on CUDA did not take cuDNN's attention")
    if off_loss > LOSS or rows[1]["gradient"] > GRADIENT:
        raise SystemExit("bf16 is further from fp32 than rounding explains")


if __name__ == "__main__":
    main()
