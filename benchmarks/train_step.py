"""Training steps per second beside PyTorch's, on the same model, batch and tokens.

    python benchmarks/train_step.py --shape small base [--remat full none] [--dtype float32]

A step is forward, loss, backward, clipping and AdamW. The contenders are processes that take turns;
"share" is the part of the device's bf16 peak (where that is not known, of the matrix rate measured
at the start) that the step's FLOPs amount to: 6 a weight and 12 layers x T x D, for each token. The
peak in MB is the whole process's memory.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After the path is set, so that it runs from anywhere.
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
    """One table for all shapes, ratios to ours in each."""
    made = parser(__doc__, turns=9, peers=True, dtype=True)
    made.add_argument("--shape", nargs="+", choices=SHAPES, default=["small", "base"])
    made.add_argument("--steps", type=int, default=0, help="in a turn (default: about 1 s of them)")
    made.add_argument("--batch", type=int, default=0, help="instead of the shape's own")
    kinds = ("none", "dots", "full")
    made.add_argument("--remat", nargs="+", choices=kinds, default=["none"], help="ours with each")
    made.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    flags = made.parse_args()
    limits = machine.measure(flags.dtype)
    say(f"limits: {limits}")
    rows = []
    for name in flags.shape:
        rows += contest(name, flags, limits)
    publish("train_step", rows, {**limits, "dtype": flags.dtype}, flags.out)


def contest(name: str, flags: Any, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of one shape; ratios to the first, which is ours."""
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
            "ms a step": 1e3 * c.median / steps,
            "min–max": "–".join(f"{1e3 * f(c.seconds) / steps:.4g}" for f in (min, max)),
            "tokens/s": tokens * steps / c.median,
            "ours is faster": c.median / finished[0].median,
            "share": f"{flops * steps / c.median / limits['peak_GFLOP_s'] / 1e9:.0%}",
            "peak, MB": c.about["peak_MB"],
            "compile, s": c.about["compile_s"],
        }
        for c in finished
    ]


if __name__ == "__main__":
    main()
