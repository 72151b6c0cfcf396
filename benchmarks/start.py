"""Time from the start of a process to the first training step and to the first sampled token.

    python benchmarks/start.py [--turns 3] [--config configs/quickstart.py]

"first" starts with an empty compile cache, "second" is the same command again. The text is already
tokenized.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.flags import parser
from benchmarks.lib.report import publish

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints one row per command and start, with median seconds."""
    made = parser(__doc__, turns=3)
    made.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
    flags = made.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        train = [str(ROOT / "train.py"), "--config", flags.config, "--config.train.num_steps=3"]
        train += ["--config.optimizer.warmup_steps=1", "--config.train.log_every=1"]
        train += ["--config.train.sample_tokens=0", "--config.train.eval_batches=1"]
        train += [f"--config.train.platform={flags.platform}"]
        sample = [str(ROOT / "sample.py"), "--ckpt", str(home / "run"), "--max_new_tokens", "1"]
        sample += ["--prompt", ""]
        subprocess.run([sys.executable, *train, "--workdir", str(home / "run")], check=True)
        for turn in range(flags.turns):
            shutil.rmtree(home / "cache/sheepop_jax/xla", ignore_errors=True)
            for which in ("first", "second"):
                run = home / f"run{turn}{which}"
                begun = time_until([*train, "--workdir", str(run)], lambda run=run: has_step(run))
                seconds.setdefault(("first training step", which), []).append(begun)
            shutil.rmtree(home / "cache/sheepop_jax/xla", ignore_errors=True)
            for which in ("first", "second"):
                written = time_until(sample, lambda: False)
                seconds.setdefault(("first sampled token", which), []).append(written)
    rows = [
        {
            "until": until,
            "start": which,
            "s": statistics.median(values),
            "min–max": "–".join(f"{f(values):.2f}" for f in (min, max)),
        }
        for (until, which), values in seconds.items()
    ]
    publish("start", rows, {"config": Path(flags.config).name}, flags.out)


def has_step(run: Path) -> bool:
    """Whether the run has logged a training step."""
    path = run / "metrics.jsonl"
    return path.exists() and '"loss"' in path.read_text()


def time_until(words: Sequence[str], seen: Callable[[], bool]) -> float:
    """Returns the seconds until `seen`, or until the process ends; always waits for its end."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=-3)
    found = None
    while process.poll() is None:
        if found is None and seen():
            found = time.perf_counter() - started
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(words)}")
    return found or time.perf_counter() - started


if __name__ == "__main__":
    main()
