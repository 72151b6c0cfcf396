"""Process time until the validation loss on Tiny Shakespeare is at most 1.8857.

    python benchmarks/time_to_loss.py --text tinyshakespeare.txt [--turns 3] [--ablate]

nanoGPT's CPU recipe reaches this loss. The model is the same: characters, 4 layers of 128, context
64. The loss covers the whole last tenth, in windows of 64 without overlap. The time is that of a
whole process: interpreter, imports, data, compilation, training, evaluation and checkpoint. "first
time" has empty caches for compiled programs and tokens, "again" those of the previous run. Each run
has its own seed and directory.

--ablate changes one ingredient of configs/shakespeare_fast.py at a time, for the same number of
steps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.contest import say
from benchmarks.lib.flags import absolute, parser
from benchmarks.lib.report import publish

ROOT = Path(__file__).resolve().parent.parent

TARGET = 1.8857
ADAM_BETAS = ["--config.optimizer.b1=0.9", "--config.optimizer.b2=0.99"]
ABLATIONS: dict[str, list[str]] = {
    "everything": [],
    "AdamW at its best rate, 3e-3, instead of Muon": [
        *("--config.optimizer.name=adamw", "--config.optimizer.learning_rate=3e-3"),
        *ADAM_BETAS,
    ],
    "learning rate 4e-3 instead of 1.4e-2": ["--config.optimizer.learning_rate=4e-3"],
    "cosine to a tenth instead of linear to zero": [
        *("--config.optimizer.schedule=cosine", "--config.optimizer.final_lr_fraction=0.1"),
    ],
    "100 warmup updates instead of 10": ["--config.optimizer.warmup_steps=100"],
    "b1 0.9 and b2 0.99 instead of 0.8 and 0.95": ADAM_BETAS,
}


def main() -> None:
    """Prints one row per contender, or per ingredient."""
    made = parser(__doc__, turns=3, peers=True)
    made.add_argument("--text", required=True, metavar="FILE", help="Tiny Shakespeare, 1.1 MB")
    made.add_argument("--ablate", action="store_true")
    flags = made.parse_args()
    flags.text = os.path.abspath(flags.text)
    with tempfile.TemporaryDirectory() as scratch:
        rows = ablate(flags, scratch) if flags.ablate else contest(flags, scratch)
    name = "time_to_loss_ablation" if flags.ablate else "time_to_loss"
    publish(name, rows, {"target": TARGET}, flags.out)


def contest(flags: Any, scratch: str) -> list[dict[str, Any]]:
    """Runs the contenders in turns, each as a whole process."""
    runs: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, words: Sequence[str], cache: str) -> None:
        runs.setdefault(name, []).append(measure(words, cache))
        say(f"{name}: {runs[name][-1]}")

    for turn in range(flags.turns):
        cache = f"{scratch}/cache{turn}"
        for which in ("first time", "again"):
            words = ours(flags, f"{scratch}/{turn}{which}", turn)
            note(f"sheepop_jax, {which}", words, cache)
        peer = [absolute(flags.peer_python), "-m", "benchmarks.lib.nanogpt", flags.text]
        note("torch, nanoGPT's recipe", peer, cache)
    ours_again = statistics.median(s for s, _ in runs["sheepop_jax, again"])
    return [row(name, found, ours_again) for name, found in runs.items()]


def ablate(flags: Any, scratch: str) -> list[dict[str, Any]]:
    """Trains with each ingredient changed, for the same number of steps."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for turn in range(flags.turns):
        for name, changes in ABLATIONS.items():
            words = ours(flags, f"{scratch}/{turn}{name}", turn)
            runs.setdefault(name, []).append(measure([*words, *changes], f"{scratch}/cache"))
            say(f"{name}: {runs[name][-1]}")
    whole = statistics.median(s for s, _ in runs["everything"])
    return [row(name, found, whole) for name, found in runs.items()]


def row(name: str, found: list[tuple[float, float]], reference: float) -> dict[str, Any]:
    """Returns a table row: medians and ranges of seconds and losses."""
    seconds, losses = zip(*found, strict=True)
    return {
        "process": name,
        "s": statistics.median(seconds),
        "min–max": f"{min(seconds):.1f}–{max(seconds):.1f}",
        "relative": statistics.median(seconds) / reference,
        "loss": f"{statistics.median(losses):.4f}",
        "losses": f"{min(losses):.4f}–{max(losses):.4f}",
        "reached": f"{sum(loss <= TARGET for loss in losses)} of {len(losses)}",
    }


def ours(flags: Any, workdir: str, seed: int) -> list[str]:
    """Returns the training command."""
    return [
        *(
            sys.executable,
            str(ROOT / "train.py"),
            "--config",
            f"{ROOT}/configs/shakespeare_fast.py",
        ),
        *(f"--config.data.path={flags.text}", f"--config.seed={seed}", "--workdir", workdir),
        f"--config.train.platform={flags.platform}",
    ]


def measure(words: Sequence[str], cache: str) -> tuple[float, float]:
    """Returns the seconds of a whole process and its final validation loss."""
    from sheepop_jax.training.metrics import read_metrics

    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    if "--workdir" not in words:
        return seconds, float(done.stdout)
    lines = read_metrics(Path(words[words.index("--workdir") + 1]))
    return seconds, [line["val_loss"] for line in lines if "val_loss" in line][-1]


if __name__ == "__main__":
    main()
