"""The text of files, plain and compressed: kept byte for byte, or refused."""

import base64
import bz2
import gzip
import http.server
import io
import json
import lzma
import os
import sysconfig
import tarfile
import threading
import traceback
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sheepop_jax.data.sources import files as module
from sheepop_jax.data.sources import paths, web
from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.files import (
    TEXT_SUFFIXES,
    TextFiles,
    open_file,
    open_texts,
    standard_library,
)
from sheepop_jax.data.sources.paths import Found, Walk, find_files
from sheepop_jax.errors import InputError

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
EACH_KIND = pytest.mark.parametrize("suffix", PACK)
TEXT = "one\r\n two\rthree\n\n\tfour \x00\x0c \u2028\x85 e\u0301 \U0001f411 no newline"


def corpus(*named_paths, errors="strict"):
    found = Found([(path.name, path) for path in named_paths])
    return TextFiles("data.path", "the value", found, errors)


def read(*named_paths, errors="strict"):
    """The texts; of a skipped one its reason."""
    texts = []
    for document in corpus(*named_paths, errors=errors):
        try:
            texts.append("".join(document.pieces))
        except SkipDocument as reason:
            texts.append(reason)
    return texts


@pytest.fixture(params=[1, 2, 3, 5, 2**20])
def block_bytes(request, monkeypatch):
    """Files are read in blocks of so many bytes."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", request.param)
    return request.param


@pytest.fixture
def a(tmp_path):
    """`a(content, name="a.txt")` writes a file."""

    def write(content, name="a.txt"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("text", [TEXT, "", "\n", "\u2028", "a\ufeff", "a" * 2_500_000 + "\u20ac"])
def test_text_is_kept_exactly(a, text):
    assert read(a(text)) == [text]


def test_characters_may_lie_across_blocks(a, block_bytes):
    assert read(a(TEXT)) == [TEXT]
    pieces = ["".join(document.pieces) for document in corpus(a(TEXT), a(TEXT[::-1], "b"))]
    assert pieces == [TEXT, TEXT[::-1]]


def test_blocks_are_read_one_by_one(a, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4)
    (document,) = corpus(a("abcdefghij"))
    assert [piece for piece in document.pieces if piece] == ["abcd", "efgh", "ij"]


def test_a_byte_order_mark_is_dropped_at_the_start_alone(a, block_bytes):
    path = a("\ufeff\ufeffone\ufefftwo\ufeff")
    assert read(path) == read(path, errors="replace") == ["\ufeffone\ufefftwo\ufeff"]
    assert read(a("\ufeff"), a("x\ufeff", "b.txt")) == ["", "x\ufeff"]


def test_documents_names_and_sizes(a):
    first, second = a("one\u20ac"), a("two", "b.md")
    found = Found([("d/a.txt", first), ("b", second)])
    found.skipped["a reason"] = 3
    files = TextFiles("data.val_path", "some/where", found, "strict")
    assert (files.field, files.value, files.num_bytes) == ("data.val_path", "some/where", 9)
    assert files.skipped == {"a reason": 3}
    for _ in range(2):
        seen = [(d.id, "".join(d.pieces), d.is_val) for d in files]
        assert seen == [("d/a.txt", "one\u20ac", False), ("b", "two", False)]


def test_the_size_of_compressed_text_is_unknown(a):
    assert corpus(a("one"), a(gzip.compress(b"two"), "b.txt.GZ")).num_bytes == 0
    gone = a("three", "c.txt")
    files = corpus(a("one"), gone)
    gone.unlink()
    assert files.num_bytes == 8
    assert corpus(a("one"), gone).num_bytes == 3


class TestSignature:
    def test_it_is_of_files_and_options(self, a, monkeypatch):
        path = a("one")
        assert corpus(path).signature() == ""  # young
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", -60.0)
        first = corpus(path).signature()
        assert first == corpus(path).signature() != ""
        assert corpus(path, errors="skip").signature() != first
        assert corpus(path, a("", "b")).signature() != first


class TestBadBytes:
    @pytest.mark.parametrize(
        "content, offset",
        [
            (b"abc\xe9t\xe9", 3),
            (b"\xef\xbb\xbfab\xff", 5),
            ("\u20ac\u20ac".encode() + b"\x80", 6),
            (b"0123456789\xe2\x82x", 10),  # a character that is not finished
            (b"0123456789\xe2\x82", 10),  # nor at the end of the file
            (b"0123\xed\xa0\x80", 4),  # half a surrogate pair
        ],
    )
    def test_strict_names_file_and_offset(self, a, block_bytes, content, offset):
        path = a(content)
        with pytest.raises(InputError) as caught:
            read(path)
        got = f"file {path} (byte 0x{content[offset]:02x} at offset {offset} is not UTF-8)"
        assert (caught.value.field, caught.value.got) == ("data.path", got)
        assert "`data.encoding_errors=replace`" in caught.value.hint

    @pytest.mark.parametrize("name", ["a.txt", "a.zip"])
    def test_the_file_is_closed_after_an_error_in_its_text(self, a, monkeypatch, name):
        path = a(zipped(**{"b.txt": b"abc\xe9"}) if name == "a.zip" else b"abc\xe9", name)
        opened = []
        monkeypatch.setattr(
            module, "open_file", lambda path: opened.append(path.open("rb")) or opened[0]
        )
        real = zipfile.ZipFile.open
        monkeypatch.setattr(
            zipfile.ZipFile, "open", lambda *words: opened.append(real(*words)) or opened[0]
        )
        with pytest.raises(InputError) as caught:  # its traceback holds the frames that read
            read(path)
        assert caught.value.field == "data.path" and [file.closed for file in opened] == [True]

    def test_offset_in_a_later_block_of_the_usual_size(self, a):
        content = "\u20ac".encode() * 800_000 + b"\xff"
        with pytest.raises(InputError, match=r"byte 0xff at offset 2400000 "):
            read(a(content))

    @pytest.mark.parametrize("byte", [b"\x00", b"\x08", b"\x0e", b"\x1a", b"\x1c", b"\x1f"])
    def test_binary_is_named(self, a, byte):
        with pytest.raises(InputError, match=r"got 'binary file .*removing it, or `data\.enc"):
            read(a(b"PN" + byte + b"G\x89"))

    def test_control_characters_of_text_are_not_binary(self, a):
        with pytest.raises(InputError, match="got 'file "):
            read(a(b"\t\n\v\f\r\x1b[0m \x7f \xe9 "))

    def test_text_of_windows_comes_with_the_command_that_converts_it(self, a):
        path = a("\u201cquoted\u201d".encode("cp1252"))
        with pytest.raises(InputError) as caught:
            read(path)
        assert caught.value.hint.startswith(f"iconv -f WINDOWS-1252 -t UTF-8 {path} ")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
    def test_utf_16_comes_with_the_command_that_converts_it(self, a, encoding):
        content = ("" if encoding == "utf-16" else "\ufeff") + "hi"
        path = a(content.encode(encoding))
        with pytest.raises(InputError, match=rf"UTF-16 file .*try iconv -f UTF-16.* {path}$"):
            read(path)

    def test_replaced_by_choice_and_counted(self, a, block_bytes, caplog):
        content = b"a\xffb\xfe \xef\xbf\xbd\xef\xbf\xbd \xe2\x82 \xef\xbf\xef\xbf\xbd\xe2"
        text = content.decode(errors="replace")
        files = corpus(a(content), a("x\ufffd", "b.txt"), errors="replace")
        for _ in range(2):  # counted anew
            caplog.clear()
            assert ["".join(d.pieces) for d in files] == [text, "x\ufffd"]
            (record,) = caplog.records
            assert record.message == "5 invalid UTF-8 sequences replaced by U+FFFD"

    @given(st.lists(st.sampled_from([b"\xef", b"\xbf", b"\xbd", b"\xe2\x82", b"a"])))
    def test_replaced_as_python_does_with_an_exact_count(self, tmp_path_factory, parts):
        content = b"".join(parts)
        path = tmp_path_factory.mktemp("x") / "a"
        path.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK_BYTES", 2)
            files = corpus(path, errors="replace")
            (text,) = ["".join(document.pieces) for document in files]
        assert text == content.decode(errors="replace")
        assert files._replaced == text.count("\ufffd") - content.count(b"\xef\xbf\xbd")

    def test_the_count_is_told_also_when_reading_stops_early(self, a, caplog):
        documents = iter(corpus(a(b"\xff"), a(b"\xff", "b"), errors="replace"))
        assert list(next(documents).pieces)[0] == "\ufffd"
        assert not caplog.records
        documents.close()
        assert [r.message for r in caplog.records] == [
            "1 invalid UTF-8 sequences replaced by U+FFFD"
        ]

    def test_nothing_is_told_of_good_text(self, a, caplog):
        assert read(a("x\ufffd"), errors="replace") == ["x\ufffd"]
        assert not caplog.records

    def test_skipped_by_choice(self, a, block_bytes):
        texts = read(a(b"ab\xe9"), a("two", "b"), a(b"\xe2", "c"), errors="skip")
        assert [str(text) for text in texts] == ["not UTF-8", "two", "not UTF-8"]


def tar(name="a.txt", content=b"text\n" * 9000):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(**files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def stored(kind):
    """An archive whose first member says what it is, as that of a book does."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("mimetype", kind)
    return packed.getvalue()


