"""The rules by which text is held out."""

import hashlib

import pytest

from sheepop_jax.data.documents import Document
from sheepop_jax.data.split import choose_split, split_documents
from sheepop_jax.errors import InputError


def held_out(corpus, rule="document", val_fraction=0.1):
    """The training and the held-out texts."""
    split = choose_split(corpus, rule, val_fraction)
    parts = list(split_documents(corpus, split))
    return [d.text for held, d in parts if not held], [d.text for held, d in parts if held]


CORPUS = [Document(f"{i}", f"document {i} " * (i % 7 + 1)) for i in range(211)]


def test_the_split_by_document_follows_the_hash_of_the_content():
    train, validation = held_out(CORPUS)
    assert sorted(train + validation) == sorted(d.text for d in CORPUS)
    for text in train + validation:
        share = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        assert (text in validation) == (share < 0.1)


def test_added_documents_move_none_across():
    train, validation = held_out(CORPUS[100:])
    more_train, more_validation = held_out(CORPUS)
    assert set(train) <= set(more_train)
    assert set(validation) <= set(more_validation)


@pytest.mark.parametrize("rule", ["tail", "auto"])
def test_the_tail_of_one_document_is_cut_by_characters(rule):
    text = "".join(chr(200 + i % 700) for i in range(1237))
    train, validation = held_out([Document("a", text)], rule)
    assert (train, validation) == ([text[: int(1237 * 0.9)]], [text[int(1237 * 0.9) :]])


def test_the_tail_of_many_documents_cuts_one_of_them_in_two():
    corpus = [Document("a", "abcd"), Document("b", "efghij"), Document("c", "kl")]
    assert held_out(corpus, "tail", 0.5) == (["abcd", "ef"], ["ghij", "kl"])
    assert held_out(corpus, "tail", 0.17) == (["abcd", "efghi"], ["j", "kl"])
    assert held_out(corpus, "tail", 1 / 6) == (["abcd", "efghij"], ["kl"])
    split = choose_split(corpus, "tail", 0.5)
    names = [document.id for _, document in split_documents(corpus, split)]
    assert names == ["a", "b", "b from character 2", "c"]


def test_auto_takes_the_tail_when_the_hashes_hold_out_too_much_or_too_little():
    held_out_bytes = sum(len(text.encode()) for text in held_out(CORPUS)[1])
    share = held_out_bytes / sum(len(document.text.encode()) for document in CORPUS)
    assert 0.05 < share < 0.2
    assert choose_split(CORPUS, "auto", 0.1).rule == "document"
    kept = [d for d in CORPUS if d.text in held_out(CORPUS)[0]]  # none held out by hash
    assert choose_split(kept, "auto", 0.1).rule == "tail"
    heavy = [d if d in kept else Document(d.id, d.text) for d in CORPUS]
    heavy = [d for d in heavy if d not in kept] + kept[:30]  # too many held out
    assert choose_split(heavy, "auto", 0.1).rule == "tail"


@pytest.mark.parametrize("rule, fraction", [("document", 1e-9), ("document", 1 - 1e-9)])
def test_an_empty_part_is_refused(rule, fraction):
    with pytest.raises(InputError, match=r"data\.val_fraction.*try data\.val_split=tail"):
        choose_split(CORPUS, rule, fraction)
    with pytest.raises(InputError, match=r"data\.val_fraction"):
        choose_split([Document("a", "ab")], "tail", 0.9)


def test_the_fingerprint_is_of_contents_in_order():
    def fingerprint(corpus):
        return choose_split(corpus, "tail", 0.1).fingerprint

    assert fingerprint(CORPUS) == fingerprint([Document("other", d.text) for d in CORPUS])
    assert fingerprint(CORPUS) != fingerprint(CORPUS[::-1])
    assert fingerprint([Document("", "ab"), Document("", "c")]) != fingerprint(
        [Document("", "a"), Document("", "bc")]
    )


def test_text_that_changes_while_it_is_read_is_refused():
    split = choose_split(CORPUS, "document", 0.1)
    with pytest.raises(InputError, match="does not change"):
        list(split_documents(CORPUS[:-1], split))
