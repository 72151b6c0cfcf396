"""Time that a checkpoint save blocks the training loop: background save against synchronous save.

    python benchmarks/checkpoints.py [--config configs/base.py] [--repeats 5]

Saves a complete training state (parameters and optimizer). A background save blocks the loop until
`save` returns, a synchronous save until the checkpoint is committed.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from sheepop_jax.config.loading import load_config
from sheepop_jax.runtime import platform

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints a table of median times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs/base.py"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--platform", default="cpu")
    flags = parser.parse_args()
    config = load_config(flags.config, [])
    machine = platform.prepare(flags.platform)

    import jax
    import jax.numpy as jnp

    from sheepop_jax.checkpoint.saver import CheckpointSaver
    from sheepop_jax.model.transformer import Transformer
    from sheepop_jax.training.optimizer import make_optimizer, make_schedule
    from sheepop_jax.training.step import init_state, jit_init

    model = Transformer(config.model, config.data.vocab_size, jnp.float32)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
    state = jax.block_until_ready(jit_init(lambda: init_state(model, optimizer, 0))())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    times: dict[str, list[float]] = {"loop waits": [], "until on disk": []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(flags.repeats + 1):
            checkpoints = CheckpointSaver(Path(directory) / str(repeat))
            started = time.perf_counter()
            checkpoints.save(state, {})
            returned = time.perf_counter()
            checkpoints.wait()
            if repeat:  # the first save compiles
                times["loop waits"].append(returned - started)
                times["until on disk"].append(time.perf_counter() - started)
            shutil.rmtree(checkpoints.directory)
    waits, disk = (statistics.median(values) for values in times.values())
    print(f"{count / 1e6:.1f} M parameters, {size / 1e6:.0f} MB of state, {machine.device_kind}")
    print(f"| median of {flags.repeats} saves | loop waits |\n|---|---|")
    print(f"| background save (as in training) | {waits:.3f} s |")
    print(f"| synchronous save | {disk:.3f} s |")
    print(f"| ratio | {disk / waits:.1f} |")


if __name__ == "__main__":
    main()
