"""Runs of train.py that die and go on, and what must be equal in the end."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from sheepop_jax.training import storage
from tests.test_train_cli import ROOT, TINY, environment

KILLED = 137
# Of a line of the log, what does not depend on the clock.
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "skipped", "val_loss", "val_accuracy")
FIELDS = {**TINY, "model.dropout": 0.1, "train.sample_tokens": 0, "checkpoint.keep": 1}


def fault_names():
    """Every name given to `fault_point` or `fault_during` anywhere in the package."""
    names = []
    for path in sorted((ROOT / "sheepop_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fault_"):
                names.append(ast.literal_eval(node.args[0]))
    return names


@dataclass
class Result:
    """How a process ended, and what it printed."""

    code: int
    stderr: str
    seconds: float  # from its first line to its end
    seconds_to_first_step: float  # from its start; 0 if it did not get there

    @property
    def saved(self):
        """Steps that it said were saved."""
        return [int(step) for step in re.findall(r"^saved step (\d+)$", self.stderr, re.M)]

    @property
    def began_at(self):
        """The step that it went on from; 0 for a fresh start, None if it did not get there."""
        if found := re.search(r"^going on from step (\d+)$", self.stderr, re.M):
            return int(found[1])
        return 0 if "beginning at step 0" in self.stderr else None


@dataclass
class Runner:
    """Starts train.py on one core, where XLA's sums have one order.

    Attributes:
        directory: of the text, the data's cache and the compile cache.
        fields: overrides of the configuration.
        devices: that XLA makes of the one core.
    """

    directory: Path
    fields: dict[str, object] = field(default_factory=dict)
    devices: int = 1

    def words(self, workdir):
        text = self.directory / "text.txt"
        if not text.exists():
            text.write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
        places = {"data.path": text, "data.cache_dir": self.directory / "cache"}
        fields = {**FIELDS, **places, **self.fields}
        words = ["--config", "configs/base.py", "--workdir", workdir]
        return [*map(str, words), *(f"--config.{name}={value}" for name, value in fields.items())]

    def start(self, words, *, fault="", patch="", stdout=subprocess.DEVNULL):
        """`train.py` with these words, on its way; stderr is a pipe."""
        code = (
            f"import os, sys; os.sched_setaffinity(0, {{{core()}}})\n"
            f"{patch}\nimport train\nsys.exit(train.main(sys.argv[1:]))"
        )
        env = {**environment(), "XDG_CACHE_HOME": str(self.directory)}
        if self.devices > 1:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.devices}"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            env=env | ({"SHEEPOP_JAX_FAULT": fault} if fault else {}),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *, fault="", patch="", kill_after=None):
        """One process, to its end.

        `fault` is a point to die at. `patch` is code that runs before train.main. `kill_after`
        seconds after its first line, the process is killed.
        """
        started = time.perf_counter()
        process = self.start(self.words(workdir), fault=fault, patch=patch)
        lines, first_line, first_step, timer = [], started, 0.0, None
        with process.stderr:
            for line in process.stderr:
                if not lines:
                    first_line = time.perf_counter()
                if not lines and kill_after is not None:
                    timer = threading.Timer(kill_after, process.kill)
                    timer.start()
                if not first_step and re.match(r"step \d+/", line):
                    first_step = time.perf_counter() - started
                lines.append(line)
        code = process.wait()
        if timer:
            timer.cancel()
            timer.join()
        return Result(code, "".join(lines), time.perf_counter() - first_line, first_step)


def core():
    """One core for each of the processes that run tests side by side."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return cores[int(worker) % len(cores)]


def outcome(workdir):
    """What must not depend on how often a run was killed."""
    return {"checkpoints": digests(workdir), "log": log_of(workdir)}


def log_of(workdir):
    """The lines of the log without what the clock decides; fails on a line that is torn."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [[line.get(name) for name in COMPARED] for line in lines]


def digests(workdir):
    """SHA-256 over the bytes of each array of each checkpoint."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = {}
    for directory in sorted((workdir / "checkpoints").iterdir()):
        for name in ("params", "optimizer"):
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                storage.describe(directory / name),
            )
            tree = storage.read(directory, {name: target})[name]
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                key = f"{directory.name}/{name}/{storage.name_of(path)}"
                found[key] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    return found
