"""Greedy decoding in each precision of weights and activations, in tokens per second.

    python benchmarks/quantize.py [--batch 1 8] [--turns 9] [--platform cpu]

The base model with random weights, prompts of 16 tokens, 128 new tokens. A turn is a whole call,
including the prompt. The precisions take turns, so that other load on the machine affects all of
them.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.flags import parser
from benchmarks.lib.report import publish
from configs import base
from sheepop_jax.config.schema import Config
from sheepop_jax.runtime import platform

VOCAB, PROMPT, NEW = 50257, 16, 128
INT8 = " + int8"


def main() -> None:
    """Prints one row per batch size and precision."""
    made = parser(__doc__, turns=9)
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    flags = made.parse_args()
    machine = platform.prepare(flags.platform)
    import numpy as np

    from sheepop_jax.generation.benchmark import cached_program
    from sheepop_jax.model.linear import quantized
    from sheepop_jax.model.transformer import Transformer, init_params
    from sheepop_jax.training.step import jit_init

    config = Config.from_dict(base.get_config()).model
    models = {
        name: Transformer(config, VOCAB, machine.compute_dtype(name))
        for name in ("float32", "bfloat16")
    }
    params = jit_init(lambda: init_params(models["float32"], 0))()
    weights = {"": params, INT8: quantized(params)}
    rows = []
    for size in flags.batch:
        prompts = np.random.default_rng(0).integers(0, VOCAB, (size, PROMPT), np.int32)
        programs = {
            name + how: cached_program(models[name], weights[how], prompts, NEW, config.max_seq_len)
            for name in models
            for how in weights
        }
        seconds: dict[str, list[float]] = {way: [] for way in programs}
        for turn in range(1 + flags.turns):  # the first turn is a warmup
            for way, program in programs.items():
                begin = time.perf_counter()
                program.write(False)
                seconds[way] += [time.perf_counter() - begin] if turn else []
        rates = {way: [size * NEW / t for t in taken] for way, taken in seconds.items()}
        medians = {way: statistics.median(found) for way, found in rates.items()}
        rows += [
            {
                "batch": size,
                "precision": way,
                "tokens/s": medians[way],
                "min–max": f"{min(rates[way]):.0f}–{max(rates[way]):.0f}",
                "relative to no int8": medians[way] / medians[way.removesuffix(INT8)],
                "peak, MB": round(program.peak_bytes / 1e6),
            }
            for way, program in programs.items()
        ]
    publish("quantize", rows, {"device": machine.device_kind}, flags.out)


if __name__ == "__main__":
    main()
