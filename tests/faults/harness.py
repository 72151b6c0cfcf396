"""Runs that die and resume, as processes and in this process, and what must be equal in the end."""

import ast
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from sheepop_jax import faults, pipeline
from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.config.schema import Config
from sheepop_jax.runtime.devices import Runtime
from sheepop_jax.training import loop, resume

ROOT = Path(__file__).resolve().parents[2]
KILLED = 137
# The fields of a log line that do not depend on the clock.
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "skipped", "val_loss", "val_accuracy")
TINY = {
    "model.d_model": 12,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_ff": 20,
    "model.max_seq_len": 32,
    "data.tokenizer": "char",
    "data.seq_len": 16,
    "optimizer.warmup_steps": 2,
    "train.platform": "cpu",
    "train.num_steps": 6,
    "train.batch_size": 3,
    "train.grad_accum_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.sample_tokens": 5,
    "checkpoint.save_every": 2,
}
FIELDS = {
    **TINY,
    "model.dropout": 0.1,
    "train.num_steps": 8,
    "train.sample_tokens": 0,
    "checkpoint.keep": 1,
}

# Everything that the tests read in the log. Change a pattern here when its message changes.
SAVED = re.compile(r"^saved step (\d+)$", re.M)
RESUMED = re.compile(r"^resuming from step (\d+)$", re.M)
FRESH = re.compile(r"^no checkpoint: starting at step 0", re.M)
STEP = re.compile(r"^step (\d+)/\d+", re.M)
EVALUATED = re.compile(r"^step \d+  validation", re.M)
FINISHED_BEFORE = re.compile(r"^training is complete", re.M)
DAMAGED = re.compile(r"damaged")
CHANGED = re.compile(r"^changed since the run started: (\S+) ", re.M)
STOPPED_BY_ANOTHER = re.compile(r"^another process received a stop signal", re.M)


def fault_names():
    """Every name passed to `fault_point` or `fault_during` anywhere in the package."""
    names = []
    for path in sorted((ROOT / "sheepop_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fault_"):
                names.append(ast.literal_eval(node.args[0]))
    return names


# As the fixture `fast_compile`, for a process.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(flags=FAST_COMPILE):
    """The environment of a user, without the flags of the tests, in which XLA compiles fast."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return {**kept, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def core():
    """One core for each pytest worker."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return cores[int(worker) % len(cores)]


def places(directory):
    """A text in a directory, and the fields that name it and the cache of its tokens."""
    text = directory / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
    return {"data.path": str(text), "data.cache_dir": str(directory / "cache")}


@dataclass
class Result:
    """What a run said, and how its process ended."""

    said: str
    code: int = 0
    at: list[float] = field(default_factory=list)  # seconds from the start to each line

    @property
    def saved(self):
        """Steps that it said were saved."""
        return [int(step) for step in SAVED.findall(self.said)]

    @property
    def began_at(self):
        """The step that it resumed from; 0 for a fresh start, None if it did not get there."""
        if found := RESUMED.search(self.said):
            return int(found[1])
        return 0 if FRESH.search(self.said) else None


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
        fields = {**FIELDS, **places(self.directory), **self.fields}
        words = ["--config", "configs/base.py", "--workdir", workdir]
        return [*map(str, words), *(f"--config.{name}={value}" for name, value in fields.items())]

    def start(self, words, *, fault="", patch="", stdout=subprocess.DEVNULL):
        """`train.py` with these words; stderr is a pipe."""
        # Several devices wait for one another by spinning: on a single core that takes minutes.
        pin = f"os.sched_setaffinity(0, {{{core()}}})" if self.devices == 1 else ""
        code = (
            f"import os, sys; {pin}\n"
            # Drawing is half of the time of so short a run.
            "from sheepop_jax.training import curve; curve.draw_curve = lambda directory: None\n"
            f"{patch}\nimport train\nsys.exit(train.main(sys.argv[1:]))"
        )
        env = {**environment(), "XDG_CACHE_HOME": str(self.directory)}
        if self.devices > 1:
            env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={self.devices}"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            env=env | ({"SHEEPOP_JAX_FAULT": fault} if fault else {}),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *, fault="", patch="", kill_at=None):
        """One process, to its end.

        `fault` is a point to die at. `patch` is code that runs before train.main. `kill_at` is a
        number of lines and of seconds: after so many lines and then seconds, it is killed.
        """
        started = time.perf_counter()
        process = self.start(self.words(workdir), fault=fault, patch=patch)
        lines, at, timer = [], [], None
        with process.stderr:
            for line in process.stderr:
                lines.append(line)
                at.append(time.perf_counter() - started)
                if kill_at and len(lines) == kill_at[0]:
                    timer = threading.Timer(kill_at[1], process.kill)
                    timer.start()
        code = process.wait()
        if timer:
            timer.cancel()
            timer.join()
        return Result("".join(lines), code, at)


@dataclass
class Here:
    """Trains in this process. All runs of one object share a compiled step.

    Attributes:
        directory: of the text and the data's cache.
        fields: overrides of the configuration.
        devices: how many of this process's devices are used.
    """

    directory: Path
    fields: dict[str, object] = field(default_factory=dict)
    devices: int = 1
    _compiled: dict[str, object] = field(default_factory=dict)

    def run(self, workdir, *, observer=None):
        """One run to its end, or to the exception that ends it."""
        config = base.get_config()
        config.update_from_flattened_dict({**FIELDS, **places(self.directory), **self.fields})
        log, level = logging.getLogger("sheepop_jax"), logging.getLogger("sheepop_jax").level
        result = Result("")
        listener = logging.Handler()
        listener.emit = lambda record: self._hear(result, record)
        log.addHandler(listener)
        log.setLevel(logging.INFO)
        some = jax.devices()[: self.devices]
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "devices", lambda: some)
                patch.setattr(loop._Loop, "_compile", self._once(loop._Loop._compile))
                patch.setattr(resume, "jit_init", self._once(resume.jit_init))
                patch.setattr(loop, "draw_curve", lambda directory: None)
                patch.setattr(faults, "observer", observer(result) if observer else None)
                if observer:
                    patch.setattr(
                        CheckpointSaver, "_commit", observer.alone(CheckpointSaver._commit)
                    )
                machine = Runtime("cpu", "cpu", self.devices, 0.0)
                pipeline.train(Config.from_dict(config), workdir, machine)
        finally:
            log.removeHandler(listener)
            log.setLevel(level)
        return result

    def _hear(self, result, record):
        result.said += record.getMessage() + "\n"

    def _once(self, make):
        def made(*arguments):
            if make.__name__ not in self._compiled:
                self._compiled[make.__name__] = make(*arguments)
            return self._compiled[make.__name__]

        return made


