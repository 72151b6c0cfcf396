"""Lines in the log where there is no terminal."""

import itertools
from types import SimpleNamespace

from sheepop_jax.data import progress as module
from sheepop_jax.data.progress import Progress


def test_a_long_reading_logs_its_progress(monkeypatch, caplog):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "sheepop_jax"):
        with Progress("data: encoding", 10_000_000) as progress:
            for _ in range(40):
                progress.update(250_000)
    lines = [record.message for record in caplog.records]
    # By this clock, of 3 s a look: at 3 s, then every 12 s.
    assert lines[0] == "data: encoding: 0.2M chars, 0.08M/s, 117 s left"
    assert lines[1] == "data: encoding: 1.2M chars, 0.08M/s, 105 s left"
    assert len(lines) == 10
