"""Sources, the text they give, what they refuse, and what is held out."""

import hashlib
import os
import sysconfig
from pathlib import Path

import pytest

from sheepop_jax.data import documents
from sheepop_jax.data.documents import Document, choose_split, open_corpus, split_documents
from sheepop_jax.errors import InputError


@pytest.fixture
def read(make_config):
    """The documents of a path, or of other `data` fields, as (id, text)."""

    def read(path="", **fields):
        fields = {f"data.{name}": value for name, value in fields.items()}
        corpus = open_corpus(make_config({"data.path": str(path), **fields}).data)
        first = [(document.id, document.text) for document in corpus]
        assert first == [(document.id, document.text) for document in corpus], "order changed"
        return first

    return read


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def test_text_is_kept_exactly(tmp_path, read):
    text = "one\r\n two\rthree\n\n\tfour \x00\x0c \u2028 e\u0301 \U0001f411 no newline"
    assert read(write(tmp_path, {"a.txt": text}) / "a.txt") == [("a.txt", text)]


def test_a_byte_order_mark_is_dropped_at_the_start_alone(tmp_path, read):
    path = write(tmp_path, {"a.txt": "\ufeffone\ufefftwo"}) / "a.txt"
    assert read(path) == [("a.txt", "one\ufefftwo")]


def test_a_directory_is_read_in_order_without_hidden_vendored_or_foreign_files(tmp_path, read):
    files = ["b.py", "a/z.md", "a/B.TXT", "a.txt", "a/deep/er/c.rs"]
    left_out = [
        ".hidden.py",
        "a/.git/x.py",
        "node_modules/x.js",
        "a/venv/x.py",
        "a/deep/__pycache__/x.py",
        "my-env/lib/x.py",
        "picture.png",
        "README",
    ]
    write(tmp_path, {name: name for name in files + left_out})
    write(tmp_path, {"my-env/pyvenv.cfg": "", "a/empty.txt": "", "a/white.txt": " \r\n\t"})
    expected = ["a.txt", "a/B.TXT", "a/deep/er/c.rs", "a/z.md", "b.py"]
    assert read(tmp_path) == [(name, name) for name in expected]


def test_pipes_links_and_loops_in_a_directory(tmp_path, read):
    write(tmp_path, {"a.txt": "one", "d/b.txt": "two"})
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "d" / "up").symlink_to("..")
    (tmp_path / "linked.txt").symlink_to("a.txt")  # the same file again: counts once
    assert read(tmp_path) == [("a.txt", "one"), ("d/b.txt", "two")]


def test_globs_and_lists_of_paths(tmp_path, read):
    names = ["a.log", "b.log", "d/c.log", "venv/d.log", "x, y.txt"]
    write(tmp_path, {name: name for name in names})

    def ids(path):
        return [name for name, _ in read(path)]

    assert ids(f"{tmp_path}/*.log") == ["a.log", "b.log"]
    assert ids(f"{tmp_path}/**/*.log") == ["a.log", "b.log", "d/c.log"]
    assert ids(f"{tmp_path}/b.log, {tmp_path}/*.log,{tmp_path}/d/c.log") == [
        "b.log",
        "a.log",
        "c.log",
    ]
    assert ids(f"{tmp_path}/x, y.txt") == ["x, y.txt"]


@pytest.mark.parametrize(
    "files, path, said",
    [
        ({}, "missing.txt", r"data\.path: got '.*missing\.txt'; expected an existing file"),
        ({}, "missing*.txt", r"data\.path: got '.*missing\*\.txt'; expected a pattern"),
        ({}, "", r"files in it: none"),
        ({"a.weights": "x"}, "", r"files in it: \.weights x 1.*try a glob.*\*\.weights"),
        ({"a.txt": ""}, "a.txt", r"data\.path: got '.*a\.txt'.*empty or only white space"),
        ({"a.txt": " \n\u2003\t"}, "a.txt", r"empty or only white space"),
        ({"a.txt": b"abc\xe9t\xe9"}, "a.txt", r"file .*a\.txt \(byte 0xe9 at offset 3.*replace"),
        ({"a.txt": b"\xef\xbb\xbfab\xff"}, "a.txt", r"byte 0xff at offset 5"),
        ({"a.txt": b"\x89PNG\x00\x01"}, "a.txt", r"binary file .*a\.txt \(byte 0x89 at offset 0"),
        ({"a.txt": "hi".encode("utf-16")}, "a.txt", r"UTF-16 file .*iconv"),
    ],
)
def test_what_is_refused(tmp_path, read, files, path, said):
    with pytest.raises(InputError, match=said):
        read(write(tmp_path, files) / path)