class TestBinary:
    """Valid UTF-8 that is no text. What is invalid as well is tested above."""

    @pytest.mark.parametrize(
        ("name", "content", "kind", "hint"),
        [
            ("a.tar", tar(), "a tar archive", "unpacking it"),
            ("a.tar.gz", gzip.compress(tar()), "a tar archive", "unpacking it"),
            ("a", zipped(a="x"), "a zip archive", "renaming it to {0}.zip"),
            ("a.docx", zipped(**{"word/document.xml": "x"}), "a Word document", "pandoc"),
            ("a.xlsx", zipped(**{"xl/workbook.xml": "x"}), "an Excel workbook", "saving its sheet"),
            ("a.epub", stored("application/epub+zip"), "an EPUB book", "pandoc"),
            ("a.odt", stored("application/vnd.oasis.open"), "an OpenDocument file", "pandoc"),
            ("a", b"SQLite format 3\0" + b"\0" * 99, "an SQLite database", "`data.source=sql`"),
            ("a", b"PAR1\x15\x04 text", "a parquet table", "`data.source=parquet`"),
            ("a", b"%PDF-1.4\n1 0 obj", "a PDF", "`data.source=pdf`"),
            ("a", b"\x7fELF\x02\x01\x01", "a program", ""),
            ("a", "sixteen letters.".encode("utf-16-le"), "UTF-16 text", "iconv -f UTF-16LE"),
            ("a", "sixteen letters.".encode("utf-16-be"), "UTF-16 text", "iconv -f UTF-16BE"),
            ("a", b"text" * 99 + b"\1" * 45, "10% of its bytes are control characters", ""),
        ],
    )
    def test_it_is_refused_by_its_kind(self, a, name, content, kind, hint):
        path = a(content, name)
        with pytest.raises(InputError) as caught:
            read(path)
        assert caught.value.got == f"binary file {path} ({kind})"
        assert caught.value.hint.startswith(hint.format(path))
        assert caught.value.hint.endswith("removing it, or `data.encoding_errors=skip`")
        assert [str(text) for text in read(path, errors="skip")] == ["binary files"]
        with pytest.raises(InputError, match="binary file"):
            read(path, errors="replace")

    def test_it_is_refused_however_late_it_shows(self, a, block_bytes):
        if block_bytes > 1:  # 100 kB byte by byte take a second
            with pytest.raises(InputError, match="control characters"):
                read(a(b"text" * 5000 + b"\0" * 9999))

    def test_the_kind_of_invalid_utf_8_is_named_too(self, a):
        with pytest.raises(InputError, match=r"\(a PNG image; byte 0x89 at offset 0 is not UTF-8"):
            read(a(b"\x89PNG\r\n\x1a\n\0"))
        with pytest.raises(InputError, match=r"\(gzip data; .*try renaming it to .*\.gz, or"):
            read(a(gzip.compress(b"x")))
        with pytest.raises(InputError, match=r"\(an old Office document; .*try soffice "):
            read(a(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a.doc"))

    @pytest.mark.parametrize(
        "text",
        [
            "\0",
            "a\0b" * 10,
            "\0" * 32,
            "\1field\2" + "a long row of text, and more" * 99,
            "B\bBO\bOL\bLD\bD" * 99,  # a manual page
            "\x1b[1mred\x1b[0m\f\v\r\n" * 9,
            "PAR1 is how it begins",
            "PK and %PDF and ustar",
            "x" * 257 + "ustar",
            "ID3 GIF89a Rar!",
        ],
    )
    def test_text_with_some_control_characters_is_text(self, a, text):
        assert read(a(text)) == [text]


@pytest.fixture
def texts(tmp_path):
    """`texts(path)`: the ids and texts of a path or URL, or the reasons to skip them."""

    def read(spec, as_they_are=False, errors="strict", **walk):
        downloads = tmp_path / "cache" / "downloads"
        found = []
        for document in open_texts(
            "data.path",
            str(spec),
            errors,
            Walk(TEXT_SUFFIXES, **walk),
            downloads,
            as_they_are=as_they_are,
        ):
            try:
                found.append((document.id, "".join(document.pieces)))
            except SkipDocument as reason:
                found.append((document.id, reason.args[0]))
        return found

    return read


class TestNotebooks:
    IMAGE = "data:image/png;base64," + "iVBOR" * 99
    CELLS = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"data": {"image/png": IMAGE}}]},
        {"cell_type": "code", "source": []},
        {"cell_type": "markdown", "source": f"![plot]({IMAGE})", "attachments": {"a": IMAGE}},
    ]
    TEXT = "# Title\ntext\n\nx = 1\n\n![plot](data:image/png;base64,)"

    def test_cells_without_outputs_and_images(self, a, texts, tmp_path):
        old = {"worksheets": [{"cells": [{"input": ["y\n", "z"]}]}]}
        a(json.dumps({"cells": self.CELLS}))
        a(json.dumps({"cells": self.CELLS}), "b.ipynb")
        a(gzip.compress(json.dumps(old).encode()), "c.ipynb.gz")
        a("no notebook", "d.ipynb")
        a('{"cells": 3}', "e.ipynb")
        assert texts(tmp_path)[1:] == [
            ("b.ipynb", self.TEXT),
            ("c.ipynb.gz", "y\nz"),
            ("d.ipynb", "damaged notebooks"),
            ("e.ipynb", "damaged notebooks"),
        ]
        assert texts(tmp_path, as_they_are=True)[3] == ("d.ipynb", "no notebook")

    def test_only_their_signature_is_new(self, a, monkeypatch, tmp_path):
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", -60.0)
        path = a("one")
        for version in (1, 2):
            found = open_texts("", str(tmp_path), "strict", Walk(TEXT_SUFFIXES), Path())
            expected = paths.signature_of(found.paths, ("text", version, "strict"))
            assert found.signature() == expected != ""
            path = a("{}", "b.ipynb")
        assert path.name == "b.ipynb"


