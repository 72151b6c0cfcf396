"""From text to token files and back, the cache, and what is refused."""

import itertools
import json
import logging
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepop_jax.data import progress, shards, stream
from sheepop_jax.data import tokenizer as tokenizer_module
from sheepop_jax.data.batches import evaluation_batches
from sheepop_jax.data.progress import Progress
from sheepop_jax.data.shards import TokenStream, encode_text, prepare
from sheepop_jax.data.tokenizer import train_bpe, train_char
from sheepop_jax.errors import InputError

SPECIAL = "sheep <|endoftext|>\r\n e\u0301"
WORDS = ["sheep", "grass", "hill", "and", "the", "wool\n", "  ", "r\u00e9\U0001f411"]


@pytest.fixture
def config(tmp_path, make_config, monkeypatch):
    """A `DataConfig` over tmp_path/text with its cache in tmp_path/cache."""
    monkeypatch.setattr(shards.os, "fsync", lambda file: None)  # takes 50 ms on a busy disk
    text = tmp_path / "text"
    text.mkdir()
    generator = np.random.default_rng(5)
    for i in range(31):
        path = text / f"{i:02}.txt"
        path.write_text(" ".join(generator.choice(WORDS, 41)), encoding="utf-8", newline="")

    def make(**fields):
        here = {"path": str(text), "cache_dir": str(tmp_path / "cache")}
        fields = {**here, "val_split": "document", "val_fraction": 0.2, **fields}
        return make_config({f"data.{name}": value for name, value in fields.items()}).data

    return make


@pytest.fixture
def small_pieces(monkeypatch):
    """Borders of shards, batches and pieces fall within every text."""
    monkeypatch.setattr(stream, "_SHARD_TOKENS", 23)
    monkeypatch.setattr(stream, "_BATCH_CHARS", 17)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 29)


def documents_of(tokens_of, tokenizer):
    """The texts of a stream, through evaluation windows."""
    tokens = [int(tokens_of.read(0, 1)[0])]
    for batch in evaluation_batches(tokens_of, seq_len=7, batch_size=3, overlap=2):
        tokens += batch.targets[batch.weights > 0].tolist()
    assert tokens[0] == tokens[-1] == tokenizer.end_of_text
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text]
    spans = zip(ends, ends[1:], strict=False)
    return [tokenizer.decode(tokens[start + 1 : stop]) for start, stop in spans]


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(st.text().filter(lambda text: text.strip("\ufeff").strip()), max_size=6),
    kind=st.sampled_from(["bpe", "char"]),
    fraction=st.floats(0.1, 1),
)
def test_every_byte_of_any_text_comes_back(
    texts, kind, fraction, config, tmp_path_factory, small_pieces
):
    texts = [text.lstrip("\ufeff") for text in texts]
    # The first holds every character, so that a character tokenizer knows the others' too.
    texts.insert(0, "a" + "".join(sorted(set("".join(texts) + SPECIAL))) + "a")
    texts.append(SPECIAL)
    root = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (root / f"{i}.txt").write_bytes(text.encode())
    made = config(
        path=str(root),
        cache_dir=str(root / "cache"),
        tokenizer=kind,
        val_split="tail",
        val_fraction=fraction * len("".join(texts[1:])) / len("".join(texts)),
        seq_len=2,
    )
    data = prepare(made)
    found = documents_of(data.train, data.tokenizer), documents_of(data.validation, data.tokenizer)
    # The cut makes two of one document, so the whole is compared without its borders.
    assert "".join(found[0] + found[1]) == "".join(texts)
    assert len(found[0]) == data.train.num_documents
    assert len("".join(found[0]).encode()) == data.train.num_bytes
    assert len("".join(found[1]).encode()) == data.validation.num_bytes
    assert data.train.num_documents + data.validation.num_documents - len(texts) in (0, 1)


def test_the_layout_of_a_stream():
    tokenizer = train_char(["abc"])
    a, b, c = tokenizer.encode("abc")
    tokens = encode_text(tokenizer, ["ab", "", "c"])
    assert tokens.tolist() == [0, a, b, 0, 0, c, 0]
    assert tokens.dtype == np.int32
    assert encode_text(tokenizer, []).tolist() == [0]


