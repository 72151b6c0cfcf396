"""A corpus read into one file: its bytes, its index, and what is left out."""

import functools
import hashlib
import json
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop_jax.data.preprocess import corpus_store as module
from sheepop_jax.data.preprocess.corpus_store import CorpusStore, write_corpus_store
from sheepop_jax.data.preprocess.split import choose_split
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe
from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.errors import InputError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # all but halves of surrogate pairs


class Held(str):
    """A text that the source itself holds out."""


class Memory:
    """A corpus of texts; a list is the pieces of one, an exception in it is raised."""

    field, value, num_bytes = "data.path", "some/where", 0

    def __init__(self, *texts, skipped=None):
        self.texts, self.skipped = texts, Counter(skipped or {})
        self.asked, self.closed = 0, False

    def signature(self):
        return ""

    def pieces(self, text):
        for piece in [text] if isinstance(text, str) else text:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def __iter__(self):
        try:
            for number, text in enumerate(self.texts, 1):
                self.asked = number
                yield Document(f"#{self.asked}", self.pieces(text), isinstance(text, Held))
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def spool_of(make_config):
    """`spool_of(corpus, …, max_bytes=3)`: the spool of one or several sources."""

    def make(*corpora, directory=None, check=lambda: None, **fields):
        config = make_config({f"data.{name}": value for name, value in fields.items()}).data
        (part,) = config.parts
        parts = [part._replace(name=f"s{i}", weight=1 / len(corpora)) for i in range(len(corpora))]
        if directory is None:
            with tempfile.TemporaryDirectory() as directory:
                return write_corpus_store(
                    Path(directory), list(zip(parts, corpora, strict=True)), check
                )
        return write_corpus_store(directory, list(zip(parts, corpora, strict=True)), check)

    return make


def texts_of(spool):
    ends = spool.documents["end"]
    return [
        "".join(spool.text(int(start), int(end)))
        for start, end in zip(spool.starts, ends, strict=True)
    ]


class TestIndex:
    def test_every_field(self, spool_of, tmp_path):
        texts = [["one\r\n", "", "\u20ac"], Held("two \U0001f411"), "\ufeff\x00\u2028"]
        spool = spool_of(Memory(*texts), Memory("three"), directory=tmp_path)
        whole = ["one\r\n\u20ac", "two \U0001f411", "\ufeff\x00\u2028", "three"]
        contents = [text.encode() for text in whole]
        assert (tmp_path / "text.bin").read_bytes() == b"".join(contents)
        sizes = list(map(len, contents))
        assert spool.documents["end"].tolist() == np.cumsum(sizes).tolist()
        assert spool.starts.tolist() == [0, *np.cumsum(sizes)[:-1]]
        assert spool.starts.dtype == np.int64
        assert spool.documents["chars"].tolist() == list(map(len, whole))
        assert spool.documents["source"].tolist() == [0, 0, 0, 1]
        assert spool.documents["is_val"].tolist() == [False, True, False, False]
        digests = [hashlib.sha256(content).digest() for content in contents]
        assert [row.tobytes() for row in spool.documents["digest"]] == [d[:16] for d in digests]
        assert spool.num_bytes == sum(sizes)
        assert texts_of(spool) == whole
        marks = [b"\0\0\0", b"\1\0\0", b"\0\0\0", b"\0\0\1"]
        both = b"".join(d + m for d, m in zip(digests, marks, strict=True))
        assert spool.fingerprint == hashlib.sha256(both).hexdigest()

    def test_it_can_be_opened_again(self, spool_of, tmp_path):
        first = spool_of(Memory("one", "two"), Memory("three"), directory=tmp_path)
        again = CorpusStore(tmp_path)
        assert again.documents.tobytes() == first.documents.tobytes()
        assert again.documents.dtype == first.documents.dtype
        assert (again.fingerprint, again.sources) == (first.fingerprint, first.sources)
        assert texts_of(again) == ["one", "two", "three"]

    def test_text_can_be_read_after_deletion_and_its_loss_is_told(self, spool_of, tmp_path):
        spool = spool_of(Memory("one", "two"), directory=tmp_path)
        (tmp_path / "text.bin").unlink()
        assert texts_of(spool) == ["one", "two"]
        (tmp_path / "text.bin").write_text("one")
        with pytest.raises(OSError, match=r"text\.bin ends at byte 3"):
            texts_of(CorpusStore(tmp_path))

    def test_names(self, spool_of, tmp_path):
        names = ["a", "b\nc", "\udcff\u20ac", '"']

        class Named(Memory):
            def __iter__(self):
                return (Document(name, ["x"]) for name in names)

        spool = spool_of(Named(), directory=tmp_path)
        assert [spool.name(index) for index in range(4)] == names
        assert len((tmp_path / "names.txt").read_bytes().splitlines()) == 4

    def test_sources_are_described(self, spool_of, tmp_path):
        spool_of(
            Memory("a", "", [SkipDocument("x")], skipped={"x": 2, "y": 1}),
            Memory("b", ""),
            directory=tmp_path,
        )
        skipped = {"empty or only white space": 1, "x": 3, "y": 1}
        assert json.loads((tmp_path / "spool.json").read_text())["sources"] == [
            {"name": "s0", "weight": 0.5, "skipped": skipped},
            {"name": "s1", "weight": 0.5, "skipped": {"empty or only white space": 1}},
        ]


