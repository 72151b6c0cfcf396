"""Several processes that share a cache and the work."""

import contextlib
import json
import logging
import signal
import subprocess
import sys

import numpy as np
import pytest

from sheepop_jax.data import cache, encode
from sheepop_jax.data import prepare as module
from sheepop_jax.data.prepare import prepare
from sheepop_jax.data.sources import paths
from sheepop_jax.data.spool import write_spool
from tests.data.preparing import ROOT, content_of, names_in, units_in


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_units_and_the_batches(config, tmp_path, start, count):
    whole = prepare(config(cache_dir=str(tmp_path / "alone")))
    total = len(whole.manifest["units"])
    options = dict(steps=3, slow=0.05)
    alone = start(config(cache_dir=str(tmp_path / "alone")), **options)
    processes = [start(config(), share=[i, count], **options) for i in range(count)]
    outputs = [process.communicate(timeout=100) for process in [alone, *processes]]
    assert [p.returncode for p in [alone, *processes]] == [0] * (count + 1), outputs
    encoded = [units_in(output) for output, _ in outputs[1:]]
    assert sorted(sum(encoded, [])) == list(range(total))
    for index, numbers in enumerate(encoded):
        assert numbers == list(range(index, total, count))
    [made] = [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("s")]
    assert content_of(made) == content_of(whole.directory)
    assert made.name == whole.directory.name

    def batches(output):
        lines = [line for line in output.splitlines() if line.startswith("batch ")]
        return [[np.array(a) for a in json.loads(line[6:])] for line in lines]

    expected = batches(outputs[0][0])
    shares = [batches(output) for output, _ in outputs[1:]]
    assert len(expected) == 3
    for step in range(3):
        for field in range(3):
            rows = np.concatenate([share[step][field] for share in shares], axis=1)
            np.testing.assert_array_equal(rows, expected[step][field])
            assert rows.shape == (2, 8, 13)


def test_the_others_make_up_for_a_dead_one(config, tmp_path, start):
    whole = prepare(config(cache_dir=str(tmp_path / "alone")))
    total = len(whole.manifest["units"])
    dying = start(config(), share=[1, 2], die=("encode", "_Writer.close", 3, "before"))
    dying.communicate(timeout=60)
    assert dying.returncode == -signal.SIGKILL
    other = start(config(), share=[0, 2], take_over=1.0)
    output, log = other.communicate(timeout=60)
    assert other.returncode == 0, log
    assert "is overdue; encoding it here" in log
    # The share of the dead, but for the unit that it did; one wait, not one for each unit.
    assert units_in(output) == [*range(0, total, 2), *range(3, total, 2)]
    assert log.count("overdue") == len(range(3, total, 2)) > 2
    [made] = [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("s")]
    assert content_of(made) == content_of(whole.directory)


def test_two_at_once_on_the_same_corpus(config, tmp_path, start):
    whole = prepare(config(cache_dir=str(tmp_path / "alone")))
    processes = [start(config(), slow=0.02 * i) for i in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [p.returncode for p in processes] == [0] * 3, outputs
    assert names_in(tmp_path / "cache") == [whole.directory.name]
    assert content_of(tmp_path / "cache" / whole.directory.name) == content_of(whole.directory)


def test_one_that_is_overtaken_takes_the_others_shards(config, tmp_path, start, monkeypatch):
    """Another process finishes while a unit is written here; the text is not read again."""
    monkeypatch.setattr(paths, "_SETTLED_SECONDS", 1000)
    reads = []

    def count(*arguments):
        reads.append(1)
        return write_spool(*arguments)

    monkeypatch.setattr(module, "write_spool", count)
    inner = encode._Writer.close
    calls = []

    def overtaken(self):
        calls.append(self)
        if len(calls) == 3:
            process = start(config())
            assert process.wait(60) == 0
        return inner(self)

    monkeypatch.setattr(encode._Writer, "close", overtaken)
    data = prepare(config())
    assert (len(calls), len(reads)) == (3, 1)
    assert names_in(tmp_path / "cache") == [data.directory.name]
    whole = prepare(config(cache_dir=str(tmp_path / "alone")))
    assert content_of(data.directory) == content_of(whole.directory)


def test_one_that_waited_takes_what_was_made_meanwhile(config, start, monkeypatch):
    inner = cache.Cache.lock

    @contextlib.contextmanager
    def late(self, check):
        assert start(config()).wait(60) == 0
        with inner(self, check):
            yield

    monkeypatch.setattr(cache.Cache, "lock", late)
    monkeypatch.setattr(module, "write_spool", None)
    assert prepare(config()).train_tokens > 0


def test_one_whose_work_another_deleted_begins_again(config, tmp_path, monkeypatch):
    inner = encode._Writer.close
    calls = []

    def deleted(self):
        calls.append(self)
        if len(calls) == 3:
            cache.delete(*(tmp_path / "cache").glob(".*-*"))
        return inner(self)

    monkeypatch.setattr(encode._Writer, "close", deleted)
    data = prepare(config())
    assert names_in(tmp_path / "cache") == [data.directory.name]


def test_waiting_for_the_lock_can_be_given_up(config, tmp_path, caplog, monkeypatch):
    config = config()
    state = []
    inner = cache.Cache.__init__

    def note(self, *arguments, **named):
        inner(self, *arguments, **named)
        state.append(self)

    def stop():
        raise LookupError

    monkeypatch.setattr(cache.Cache, "__init__", note)
    calls = []

    def inside():
        if not calls:
            calls.append(1)
            with caplog.at_level(logging.INFO, "sheepop_jax"), pytest.raises(LookupError):
                prepare(config, check=stop)

    prepare(config, check=inside)
    assert "another process prepares the same text; waiting for it" in caplog.text


def test_a_lock_that_was_deleted_meanwhile_is_made_anew(tmp_path, monkeypatch):
    first = cache.Cache(tmp_path / "cache", "state", True)
    second = cache.Cache(tmp_path / "cache", "state", True)
    third = cache.Cache(tmp_path / "cache", "state", True)
    monkeypatch.setattr(cache, "_POLL_SECONDS", 0)
    first_lock = first.lock(lambda: None)
    first_lock.__enter__()

    def free():
        first._lock.unlink()
        first._lock.parent.rmdir()
        first_lock.__exit__(None, None, None)

    def refuse():
        raise LookupError

    with second.lock(free):
        assert second._lock.exists()
        with pytest.raises(LookupError), third.lock(refuse):
            pass


def test_the_command_shares_work_between_processes(config, tmp_path, process_env):
    words = [
        f"--config.data.{name}={value}"
        for name, value in (
            ("path", tmp_path / "text"),
            ("cache_dir", tmp_path / "cache"),
            ("seq_len", 13),
            ("vocab_size", 307),
            ("val_split", "document"),
            ("val_fraction", 0.2),
        )
    ]
    start = [sys.executable, "-m", "sheepop_jax", "data", "--config", "configs/base.py", *words]
    processes = [
        subprocess.Popen(
            [*start, "--process_index", str(i), "--process_count", "2", "--json"],
            cwd=ROOT,
            env=process_env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    manifests = [json.loads(output) for output, _ in outputs]
    alone = prepare(config(cache_dir=str(tmp_path / "alone")))
    assert manifests[0] == manifests[1]
    assert manifests[0]["sources"] == alone.manifest["sources"]