def test_a_corpus_in_files_is_the_stream_of_its_parts(config, small_pieces, tmp_path):
    data = prepare(config())
    texts = [path.read_bytes().decode() for path in sorted((tmp_path / "text").iterdir())]
    train, validation = (documents_of(s, data.tokenizer) for s in (data.train, data.validation))
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in train] == train
    expected = encode_text(data.tokenizer, train)
    np.testing.assert_array_equal(data.train.read(0, len(data.train)), expected)
    assert data.tokenizer.fingerprint == train_bpe(iter(train), 307).fingerprint
    manifest = json.loads((data.directory / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    assert (entry["tokens"], entry["documents"]) == (len(expected), len(train))
    assert entry["bytes"] == data.train.num_bytes == sum(len(t.encode()) for t in train)
    assert [file["tokens"] for file in entry["files"][:-1]] == [23] * (len(entry["files"]) - 1)
    assert manifest["dtype"] == "<u2"


def test_gzip_figure(config, tmp_path):
    words = np.random.default_rng(7).choice(WORDS, 30_000)
    (tmp_path / "text" / "long.txt").write_text(" ".join(words), encoding="utf-8")
    data = prepare(config(val_split="tail"))
    content = "".join(documents_of(data.validation, data.tokenizer)).encode()
    # `gzip -9` writes the same bytes as zlib at level 9, in a frame of 18 bytes.
    size = len(zlib.compress(content, 9)) - 6 + 18
    assert data.gzip_bits_per_byte == pytest.approx(8 * size / len(content))


def test_reading_across_shards(small_pieces, config):
    data = prepare(config())
    whole = data.train.read(0, len(data.train))
    for start, stop in ((0, 0), (0, 1), (22, 23), (23, 24), (22, 24), (5, 71), (46, 69)):
        np.testing.assert_array_equal(data.train.read(start, stop), whole[start:stop])
    assert data.train.read(5, 29).dtype == np.int32
    for start, stop in ((-1, 3), (3, len(whole) + 1), (4, 3)):
        with pytest.raises(IndexError):
            data.train.read(start, stop)
    memory = TokenStream.from_array(whole, 11, 3)
    np.testing.assert_array_equal(memory.read(5, 71), whole[5:71])
    assert (len(memory), memory.num_bytes, memory.num_documents) == (len(whole), 11, 3)


def test_a_vocabulary_beyond_16_bits(tmp_path, config):
    characters = "".join(chr(0x10000 + i) for i in range(70_000))
    path = tmp_path / "many.txt"
    text = characters + characters[-30_000:]
    path.write_text(text, encoding="utf-8")
    data = prepare(config(path=str(path), tokenizer="char", val_split="tail", val_fraction=0.2))
    assert data.tokenizer.vocab_size == 70_001
    assert documents_of(data.train, data.tokenizer) == [text[: int(100_000 * 0.8)]]
    assert data.train.read(70_000, 70_001).tolist() == [70_000]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    tokenizer = train_char(["abc"])
    tokenizer.vocab_size = 3
    writer = stream.SplitWriter(tmp_path, "train", tokenizer, Progress("", 0))
    writer.add("a", "abc", 3)
    with pytest.raises(InputError, match=r"id 3.*ids below its vocabulary size 3"):
        writer.close()


class TestCache:
    def test_is_reused_while_nothing_changes(self, config, monkeypatch, caplog):
        first = prepare(config())
        monkeypatch.setattr(shards, "_build", None)
        with caplog.at_level(logging.INFO, "sheepop_jax"):
            second = prepare(config(seq_len=11))  # windows are not part of the files
        assert f"reused from {first.directory}" in caplog.text
        assert second.identity == first.identity
        assert second.gzip_bits_per_byte == first.gzip_bits_per_byte

    def test_is_made_anew_for_other_text_tokenizers_and_splits(self, config, tmp_path):
        first = prepare(config())
        tokenizer = tmp_path / "tokenizer.json"
        tokenizer.write_text(first.tokenizer.to_json(), encoding="utf-8")
        others = [
            prepare(config(vocab_size=263)),
            prepare(config(tokenizer="char")),
            prepare(config(tokenizer=str(tokenizer))),
            prepare(config(val_split="tail")),
            prepare(config(val_fraction=0.4)),
        ]
        with (tmp_path / "text" / "00.txt").open("a") as file:
            file.write("x")
        others.append(prepare(config()))
        assert len({data.directory for data in [first, *others]}) == 7
        assert others[2].identity == first.identity  # the same tokens by another way
        others.pop(2)
        assert len({str(data.identity) for data in [first, *others]}) == 6

    def test_does_not_depend_on_where_the_text_lies(self, config, tmp_path):
        first = prepare(config())
        (tmp_path / "text").rename(tmp_path / "elsewhere")
        assert prepare(config(path=str(tmp_path / "elsewhere"))).identity == first.identity

    def test_default_is_the_users(self, config, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert prepare(config(cache_dir="")).directory.parent == tmp_path / "xdg" / "sheepop_jax"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        directory = prepare(config(cache_dir="")).directory
        assert directory.parent == tmp_path / "home" / ".cache" / "sheepop_jax"

    @pytest.mark.parametrize("damage", ["truncate", "append", "flip", "delete", "manifest"])
    @pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "tokenizer.json"])
    def test_damage_is_refused(self, config, monkeypatch, name, damage):
        if damage in ("truncate", "append"):
            monkeypatch.setattr(shards, "_HASH_BYTES", 0)  # as for large files: by size alone
        directory = prepare(config()).directory
        path = directory / name
        content = path.read_bytes()
        match damage:
            case "truncate":
                path.write_bytes(content[:-2])
            case "append":
                path.write_bytes(content + b"xx")
            case "flip":
                path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
            case "delete":
                path.unlink()
            case "manifest":
                path = directory / "manifest.json"
                path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match=rf"{path.name}.*try deleting {directory};"):
            prepare(config())

    def test_a_directory_without_manifest_is_refused(self, config):
        directory = prepare(config()).directory
        (directory / "manifest.json").unlink()
        with pytest.raises(InputError, match=rf"manifest\.json.*try deleting {directory};"):
            prepare(config())

    def test_a_file_that_shrinks_during_the_run_is_an_error_not_a_crash(self, config):
        data = prepare(config())
        with (data.directory / "train-00000.bin").open("rb+") as file:
            file.truncate(10)
        with pytest.raises(InputError, match="train-00000.bin: got '10 bytes'"):
            data.train.read(0, 13)

    def test_nothing_is_left_behind_by_a_failure(self, config, tmp_path, monkeypatch):
        def fail(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(shards, "_write_text", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(config())
        assert list((tmp_path / "cache").iterdir()) == []

    def test_of_two_processes_the_second_takes_the_firsts(self, config, tmp_path, monkeypatch):
        """Both find nothing in the cache, and both write; one rename wins."""
        barrier = threading.Barrier(2)
        write_splits = shards._write_splits

        def wait(*arguments):
            barrier.wait(timeout=20)
            return write_splits(*arguments)

        monkeypatch.setattr(shards, "_write_splits", wait)
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(prepare(config()))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0].identity == found[1].identity
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [found[0].directory.name]

    def test_that_cannot_be_written_is_refused_before_the_tokenizer_is_trained(
        self, config, tmp_path, monkeypatch
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(shards, "_train_tokenizer", None)
        with pytest.raises(InputError, match=r"data\.cache_dir: got '.*file.*Not a directory"):
            prepare(config(cache_dir=str(tmp_path / "file" / "cache")))

    def test_a_full_disk_is_said(self, config, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shards.os, "fsync", full)
        with pytest.raises(InputError, match=r"data\.cache_dir.*No space left.*MB free"):
            prepare(config())


def test_a_long_preparation_logs_how_far_each_reading_is(config, monkeypatch, caplog, tmp_path):
    clock = itertools.count(0, 11)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "sheepop_jax"):
        prepare(config())
    for label in ("data: reading", "data: reading for the tokenizer", "data: encoding"):
        lines = [r.message for r in caplog.records if r.message.startswith(f"{label}: ")]
        assert len(lines) == 31, label
        assert label == "data: reading" or lines[-1].endswith("/s, 0 s left")


def test_the_tokenizer_never_sees_the_held_out_text(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("ab" * 90 + "\u2603" * 20, encoding="utf-8")
    made = config(path=str(path), tokenizer="char", val_split="tail", val_fraction=0.15)
    said = r"one\.txt from character 170: .*U\+2603\) at position 10"
    with pytest.raises(InputError, match=said):
        prepare(made)


def test_text_shorter_than_a_window_is_refused_and_nothing_is_written(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 2)
    short = dict(path=str(path), tokenizer="char", val_split="tail", val_fraction=0.5)
    with pytest.raises(InputError, match=r"data\.seq_len: got 12; expected at most 11"):
        prepare(config(seq_len=12, **short))
    assert not any((tmp_path / "cache").iterdir())
    assert len(prepare(config(seq_len=11, **short)).train) == 12
    with pytest.raises(InputError, match=r"data\.seq_len"):
        prepare(config(seq_len=12, **short))