class TestZip:
    FILES = {
        "b/two.TXT": "two\r\n",
        "a.py": "\ufeffone",
        "n.ipynb": json.dumps({"cells": [{"source": "cell"}]}),
        "x.png": "\x89",
        ".hidden.txt": "",
        "__MACOSX/a.py": "",
        "node_modules/a.js": "",
        "README": "no suffix",
        "big.txt": "x" * 200,
        "../../out.txt": "never written",
        "/absolute.txt": "here",
    }

    def test_its_texts_are_documents(self, a, texts, tmp_path):
        path = a(zipped(**self.FILES), "a.zip")
        before = sorted(tmp_path.rglob("*"))
        hidden = "hidden or vendored files"
        assert texts(path, max_file_bytes=100) == [
            ("a.zip/../../out.txt", hidden),
            ("a.zip/.hidden.txt", hidden),
            ("a.zip//absolute.txt", "here"),
            ("a.zip/README", "suffixless files"),
            ("a.zip/__MACOSX/a.py", hidden),
            ("a.zip/a.py", "one"),
            ("a.zip/b/two.TXT", "two\r\n"),
            ("a.zip/big.txt", "files larger than data.max_file_bytes"),
            ("a.zip/n.ipynb", "cell"),
            ("a.zip/node_modules/a.js", hidden),
            ("a.zip/x.png", ".png files"),
        ]
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(InputError, match="a zip archive"):
            texts(path, as_they_are=True)

    def test_links_and_encrypted_or_unbounded_members_are_skipped(self, a, texts):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("b.txt", "x", zipfile.ZIP_BZIP2)
            link = zipfile.ZipInfo("l.txt")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
            archive.writestr("s.txt", "x")
        content = bytearray(packed.getvalue())
        entry = content.rindex(b"PK\x01\x02")
        content[entry + 8] |= 1  # the flag of the last member
        path = a(bytes(content), "a.zip")
        assert texts(path) == [
            ("a.zip/b.txt", "files compressed by other methods than deflate"),
            ("a.zip/l.txt", "links"),
            ("a.zip/s.txt", "encrypted files"),
        ]

    def test_bad_text_in_it_is_named(self, a, texts):
        path = a(zipped(**{"d/a.txt": b"caf\xe9"}), "a.zip")
        with pytest.raises(InputError, match=r"a\.zip/d/a\.txt \(byte 0xe9 at offset 3"):
            texts(path)
        assert texts(path, errors="skip") == [("a.zip/d/a.txt", "not UTF-8")]

    def test_a_bomb_is_refused_before_it_is_read(self, a, texts, monkeypatch):
        monkeypatch.setattr(module, "_FREE_EXPANSION_BYTES", 2**10)
        path = a(zipped(**{"a.txt": "x" * 2**20, "x.png": "y" * 2**20}), "a.zip")
        with pytest.raises(InputError, match=r"a\.zip \(its text has 1048576 bytes; unpack it"):
            texts(path)

    def test_what_is_damaged_is_refused(self, a, texts):
        good = zipped(**{"a.txt": "text of some length" * 9})
        cut, flipped = good[:-9], bytearray(good)
        flipped[40] ^= 0xFF
        for content in (cut, bytes(flipped), b"PK no", b""):
            with pytest.raises(InputError, match="expected a readable zip archive"):
                texts(a(content, "a.zip"))


