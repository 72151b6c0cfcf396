"""Two processes of two devices each, over gloo: they train as one, and fail as one."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from sheepop_jax.runtime import distributed
from sheepop_jax.training.signals import EXIT_STOPPED
from tests.faults.harness import (
    FAST_COMPILE,
    KILLED,
    RESUMED,
    STEP,
    STOPPED_BY_ANOTHER,
    Here,
    Runner,
    digests,
    environment,
    largest_difference,
    log_of,
    outcome,
)

# Sums over rows that are split have another order. The largest that was seen is 4.3e-7.
TOLERANCE = 1e-5
STEPS = 10
FIELDS = {
    "train.batch_size": 4,
    "train.num_steps": STEPS,
    "train.sample_tokens": 4,
    "mesh.data": -1,
    "mesh.fsdp": 2,
}
ACROSS = {**FIELDS, "model.d_model": 16, "mesh.fsdp": 1, "mesh.tensor": 2}


@dataclass
class Ended:
    """How a process of several ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float  # until it had ended


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(runner, workdir, *, faults=("", ""), patches=("", ""), when=None):
    """Two processes to their end; `when` is (process, regex, what to do with the two of them)."""
    address, started = f"127.0.0.1:{free_port()}", time.monotonic()
    words = ["--coordinator_address", address, "--num_processes", "2", "--process_id"]
    running = [
        runner.start(
            [*runner.words(workdir), *words, str(i)],
            fault=faults[i],
            patch=patches[i],
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]
    said = [[], []]
    ended = [None, None]

    def listen(i):
        with running[i] as process:
            for line in process.stderr:
                said[i].append(line)
                if when and when[0] == i and re.match(when[1], line):
                    when[2](running)
            out = process.stdout.read()
        code = process.wait()
        ended[i] = Ended(code, out, "".join(said[i]), time.monotonic() - started)

    threads = [threading.Thread(target=listen, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    for process in running:
        process.kill()
    assert None not in ended, "a process that does not end: " + "".join(said[0] + said[1])
    return ended


@pytest.fixture(scope="module")
def two(shared):
    return Runner(shared, FIELDS, devices=2)


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """The undisturbed run of two processes."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    first, other = together(two, workdir)
    assert (first.code, other.code) == (0, 0), first.stderr + other.stderr
    return workdir, first, other


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """The log of this process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    Here(shared, {**FIELDS, "mesh.fsdp": 1}).run(workdir)
    return log_of(workdir)


# A process that sends itself SIGTERM after step 3. Steps are slow from there on, so that the signal
# is noticed before the last one.
STOPS = """
import os, signal, time
from sheepop_jax.training.divergence import DivergenceMonitor
look = DivergenceMonitor.look
def slow(self, step, metrics):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if step >= 3:
        time.sleep(1)
    return look(self, step, metrics)
DivergenceMonitor.look = slow
"""


@pytest.mark.slow  # the next test shows the same, with a stop in between
def test_two_processes_train_as_one_device(whole, alone):
    workdir, first, other = whole
    worst = largest_difference(training(log_of(workdir)), training(alone))
    assert worst < TOLERANCE
    assert log_of(workdir)[-1][-2:] == pytest.approx(alone[-1][-2:], rel=TOLERANCE)
    assert "process 0 of 2" in first.stderr
    # Only the first process prints.
    assert first.stdout.startswith(str(workdir)) and first.stdout.count("\n") == 1
    assert STEP.findall(first.stderr)[-1] == str(STEPS)
    assert other.stdout == ""
    assert len(digests(workdir)) > 15  # one process can read what two have written


def test_two_processes_stop_and_resume_as_one_device_trains(two, alone, tmp_path):
    """One run: a signal to one process, and then to its end."""
    workdir = tmp_path / "run"
    stopped = together(two, workdir, patches=("", STOPS))
    assert [process.code for process in stopped] == [EXIT_STOPPED] * 2, stopped[0].stderr
    assert STOPPED_BY_ANOTHER.search(stopped[0].stderr)
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 3 <= step < STEPS - 2
    assert largest_difference(training(log_of(workdir)), training(alone)[:step]) < TOLERANCE

    first, other = together(two, workdir)
    assert (first.code, other.code) == (0, 0), first.stderr + other.stderr
    assert int(RESUMED.search(first.stderr)[1]) == step
    # An evaluation that a signal ends is not done again: only the training lines are all there.
    worst = largest_difference(training(log_of(workdir)), training(alone))
    print(f"largest relative difference over {STEPS} steps: {worst:.1e}")
    assert worst < TOLERANCE
    assert log_of(workdir)[-1][-2:] == pytest.approx(alone[-1][-2:], rel=TOLERANCE)
    assert "process 0 of 2" in first.stderr
    # Only the first process prints.
    assert first.stdout.startswith(str(workdir)) and first.stdout.count("\n") == 1
    assert STEP.findall(first.stderr)[-1] == str(STEPS)
    assert other.stdout == ""
    assert [line for line in other.stderr.splitlines() if not line.startswith("[Gloo]")] == []
    assert len(digests(workdir)) > 15  # one process can read what two have written


def training(log):
    """The lines of training steps."""
    return [line for line in log if line[1] is not None]


# The rest is for `make soak`: each with processes of its own.
@pytest.mark.slow
def test_the_death_of_one_process_ends_the_other(two, tmp_path):
    """And loses nothing: the run resumes from the last save, to its end."""
    workdir = tmp_path / "run"
    step = 0
    died = together(two, workdir, faults=("", "save-begun:2"))
    assert died[1].code == KILLED, died[0].stderr + died[1].stderr
    assert died[0].code not in (0, EXIT_STOPPED)
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name[0] != ".")
    assert step < saved < STEPS

    first, other = together(two, workdir)
    assert (first.code, other.code) == (0, 0), first.stderr + other.stderr
    assert int(RESUMED.search(first.stderr)[1]) == saved


@pytest.mark.slow
def test_a_tensor_axis_goes_across_processes(shared, alone, tmp_path):
    """Each process then holds all rows of the batch, and half of each matrix."""
    wide = Runner(shared, {**ACROSS, "mesh.tensor": 4, "model.num_heads": 4}, devices=2)
    narrow = Runner(shared, {**ACROSS, "mesh.tensor": 1, "model.num_heads": 4})
    ended = together(wide, tmp_path / "wide")
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert narrow.run(tmp_path / "narrow").code == 0
    found, expected = log_of(tmp_path / "wide"), log_of(tmp_path / "narrow")
    assert largest_difference(found, expected) < TOLERANCE


# Restores the newest checkpoint of a run over all devices that there are, and saves it again.
MOVE = """
import sys
from pathlib import Path
from sheepop_jax.runtime import distributed
from sheepop_jax.runtime import platform
source, target, *member = sys.argv[1:]
if member:
    member = [member[0], 2, int(member[1])]
member = distributed.DistributedConfig(*member)
platform.prepare("cpu", lambda: distributed.initialize(member))
import jax
from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.model.partitioning import make_mesh
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.resume import restore_or_init
run = open_run(source)
optimizer = make_optimizer(run.config.optimizer, make_schedule(run.config.optimizer, 9))
mesh = make_mesh(MeshConfig(1, -1, 1), jax.devices())
state, _, _ = restore_or_init(run.model(), optimizer, 0, mesh, run.checkpoints)
[kernel] = {x.addressable_shards[0].data.shape for x in [state.params["embedding"]]}
moved = CheckpointSaver(Path(target) / "checkpoints")
moved.save(state, {})
moved.wait()
print(jax.device_count(), kernel)
"""


def move(devices, source, target, count=1):
    """In one process or in two; returns what each printed last."""
    member = [f"127.0.0.1:{free_port()}"] if count > 1 else []
    flags = f"--xla_force_host_platform_device_count={devices // count}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MOVE, source, target, *member, *([str(i)] if member else [])],
            env=environment(f"{FAST_COMPILE} {flags}"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=200)[0].splitlines()[-1] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return said


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_to_two_processes_and_back(shared, tmp_path):
    fields = {"model.d_model": 32, "train.batch_size": 8, "train.num_steps": 2, "mesh.fsdp": 8}
    eight, two, again = (tmp_path / name for name in ("eight", "two", "again"))
    assert Runner(shared, fields, devices=8).run(eight).code == 0
    assert move(4, eight, two, count=2) == ["4 (128, 8)"] * 2
    for name in ("config.json", "tokenizer.json"):
        (two / name).write_bytes((eight / name).read_bytes())
    assert move(8, two, again) == ["8 (128, 4)"]
    expected = digests(eight)
    assert len(expected) > 40
    assert digests(two) == expected
    assert digests(again) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_when_one_dies_the_other_ends_and_the_relaunch_goes_on(two, whole, tmp_path, dying):
    workdir = tmp_path / "run"
    faults = ["", ""]
    faults[dying] = "save-begun:3"
    ended = together(two, workdir, faults=faults)
    assert ended[dying].code == KILLED, ended[dying].stderr
    assert ended[1 - dying].code not in (0, EXIT_STOPPED)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name[0] != ".") == [
        "00000004"
    ]
    again = together(two, workdir)
    assert [process.code for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert RESUMED.search(again[0].stderr)[1] == "4"
    assert outcome(workdir) == outcome(whole[0])


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(two, tmp_path):
    """Its connections stay open, so only the heartbeat tells."""

    def freeze(running):
        os.kill(running[1].pid, signal.SIGSTOP)
        # Its end would tell the other one too: that comes much later.
        threading.Timer(distributed.HEARTBEAT_SECONDS + 120, running[1].kill).start()

    first, frozen = together(two, tmp_path / "run", when=(0, r"step 3/", freeze))
    assert first.code not in (0, EXIT_STOPPED)
    assert first.seconds < frozen.seconds - 30


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(two, whole, tmp_path):
    workdir = tmp_path / "run"
    ended = together(
        two, workdir, when=(0, r"step 3/", lambda running: running[1].send_signal(signal.SIGTERM))
    )
    assert [process.code for process in ended] == [EXIT_STOPPED] * 2, ended[0].stderr
    assert STOPPED_BY_ANOTHER.search(ended[0].stderr)
    again = together(two, workdir)
    assert [process.code for process in again] == [0, 0]
    step = int(RESUMED.search(again[0].stderr)[1])
    assert 3 <= step <= STEPS
    # An evaluation that a signal ends is not done again: the checkpoints and the losses are equal.
    found, expected = outcome(workdir), outcome(whole[0])
    assert (
        found["checkpoints"].items()
        >= {
            name: digest
            for name, digest in expected["checkpoints"].items()
            if name.startswith(f"{STEPS:08d}")
        }.items()
    )
    assert [x for x in found["log"] if x[1]] == [x for x in expected["log"] if x[1]]


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(two, whole):
    other = Runner(two.directory, {**FIELDS, "train.batch_size": 8}, devices=2)
    ended = together(other, whole[0])
    for process in ended:
        assert process.code == 2
        assert f"error: {whole[0]}: " in process.stderr
        assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_save_is_done_for_none_before_it_is_committed(two, tmp_path):
    """Else the others would be at the end, waiting for the first, which may still be hashing."""
    slow = """
import time
from sheepop_jax.checkpoint.saver import CheckpointSaver
publish = CheckpointSaver._publish
CheckpointSaver._publish = lambda *args: (time.sleep(3), publish(*args))
"""
    looks = """
import sys
from sheepop_jax.checkpoint.saver import CheckpointSaver
wait = CheckpointSaver.wait
def look(self):
    busy = self._pending is not None
    wait(self)
    if busy:
        print("found", self.steps(), file=sys.stderr)
CheckpointSaver.wait = look
"""
    runner = Runner(two.directory, {**FIELDS, "train.num_steps": 2}, devices=2)
    ended = together(runner, tmp_path / "run", patches=(slow, looks))
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "found [2]" in ended[1].stderr and "found []" not in ended[1].stderr


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(two, tmp_path):
    """The other waits in the middle of a step; the first must not wait for it in turn."""
    fails = """
import sheepop_jax.training.divergence as health
def look(self, step, metrics):
    if step == 3:
        raise health.TrainingDiverged("as planned")
health.DivergenceMonitor.look = look
"""
    ended = together(two, tmp_path / "run", patches=("", fails))
    assert ended[1].code == 1 and "error: as planned" in ended[1].stderr
    assert ended[0].code not in (0, EXIT_STOPPED)