def test_special_files_are_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="pipe, socket or device"):
        read(tmp_path / "pipe")
    with pytest.raises(InputError, match="loop .*symbolic links"):
        read(tmp_path / "loop")


def test_invalid_bytes_are_replaced_by_choice_and_counted(tmp_path, read, caplog):
    path = write(tmp_path, {"a.txt": b"a\xffb\xfe \xef\xbf\xbd"}) / "a.txt"
    assert read(path, encoding_errors="replace") == [("a.txt", "a\ufffdb\ufffd \ufffd")]
    assert [r.message for r in caplog.records] == ["2 invalid UTF-8 sequences replaced by U+FFFD"]


def test_the_standard_library(read):
    found = read()
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name, _ in found]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not {"test", "tests", "idle_test", "site-packages"}.intersection(
        part for name in names for part in name.split("/")
    )
    assert dict(found)["os.py"].encode() == (root / "os.py").read_bytes()
    assert sum(len(text) for _, text in found) > 5e6


def test_standard_library_files_that_do_not_decode_are_passed_over(
    tmp_path, read, monkeypatch, caplog
):
    write(tmp_path, {"a.py": "one", "latin.py": b"# \xe9", "test/b.py": "two", "c.txt": "three"})
    monkeypatch.setattr(documents.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with caplog.at_level("INFO", "sheepop_jax"):
        assert read() == [("a.py", "one")]
    assert "1 files that are not UTF-8 skipped" in caplog.text
    (tmp_path / "a.py").unlink()
    (tmp_path / "latin.py").unlink()
    with pytest.raises(InputError, match=r"data\.source.*try data\.path"):
        read()


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def serve(answer):
            def load_dataset(name, subset, **options):
                assert (name, options) == ("some/set", {"split": "train", "streaming": True})
                if isinstance(answer, Exception):
                    raise answer
                return [{**row, "subset": subset} for row in answer]

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)

        return serve

    def test_rows_become_documents(self, hub, read):
        hub([{"body": "one"}, {"body": ""}, {"body": None}, {"body": "two\r\n"}])
        found = read(name="some/set", text_column="body")
        assert found == [("some/set#0", "one"), ("some/set#3", "two\r\n")]
        assert read(name="some/set", subset="v2", text_column="subset")[0][1] == "v2"

    @pytest.mark.parametrize(
        "answer, said",
        [
            ([{"body": "x", "id": 3}], r"data\.text_column: got 'text'.*columns body, id, subset"),
            ([{"text": 3}], r"data\.text_column: .*rows hold int"),
            ([], r"data\.name: .*rows with text"),
            (ConnectionError("no route"), r"data\.name: got 'some/set'.*no route.*try.*network"),
            (ValueError("BuilderConfig 'x' not found.\nAvailable: ['a']"), r"data\.subset.*'a'"),
        ],
    )
    def test_what_is_refused(self, hub, read, answer, said):
        hub(answer)
        with pytest.raises(InputError, match=said):
            read(name="some/set")


def held_out(corpus, rule="document", val_fraction=0.1):
    """The training and the held-out texts."""
    split = choose_split(corpus, rule, val_fraction)
    parts = list(split_documents(corpus, split, "test"))
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
    names = [document.id for _, document in split_documents(corpus, split, "test")]
    assert names == ["a", "b", "b from character 2", "c"]


def test_auto_takes_the_tail_when_the_hashes_hold_out_too_much_or_too_little():
    share = sum(len(text.encode()) for text in held_out(CORPUS)[1])
    share /= sum(len(document.text.encode()) for document in CORPUS)
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
        list(split_documents(CORPUS[:-1], split, "test"))


def test_a_long_reading_logs_its_progress(monkeypatch, caplog):
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(documents.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO", "sheepop_jax"):
        list(split_documents(CORPUS, choose_split(CORPUS, "document", 0.1), "data: encoding"))
    lines = [r.message for r in caplog.records if r.message.startswith("data: encoding")]
    assert "s left" in lines[0]
    assert 50 < len(lines) < 60  # every 12 s by this clock