class TestWeb:
    @pytest.fixture
    def served(self):
        """Serves `answers[path]`, (headers, content) or a status; notes what was asked."""
        answers, asked = {}, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, dict(self.headers)))
                answer = answers.get(self.path, 404)
                if not isinstance(answer, int):
                    headers, content = answer
                    same = self.headers.get("If-None-Match") == headers.get("ETag", "none")
                    answer = 304 if same else 200
                self.send_response(answer)
                if answer == 200:
                    for header in headers.items():
                        self.send_header(*header)
                self.end_headers()
                if answer == 200:
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}", answers, asked
            server.shutdown()

    def test_text_is_read_and_cached(self, served, texts, a, tmp_path, caplog):
        url, answers, asked = served
        answers["/in.txt"] = {"ETag": '"1"'}, "\ufeffone\r\n".encode()
        for _ in range(2):
            assert texts(f"{url}/in.txt") == [(f"{url}/in.txt", "one\r\n")]
        assert [headers.get("If-None-Match") for _, headers in asked] == [None, '"1"']
        answers["/in.txt"] = {"ETag": '"2"'}, b"two"
        assert texts(f"{a('local')}, {url}/in.txt") == [
            ("a.txt", "local"),
            (f"{url}/in.txt", "two"),
        ]
        answers["/in.txt"] = 500
        assert texts(f"{url}/in.txt") == [(f"{url}/in.txt", "two")]
        assert "HTTP 500" in caplog.text and "using the copy from an earlier run" in caplog.text
        assert len(list((tmp_path / "cache" / "downloads").iterdir())) == 2

    def test_suffixes_count(self, served, texts):
        url, answers, _ = served
        answers["/a.txt.gz?x=1"] = {}, gzip.compress(b"one")
        answers["/a.zip"] = {}, zipped(**{"b.txt": "two"})
        assert texts(f"{url}/a.txt.gz?x=1")[0][1] == "one"
        assert texts(f"{url}/a.zip") == [(f"{url}/a.zip/b.txt", "two")]

    def test_what_is_refused_leaves_nothing(self, served, texts, tmp_path, monkeypatch):
        url, answers, _ = served
        monkeypatch.setattr(web, "_MAX_TEXT_BYTES", 9)
        monkeypatch.setattr(web, "_NETWORK_SECONDS", 0.2)
        answers["/large.txt"] = {}, b"x" * 10
        answers["/cut.txt"] = {"Content-Length": "9"}, b"x"
        answers["/page"] = {"Content-Type": "text/html; charset=utf-8"}, b"<html>"
        for name, said in (
            ("none.txt", "HTTP 404"),
            ("large.txt", "larger than 9 bytes"),
            ("cut.txt", "8 bytes before the end"),
            ("page", "an HTML page, not a text file"),
        ):
            with pytest.raises(InputError) as caught:
                texts(f"{url}/{name}")
            assert caught.value.got.startswith(f"{url}/{name} (") and said in caught.value.got
            assert not (tmp_path / "cache").exists()

    def test_secrets_are_sent_and_never_shown(self, served, texts, tmp_path, caplog):
        caplog.set_level("INFO")
        url, answers, asked = served
        answers["/a.txt?token=s3cret"] = {}, b"one"
        secret = url.replace("://", "://me:s3cret@") + "/a.txt?token=s3cret"
        shown = url.replace("://", "://\u2026@") + "/a.txt?token=\u2026"
        assert texts(secret) == [(shown, "one")]
        assert asked[0][1]["Authorization"] == "Basic " + base64.b64encode(b"me:s3cret").decode()
        assert shown in caplog.text and "s3cret" not in caplog.text
        for url in (secret.replace("a.txt", "b.txt"), "http://me:s3cret/x@h/a.txt"):
            with pytest.raises(InputError) as caught:
                texts(url)
            said = "".join(traceback.format_exception(caught.value, chain=False))
            assert "s3cret" not in said.replace(repr(url), "")
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any("s3cret" in str(p) or b"s3cret" in p.read_bytes() for p in files)