@dataclass
class Snapshot:
    """The files of a run at one passing of a fault point, and what the run had said by then."""

    path: Path
    said: Result


@dataclass
class Snapshots:
    """Copies a run's directory at fault points, as a kill at that moment would leave it.

    A kill keeps every file as it is and loses what is only in memory: buffers that are not flushed,
    a save that is under way, batches. So does a copy. The run itself is not disturbed, and one run
    gives the files of many kills. A copy does not show how a process ends, which the tests with
    real processes do. It is made while no save is under way in another thread, or at a point of
    the save, so that it is of one moment.

    Attributes:
        workdir: of the run.
        directory: for the copies.
        wanted: point → passings to copy at.
    """

    workdir: Path
    directory: Path
    wanted: dict[str, tuple[int, ...]]
    found: dict[tuple[str, int], Snapshot] = field(default_factory=dict)
    _passed: Counter = field(default_factory=Counter)
    _lock: object = field(default_factory=threading.RLock)

    def __call__(self, result: Result) -> Callable:
        def observer(name, before):
            with self._lock:
                self._passed[name] += 1
                nth = self._passed[name]
                if nth not in self.wanted.get(name, ()):
                    return
                before()
                path = self.directory / f"{name}-{nth}"
                shutil.copytree(self.workdir, path)
                self.found[name, nth] = Snapshot(path, Result(result.said))

        return observer

    def alone(self, commit):
        """A save that holds the lock, so that no copy is made in the middle of it."""

        def locked(*arguments):
            with self._lock:
                return commit(*arguments)

        return locked


def outcome(workdir):
    """What must not depend on how often a run was killed."""
    return {"checkpoints": digests(workdir), "log": log_of(workdir)}


def log_of(workdir):
    """The lines of the log without what the clock decides; fails on a line that is torn."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [[line.get(name) for name in COMPARED] for line in lines]


def largest_difference(found, expected):
    """Relative, over all numbers of two logs that must have the same lines."""
    assert len(found) == len(expected)
    worst = 0.0
    for line, other in zip(found, expected, strict=True):
        for value, wanted in zip(line, other, strict=True):
            if wanted is None or isinstance(wanted, bool | int):
                assert value == wanted
            else:
                worst = max(worst, abs(value - wanted) / abs(wanted))
    return worst


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
