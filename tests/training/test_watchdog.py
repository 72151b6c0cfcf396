"""A late step is said once, with the stacks of all threads."""

import threading
import time

import pytest

from sheepop_jax.training import watchdog
from sheepop_jax.training.watchdog import Watchdog


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(watchdog, "time", found)
    monkeypatch.setattr(watchdog, "_LOOK_SECONDS", 0.01)
    return found


@pytest.fixture
def dog(clock):
    found = Watchdog()
    yield found
    found.close()
    assert not found._thread.is_alive()


def steps(dog, clock, count):
    dog.resume()
    for step in range(count):
        clock.now += 0.02
        dog.step(step)


def wait_for(caplog, count):
    until = time.monotonic() + 60
    while len(caplog.records) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(caplog.records) == count


def looked(dog, monkeypatch):
    """Returns once the thread has looked at the clock as it is now."""
    limit, seen = dog.limit, threading.Event()
    monkeypatch.setattr(dog, "limit", lambda: (limit(), seen.set())[0])
    assert seen.wait(60)
    seen.clear()  # what it saw first may have begun before
    assert seen.wait(60)


def test_a_late_step_is_said_once_and_the_next_one_again(dog, clock, caplog, monkeypatch):
    steps(dog, clock, 5)
    clock.now += 9.9
    looked(dog, monkeypatch)
    assert not caplog.records
    clock.now += 3.1
    wait_for(caplog, 1)
    assert caplog.records[0].args[:3] == (4, 13.0, pytest.approx(0.02))
    assert f"0x{threading.main_thread().ident:x}".lstrip("0x") in caplog.text
    assert "test_watchdog.py" in caplog.text
    clock.now += 1000
    time.sleep(0.1)
    assert len(caplog.records) == 1
    dog.step(5)
    clock.now += 1000
    wait_for(caplog, 2)


def test_nothing_is_late_while_paused_or_before_there_is_a_median(dog, clock, caplog, monkeypatch):
    dog.resume()
    clock.now += 1000  # the first step: there is nothing to compare with
    looked(dog, monkeypatch)
    steps(dog, clock, 5)
    dog.pause()
    clock.now += 1000
    time.sleep(0.1)
    assert not caplog.records
    dog.resume()
    clock.now += 1000
    wait_for(caplog, 1)


def test_the_limit_is_ten_medians(monkeypatch):
    dog = Watchdog()
    assert dog.limit() == float("inf")
    dog._seconds.extend([1.0, 3.0, 2.0])
    assert dog.limit() == 20.0
    dog._seconds.extend([0.1] * 50)
    assert dog.limit() == watchdog._AT_LEAST_SECONDS
    dog.close()
