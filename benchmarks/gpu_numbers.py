"""Checks that bf16 with cuDNN attention agrees with fp32 and XLA attention on this GPU.

    python benchmarks/gpu_numbers.py [--shape base]

Computes loss and gradient of one model with the same parameters and tokens both ways. Exits with 1
if they differ by more than bf16 rounding, or if cuDNN attention was not used.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.flags import parser
from benchmarks.lib.ours import model_config
from benchmarks.lib.report import publish
from benchmarks.lib.shapes import SHAPES
from sheepop_jax.runtime import platform

LOSS, GRADIENT = 2e-3, 3e-2  # relative tolerances; bf16 has a relative spacing of 2^-8


def main() -> None:
    """Prints one row per dtype; the last column is the gradient's difference from fp32."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="base")
    flags = made.parse_args()
    machine = platform.prepare(flags.platform)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from sheepop_jax.model.flash_attention import choose_implementation
    from sheepop_jax.model.loss import chunk_length, cross_entropy_sum
    from sheepop_jax.model.transformer import Transformer, init_params, output_embedding
    from sheepop_jax.training.step import jit_init

    shape = dataclasses.replace(SHAPES[flags.shape], batch=2)
    config = model_config(shape)
    dtypes = {"float32": jnp.dtype("float32"), "bfloat16": jnp.dtype("bfloat16")}
    plain = Transformer(config, shape.vocab)
    params = jit_init(lambda: init_params(plain, 0))()
    ids = np.random.default_rng(0).integers(0, shape.vocab, (shape.batch, shape.time + 1))
    rows, norms = [], {}
    for name, dtype in dtypes.items():
        attention = choose_implementation(machine.platform, dtype, config.head_width, 0.0)
        model = Transformer(config, shape.vocab, dtype, attention)

        def loss(params, model=model):
            hidden, _ = model.apply({"params": params}, ids[:, :-1])
            table, weights = output_embedding(params), jnp.ones(ids[:, 1:].shape)
            chunk = chunk_length(weights.size, table.shape[0])
            total = cross_entropy_sum(hidden, table, ids[:, 1:], weights, shape.vocab, 0.0, chunk)
            return total / weights.size

        # Autotuning fp32 matmuls takes minutes and does not affect the comparison.
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
        raise SystemExit("bf16 on CUDA did not use cuDNN attention")
    if off_loss > LOSS or rows[1]["gradient"] > GRADIENT:
        raise SystemExit("bf16 and fp32 differ by more than rounding")


if __name__ == "__main__":
    main()
