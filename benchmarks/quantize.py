"""Tokens per second of greedy decoding, with weights and activations in each precision.

    python benchmarks/quantize.py [--batch 1 8] [--turns 9] [--platform cpu]

The base model with random weights, prompts of 16 tokens, 128 new ones. A turn is a whole call,
prompt included; the ways take turns, so that what else the machine does meets all of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After the path is set, so that it runs from anywhere: hence E402.
from configs import base  # noqa: E402
from sheepop_jax import runtime  # noqa: E402
from sheepop_jax.config import Config  # noqa: E402

VOCAB, PROMPT, NEW = 50257, 16, 128


def main() -> None:
    """A row for each batch size and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--platform", default="auto")
    flags = parser.parse_args()
    machine = runtime.prepare(flags.platform)
    import jax
    import numpy as np
    from flax import linen as nn

    from sheepop_jax.generation.bench import _cached
    from sheepop_jax.model.quantize import quantized
    from sheepop_jax.model.transformer import Transformer
    from sheepop_jax.training.step import init_params, jit_init

    config = Config.from_dict(base.get_config()).model
    models = {
        name: Transformer(config, VOCAB, machine.compute_dtype(name))
        for name in ("float32", "bfloat16")
    }
    params = jit_init(lambda: nn.meta.unbox(init_params(models["float32"], 0)))()
    weights = {"": params, " + int8": quantized(params)}
    print(f"{machine.device_kind}, jax {jax.__version__}")
    print("| batch | way | tokens/s, median | best | peak, MB |\n|--:|:--|--:|--:|--:|")
    for size in flags.batch:
        prompts = np.random.default_rng(0).integers(0, VOCAB, (size, PROMPT), np.int32)
        programs = {
            name + how: _cached(models[name], weights[how], prompts, NEW, config.max_seq_len)
            for name in models
            for how in weights
        }
        seconds: dict[str, list[float]] = {way: [] for way in programs}
        for turn in range(1 + flags.turns):  # the first is not counted
            for way, program in programs.items():
                begin = time.perf_counter()
                program.write(False).block_until_ready()
                seconds[way] += [time.perf_counter() - begin] if turn else []
        for way, program in programs.items():
            median, best = statistics.median(seconds[way]), min(seconds[way])
            rates = f"{size * NEW / median:.0f} | {size * NEW / best:.0f}"
            print(f"| {size} | {way} | {rates} | {program.peak_bytes / 1e6:.0f} |")


if __name__ == "__main__":
    main()
