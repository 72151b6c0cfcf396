"""A save that cannot be: one line says why, exit 1, and the run goes on from the one before."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sheepop_jax.training import storage
from tests.faults.harness import KILLED, outcome
from tests.test_train_cli import ROOT, environment

FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
NOT_FINITE = """
import dataclasses, jax
from sheepop_jax.training import trainer
make = trainer.make_train_step
def made(*arguments):
    step = make(*arguments)
    def stepped(state, batch):
        new, metrics = step(state, batch)
        bad = jax.numpy.where(state.step == 5, jax.numpy.nan, 1)  # in the sixth step, saved next
        return dataclasses.replace(new, params=jax.tree.map(lambda p: p * bad, new.params)), metrics
    return stepped
trainer.make_train_step = made
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "reason"), [(FULL, "MB free there"), (NOT_FINITE, "not finite")], ids=["full", "nan"]
)
def test_a_failed_save_is_one_line_and_the_run_can_go_on(
    patch, reason, runner, undisturbed, tmp_path
):
    """A limit on the size of files stands for the full disk."""
    workdir = tmp_path / "run"
    assert runner.run(workdir, fault="after-rename:2").code == KILLED
    failed = runner.run(workdir, patch=patch)
    assert failed.code == 1 and failed.began_at == 4
    assert not failed.saved and "Traceback" not in failed.stderr, failed.stderr
    told = [line for line in failed.stderr.splitlines() if "not saved" in line]
    assert told == failed.stderr.splitlines()[-1:]
    assert told[0].startswith(f"error: {workdir}/checkpoints/00000006: not saved (")
    assert reason in told[0] and "older checkpoints are intact" in told[0]
    again = runner.run(workdir)
    assert (again.code, again.began_at) == (0, 4), again.stderr
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
    code = "from sheepop_jax.training import storage\nasync def write(): pass\nHUSH\nwrite()\n"
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
