"""Lines in the log where there is no terminal, a bar where there is one."""

import io
import itertools
import re
import time
from types import SimpleNamespace

import pytest

from sheepop_jax import progress as module
from sheepop_jax.progress import Progress, elapsed


@pytest.fixture
def by_clock(monkeypatch):
    """Each look at the clock takes so many seconds."""

    def set_clock(seconds):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    return set_clock


@pytest.fixture
def lines(caplog):
    with caplog.at_level("INFO", "sheepop_jax"):
        yield lambda: [record.message for record in caplog.records]


def test_a_long_reading_logs_its_progress(by_clock, lines):
    by_clock(3)
    with Progress("data: encoding", 10_000_000) as progress:
        for _ in range(40):
            progress.update(250_000)
    # By this clock, of 3 s a look: at 3 s, then every 12 s.
    assert lines()[0] == "data: encoding: 0.2 MB"  # the first update has no rate
    assert lines()[1] == "data: encoding: 1.2 MB, 0.08 MB/s, 105 s left"
    assert len(lines()) == 10
    assert lines()[-1] == "data: encoding: 9.2 MB, 0.08 MB/s, 9 s left"


def test_a_short_reading_does_not(by_clock, lines):
    by_clock(0.1)
    with Progress("data: encoding", 10_000_000) as progress:
        for _ in range(19):
            progress.update(250_000)
    assert lines() == []


@pytest.mark.parametrize("total", [0, 400_000, 500_000])
def test_what_is_left_is_told_only_where_it_is_known(by_clock, lines, total):
    by_clock(3)
    with Progress("data: reading", total) as progress:
        for amount in (0, 100_000, 100_000, 100_000, 200_000):
            progress.update(amount)
    assert lines()[1:] == ["data: reading: 0.5 MB, 0.04 MB/s"]


def test_nothing_is_estimated_from_almost_nothing(by_clock, lines):
    """A source that takes long to open, and then gives a few bytes."""
    by_clock(3)
    with Progress("data: reading", 40_000_000) as progress:
        for amount in (15, 15, 15, 15, 15, 20_000_000):
            progress.update(amount)
    assert lines() == ["data: reading: 0.0 MB", "data: reading: 0.0 MB"]


def test_nothing_read_yet(by_clock, lines):
    by_clock(3)
    with Progress("data: reading", 100) as progress:
        progress.update(0)
    assert lines() == ["data: reading: 0.0 MB"]


def test_each_update_checks(lines):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with Progress("data: reading", 0, check) as progress:
            for _ in range(9):
                progress.update(1)
    assert len(calls) == 3


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch, by_clock, lines):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    bars, real = [], module.tqdm.tqdm

    def bar(**options):
        assert options.pop("delay") == 2
        bars.append(real(**options, file=Terminal(), mininterval=0))
        return bars[0]

    monkeypatch.setattr(module, "tqdm", SimpleNamespace(tqdm=bar))
    by_clock(3)
    with Progress("data: reading", 4_000_000) as progress:
        for _ in range(3):
            progress.update(1_000_000)
    assert lines() == []
    assert "data: reading:  75%" in bars[0].fp.getvalue()
    assert "3.00M/4.00M" in bars[0].fp.getvalue()
    assert bars[0].disable  # closed


def test_a_call_without_progress_logs_its_seconds(monkeypatch, lines):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt), elapsed("data: training"):
        deadline = time.monotonic() + 30
        while len(lines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt
    said = lines()
    assert len(said) >= 2
    assert all(re.fullmatch(r"data: training: \d+ s so far", line) for line in said)
    time.sleep(0.1)
    assert lines() == said
