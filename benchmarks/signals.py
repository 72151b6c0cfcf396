"""Time from SIGTERM to the exit of train.py, by phase; medians in seconds.

    python benchmarks/signals.py [--repeats 3]

Trains quickstart on Python's standard library in new directories and prints a table.
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
# Phase → the log line that triggers the signal, and the delay in seconds.
PHASES = {
    "training the tokenizer": ("training a bpe", 0.1),
    "encoding": ("training a bpe", 3.0),
    "compiling the train step": ("compiling the train step", 0.3),
    "training": ("step 20/", 0.5),
    "evaluating": ("step 40/", 0.1),
}


def main() -> None:
    """Runs one process per phase and repeat."""
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
    """Returns the exit code and the seconds from the signal to the exit."""
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
