"""Cached greedy decoding against transformers' `generate`, in tokens per second.

    python benchmarks/decode.py [--batch 1 8 32] [--turns 5]

The base model with random weights, prompts of 16 tokens, 128 new tokens. A turn is a whole call,
including the prompt. "memory alone" only reads every weight once per new token of the batch: the
bandwidth limit. "share" is relative to it. "speedup" is the row's time over that of sheepop_jax.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.contest import Contender, take_turns
from benchmarks.lib.flags import absolute, parser
from benchmarks.lib.report import publish

PEERS = {"transformers GPT-2": "gpt2", "transformers Starcoder2": "starcoder2"}


def main() -> None:
    """Prints one table for all batch sizes."""
    made = parser(__doc__, turns=5, peers=True, dtype=True)
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--prompt", type=int, default=16)
    made.add_argument("--new_tokens", type=int, default=128)
    flags = made.parse_args()
    rows = []
    for size in flags.batch:
        rows += contest(size, flags)
    publish("decode", rows, {"dtype": flags.dtype}, flags.out)


def contest(size: int, flags: Any) -> list[dict[str, Any]]:
    """Returns the rows of one batch size, sheepop_jax first."""
    words = ["decode", "base", "--rows", str(size), "--dtype", flags.dtype]
    words += ["--prompt", str(flags.prompt), "--new_tokens", str(flags.new_tokens)]
    ours = Contender("sheepop_jax", "ours", [*words, "--platform", flags.platform])
    python = absolute(flags.peer_python)
    peers = [Contender(k, "peers", [*words, "--kind", v], python) for k, v in PEERS.items()]
    memory = Contender("memory alone", "ours", ["read", *words[1:], "--platform", flags.platform])
    finished = take_turns([ours, *peers, memory], flags.turns, flags.within)
    tokens = size * flags.new_tokens
    return [
        {
            "batch": size,
            "contender": c.name,
            "tokens/s": tokens / c.median,
            "ms/call": 1e3 * c.median,
            "min–max": c.spread,
            "speedup": c.median / finished[0].median,
            "share": f"{memory.median / c.median:.0%}" if memory in finished else "",
            "first token: cold, s": c.about.get("first_cold_s"),
            "warm, ms": c.about.get("first_warm_ms"),
            "peak, MB": c.about["peak_MB"],
        }
        for c in finished
    ]


if __name__ == "__main__":
    main()