class TestCompressed:
    @EACH_KIND
    @pytest.mark.parametrize("upper", [False, True])
    def test_text_is_kept_exactly(self, a, suffix, upper, block_bytes):
        name = f"a.txt{suffix}"
        path = a(PACK[suffix](("\ufeff" + TEXT).encode()), name.upper() if upper else name)
        assert read(path) == [TEXT]

    @EACH_KIND
    def test_several_members_are_one_text(self, a, suffix, monkeypatch):
        content = os.urandom(3000).hex().encode()
        parts = [content, b"", b"\xe2\x82", b"\xac", content]
        packed = b"".join(map(PACK[suffix], parts))
        expected = b"".join(parts).decode()
        path = a(packed, f"a{suffix}")
        assert read(path) == [expected]
        for size in (1, 7, len(PACK[suffix](content)), len(packed) - 1):  # at and across borders
            monkeypatch.setattr(module, "_MEMBER_BYTES", size)
            assert read(path) == [expected]

    @EACH_KIND
    def test_large_text(self, a, suffix):
        text = "".join(f"line {number}\n" for number in range(100_000))
        assert read(a(PACK[suffix](text.encode()), f"a{suffix}")) == [text]

    @EACH_KIND
    def test_what_is_cut_off_is_refused(self, a, suffix):
        packed = PACK[suffix](os.urandom(5000).hex().encode())
        sizes = [*range(1, 12), 1000, len(packed) // 2, *range(len(packed) - 9, len(packed))]
        for size in sizes:
            for whole in (b"", packed):  # the first member, and one after it
                path = a(whole + packed[:size], f"a.txt{suffix}")
                with pytest.raises(InputError) as caught:
                    read(path)
                said = str(caught.value)
                assert said.startswith("data.path: got ") and f"{path} (" in said, (size, said)
                assert said.endswith("expected a readable file") and "\n" not in said

    @EACH_KIND
    @pytest.mark.parametrize("where", [0, 1, 1500, -3])
    def test_what_is_damaged_is_refused(self, a, suffix, where):
        packed = bytearray(PACK[suffix](os.urandom(5000).hex().encode()))
        good = bytes(packed)
        packed[where] ^= 0x55
        for content in (bytes(packed), good + bytes(packed)):
            path = a(content, f"a.txt{suffix}")
            with pytest.raises(InputError, match=r"a\.txt\.\w+ \(.+\)[\"']; expected a readable"):
                read(path)

    @EACH_KIND
    def test_what_follows_the_last_member(self, a, suffix):
        packed = PACK[suffix](b"one")
        assert read(a(packed + b"\0" * 8, f"a{suffix}")) == ["one"]  # padding
        with pytest.raises(InputError, match="a readable file"):
            read(a(packed + b"something else", f"a{suffix}"))

    @EACH_KIND
    def test_plain_text_by_that_name_is_refused(self, a, suffix):
        with pytest.raises(InputError, match=f"a{suffix} .*a readable file"):
            read(a("plain text, not packed", f"a{suffix}"))

    @EACH_KIND
    def test_empty_files(self, a, suffix):
        assert read(a(b"", f"a{suffix}"), a(PACK[suffix](b""), f"b{suffix}")) == ["", ""]

    @EACH_KIND
    def test_a_bomb_is_refused_in_bounded_memory(self, a, suffix, monkeypatch):
        size = 2**26 if suffix == ".zst" else 2**23  # a kilobyte of zst holds up to 32 MB
        monkeypatch.setattr(module, "_FREE_EXPANSION_BYTES", size // 16)
        path = a(PACK[suffix](b"x" * size), f"a{suffix}")
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match="over 250 times its size; decompress it first"):
                for document in corpus(path):
                    for _ in document.pieces:
                        pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < size * 0.75

    @EACH_KIND
    def test_expansion_is_bounded_exactly(self, a, suffix, monkeypatch):
        content = b"y" * 100_000
        path = a(PACK[suffix](content), f"a{suffix.upper()}")
        size = path.stat().st_size
        monkeypatch.setattr(module, "_MAX_EXPANSION", 10)
        monkeypatch.setattr(module, "_FREE_EXPANSION_BYTES", len(content) - 10 * size)
        assert read(path) == [content.decode()]
        monkeypatch.setattr(module, "_FREE_EXPANSION_BYTES", len(content) - 10 * size - 1)
        with pytest.raises(InputError, match="over 10 times its size"):
            read(path)

    def test_plain_text_has_no_bound(self, a, monkeypatch):
        monkeypatch.setattr(module, "_MAX_EXPANSION", 0)
        monkeypatch.setattr(module, "_FREE_EXPANSION_BYTES", 0)
        assert read(a("text")) == ["text"]

    @EACH_KIND
    def test_files_are_closed(self, a, suffix):
        def opened():
            links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
            return sum(os.readlink(link) == str(path) for link in links if os.path.lexists(link))

        path = a(PACK[suffix](b"one\ntwo\n" * 9999), f"a{suffix}")
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("needs /proc")
        with open_file(path) as file:
            assert file.readline() == b"one\n"
            assert opened() == 1
        assert opened() == 0
        open_file(path).close()  # before anything is read
        assert opened() == 0


def test_files_that_cannot_be_read(a, monkeypatch):
    path = a("one")
    files = corpus(path)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.txt \(No such file.*a readable file"):
        next(iter(next(iter(files)).pieces))
    path = a("one")

    def deny(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(InputError, match=r"a\.txt \(Permission denied\)'; expected a readable"):
        read(path)


def test_suffixes_of_text(tmp_path):
    assert {".txt", ".md", ".py", ".json"} <= TEXT_SUFFIXES
    assert not {".jsonl", ".csv", ".tsv", ".parquet", ".pdf", ".png", ".gz", ""} & TEXT_SUFFIXES
    assert all(suffix.startswith(".") and suffix.islower() for suffix in TEXT_SUFFIXES)
    for suffix, pack in PACK.items():
        (tmp_path / f"a.md{suffix}").write_bytes(pack(b"one"))
    found = find_files("data.path", str(tmp_path), Walk(TEXT_SUFFIXES))
    assert ["".join(d.pieces) for d in TextFiles("", "", found, "strict")] == ["one"] * 4


class TestStandardLibrary:
    def test_it_is_pythons_own_without_its_tests(self):
        found = standard_library()
        assert (found.field, found.value, found.skipped) == ("data.source", "stdlib", {})
        root = Path(sysconfig.get_paths()["stdlib"])
        texts = {}
        for document in found:
            try:
                texts[document.id] = "".join(document.pieces)
            except SkipDocument:
                pass
        assert list(texts) == sorted(texts)
        assert {"os.py", "json/decoder.py"} <= set(texts)
        assert not {"test", "tests", "idle_test", "site-packages"}.intersection(
            part for name in texts for part in name.split("/")
        )
        assert all(name.endswith(".py") for name in texts)
        assert texts["os.py"].encode() == (root / "os.py").read_bytes()
        assert sum(map(len, texts.values())) > 5e6

    def test_files_that_do_not_decode_are_passed_over(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        (tmp_path / "tests").mkdir()
        contents = {"a.py": b"one", "l.py": b"# \xe9", "tests/b.py": b"two", "c.txt": b"three"}
        for name, content in {**contents, ".gitignore": b"*"}.items():
            (tmp_path / name).write_bytes(content)
        documents = list(standard_library())
        assert [document.id for document in documents] == ["a.py", "l.py"]
        assert list(documents[0].pieces)[0] == "one"
        with pytest.raises(SkipDocument, match="not UTF-8"):
            list(documents[1].pieces)

    @pytest.mark.parametrize("there", [False, True])
    def test_an_interpreter_without_one(self, tmp_path, monkeypatch, there):
        root = tmp_path / "lib"
        if there:
            root.mkdir()
        monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
        with pytest.raises(InputError, match=r"data\.source: got 'stdlib'.*try `data\.path"):
            standard_library()


@pytest.mark.parametrize("tags_as_asked", [False, True])
def test_html_that_is_read_with_its_tags_is_said(tmp_path, caplog, tags_as_asked):
    (tmp_path / "a.html").write_text("<p>one</p>")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("c.htm", "<p>two</p>")
        archive.writestr("d.txt", "three")
    walk = None if tags_as_asked else Walk(suffixes=TEXT_SUFFIXES)
    names = ["a.html"] if tags_as_asked else ["a.html", "b.zip"]
    found = Found([(name, tmp_path / name) for name in names])
    texts = TextFiles("data.path", str(tmp_path), found, "strict", walk=walk)
    assert len([list(document.pieces) for document in texts]) == (1 if tags_as_asked else 3)
    assert ("2 HTML files read with their tags" in caplog.text) != tags_as_asked
