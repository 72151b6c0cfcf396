"""Sources, the text they give, and what they refuse."""

import os
import sysconfig
from pathlib import Path

import pytest

from sheepop_jax.data import documents
from sheepop_jax.data.documents import open_corpus
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
