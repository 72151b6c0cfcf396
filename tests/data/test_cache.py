"""What is reused, what is made anew, what is deleted."""

import logging
import os
import time

import pytest

from sheepop_jax.data.preprocess import cache, encode
from sheepop_jax.data.preprocess import prepare as module
from sheepop_jax.data.preprocess.corpus_store import write_corpus_store
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.sources import paths
from sheepop_jax.errors import InputError
from tests.data.preparing import names_in


def test_is_reused_while_nothing_changes(config, monkeypatch, caplog):
    first = prepare(config())
    monkeypatch.setattr(module, "write_corpus_store", None)
    monkeypatch.setattr(module, "encode_units", None)
    with caplog.at_level(logging.INFO, "sheepop_jax"):
        second = prepare(config(seq_len=11))  # windows are not part of the files
    assert f"reused from {first.directory}" in caplog.text
    assert second.identity == first.identity
    assert second.gzip_bits_per_byte == first.gzip_bits_per_byte


def test_reads_files_again_that_changed_a_moment_ago(config, monkeypatch):
    monkeypatch.setattr(paths, "_SETTLED_SECONDS", 1000.0)
    reads = []

    def count(*arguments):
        reads.append(1)
        return write_corpus_store(*arguments)

    monkeypatch.setattr(module, "write_corpus_store", count)
    first = prepare(config())
    monkeypatch.setattr(module, "encode_units", None)
    assert prepare(config()).identity == first.identity
    assert len(reads) == 2
    assert names_in(first.directory.parent) == [first.directory.name]


def test_another_tokenizer_needs_no_other_signature(config, tmp_path, monkeypatch):
    """What is remembered is the text; the shards' name has the rest."""
    first = prepare(config())
    second = prepare(config(tokenizer="char"))
    monkeypatch.setattr(module, "write_corpus_store", None)
    assert prepare(config()).directory == first.directory
    assert prepare(config(tokenizer="char")).directory == second.directory


@pytest.mark.parametrize("memory", ["", "[]", '{"x": 1}', '{"fingerprint": "0"}'])
def test_a_broken_memory_is_as_good_as_none(config, tmp_path, memory):
    first = prepare(config())
    [path] = (tmp_path / "cache" / "sources").glob("*.json")
    path.write_text(memory)
    assert prepare(config()).identity == first.identity
    assert names_in(tmp_path / "cache") == [first.directory.name]


def test_is_made_anew_for_other_text_tokenizers_and_splits(config, tmp_path):
    first = prepare(config())
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(first.tokenizer.to_json(), encoding="utf-8")
    others = [
        prepare(config(vocab_size=263)),
        prepare(config(tokenizer="char")),
        prepare(config(tokenizer=str(tokenizer))),
        prepare(config(val_split="tail")),
        prepare(config(val_fraction=0.4)),
        prepare(config(tokenizer_sample_bytes=2000)),
    ]
    with (tmp_path / "text" / "00.txt").open("a") as file:
        file.write("x")
    others.append(prepare(config()))
    assert len({data.directory for data in [first, *others]}) == 8
    assert others[2].identity == first.identity  # the same tokens by another way
    others.pop(2)
    assert len({str(data.identity) for data in [first, *others]}) == 7


def test_an_edit_of_the_same_size_is_noticed(config, tmp_path):
    first = prepare(config())
    path = tmp_path / "text" / "00.txt"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(config()).identity != first.identity


def test_does_not_depend_on_where_the_text_lies(config, tmp_path):
    first = prepare(config())
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    again = prepare(config(path=str(tmp_path / "elsewhere")))
    assert (again.identity, again.directory) == (first.identity, first.directory)
    assert names_in(tmp_path / "cache") == [first.directory.name]


def test_default_is_the_users(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(config(cache_dir="")).directory.parent == tmp_path / "xdg" / "sheepop_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = prepare(config(cache_dir="")).directory
    assert directory.parent == tmp_path / "home" / ".cache" / "sheepop_jax"


def test_unfinished_work_is_deleted_after_a_day_and_nothing_else(config, tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    unfinished = [
        ".tokens-0123456789abcdef",
        ".spool-0123456789abcdef",
        ".deleted-0123456789abcdef",
        ".reading-17-01234567",
    ]
    others = [".oh-my-zsh", ".vscode-server", "0123456789abcdef", ".spool-of-mine", "a-b"]
    living = ".tokens-00000000000000ff"
    yesterday = time.time() - 86_400 - 60
    for name in [*unfinished, *others, living]:
        (directory / name).mkdir()
        (directory / name / "file").write_text("x")
        if name != living:
            os.utime(directory / name / "file", (yesterday, yesterday))
        os.utime(directory / name, (yesterday, yesterday))
    data = prepare(config())
    assert names_in(directory) == sorted([*others, living, data.directory.name])


def test_text_in_use_is_not_abandoned(config, tmp_path, monkeypatch):
    old = time.time() - 90_000
    ages = []
    inner = encode._encode_unit

    def check_age(directory, unit, spool, *rest):
        os.utime(spool.directory, (old, old))
        inner(directory, unit, spool, *rest)
        ages.append(time.time() - spool.directory.stat().st_mtime)

    monkeypatch.setattr(encode, "_encode_unit", check_age)
    prepare(config())
    assert max(ages) < 1000


def test_that_cannot_be_written_is_refused_before_the_text_is_read(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "write_corpus_store", None)
    said = r"data\.cache_dir: got '.*file/cache \(Not a directory; \d+ MB free\).*try another"
    with pytest.raises(InputError, match=said):
        prepare(config(cache_dir=str(tmp_path / "file" / "cache")))


def test_that_is_read_only_serves_what_it_has(config, monkeypatch):
    first = prepare(config())

    def refuse(self, check):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cache.Cache, "lock", refuse)
    assert prepare(config()).identity == first.identity
    with pytest.raises(InputError, match=r"data\.cache_dir: .*Read-only file system"):
        prepare(config(tokenizer="char"))