class TestLeftOut:
    def test_empty_and_blank_documents(self, spool_of):
        blank = [[], "", " \r\n\u2003\t\x85", ["\n", " "], ["", ""]]
        corpus = Memory("one", *blank, [" ", "x", " "], "\x00", "\u200b", skipped={"before": 1})
        spool = spool_of(corpus)
        assert texts_of(spool) == ["one", " x ", "\x00", "\u200b"]
        assert spool.sources[0]["skipped"] == {"empty or only white space": 5, "before": 1}
        assert corpus.skipped == {"before": 1}  # reading again counts anew

    def test_skipping_in_the_middle_leaves_no_trace(self, spool_of, tmp_path):
        cut = ["x" * 3_000_000, "\u20ac", SkipDocument("a reason")]
        corpus = Memory("one", cut, "two", [SkipDocument("another")], cut)
        spool = spool_of(corpus, directory=tmp_path)
        (tmp_path / "other").mkdir()
        clean = spool_of(Memory("one", "two"), directory=tmp_path / "other")
        for name in ("text.bin", "documents.bin"):
            assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
        assert spool.fingerprint == clean.fingerprint
        assert spool.sources[0]["skipped"] == {"a reason": 2, "another": 1}
        assert [spool.name(index) for index in range(2)] == ["#1", "#3"]

    @pytest.mark.parametrize(
        "corpora, said",
        [
            ([Memory()], r"\(found: nothing\)$"),
            ([Memory("", " ")], r"\(found: 2 empty or only white space\)$"),
            ([Memory([SkipDocument("x")], skipped={"y": 3})], r"\(found: 3 y, 1 x\)$"),
            ([Memory("one"), Memory()], r"\(found: nothing\)$"),
        ],
    )
    def test_no_text_is_an_error(self, spool_of, tmp_path, corpora, said):
        with pytest.raises(InputError, match=said) as caught:
            spool_of(*corpora, directory=tmp_path)
        assert str(caught.value).startswith(
            "data.path: got 'some/where'; expected a source with text ("
        )
        assert not (tmp_path / "spool.json").exists()


class TestSurrogates:
    BAD = ["\ufeffa\U0001f411\ud83d", "b\udc11\udc11c", "\ud83d\udc11"]

    def test_strict_names_document_and_code_point(self, spool_of):
        with pytest.raises(InputError, match=r"^#2: got 'U\+D83D'; .*encoding_errors=replace`$"):
            spool_of(Memory("one", self.BAD))

    def test_replaced_by_choice(self, spool_of):
        spool = spool_of(Memory(self.BAD), encoding_errors="replace")
        # The last two are a pair: one character, as JSON escapes have it.
        assert texts_of(spool) == ["\ufeffa\U0001f411\ufffdb\ufffd\ufffdc\U0001f411"]

    def test_skipped_by_choice(self, spool_of):
        spool = spool_of(Memory("one", ["x", *self.BAD], "two"), encoding_errors="skip")
        assert texts_of(spool) == ["one", "two"]
        assert spool.sources[0]["skipped"] == {"not Unicode (lone surrogate)": 1}


