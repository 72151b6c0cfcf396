"""Several processes that want the same shards."""

import contextlib
import json
import logging
import shutil

import pytest

from sheepop_jax import __main__ as tools
from sheepop_jax.data.preprocess import cache, encode
from sheepop_jax.data.preprocess import prepare as module
from sheepop_jax.data.preprocess.corpus_store import write_corpus_store
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.sources import paths
from tests.data.preparing import content_of, names_in, start


def test_several_at_once_end_with_the_same_shards(config, tmp_path, undisturbed):
    processes = [start(config()) for _ in range(3)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    assert names_in(tmp_path / "cache") == [undisturbed.directory.name]
    made = tmp_path / "cache" / undisturbed.directory.name
    assert content_of(made) == content_of(undisturbed.directory)


@pytest.mark.parametrize(
    "place", ["write_corpus_store", "train_bpe", "encode_units", "make_manifest"]
)
def test_one_that_waits_can_give_up(config, place, caplog, monkeypatch):
    """In whatever phase the first one is."""
    inner = getattr(module, place)

    def stop():
        raise LookupError

    def meanwhile(*arguments, **named):
        monkeypatch.setattr(module, place, inner)
        with caplog.at_level(logging.INFO, "sheepop_jax"), pytest.raises(LookupError):
            prepare(config(), check=stop)
        return inner(*arguments, **named)

    monkeypatch.setattr(module, place, meanwhile)
    prepare(config())
    assert caplog.text.count("waiting for another process that prepares the same text") == 1


def test_one_that_waited_takes_what_was_made_meanwhile(config, monkeypatch):
    inner = cache.Cache.lock

    @contextlib.contextmanager
    def late(self, check):
        monkeypatch.setattr(cache.Cache, "lock", inner)
        prepare(config())
        monkeypatch.setattr(module, "write_corpus_store", None)
        with self.lock(check):
            yield

    monkeypatch.setattr(cache.Cache, "lock", late)
    assert prepare(config()).train_tokens > 0


def test_one_that_is_overtaken_takes_the_others_shards(config, tmp_path, undisturbed, monkeypatch):
    """The same text elsewhere has another lock; it is not read again."""
    monkeypatch.setattr(paths, "_SETTLED_SECONDS", 1000)
    shutil.copytree(tmp_path / "text", tmp_path / "elsewhere")
    reads, closed = [], []
    inner = encode._Writer.close

    def count(*arguments):
        reads.append(1)
        return write_corpus_store(*arguments)

    def overtaken(self):
        closed.append(self)
        if len(closed) == 3:
            prepare(config(path=str(tmp_path / "elsewhere")))
        return inner(self)

    monkeypatch.setattr(module, "write_corpus_store", count)
    monkeypatch.setattr(encode._Writer, "close", overtaken)
    data = prepare(config())
    assert len(reads) == 2
    assert names_in(tmp_path / "cache") == [data.directory.name]
    assert content_of(data.directory) == content_of(undisturbed.directory)


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


def test_any_process_of_the_command_prepares_and_reports_the_same(config, tmp_path, capsys):
    fields = {"path": tmp_path / "text", "cache_dir": tmp_path / "cache", "seq_len": 13}
    words = ["data", "--config", "configs/base.py", "--json", "--config.data.tokenizer=char"]
    words += [f"--config.data.{name}={value}" for name, value in fields.items()]
    reports = []
    for index in (1, 0):  # also if the first one never comes
        tools.main([*words, "--process_index", str(index), "--process_count", "2"])
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    assert reports[0]["sources"][0]["documents_read"] == 31
