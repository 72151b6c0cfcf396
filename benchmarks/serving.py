"""The server against our own `generate`, llama.cpp's server and transformers, in tokens per second.

    python benchmarks/serving.py [--clients 1 8 32] [--turns 5]

The base model with random weights, fp32. A turn is one streamed completion for each client, all
sent at once: prompts of 16 token ids, 128 new tokens, greedy. `generate` of sheepop_jax and of
transformers get the same prompts as one batch. "share" is relative to `generate` of sheepop_jax,
"first token" what the clients see. llama.cpp needs the packages gguf and xllamacpp.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.contest import ROOT, Contender, say, take_turns
from benchmarks.lib.flags import absolute, parser
from benchmarks.lib.report import publish
from benchmarks.lib.servers import GGUF

CONTEXT = 1024  # as in decode.py


def main() -> None:
    """Prints one table for all numbers of clients."""
    made = parser(__doc__, turns=5, peers=True)
    made.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--prompt", type=int, default=16)
    made.add_argument("--new_tokens", type=int, default=128)
    flags = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        words = ["-m", "benchmarks.lib.random_run", "base", str(CONTEXT), directory]
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT)
        for clients in flags.clients:
            rows += contest(Path(directory), clients, flags)
    publish("serving", rows, {"slots": max(flags.clients)}, flags.out)


def contest(directory: Path, clients: int, flags: Any) -> list[dict[str, Any]]:
    """Returns the rows of one number of clients."""
    length = ["--prompt", str(flags.prompt), "--new_tokens", str(flags.new_tokens)]
    batch = ["decode", "base", "--rows", str(clients), *length]
    asked = [str(directory), "base", "--clients", str(clients), *length]
    asked += ["--slots", str(max(flags.clients)), "--platform", flags.platform]
    generate = Contender("sheepop_jax generate", "ours", [*batch, "--platform", flags.platform])
    contenders = [Contender("sheepop_jax serve", "servers", ["ours", *asked]), generate]
    if (directory / GGUF).exists():
        contenders.append(Contender("llama.cpp server", "servers", ["llama", *asked]))
    else:
        say("llama.cpp server: left out, there is no GGUF")
    kind = ["--kind", "starcoder2"]  # the architecture of sheepop_jax
    python = absolute(flags.peer_python)
    contenders.append(Contender("transformers generate", "peers", [*batch, *kind], python))
    finished = take_turns(contenders, flags.turns, flags.within)
    tokens = clients * flags.new_tokens
    return [
        {
            "clients": clients,
            "contender": c.name,
            "tokens/s": tokens / c.median,
            "ms/turn": 1e3 * c.median,
            "min–max": c.spread,
            "share": f"{generate.median / c.median:.0%}" if generate in finished else "",
            "first token: p50, ms": first_token(c, 50),
            "p99, ms": first_token(c, 99),
        }
        for c in finished
    ]


def first_token(contender: Contender, percentile: int) -> float | None:
    """Milliseconds to the first token over all clients and turns; None without clients."""
    if contender.module != "servers":
        return None
    values = sorted(1e3 * first for turn in contender.results for first in turn["first"])
    return values[len(values) * percentile // 100]


if __name__ == "__main__":
    main()
