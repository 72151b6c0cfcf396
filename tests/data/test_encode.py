"""Units: how a spool is cut, and that cutting changes no token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepop_jax.config.data import Part
from sheepop_jax.data import tokenizer as tokenizer_module
from sheepop_jax.data.preprocess import encode
from sheepop_jax.data.preprocess.corpus_store import write_corpus_store
from sheepop_jax.data.preprocess.encode import encode_units, units
from sheepop_jax.data.preprocess.split import choose_split
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.sources.documents import Document
from sheepop_jax.errors import InputError
from sheepop_jax.progress import Progress

TEXT = "the cat's sat-mat, and the sheep ate 12 hills \n\n of  wool\r\n r\u00e9\U0001f411 "
BPE = train_bpe(iter([TEXT * 5]), 300)


class Texts:
    """A corpus in memory."""

    field, value, skipped, num_bytes = "data.path", "memory", Counter(), 0

    def __init__(self, *texts):
        self._texts = texts

    def signature(self):
        return ""

    def __iter__(self):
        for number, text in enumerate(self._texts):
            yield Document(f"{number}", [text])


@pytest.fixture
def spool_of(tmp_path_factory, make_config):
    config = make_config().data

    def make(*sources):
        parts = [
            (Part(f"{number}", 1 / len(sources), config), Texts(*texts))
            for number, texts in enumerate(sources)
        ]
        return write_corpus_store(tmp_path_factory.mktemp("spool"), parts)

    return make


@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sources=st.lists(
        st.lists(st.text(st.sampled_from("ab \n\u00e9\U0001f411"), min_size=1), min_size=1).filter(
            lambda texts: any(text.strip() for text in texts)
        ),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 40),
)
def test_units_are_the_spool_in_order(sources, size, spool_of):
    spool = spool_of(*sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_UNIT_BYTES", size)
        found = units(spool, BPE)
        assert found == units(spool, BPE)
    assert [unit.number for unit in found] == list(range(len(found)))
    assert [found[0].start, *(unit.stop for unit in found)] == [
        *(unit.start for unit in found),
        spool.num_bytes,
    ]
    text = b"".join(piece.encode() for piece in spool.text(0, spool.num_bytes))
    ends = set(spool.documents["end"].tolist())
    for unit in found:
        assert unit.start < unit.stop
        assert all(
            spool.documents["source"][i] == unit.source
            for i in range(len(spool.starts))
            if spool.starts[i] < unit.stop and spool.documents["end"][i] > unit.start
        )
        text[unit.start : unit.stop].decode()  # between characters
        if unit.stop not in ends:  # only within a document that is large
            document = int(np.searchsorted(spool.documents["end"], unit.stop, side="right"))
            assert spool.documents["end"][document] - unit.start > 2 * size


def test_a_large_document_is_cut_in_its_own_units_and_small_ones_are_not(spool_of, monkeypatch):
    monkeypatch.setattr(encode, "_UNIT_BYTES", 100)
    spool = spool_of([TEXT, TEXT * 20, "one word", TEXT], ["other"])
    found = units(spool, BPE)
    assert len(found) > len(TEXT) * 22 // 200
    text = b"".join(piece.encode() for piece in spool.text(0, spool.num_bytes))
    ends = spool.documents["end"].tolist()
    within = [unit.stop for unit in found if unit.stop not in ends]
    assert len(within) > 8
    for stop in within:  # before a space or line break that follows something else
        assert text[stop : stop + 1] in (b" ", b"\n")
        assert not text[stop - 1 : stop].isspace()
    assert found[-1] == (len(found) - 1, 1, ends[-2], ends[-1])
    assert max(unit.stop - unit.start for unit in found) <= 300


def encoded(directory, spool, split, tokenizer, **options):
    directory.mkdir()
    found = encode_units(directory, spool, split, tokenizer, **options)
    sides = []
    for side in encode.SIDES:
        files = [entry[side]["file"] for entry in found if side in entry]
        parts = [np.fromfile(directory / file, "<u2") for file in files]
        sides.append(np.concatenate([np.zeros(0, "<u2"), *parts]).tolist())
    return found, sides


@pytest.mark.parametrize("unit_bytes", [100, 150, 1000, 2**26])
@pytest.mark.parametrize("piece_chars", [100, 2**18])
def test_ids_are_those_of_the_documents_as_a_whole(
    spool_of, tmp_path, monkeypatch, unit_bytes, piece_chars
):
    monkeypatch.setattr(encode, "_UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", piece_chars)
    texts = ["one", TEXT * 20, TEXT, "end " * 50]
    spool = spool_of(texts)
    fraction = 60 / sum(map(len, texts))
    split = choose_split(spool, "tail", fraction)
    found, (train, is_val) = encoded(tmp_path / "tokens", spool, split, BPE)
    expected = [texts[0], texts[1], texts[2], texts[3][:140]]
    eot = BPE.end_of_text
    assert train == sum(([eot, *BPE.encode(text)] for text in expected), [])
    assert is_val == [eot, *BPE.encode(texts[3][140:])]
    assert sum(entry["train"]["documents"] for entry in found if "train" in entry) == 4
    sizes = [entry[side]["bytes"] for entry in found for side in encode.SIDES if side in entry]
    assert sum(sizes) == spool.num_bytes
    assert sorted(p.name[:5] for p in (tmp_path / "tokens").iterdir()) == sorted(
        [file[:5] for entry in found for file in ("train", "valid") if file in str(entry)]
        + ["unit-"] * len(found)
    )


def test_a_unit_is_done_once_and_again_if_its_marker_is_gone(spool_of, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_UNIT_BYTES", 100)
    spool = spool_of([TEXT * 20])
    split = choose_split(spool, "tail", 0.1)
    first = encoded(tmp_path / "a", spool, split, BPE)
    count = []
    inner = encode._encode_unit

    def note(directory, unit, *rest):
        count.append(unit.number)
        inner(directory, unit, *rest)

    monkeypatch.setattr(encode, "_encode_unit", note)
    (tmp_path / "a" / "unit-00002.json").unlink()
    (tmp_path / "a" / "train-00002.bin").write_bytes(b"half")
    again = encode_units(tmp_path / "a", spool, split, BPE)
    assert (again, count) == (first[0], [2])
    assert (tmp_path / "a" / "train-00002.bin").stat().st_size == 2 * again[2]["train"]["tokens"]


def test_a_unit_is_on_disk_before_its_files_have_their_names(spool_of, tmp_path, disk_order):
    spool = spool_of(["abc" * 30])
    disk_order.clear()
    [entry], _ = encoded(tmp_path / "a", spool, choose_split(spool, "tail", 0.1), train_char("abc"))
    expected = []
    for side in encode.SIDES:
        expected += [("synced", 2 * entry[side]["tokens"]), ("renamed", entry[side]["file"])]
    marker = tmp_path / "a" / "unit-00000.json"
    assert disk_order == [*expected, ("synced", marker.stat().st_size), ("renamed", marker.name)]


def test_a_unit_that_fails_leaves_no_file(spool_of, tmp_path):
    spool = spool_of(["abc" * 30 + "d"])
    split = choose_split(spool, "tail", 0.1)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="^0: got .*at position 90"):
        encode_units(tmp_path / "a", spool, split, train_char(["abc"]))
    assert list((tmp_path / "a").iterdir()) == []


def test_a_directory_that_is_gone_is_an_error(spool_of, tmp_path):
    spool = spool_of(["abc" * 30])
    split = choose_split(spool, "tail", 0.1)
    with pytest.raises(FileNotFoundError, match="a"):
        encode_units(tmp_path / "a", spool, split, BPE)


def test_ids_beyond_the_vocabulary_are_refused(spool_of, tmp_path):
    tokenizer = train_char(["abc"])
    tokenizer.vocab_size = 3
    spool = spool_of(["ab" * 30 + "c" * 30])
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"id 3.*ids below the vocabulary size 3"):
        encode_units(tmp_path / "a", spool, choose_split(spool, "tail", 0.1), tokenizer)


def test_the_narrowest_type_is_taken():
    tokenizer = train_char(["abc"])
    for size, dtype in ((4, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")):
        tokenizer.vocab_size = size
        assert encode.dtype_of(tokenizer) == dtype


def test_text_is_held_in_memory_by_the_piece(spool_of, tmp_path, monkeypatch):
    """However long a document is, what is on its way stays bounded."""
    monkeypatch.setattr("sheepop_jax.data.preprocess.corpus_store._BLOCK_BYTES", 500)
    monkeypatch.setattr("sheepop_jax.data.stream._BATCH_CHARS", 500)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 400)
    spool = spool_of([TEXT * 500])
    split = choose_split(spool, "tail", 0.1)
    longest, ahead = [], Counter()
    inner_encode, inner_update = BPE.encode_batch, Progress.update

    def encode_batch(texts):
        longest.append(max(map(len, texts)))
        ahead["given"] += len("".join(texts).encode())
        return inner_encode(texts)

    def update(self, size):
        ahead["done"] += size
        ahead["most"] = max(ahead["most"], ahead["given"] - ahead["done"])
        inner_update(self, size)

    monkeypatch.setattr(BPE, "encode_batch", encode_batch)
    monkeypatch.setattr(Progress, "update", update)
    encoded(tmp_path / "a", spool, split, BPE)
    assert max(longest) <= 400
    assert ahead["most"] < 10_000 < ahead["done"] // 3