class TestMaxBytes:
    @pytest.mark.parametrize(
        "max_bytes, expected, asked",
        [
            (0, ["abc", "d\u20ac\u20ac", "xyz"], 3),
            (1, ["a"], 1),
            (3, ["abc"], 1),
            (4, ["abc", "d"], 2),
            (5, ["abc", "d"], 2),  # not half a character, nor bytes of the next document for it
            (6, ["abc", "d"], 2),
            (7, ["abc", "d\u20ac"], 2),
            (10, ["abc", "d\u20ac\u20ac"], 2),
            (11, ["abc", "d\u20ac\u20ac", "x"], 3),
            (99, ["abc", "d\u20ac\u20ac", "xyz"], 3),
        ],
    )
    def test_reading_stops_there(self, spool_of, max_bytes, expected, asked):
        corpus = Memory("abc", ["d", "\u20ac\u20ac"], "xyz")
        spool = spool_of(corpus, max_bytes=max_bytes)
        assert texts_of(spool) == expected
        assert spool.documents["chars"].tolist() == list(map(len, expected))
        assert spool.sources[0]["skipped"] == {}
        assert (corpus.asked, corpus.closed) == (asked, True)

    def test_a_cut_that_leaves_nothing_or_white_space_ends_it_too(self, spool_of):
        assert texts_of(spool_of(Memory("abc", "\u20ac", "d"), max_bytes=4)) == ["abc"]
        spool = spool_of(Memory("abc", "  x", "d"), max_bytes=5)
        assert texts_of(spool) == ["abc"]
        assert spool.sources[0]["skipped"] == {}
        with pytest.raises(InputError, match="expected a source with text"):
            spool_of(Memory("\u20ac", "d"), max_bytes=1)

    def test_it_is_for_each_source_and_for_text_to_train_on(self, spool_of):
        corpora = [Memory(Held("held out"), "ab", Held("c" * 9), "def"), Memory("ghijk")]
        spool = spool_of(*corpora, max_bytes=4)
        assert texts_of(spool) == ["held out", "ab", "c" * 9, "de", "ghij"]

    def test_what_is_left_out_takes_no_room(self, spool_of):
        corpus = Memory(["abc", SkipDocument("x")], " ", "defgh")
        assert texts_of(spool_of(corpus, max_bytes=4)) == ["defg"]

    def test_no_more_of_a_document_is_read(self, spool_of):
        corpus = Memory(["abc", "de", RuntimeError("read too far")])
        assert texts_of(spool_of(corpus, max_bytes=4)) == ["abcd"]

    @settings(max_examples=50, deadline=None)
    @given(TEXTS, st.integers(1, 40))
    def test_the_longest_prefix_of_whole_characters(self, spool_of, text, max_bytes):
        text = "x" + text
        (found,) = texts_of(spool_of(Memory(list(text)), max_bytes=max_bytes))
        assert found == text.encode()[:max_bytes].decode(errors="ignore")


class TestFingerprint:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(TEXTS.filter(lambda t: t and not t.isspace()), min_size=1), st.data())
    def test_it_is_not_of_names_or_of_how_text_is_cut(self, spool_of, texts, data):
        class Other(Memory):
            def __iter__(self):
                return (Document("other", document.pieces) for document in super().__iter__())

        def cut(text):
            places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
            borders = zip([0, *places], [*places, len(text)], strict=True)
            return [text[start:stop] for start, stop in borders]

        spool = spool_of(Memory(*texts))
        again = spool_of(Other(*map(cut, texts)))
        assert again.fingerprint == spool.fingerprint
        assert again.documents.tobytes() == spool.documents.tobytes()

    def test_it_is_of_content_order_side_and_source(self, spool_of):
        corpora = [
            [Memory("ab", "c")],
            [Memory("c", "ab")],
            [Memory("a", "bc")],
            [Memory("abc")],
            [Memory("ab", Held("c"))],
            [Memory("ab"), Memory("c")],
            [Memory("ab", "c", "c")],
        ]
        assert len({spool_of(*each).fingerprint for each in corpora}) == len(corpora)


class TestReadingEnds:
    def test_at_an_error_the_source_is_closed(self, spool_of, tmp_path):
        corpus = Memory("one", [OSError("broken")])
        with pytest.raises(OSError, match="broken"):
            spool_of(corpus, directory=tmp_path)
        assert corpus.closed
        assert not (tmp_path / "spool.json").exists()

    def test_when_check_raises(self, spool_of):
        calls = []

        def check():
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        corpus = Memory("one", ["two", "three", "four"])
        with pytest.raises(KeyboardInterrupt):
            spool_of(corpus, check=check)
        assert (corpus.closed, corpus.asked) == (True, 2)

    def test_progress_knows_the_total_if_every_source_does(self, spool_of, monkeypatch):
        totals = []

        class Progress(module.Progress):
            def __init__(self, label, total, check):
                totals.append(total)
                super().__init__(label, total, check)

        monkeypatch.setattr(module, "Progress", Progress)
        known, unknown = Memory("abc"), Memory("abc")
        known.num_bytes = 3
        spool_of(known, known)
        spool_of(known, unknown)
        assert totals == [6, 0]


