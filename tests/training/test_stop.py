"""Signals to real processes, in each phase: whether they leave, and with which code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sheepop_jax.training import signals
from sheepop_jax.training.signals import StopRequested, StopSignal

ROOT = Path(__file__).resolve().parents[2]
# The main thread is in compiled code, as it is in XLA's compiler: no Python handler can run there.
# A lock that it waits for twice, since a signal does not end that wait; zeros are a free lock.
DEAF = """import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
while True: libc.pthread_mutex_lock(mutex)"""
HEARS = "import time\nwhile True:\n    time.sleep(0.01)\n    stop.check()"
PROGRAM = """
{before}
import sys
from sheepop_jax.training import signals as module
{grace}
from sheepop_jax.training.signals import EXIT_STOPPED, StopRequested, StopSignal
stop = StopSignal().install()
{saves}
print("ready", flush=True)
try:
    {phase}
except StopRequested as error:
    print("asked", error, flush=True)
    {after}
    sys.exit(EXIT_STOPPED)
"""


def start(phase, saves=False, after="", grace=None, before=""):
    """A process in this phase. `grace` are seconds for the main thread, if not its own.

    `before` is code that it runs first.
    """
    indented = phase.replace("\n", "\n    ")
    saves = "stop.something_to_save()" if saves else ""
    after = after.replace("\n", "\n    ")
    grace = f"module._GRACE_SECONDS = {grace}" if grace else ""
    code = PROGRAM.format(phase=indented, saves=saves, after=after, grace=grace, before=before)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    """Exit code, the rest of stdout, and of stderr."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def test_before_there_is_something_to_save_even_a_deaf_process_leaves():
    process = start(DEAF)
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert (code, out) == (75, "") and "SIGTERM" in err


def test_with_something_to_save_it_is_waited_for():
    """Longer than the second that a process without has to leave."""
    process = start(HEARS, saves=True, after="time.sleep(2.0)\nprint('saved', flush=True)")
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (75, "asked SIGINT\nsaved\n")
    assert "SIGINT" in err


@pytest.mark.parametrize("saves", [False, True])
def test_the_second_signal_ends_a_deaf_process_at_once(saves):
    process = start(DEAF, saves=saves, grace=None if saves else 600)
    process.send_signal(signal.SIGTERM)
    # Two that are pending together would come in the order of their numbers.
    assert process.stderr.readline() == "\n" and "SIGTERM" in process.stderr.readline()
    if saves:
        time.sleep(1.5)  # more than the grace
        assert process.poll() is None  # it waits for the step in hand
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 128 + signal.SIGINT


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_closed_terminal_and_a_schedulers_warning_are_waited_for(name):
    """Though they come again, and SIGTERM after them; and though nobody reads stderr any more."""
    after = "time.sleep(1.0)\nprint('saved', flush=True)"
    process = start(HEARS, saves=True, after=after)
    process.stderr.close()
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == f"asked {name}\n"
    for again in (getattr(signal, name), signal.SIGHUP, signal.SIGTERM):
        process.send_signal(again)
    process.stderr = None
    assert end(process)[:2] == (75, "saved\n")


def test_under_nohup_a_closed_terminal_is_ignored():
    process = start(HEARS, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (75, "asked SIGTERM\n")


def test_a_platform_without_these_signals(monkeypatch):
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
        monkeypatch.delattr(signal, name)
    code = Path(signals.__file__).read_text()
    without = {"__name__": "without"}
    exec(compile(code, signals.__file__, "exec"), without)
    assert without["_OTHERS"] == ()


def test_other_signals_are_not_meant():
    process = start(HEARS)
    process.send_signal(signal.SIGCHLD)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (75, "asked SIGTERM\n")


def test_what_is_not_installed_never_stops():
    stop = StopSignal()
    stop.check()
    stop.something_to_save()
    stop._name = "SIGTERM"
    with pytest.raises(StopRequested):
        stop.check()
    with pytest.raises(StopRequested):
        stop.something_to_save()
