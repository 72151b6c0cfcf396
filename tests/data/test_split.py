"""The rules by which text is held out, and by which duplicates are left out."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop_jax.data.preprocess.corpus_store import write_corpus_store
from sheepop_jax.data.preprocess.split import LEFT_OUT, TRAIN, VAL, choose_split
from sheepop_jax.data.sources.documents import Document
from sheepop_jax.errors import InputError


class Held(str):
    """A text that the source itself holds out."""


class Memory:
    """A corpus of texts, those held out first."""

    field, value, skipped, num_bytes = "data.path", "some/where", Counter(), 0

    def __init__(self, *texts):
        self.texts = sorted(texts, key=lambda text: not isinstance(text, Held))

    def signature(self):
        return ""

    def __iter__(self):
        return (Document(text[:9], [text], isinstance(text, Held)) for text in self.texts)


@pytest.fixture(scope="module")
def spool_of(make_config, tmp_path_factory):
    """`spool_of(["one", "two"], ["three"])`: the spool of two sources."""
    (part,) = make_config().data.parts

    def make(*sources):
        names = [f"s{number}" if len(sources) > 1 else "" for number in range(len(sources))]
        parts = [(part._replace(name=n), Memory(*t)) for n, t in zip(names, sources, strict=True)]
        return write_corpus_store(Path(tmp_path_factory.mktemp("spool")), parts)

    return make


@pytest.fixture
def sides(spool_of):
    """The training and the held-out texts, in order, as the segments have them."""

    def make(*sources, rule="document", val_fraction=0.1):
        spool = spool_of(*sources)
        split = choose_split(spool, rule, val_fraction)
        found = ([], [])
        for segment in split.segments(spool):
            found[segment.is_val].append("".join(spool.text(segment.start, segment.stop)))
        return found

    return make


TEXTS = [f"document {i} " * (i % 7 + 1) for i in range(211)]


def share(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


KEPT = [text for text in TEXTS if share(text) >= 0.1]
HASHED = [text for text in TEXTS if share(text) < 0.1]


class TestByDocument:
    def test_it_follows_the_hash_of_the_content(self, sides):
        assert sides(TEXTS) == (KEPT, HASHED)
        assert 10 < len(HASHED) < 35

    @pytest.mark.parametrize("step", [0.03, 0.5, 0.97])
    def test_any_fraction(self, sides, step):
        train, is_val = sides(TEXTS, val_fraction=step)
        assert all(share(text) < step for text in is_val)
        assert all(share(text) >= step for text in train)

    def test_added_documents_move_none_across(self, sides):
        train, is_val = sides(TEXTS[100:])
        more_train, more_held_out = sides(TEXTS)
        assert set(train) <= set(more_train)
        assert set(is_val) <= set(more_held_out)


class TestTail:
    @pytest.mark.parametrize("rule", ["tail", "auto"])
    def test_one_document_is_cut_by_characters(self, sides, rule):
        text = "".join(chr(100 + i % 700) for i in range(1237))
        cut = int(1237 * 0.9)
        assert sides([text], rule=rule) == ([text[:cut]], [text[cut:]])

    def test_one_of_many_documents_is_cut_in_two(self, sides):
        texts = ["abc\u20ac", "ef\U0001f411h\u00e9j", "kl"]

        def tail(val_fraction):
            return sides(texts, rule="tail", val_fraction=val_fraction)

        assert tail(0.5) == (["abc\u20ac", "ef"], ["\U0001f411h\u00e9j", "kl"])
        assert tail(0.17) == (["abc\u20ac", "ef\U0001f411h\u00e9"], ["j", "kl"])
        assert tail(1 / 6) == (texts[:2], ["kl"])  # between documents
        assert tail(0.9) == (["a"], ["bc\u20ac", *texts[1:]])
        assert tail(0.08) == ([*texts[:2], "k"], ["l"])

    def test_a_cut_document_begins_once(self, spool_of):
        spool = spool_of(["abcd", "efghij", "kl"])
        split = choose_split(spool, "tail", 0.5)
        found = [tuple(segment) for segment in split.segments(spool)]
        assert found == [
            (0, 0, 4, False, True),
            (1, 4, 6, False, True),
            (1, 6, 10, True, True),
            (2, 10, 12, True, True),
        ]
        assert (split.cuts, split.rules, split.duplicates) == ({1: 6}, ["tail"], 0)
        found = [tuple(segment) for segment in split.segments(spool, 5, 11)]
        assert found == [(1, 5, 6, False, False), (1, 6, 10, True, True), (2, 10, 11, True, True)]
        found = [tuple(segment) for segment in split.segments(spool, 7, 9)]
        assert found == [(1, 7, 9, True, False)]
        assert all(type(segment.is_val) is bool for segment in split.segments(spool))


class TestTails:
    def test_each_document_gives_its_share(self, sides):
        texts = ["abc\u20ac" * 5, "ef\U0001f411h" * 25, "k" * 40]
        train, is_val = sides(texts, rule="tails", val_fraction=0.2)
        assert (train, is_val) == (
            [t[: -len(t) // 5] for t in texts],
            [t[-len(t) // 5 :] for t in texts],
        )

    def test_short_documents_add_up_to_the_fraction(self, sides):
        train, is_val = sides([f"{i:03}" for i in range(100)], rule="tails", val_fraction=0.1)
        assert len("".join(is_val)) == 30 and len("".join(train)) == 270
        train, is_val = sides(list("abcdefghij"), rule="tails", val_fraction=0.5)
        assert is_val == list("bdfhj")  # of one character, and so not cut

    def test_few_documents_are_split_so(self, spool_of, sides):
        """Four files of four languages are all in the validation split."""
        texts = [letter * 1000 for letter in "abcd"]
        train, is_val = sides(texts, rule="auto")
        assert (train, is_val) == ([t[:900] for t in texts], [t[900:] for t in texts])
        before = choose_split(spool_of(texts), "auto", 0.1, few="tail")
        assert before.rules == ["tail"] and list(before.cuts) == [3]


class TestAuto:
    def rules(self, spool_of, *sources):
        return choose_split(spool_of(*sources), "auto", 0.1).rules

    def test_document_while_the_hashes_hold_out_about_the_fraction(self, spool_of):
        sizes = [sum(len(text) for text in texts) for texts in (HASHED, TEXTS)]
        assert 0.05 < sizes[0] / sizes[1] < 0.2
        assert self.rules(spool_of, TEXTS) == ["document"]

    def test_tails_where_they_hold_out_none(self, spool_of):
        assert self.rules(spool_of, KEPT) == ["tails"]

    @pytest.mark.parametrize(
        "kept_bytes, rule",
        [(3999, "tails"), (4000, "document"), (19_000, "document"), (19_001, "tails")],
    )
    def test_half_and_twice_the_fraction_of_the_bytes(self, spool_of, kept_bytes, rule):
        def text(num_bytes, is_val):
            texts = (f"{i:05}".ljust(num_bytes - 2, "x") + "\u00e9" for i in range(999))
            return next(text for text in texts if (share(text) < 0.1) == is_val)

        # The 1000 bytes that the hash holds out are 0.2 or 0.05 of all, or just beyond that.
        assert self.rules(spool_of, [text(1000, True), text(kept_bytes, False)]) == [rule]

    def test_tail_where_there_is_one_document(self, spool_of):
        assert self.rules(spool_of, HASHED[:1]) == ["tail"]
        # Above a half, all of it is "less than twice the fraction".
        assert choose_split(spool_of(HASHED[:1]), "auto", 0.6).rules == ["tail"]

    def test_a_source_with_a_validation_split_of_its_own(self, spool_of):
        assert self.rules(spool_of, ["a", Held("b")]) == ["source"]
        assert self.rules(spool_of, ["a", Held("b")], TEXTS, ["c" * 20]) == [
            "source",
            "document",
            "tail",
        ]

    def test_also_where_another_source_keeps_all_of_it(self, spool_of):
        assert self.rules(spool_of, ["a", Held("b")], [*TEXTS, Held("b")]) == ["source", "source"]


class TestOwnSplit:
    SOURCES = (["a" * 50, Held("b")], ["c" * 30, "d" * 30])

    def test_source(self, sides):
        assert sides(*self.SOURCES, rule="source") == (["a" * 50, "c" * 30, "d" * 30], ["b"])

    def test_auto_has_a_rule_for_each_source(self, sides):
        train, is_val = sides(*self.SOURCES, rule="auto")
        assert train == ["a" * 50, "c" * 27, "d" * 27]
        assert is_val == ["b", "c" * 3, "d" * 3]

    @pytest.mark.parametrize("rule", ["tail", "document"])
    def test_left_out_where_it_is_not_asked_for(self, spool_of, rule):
        texts = [*TEXTS, Held("b"), Held(TEXTS[0])]
        spool = spool_of(texts)
        split = choose_split(spool, rule, 0.1)
        assert split.side[:2].tolist() == [LEFT_OUT, LEFT_OUT]
        assert split.duplicates == 0  # TEXTS[0] is no duplicate of what is not used
        assert split.side[2:].tolist() == choose_split(spool_of(TEXTS), rule, 0.1).side.tolist()


class TestDuplicates:
    def test_the_first_is_kept_and_the_others_counted(self, spool_of, caplog):
        spool = spool_of(["a", "b", "a", "c", "b", "a"], ["b", "d", "e"])
        with caplog.at_level("INFO", "sheepop_jax"):
            split = choose_split(spool, "tail", 0.5)
        assert np.flatnonzero(split.side == LEFT_OUT).tolist() == [2, 4, 5, 6]
        assert split.duplicates == 4
        assert "removed 4 duplicate documents" in caplog.text

    @pytest.mark.parametrize("rule", ["source", "auto"])
    def test_one_that_its_source_holds_out_is_preferred(self, spool_of, rule):
        spool = spool_of(["a", "b", "x", "yy"], [Held("b"), Held("b"), "b", "z", Held("x")])
        split = choose_split(spool, "source", 0.1)
        (second,) = np.flatnonzero((spool.documents["source"] == 1) & (split.side == VAL))[:1]
        assert split.side.tolist() == [TRAIN, LEFT_OUT, LEFT_OUT, TRAIN] + [
            VAL,
            LEFT_OUT,
            VAL,
            LEFT_OUT,
            TRAIN,
        ]
        assert split.duplicates == 4
        assert second == 4

    def test_no_held_out_text_is_trained_on(self, sides):
        train, is_val = sides(TEXTS + TEXTS[:50], TEXTS[20:90] + ["x", "y"], rule="tail")
        assert len(train) + len(is_val) <= len(TEXTS) + 2 + 2
        assert not set(train) & set(is_val)

    def test_half_of_a_digest_is_not_enough(self, spool_of):
        spool = spool_of(["a", "b", "c"])
        spool.documents["digest"][1, 0] = spool.documents["digest"][0, 0]
        spool.documents["digest"][2, 1] = spool.documents["digest"][1, 1]
        assert choose_split(spool, "tail", 0.5).duplicates == 0
        spool.documents["digest"][1] = spool.documents["digest"][2]
        assert choose_split(spool, "tail", 0.5).duplicates == 1


@given(
    st.lists(st.text("ab\u20ac\U0001f411", min_size=1, max_size=6), min_size=3, max_size=9),
    st.sampled_from(["tail", "tails", "auto", "document"]),
    st.data(),
)
def test_segments_of_any_partition_are_those_of_the_whole(spool_of, texts, rule, data):
    spool = spool_of(texts)
    try:
        split = choose_split(spool, rule, 0.4)
    except InputError:
        return
    whole = list(split.segments(spool))
    for document, text in enumerate(texts):
        mine = [segment for segment in whole if segment.document == document]
        kept = "".join("".join(spool.text(s.start, s.stop)) for s in mine)
        assert kept == ("" if split.side[document] == LEFT_OUT else text)
        assert len(mine) == int(split.side[document] != LEFT_OUT) + (document in split.cuts)
    assert [s.start for s in whole] == sorted(s.start for s in whole)
    places = data.draw(st.lists(st.integers(0, spool.num_bytes), max_size=4))
    borders = [0, *sorted(places), spool.num_bytes]
    joined = []
    for start, stop in zip(borders, borders[1:], strict=False):
        for segment in split.segments(spool, start, stop):
            assert start <= segment.start < segment.stop <= stop
            assert segment.is_val in (True, False)
            if segment.begins:
                joined.append(segment)
            else:
                last = joined[-1]
                assert (last.document, last.is_val, last.stop) == (
                    segment.document,
                    segment.is_val,
                    segment.start,
                )
                joined[-1] = last._replace(stop=segment.stop)
    assert joined == whole


class TestRefused:
    @pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
    def test_an_empty_part_by_document(self, spool_of, fraction):
        said = (
            r"data\.val_fraction: .*\(by document: 211 documents, 10,504 bytes\); try `data\.val_"
        )
        with pytest.raises(InputError, match=said):
            choose_split(spool_of(TEXTS), "document", fraction)

    @pytest.mark.parametrize("fraction", [0.9, 1e-17])
    def test_an_empty_part_by_tail(self, spool_of, fraction):
        with pytest.raises(InputError, match=r"data\.val_fraction: .*by tail.*try more text"):
            choose_split(spool_of(["ab"]), "tail", fraction)

    def test_no_validation_split(self, spool_of):
        with pytest.raises(InputError, match=r"data\.val_split: got 'source'; .*data\.val_path"):
            choose_split(spool_of(TEXTS), "source", 0.1)

    @pytest.mark.parametrize("rule", ["source", "auto"])
    def test_nothing_but_a_validation_split(self, spool_of, rule):
        with pytest.raises(InputError, match=r"^data\.val_split: .*training text besides"):
            choose_split(spool_of([Held("a"), "a", Held("b")]), rule, 0.1)

    def test_nothing_but_a_validation_split_that_is_not_used(self, spool_of):
        with pytest.raises(InputError, match=r"^data\.val_fraction: .*by tail: 0 documents"):
            choose_split(spool_of([Held("a")]), "tail", 0.1)

    @pytest.mark.parametrize(
        "second, rule", [(TEXTS[:9], "tail"), (HASHED[:1], "document"), ([Held("x")], "source")]
    )
    def test_a_source_of_a_mixture_without_training_text(self, spool_of, second, rule):
        first = [text for text in TEXTS if text not in HASHED[:1]] + [Held("b")]
        first += HASHED[:1] if rule == "tail" else []
        with pytest.raises(InputError, match=rf"^data\.mixture\.s1: got 'a source .*\(by {rule}\)"):
            choose_split(spool_of(first, second), rule, 0.1)

    def test_a_source_of_a_mixture_that_is_one_cut_document_is_good(self, sides):
        train, is_val = sides(["a" * 10], ["b" * 10], rule="tail", val_fraction=0.2)
        assert (train, is_val) == (["a" * 8, "b" * 8], ["a" * 2, "b" * 2])


def test_what_is_held_out_is_told(spool_of, caplog):
    with caplog.at_level("INFO", "sheepop_jax"):
        choose_split(spool_of(["a" * 1_000_000], ["b" * 30, Held("c" * 10)]), "auto", 0.25)
    assert [record.message for record in caplog.records] == [
        "data: s0: 1 documents, split by tail",
        "data: s1: 2 documents, split by source",
        "data: 3 documents, 1.00 MB; validation split by tail, source: 25.0% of the bytes",
    ]
