"""Chunked cross-entropy against full logits: time and memory of the loss and its gradients.

    python benchmarks/loss.py [--time 128 256 512] [--batch 4]

Uses the base model's width and vocabulary. Temporaries are the memory of the compiled program
without its arguments and results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.contest import Contender, take_turns
from benchmarks.lib.flags import parser
from benchmarks.lib.report import publish


def main() -> None:
    """Prints one row per sequence length and implementation."""
    made = parser(__doc__, turns=7)
    made.add_argument("--time", type=int, nargs="+", default=[128, 256, 512])
    made.add_argument("--batch", type=int, default=4)
    flags = made.parse_args()
    rows = []
    for time in flags.time:
        words = ["loss", "base", "--batch", str(flags.batch), "--time", str(time)]
        words += ["--platform", flags.platform, "--way"]
        ways = [Contender(way, "ours", [*words, way]) for way in ("chunked", "whole")]
        finished = take_turns(ways, flags.turns)
        rows += [
            {
                "tokens": flags.batch * time,
                "loss": c.name,
                "ms": 1e3 * c.median,
                "min–max": c.spread,
                "time / whole": c.median / finished[-1].median,
                "temporaries, MB": c.about["temporaries_MB"],
                "peak, MB": c.about["peak_MB"],
            }
            for c in finished
        ]
    publish("loss", rows, {}, flags.out)


if __name__ == "__main__":
    main()
