"""Bad input, and the tokenizer's training."""

import json
import re
import time

import numpy as np
import pytest
import tokenizers

from sheepop_jax.data.preprocess import prepare as module
from sheepop_jax.data.preprocess.prepare import encode_path, prepare
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from tests.data.preparing import names_in


@pytest.mark.parametrize("there", [False, True], ids=["new cache", "cache with shards"])
def test_bad_input_leaves_nothing(config, tmp_path, there):
    text = tmp_path / "one.txt"
    text.write_text("ab" * 900 + "\u2603" * 20, encoding="utf-8")
    short = tmp_path / "short.txt"
    short.write_text("abcdefghij" * 2)
    unknown = tmp_path / "tokenizer.json"
    unknown.write_text(train_char(["ab"]).to_json(), encoding="utf-8")
    kept = []
    if there:
        kept = [prepare(config()).directory.name]
    before = sorted((tmp_path / "cache").rglob("*")) if there else []
    one = dict(path=str(text), tokenizer="char", val_split="tail")
    for fields, said in (
        (dict(one, val_fraction=0.05, tokenizer=str(unknown)), r"one\.txt.*U\+2603"),
        (dict(one, val_fraction=1 - 1e-9), r"data\.val_fraction"),
        (dict(one, val_fraction=0.5, path=str(short)), r"data\.seq_len: got 13.* at most 11"),
        (dict(path=str(text), val_split="source"), r"data\.val_split"),
    ):
        with pytest.raises(InputError, match=said):
            prepare(config(**fields))
        if there:
            assert names_in(tmp_path / "cache") == kept
            assert sorted((tmp_path / "cache").rglob("*")) == before
        else:
            assert not (tmp_path / "cache").exists()


def test_what_is_passed_over_is_said_as_it_is_now(config, tmp_path, caplog):
    caplog.set_level("INFO")
    prepare(config())
    assert "skipped" not in caplog.text
    (tmp_path / "text" / "late.csv").write_text("a,b\n")
    prepare(config())
    assert "token shards reused" in caplog.text
    assert "data: skipped: 1 csv files (data.source=csv reads them)" in caplog.text


def test_a_text_shorter_than_a_window_is_refused(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 2)
    short = dict(path=str(path), tokenizer="char", val_split="tail", val_fraction=0.5)
    with pytest.raises(InputError, match=r"data\.seq_len: got 12; expected at most 11"):
        prepare(config(seq_len=12, **short))
    assert len(prepare(config(seq_len=11, **short)).train[0]) == 12
    with pytest.raises(InputError, match=r"data\.seq_len"):
        prepare(config(seq_len=12, **short))
    assert len(prepare(config(seq_len=11, **short)).train[0]) == 12  # those stay
    # One document a window: it is padded.
    assert prepare(config(seq_len=12, packing="one_per_window", **short)).train_tokens == 12


