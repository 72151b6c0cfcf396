"""Training steps against PyTorch, with the same model, batch and tokens.

    python benchmarks/train_step.py --shape small base [--remat full none] [--dtype float32]

A step is forward pass, loss, backward pass, clipping and AdamW. The contenders are processes that
take turns. "speedup" is the row's time over that of the first contender. MFU is relative to the
device's bf16 peak, or to the matmul rate measured at the start if the peak is unknown, and counts 6
FLOPs per weight and 12 x layers x T x D per token. Peak memory is of the process.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib import machine
from benchmarks.lib.contest import Contender, say, take_turns
from benchmarks.lib.flags import absolute, parser
from benchmarks.lib.report import publish
from benchmarks.lib.shapes import SHAPES

PEERS = {
    "torch, plain modules": ("plain",),
    "torch, plain, compiled": ("plain", "--compile"),
    "transformers GPT-2": ("gpt2",),
    "transformers Starcoder2": ("starcoder2",),
}


def main() -> None:
    """Prints one table for all shapes."""
    made = parser(__doc__, turns=9, peers=True, dtype=True)
    made.add_argument("--shape", nargs="+", choices=SHAPES, default=["small", "base"])
    made.add_argument("--steps", type=int, default=0, help="steps per turn (default: about 1 s)")
    made.add_argument("--batch", type=int, default=0, help="batch size (default: the shape's)")
    kinds = ("none", "dots", "full")
    made.add_argument(
        "--remat", nargs="+", choices=kinds, default=["none"], help="remat of sheepop_jax"
    )
    made.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    flags = made.parse_args()
    limits = machine.measure(flags.dtype)
    say(f"limits: {limits}")
    rows = []
    for name in flags.shape:
        rows += contest(name, flags, limits)
    publish("train_step", rows, {**limits, "dtype": flags.dtype}, flags.out)


def contest(name: str, flags: Any, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the rows of one shape; the first is sheepop_jax."""
    shape = SHAPES[name]
    steps = flags.steps or (20 if name == "small" else 1)
    words = [
        *("train_step", name, "--steps", str(steps), "--dtype", flags.dtype),
        *("--batch", str(flags.batch)),
    ]
    contenders = []
    for remat in flags.remat:
        about = "sheepop_jax" if remat == "none" else f"sheepop_jax, remat={remat}"
        own = ["--platform", flags.platform, "--remat", remat]
        contenders.append(Contender(about, "ours", [*words, *own]))
    for peer in flags.peers:
        kind, *more = PEERS[peer]
        python = absolute(flags.peer_python)
        contenders.append(Contender(peer, "peers", [*words, "--kind", kind, *more], python))
    finished = take_turns(contenders, flags.turns, flags.within)
    tokens = (flags.batch or shape.batch) * shape.time
    flops = shape.step_flops / shape.tokens * tokens
    return [
        {
            "shape": name,
            "contender": c.name,
            "ms/step": 1e3 * c.median / steps,
            "min–max": "–".join(f"{1e3 * f(c.seconds) / steps:.4g}" for f in (min, max)),
            "tokens/s": tokens * steps / c.median,
            "speedup": c.median / finished[0].median,
            "MFU": f"{flops * steps / c.median / limits['peak_GFLOP_s'] / 1e9:.0%}",
            "peak, MB": c.about["peak_MB"],
            "compile, s": c.about["compile_s"],
        }
        for c in finished
    ]


if __name__ == "__main__":
    main()
