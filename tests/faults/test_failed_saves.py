"""A save that cannot be: one line says why, exit 1, and the run resumes from the one before."""

import dataclasses
import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.saver import CheckpointSaver, SaveFailed
from tests.faults.harness import ROOT, environment, outcome

pytestmark = pytest.mark.usefixtures("fast_compile")

# From the first save on: the compile cache may be written before.
FULL = """
import resource
from sheepop_jax.checkpoint.saver import CheckpointSaver
save = CheckpointSaver.save
def full(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    save(*arguments)
CheckpointSaver.save = full
"""


def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    runner, here, undisturbed, snapshots, tmp_path
):
    """A limit on the size of files stands for the full disk."""
    workdir = shutil.copytree(snapshots["after-rename", 2].path, tmp_path / "run")
    failed = runner.run(workdir, patch=FULL)
    assert failed.code == 1 and failed.began_at == 4, failed.said
    assert not failed.saved and "Traceback" not in failed.said, failed.said
    [told] = [line for line in failed.said.splitlines() if line.startswith("error: ")]
    assert told == failed.said.splitlines()[-1]
    assert told.startswith(f"error: {workdir}/checkpoints/00000006: ") and "MB free" in told
    assert here.run(workdir).began_at == 4
    assert outcome(workdir) == undisturbed


def test_parameters_that_are_not_finite_end_the_run_and_it_can_go_on(
    here, undisturbed, snapshots, tmp_path
):
    workdir = shutil.copytree(snapshots["after-rename", 2].path, tmp_path / "run")
    save = CheckpointSaver.save

    def poisoned(self, state, figures):
        bad = jax.numpy.nan if state.step == 6 else 1
        params = jax.tree.map(lambda p: p * bad, state.params)
        save(self, dataclasses.replace(state, params=params), figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointSaver, "save", poisoned)
        with pytest.raises(SaveFailed, match="00000006.*not finite"):
            here.run(workdir)
    assert here.run(workdir).began_at == 4
    assert outcome(workdir) == undisturbed


def test_only_what_orbax_says_of_a_failed_save_is_kept_back(monkeypatch):
    """Which of it comes in a real failure is a matter of timing."""
    absl, shown = logging.getLogger("absl"), []
    monkeypatch.setattr(absl, "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    storage._hush_orbax()
    storage._hush_orbax()  # with each save
    other = SimpleNamespace(exc_value=RuntimeError("another"))
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    sys.unraisablehook(other)
    assert shown == [other]

    def passes(message):
        return bool(absl.filter(logging.LogRecord("absl", logging.ERROR, "", 0, message, (), None)))

    assert passes("another") and not passes("[thread=x] _SignalingThread.run() raised an exception")


def test_with_debug_nothing_is_kept_back(monkeypatch):
    hook = sys.unraisablehook
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    monkeypatch.setattr(storage.log, "isEnabledFor", lambda level: level == logging.DEBUG)
    storage._hush_orbax()
    assert sys.unraisablehook is hook and logging.getLogger("absl").filters == []


def test_writes_that_never_began_are_not_warned_of():
    """Which of orbax's writes have begun when the disk is full hangs on the clock."""
    code = "from sheepop_jax.checkpoint import storage\nasync def write(): pass\nHUSH\nwrite()\n"
    for hush, expected in (("storage._hush_orbax()", ""), ("pass", "never awaited")):
        result = subprocess.run(
            [sys.executable, "-c", code.replace("HUSH", hush)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment(),
        )
        assert expected in result.stderr and bool(result.stderr) == bool(expected)
