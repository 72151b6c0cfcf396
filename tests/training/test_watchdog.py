"""A late step is said once, with the stacks of all threads."""

import re
import threading
import time

import pytest

from sheepop_jax.training import watchdog
from sheepop_jax.training.watchdog import Watchdog


@pytest.fixture
def dog(monkeypatch):
    monkeypatch.setattr(watchdog, "_AT_LEAST_SECONDS", 1.0)
    found = Watchdog()
    yield found
    found.close()
    assert not found._thread.is_alive()


def steps(dog, count, seconds=0.005):
    dog.resume()
    for step in range(count):
        time.sleep(seconds)
        dog.step(step)


def wait_for(caplog, count, seconds=20.0):
    until = time.monotonic() + seconds
    while len(caplog.records) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(caplog.records) == count


def test_a_late_step_is_said_once_and_the_next_one_again(dog, caplog):
    steps(dog, 5)
    wait_for(caplog, 1)
    assert re.search(r"the step after 4 has taken \d s so far, the median is 0\.0", caplog.text)
    assert f"0x{threading.main_thread().ident:x}".lstrip("0x") in caplog.text
    assert "test_watchdog.py" in caplog.text
    time.sleep(1.5)
    assert len(caplog.records) == 1
    dog.step(5)
    wait_for(caplog, 2)


def test_nothing_is_late_while_paused_or_before_there_is_a_median(dog, caplog):
    dog.resume()
    time.sleep(1.4)  # the first step: there is nothing to compare with
    steps(dog, 5)
    dog.pause()
    time.sleep(1.6)
    assert not caplog.records
    dog.resume()
    wait_for(caplog, 1)


def test_the_limit_is_ten_medians(monkeypatch):
    dog = Watchdog()
    assert dog.limit() == float("inf")
    dog._seconds.extend([1.0, 3.0, 2.0])
    assert dog.limit() == 20.0
    dog._seconds.extend([0.1] * 50)
    assert dog.limit() == watchdog._AT_LEAST_SECONDS
    dog.close()
