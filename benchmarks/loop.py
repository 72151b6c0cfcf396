"""Overhead of the training loop over the compiled step alone.

    python benchmarks/loop.py [--steps 300] [--turns 5]

Both train the same small model from the same state on the same data, in turns: the trainer's loop
with its data, metrics, log and progress, and a bare Python loop that calls the compiled step on
batches already on the device. Evaluation and saving are disabled; the trainer's clock excludes them
anyway.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.flags import parser
from benchmarks.lib.report import publish
from sheepop_jax.config.loading import load_config
from sheepop_jax.runtime import platform

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints two rows with median times per step and their ratio."""
    made = parser(__doc__, turns=5)
    made.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
    made.add_argument("--steps", type=int, default=300)
    flags = made.parse_args()
    platform.prepare(flags.platform)
    seconds: dict[str, list[float]] = {"bare step": [], "trainer": []}
    for turn in range(flags.turns + 1):
        for name, measure in (("bare step", bare), ("trainer", trained)):
            per_step = measure(flags.config, flags.steps)
            if turn:
                seconds[name].append(per_step)
    ratios = [t / b for b, t in zip(*seconds.values(), strict=True)]
    rows = [
        {
            "loop": name,
            "ms/step": 1e3 * statistics.median(values),
            "min–max": "–".join(f"{1e3 * f(values):.4g}" for f in (min, max)),
            "relative": statistics.median(ratios) if name == "trainer" else 1.0,
            "each turn": "–".join(f"{f(ratios):.3f}" for f in (min, max))
            if name == "trainer"
            else "",
        }
        for name, values in seconds.items()
    ]
    publish("loop", rows, {"steps": flags.steps}, flags.out)


def make_job(path: str, steps: int, directory: str) -> Any:
    """Returns the job of train.py, without evaluation and samples."""
    import jax

    from sheepop_jax.data.loader import PackingConfig, TrainBatches
    from sheepop_jax.data.preprocess.prepare import prepare
    from sheepop_jax.model.partitioning import make_mesh
    from sheepop_jax.model.transformer import Transformer
    from sheepop_jax.training.loop import Job

    every = ("train.eval_every", "checkpoint.save_every", "optimizer.warmup_steps")
    config = load_config(path, [f"train.num_steps={steps}", *(f"{name}=0" for name in every)])
    data = prepare(config.data)
    train = config.train
    return Job(
        config=config,
        directory=Path(directory),
        model=Transformer(config.model, data.tokenizer.vocab_size),
        mesh=make_mesh(config.mesh, jax.devices()),
        batches=TrainBatches(
            data.train,
            PackingConfig.of(config.data, data.tokenizer.end_of_text),
            seed=config.seed,
            accum=train.grad_accum_steps,
            batch_size=train.batch_size,
        ),
        num_steps=steps,
        evaluate=lambda params: dict.fromkeys(
            ("val_loss", "val_perplexity", "val_bits_per_byte", "val_accuracy"), 1.0
        ),
        sample=None,
        flops_per_token=0.0,
        peak_flops=0.0,
    )


def trained(path: str, steps: int) -> float:
    """Returns seconds per step by the trainer's own clock, from metrics.jsonl."""
    from sheepop_jax.training.loop import fit
    from sheepop_jax.training.metrics import read_metrics
    from sheepop_jax.training.signals import StopSignal

    with tempfile.TemporaryDirectory() as directory:
        fit(make_job(path, steps, directory), StopSignal())
        lines = [line for line in read_metrics(Path(directory)) if "loss" in line]
    first, last = lines[0], lines[-1]  # the first interval includes the warmup
    return (last["train_seconds"] - first["train_seconds"]) / (last["step"] - first["step"])


def bare(path: str, steps: int) -> float:
    """Returns seconds per step of the compiled step alone."""
    import jax

    from sheepop_jax.training.optimizer import make_optimizer, make_schedule
    from sheepop_jax.training.step import init_state, jit_init, jit_step, make_train_step

    job = make_job(path, steps, "")
    schedule = make_schedule(job.config.optimizer, steps)
    optimizer = make_optimizer(job.config.optimizer, schedule)
    state = jit_init(lambda: init_state(job.model, optimizer, job.config.seed))()
    function = make_train_step(job.model, optimizer, schedule, job.config.seed)
    batches = [jax.device_put(batch) for batch in job.batches.iterate(0, 8)]
    jitted = jit_step(function, None, job.mesh, job.config.model.remat)
    step = jitted.lower(state, batches[0]).compile()
    log_every = job.config.train.log_every
    for i in range(log_every):
        state, metrics = step(state, batches[i % 8])
    jax.block_until_ready(metrics)
    started = time.perf_counter()
    for i in range(steps - log_every):
        state, metrics = step(state, batches[i % 8])
    jax.block_until_ready(metrics)
    return (time.perf_counter() - started) / (steps - log_every)


if __name__ == "__main__":
    main()