def test_each_source_of_a_mixture_must_fill_a_window(config, tmp_path):
    (tmp_path / "one.txt").write_text("abcdefghij")
    parts = {
        "big": {"weight": 1.0, "path": str(tmp_path / "text")},
        "small": {"weight": 1.0, "path": str(tmp_path / "one.txt")},
    }
    with pytest.raises(InputError, match=r"data\.seq_len: .*data\.mixture\.small has \d+ tokens"):
        prepare(config(mixture=parts, val_split="auto"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cut", ["tail", "later piece", "later unit", "own document"])
def test_a_character_that_a_tokenizer_does_not_know_is_named_with_its_place(
    config, tmp_path, cut, monkeypatch
):
    monkeypatch.setattr("sheepop_jax.data.tokenizer._PIECE_CHARS", 40)
    directory = tmp_path / "named"
    directory.mkdir()
    training = "\u00e9b" * 900
    (directory / "a.txt").write_text("ab" * 30, encoding="utf-8")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_char(["\u00e9ab"]).to_json(), encoding="utf-8")
    fields = dict(path=str(directory), tokenizer=str(tokenizer), val_split="tail")
    match cut:
        case "tail":
            text, fraction = training + "b" * 3 + "\u2603" * 20, 22 / (1823 + 60)
        case "later piece":
            text, fraction = training + "b" * 303 + "\u2603" * 20, 322 / (2123 + 60)
        case "later unit":
            text, fraction = training + "b" * 3003 + "\u2603" * 20, 3022 / (4823 + 60)
        case "own document":
            (directory / "c.txt").write_text(training, encoding="utf-8")
            text, fraction = "b" * 33 + "\u2603" * 20, None
    (directory / "b.txt").write_text(text, encoding="utf-8")
    if fraction is None:
        fields |= dict(val_path=str(directory / "b.txt"), path=str(directory / "c.txt"))
        fields["val_split"], fraction = "source", 0.1
    (directory / "a.txt").touch()
    said = (
        rf"^b\.txt: got .*U\+2603\) at position {text.index(chr(0x2603))}\"; .*data\.tokenizer=bpe"
    )
    with pytest.raises(InputError, match=said):
        prepare(config(**fields, val_fraction=fraction))


def test_characters_are_those_of_the_held_out_text_too(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("ab cd " * 300 + "\u2603", encoding="utf-8")
    data = prepare(config(path=str(path), tokenizer="char", val_split="tail", val_fraction=0.01))
    assert data.tokenizer.decode(data.validation.read(0, len(data.validation))).endswith("\u2603")
    assert data.tokenizer.vocab_size == 1 + len("abcd \u2603")


def test_a_bpe_never_sees_the_held_out_text(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("ab cd " * 300 + "xyzzy " * 60, encoding="utf-8")
    data = prepare(config(path=str(path), val_split="tail", val_fraction=360 / 2160))
    vocabulary = json.loads(data.tokenizer.to_json())["model"]["vocab"]
    assert any("cd" in token for token in vocabulary)
    assert not any("xy" in token or "zz" in token for token in vocabulary)


def test_a_bpe_learns_from_an_even_sample(config, monkeypatch):
    monkeypatch.setattr("sheepop_jax.data.tokenizer._PIECE_CHARS", 50)
    given = []

    def note(pieces, vocab_size):
        given.append(list(pieces))
        return inner(iter(given[-1]), vocab_size)

    inner = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", note)
    whole = prepare(config())
    size = whole.train[0].num_bytes
    texts = "".join(given[0])
    assert len(texts.encode()) == size
    assert given[0] and "" not in given[0]
    for share in (0.5, 0.1, 0.03):
        data = prepare(config(tokenizer_sample_bytes=int(share * size)))
        sample = given[-1]
        found = sum(map(len, sample)) / len(texts)
        assert abs(found - int(share * size) / size) <= 51 / len(texts)
        assert data.train[0].num_bytes == size
        # Evenly: each part of the text gives its share, to a piece.
        places = np.array([given[0].index(piece) for piece in sample]) / len(given[0])
        assert (np.diff(np.sort(places)) < 2.5 / (share * len(given[0]))).all()
    again = config(tokenizer_sample_bytes=int(share * size), cache_dir=str(data.directory) + "x")
    assert prepare(again).identity == data.identity
    one = config(tokenizer="char", tokenizer_sample_bytes=1)
    assert prepare(one).directory == prepare(config(tokenizer="char")).directory
    assert prepare(one).tokenizer.vocab_size == 1 + len(set(texts))


def test_a_bpe_in_training_says_on_what_and_for_how_long(config, monkeypatch, caplog):
    """The library is silent from the last piece of text on."""
    monkeypatch.setattr("sheepop_jax.progress._LINE_SECONDS", 0.01)

    def train(pieces, vocab_size):
        read = list(pieces)
        deadline = time.monotonic() + 30
        while "so far" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return inner(iter(read), vocab_size)

    inner = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", train)
    caplog.set_level("INFO")
    size = prepare(config()).train[0].num_bytes
    assert f"on the training split ({size / 1e6:.3g} MB)" in caplog.text
    assert re.search(r"data: training the tokenizer: \d+ s so far", caplog.text)
    caplog.clear()
    prepare(config(tokenizer_sample_bytes=size // 4))
    assert f"on 25.0% of the training split ({size // 4 / 1e6:.3g} MB)" in caplog.text


def test_a_given_tokenizer_is_used_as_it_is(config, tmp_path):
    first = prepare(config())
    path = tmp_path / "mine.json"
    path.write_text(first.tokenizer.to_json(), encoding="utf-8")
    data = prepare(config(tokenizer=str(path), cache_dir=str(tmp_path / "second")))
    assert data.tokenizer.fingerprint == Tokenizer.from_file(path).fingerprint
    assert data.identity == first.identity
    with pytest.raises(InputError, match=r"data\.tokenizer: got .*nowhere"):
        prepare(config(tokenizer=str(tmp_path / "nowhere"), cache_dir=str(tmp_path / "third")))
    assert not (tmp_path / "third").exists()


def test_a_tokenizer_that_loses_text_is_said_loudly(config, tmp_path, caplog):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    (tmp_path / "words.json").write_text(inner.to_str())
    lossy = config(tokenizer=str(tmp_path / "words.json"), val_split="tail")
    for said_before in (0, 1):  # when they are made, and when they are found
        assert caplog.text.count("IS NOT LOSSLESS") == said_before
        assert not prepare(lossy).lossless
    assert prepare(config(val_split="tail")).lossless
    assert caplog.text.count("IS NOT LOSSLESS") == 2


@pytest.mark.parametrize(("lost", "lossless"), [("validation", False), ("training", True)])
def test_all_text_that_is_measured_is_compared(config, tmp_path, caplog, lost, lossless):
    """One unknown word, at the end of a split, decides about that split."""
    vocabulary = {"\u2581a": 0, "?": 1, "\u2581": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    (tmp_path / "words.json").write_text(inner.to_str())
    words = ["a"] * 2000
    words[-1 if lost == "validation" else 1000] = "b"
    (tmp_path / "one.txt").write_text(" ".join(words))
    given = dict(path=str(tmp_path / "one.txt"), tokenizer=str(tmp_path / "words.json"))
    data = prepare(config(**given, val_split="tail"))
    assert data.lossless is lossless
    assert f"does not restore the {lost} text" in caplog.text


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({"source": "json", "text_column": "a.b"}, "rows", "one\ntwo\n"),  # not other.txt
        ({"source": "json", "text_column": "a.b"}, "rows/rows.jsonl", "one\ntwo\n"),
        ({"source": "csv", "text_column": "b"}, "quoted.tsv", '"one"\n'),
        ({"source": "quoted_tsv", "text_column": "b"}, "quoted.tsv", "one\n"),
        ({"source": "files"}, "quoted.tsv", 'a\tb\n1\t"one"\n'),
        ({"encoding_errors": "replace"}, "bad.txt", "one\ufffd"),
        ({"encoding_errors": "replace", "max_bytes": 1}, "bad.txt", "one\ufffd"),
    ],
)
def test_other_text_is_read_with_the_options_of_the_run(config, tmp_path, options, name, text):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "other.txt").write_text("another")
    rows = [{"text": "wrong", "a": {"b": word}} for word in ("one", "two")]
    (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "quoted.tsv").write_text('a\tb\n1\t"one"\n')
    (tmp_path / "bad.txt").write_bytes(b"one\xff")
    fields = {"path": str(tmp_path / "text"), "join_rows": "text_column" in options, **options}
    tokenizer = train_char([text])
    read = encode_path(config(**fields), str(tmp_path / name), tokenizer, "data")
    assert read.content.decode() == text
    assert tokenizer.decode(read.stream.read(0, len(read.stream))) == text


def test_a_database_has_no_other_text_for_a_run_without_a_query(config, tmp_path):
    with pytest.raises(InputError) as caught:
        encode_path(config(), str(tmp_path / "notes.db"), train_char(["a"]), "data")
    assert (caught.value.field, caught.value.got) == ("data", str(tmp_path / "notes.db"))
    assert "no query" in caught.value.expected