class TestText:
    def test_blocks(self, spool_of, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 4)
        spool = spool_of(Memory("abc\u20acde\U0001f411fg"))
        pieces = list(spool.text(0, spool.num_bytes))
        assert pieces == ["abc", "\u20acde", "\U0001f411", "fg"]
        assert "".join(spool.text(3, 8)) == "\u20acde"
        assert list(spool.text(5, 5)) == []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS, min_size=1, max_size=3), st.integers(1, 9), st.data())
    def test_any_range_and_any_character(self, spool_of, texts, block_bytes, data):
        texts = ["x" + text for text in texts]
        spool, whole = spool_of(Memory(*texts)), "".join(texts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK_BYTES", block_bytes)
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
            places = [len(whole[:char].encode()) for char in (start, stop)]
            assert "".join(spool.text(*places)) == whole[start:stop]
            document = data.draw(st.integers(0, len(texts) - 1))
            char = data.draw(st.integers(0, len(texts[document])))
            before = "".join(texts[:document]) + texts[document][:char]
            assert spool.byte_of_char(document, char) == len(before.encode())


class TestCutNear:
    @functools.cached_property
    def tokenizer(self):
        corpus = "It's a test, isn't it?  Two  spaces\n\n\tand tabs \u00e9t\u00e9 123 45\r\n " * 20
        return train_bpe(iter([corpus]), 400)

    WORDS = st.lists(
        st.one_of(
            st.sampled_from([" ", "\n", "\t", "\r\n", "a", "It's", "  ", "\u00e9t\u00e9", "123"]),
            st.sampled_from(["\u20ac", "\U0001f411", "\u3000", "\x85", "\xa0", "\u2028", "\x1c"]),
            st.characters(exclude_categories=["Cs"]),
        ),
        min_size=1,
        max_size=30,
    ).map("".join)

    @settings(max_examples=100, deadline=None)
    @given(WORDS, st.data())
    def test_there_the_ids_do_not_change(self, spool_of, text, data):
        content = ("x" + text).encode()
        spool = spool_of(Memory("x" + text))
        position = data.draw(st.integers(0, len(content)))
        place = spool.cut_near(position, self.tokenizer)
        assert position <= place <= len(content)
        head, tail = content[:place].decode(), content[place:].decode()  # between characters
        encode = self.tokenizer.encode
        assert encode(head) + encode(tail) == encode("x" + text)
        if not (tail[:1] in (" ", "\n") and head[-1:].strip()):  # between two tokens of a word
            rest = content[place:].decode()
            assert not any(
                a.strip() and b in " \n" for a, b in zip(rest, rest[1:], strict=False)
            ), rest

    def test_it_is_the_first_such_place(self, spool_of):
        spool = spool_of(Memory("ab  cd e\nf\u20acgh \u20ac"))
        found = [spool.cut_near(position, self.tokenizer) for position in range(spool.num_bytes)]
        assert found == [2, 2, 6, 6, 6, 6, 8, 8, *[15] * 8, 16, 19, 19]

    def test_it_does_not_look_far(self, spool_of):
        spool = spool_of(Memory("x" * 70_000 + " y"))
        assert spool.cut_near(10, self.tokenizer) == 10
        assert spool.cut_near(10_000, self.tokenizer) == 70_000
        spool = spool_of(Memory("x" + "\u20ac" * 30_000 + " y"))
        assert spool.cut_near(2, self.tokenizer) == 4


def test_one_long_line_takes_little_memory(spool_of, tmp_path):
    """A line of 16 MB is read, split and given back in blocks of 1 MB."""
    piece, count = "\u20ac sheep " * 16_000, 100

    def line():
        return (piece for _ in range(count))

    class Line(Memory):
        def __iter__(self):
            yield Document("line", line())

    tracemalloc.start()
    try:
        spool = spool_of(Line(), directory=tmp_path)
        split = choose_split(spool, "auto", 0.1)
        sizes = [0, 0]
        for segment in split.segments(spool):
            for text in spool.text(segment.start, segment.stop):
                sizes[segment.is_val] += len(text.encode())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == count * len(piece.encode()) == spool.num_bytes > 15e6
    assert sizes[1] == pytest.approx(spool.num_bytes / 10, rel=1e-4)
    assert peak < 8e6
