"""How soon train.py leaves after SIGTERM, by what it is doing then; medians, in seconds.

    python benchmarks/signals.py [--repeats 3]

Trains a small BPE model on Python's standard library in fresh directories; prints a table.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Phase → the line of the log after which the signal is sent, and how many seconds later.
PHASES = {
    "training the tokenizer": ("training a bpe", 0.1),
    "encoding": ("training a bpe", 3.0),
    "compiling the train step": ("compiling the train step", 0.3),
    "training": ("step 20/", 0.5),
    "evaluating": ("step 40/", 0.1),
}


def main() -> None:
    """One process for each phase and repeat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default 3")
    flags = parser.parse_args()
    print(f"{'phase':28}{'exit code':>10}{'seconds':>10}")
    for phase, (line, delay) in PHASES.items():
        codes, seconds = zip(*(stop(line, delay) for _ in range(flags.repeats)), strict=True)
        print(f"{phase:28}{codes[0] if len(set(codes)) == 1 else codes!s:>10}", end="")
        print(f"{statistics.median(seconds):>10.2f}")


def stop(trigger: str, delay: float) -> tuple[int, float]:
    """Exit code, and seconds from the signal to the end."""
    with tempfile.TemporaryDirectory() as directory:
        words = ["--config", "configs/quickstart.py", "--workdir", f"{directory}/run"]
        words += ["--config.train.eval_every=40", "--config.train.num_steps=400"]
        process = subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": directory},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        sent = 0.0
        with process.stderr as lines:
            for line in lines:
                if not sent and trigger in line:
                    time.sleep(delay)
                    process.send_signal(signal.SIGTERM)
                    sent = time.perf_counter()
        return process.wait(), time.perf_counter() - sent


if __name__ == "__main__":
    main()
