"""Signals to real processes, in each phase: how soon they leave, and with which code."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sheepop_jax.training.stop import StopRequested, StopSignal

ROOT = Path(__file__).resolve().parents[2]
# The main thread is in compiled code, as it is in XLA's compiler: no Python handler can run there.
DEAF = "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**8)"
HEARS = "import time\nwhile True:\n    time.sleep(0.01)\n    stop.check()"
PROGRAM = """
import sys
from sheepop_jax.training.stop import EXIT_STOPPED, StopRequested, StopSignal
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


def start(phase, saves=False, after=""):
    indented = phase.replace("\n", "\n    ")
    saves = "stop.something_to_save()" if saves else ""
    after = after.replace("\n", "\n    ")
    code = PROGRAM.format(phase=indented, saves=saves, after=after)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process, seconds=8.0):
    """Exit code, the rest of stdout, and stderr; how long it took."""
    since = time.monotonic()
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err, time.monotonic() - since


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_something_to_save_even_a_deaf_process_leaves(number):
    process = start(DEAF)
    process.send_signal(number)
    code, out, err, seconds = end(process)
    assert (code, out) == (75, "") and seconds < 5
    assert re.search(rf"{number.name}: stopping; once more", err)


def test_a_process_that_listens_leaves_by_itself():
    process = start(HEARS)
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (75, "asked SIGTERM\n")


def test_with_something_to_save_it_is_waited_for():
    process = start(HEARS, saves=True, after="time.sleep(2.0)\nprint('saved', flush=True)")
    process.send_signal(signal.SIGINT)
    code, out, err, _ = end(process)
    assert (code, out) == (75, "asked SIGINT\nsaved\n")
    assert "SIGINT: saving and stopping; once more to leave at once" in err


@pytest.mark.parametrize("saves", [False, True])
def test_the_second_signal_ends_a_deaf_process_at_once(saves):
    process = start(DEAF, saves=saves)
    process.send_signal(signal.SIGTERM)
    # Two that are pending together would come in the order of their numbers.
    time.sleep(1.5 if saves else 0.2)
    if saves:
        assert process.poll() is None  # it waits for the step in hand
    process.send_signal(signal.SIGINT)
    code, _, _, seconds = end(process)
    assert code == 128 + signal.SIGINT and seconds < 5


def test_other_signals_are_not_meant():
    process = start(HEARS)
    process.send_signal(signal.SIGCHLD)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


def test_what_is_not_installed_never_stops():
    stop = StopSignal()
    stop.check()
    stop.something_to_save()
    stop._name = "SIGTERM"
    with pytest.raises(StopRequested):
        stop.check()
    with pytest.raises(StopRequested):
        stop.something_to_save()
