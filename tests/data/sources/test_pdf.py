"""Real PDF files, written here byte by byte: their text, and what is left out and why."""

import logging
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pypdf
import pytest
from pypdf.errors import DependencyError

from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.paths import Walk
from sheepop_jax.data.sources.pdf import open_pdfs
from sheepop_jax.errors import InputError

PDFS = Walk({".pdf"})
TWO_PAGES = [
    "BT /F1 12 Tf 72 700 Td (The first page.) Tj 0 -14 Td (Its second line) Tj ET",
    "BT /F1 12 Tf 72 700 Td (The second page) Tj ET",
]
TEXT = "The first page.\nIts second line\nThe second page"
# Codes 1 to 4 mean a high half alone, an emoji in its two halves, and a letter.
HALVES = """/CIDInit /ProcSet findresource begin 12 dict begin begincmap
1 begincodespacerange <01> <04> endcodespacerange
4 beginbfchar <01> <D800> <02> <D83D> <03> <DE00> <04> <0061> endbfchar
endcmap end end"""


def pdf(pages: list[str], unicode_map: str = "") -> bytes:
    """A PDF of these content streams, one a page; `unicode_map` says what character codes mean."""
    to_unicode = " /ToUnicode 4 0 R" if unicode_map else ""
    kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids [{kids}] >>",
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica{to_unicode} >>",
        f"<< /Length {len(unicode_map)} >>\nstream\n{unicode_map}\nendstream",
    ]
    for index, content in enumerate(pages):
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents "
            f"{6 + 2 * index} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    return (
        data
        + (
            f"xref\n0 {size}\n0000000000 65535 f \n{table}"
            f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
        ).encode()
    )


def write(path: Path, pages: list[str] = TWO_PAGES, **options) -> Path:
    path.write_bytes(pdf(pages, **options))
    return path


def encrypt(path: Path, password: str, algorithm: str) -> Path:
    writer = pypdf.PdfWriter(clone_from=write(path))
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    writer.write(path)
    return path


def read(path: Path) -> dict[str, str]:
    """Text by id, or the reason to skip in brackets."""
    found = {}
    for document in open_pdfs("data.path", str(path), PDFS):
        try:
            found[document.id] = "".join(document.pieces)
        except SkipDocument as skip:
            found[document.id] = f"[{skip}]"
    return found


def test_pages_are_joined_by_one_line_feed(tmp_path):
    pages = [*TWO_PAGES, "", "BT /F1 12 Tf 72 700 Td (Last, after a blank one) Tj ET"]
    assert read(write(tmp_path / "a.pdf", pages)) == {"a.pdf": f"{TEXT}\nLast, after a blank one"}


def test_a_page_that_ends_with_a_line_feed_gets_none_more(tmp_path, monkeypatch):
    texts = iter(["one\n", "two", "", "\n", "three"])
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: next(texts))
    assert read(write(tmp_path / "a.pdf", ["x"] * 5)) == {"a.pdf": "one\ntwo\n\nthree"}


def test_a_directory_gives_its_pdfs_in_order_and_none_is_lost_by_a_bad_one(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    whole = write(tmp_path / "sub/b.PDF").read_bytes()
    write(tmp_path / "c.pdf")
    write(tmp_path / "scan.pdf", ["0 0 100 100 re f", ""])
    write(tmp_path / "white.pdf", ["BT /F1 12 Tf 72 700 Td (  ) Tj ET"])
    encrypt(tmp_path / "locked.pdf", "secret", "RC4-128")
    encrypt(tmp_path / "open.pdf", "", "RC4-128")
    (tmp_path / "cut.pdf").write_bytes(whole[:100])
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "packed.pdf.gz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no PDF")
    no_text = "[PDFs without text (scanned pages need OCR first)]"
    assert list(read(tmp_path).items()) == [
        ("c.pdf", TEXT),
        ("cut.pdf", "[damaged PDFs]"),
        ("empty.pdf", "[damaged PDFs]"),
        ("locked.pdf", "[PDFs that need a password]"),
        ("open.pdf", TEXT),
        ("scan.pdf", no_text),
        ("sub/b.PDF", TEXT),
        ("white.pdf", no_text),
    ]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("\n" not in warning for warning in warnings)
    assert "cut.pdf (" in warnings[0] and "Error: " in warnings[0]
    assert "empty.pdf (" in warnings[1] and "empty file" in warnings[1]
    assert "secret" not in caplog.text
    corpus = open_pdfs("data.path", str(tmp_path), PDFS)
    assert corpus.skipped == {".txt files": 1, "compressed PDFs": 1}
    assert (corpus.field, corpus.value) == ("data.path", str(tmp_path))
    assert [d.is_val for d in corpus] == [False] * 8


def test_aes_with_an_empty_password_opens(tmp_path):
    pytest.importorskip("cryptography", reason="pypdf[crypto] is not installed")
    assert read(encrypt(tmp_path / "a.pdf", "", "AES-256")) == {"a.pdf": TEXT}


def test_aes_without_its_package_is_told_apart(tmp_path, monkeypatch):
    def refuse(file):
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf, "PdfReader", refuse)
    (reason,) = read(write(tmp_path / "a.pdf")).values()
    assert reason == "[encrypted PDFs that need the Python package cryptography]"


def test_damage_in_a_later_page_leaves_the_whole_pdf_out(tmp_path, monkeypatch, caplog):
    """Whatever pypdf raises: a KeyError too."""
    real = pypdf.PageObject.extract_text

    def fail(page):
        return real(page) if page.page_number == 0 else {}["/Contents"]

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fail)
    assert read(write(tmp_path / "a.pdf")) == {"a.pdf": "[damaged PDFs]"}
    assert "KeyError" in caplog.text


def test_half_characters_are_paired_or_replaced(tmp_path):
    content = "BT /F1 12 Tf 72 700 Td <010402030401> Tj ET"
    text = read(write(tmp_path / "a.pdf", [content], unicode_map=HALVES))["a.pdf"]
    assert text == "\ufffda\U0001f600a\ufffd"
    assert text.encode()


def test_the_logger_of_pypdf_is_silent(tmp_path, caplog):
    """pypdf has much to say of a file whose table is elsewhere, and reads it all the same."""
    whole = pdf(TWO_PAGES)
    path = tmp_path / "a.pdf"
    path.write_bytes(whole.replace(b"startxref\n", b"startxref\n9"))
    logging.getLogger("pypdf").setLevel(logging.NOTSET)
    pypdf.PdfReader(path)
    assert caplog.records, "pypdf no longer logs this"
    caplog.clear()
    assert read(path) == {"a.pdf": TEXT}
    assert not caplog.records


def test_memory_does_not_grow_with_the_number_of_pages(tmp_path):
    """Each page holds 100 kB of drawing; all of them would be 3 MB."""
    page = f"BT /F1 12 Tf 72 700 Td (text) Tj ET % {'x' * 100_000}\n"
    path = write(tmp_path / "a.pdf", [page] * 30)
    read(write(tmp_path / "warm.pdf"))
    tracemalloc.start()
    try:
        assert read(path) == {"a.pdf": "\n".join(["text"] * 30)}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6


def test_the_signature_follows_the_files_and_the_version(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pdf")
    assert open_pdfs("data.path", str(path), PDFS).signature() == "", "may still change"
    late = time.time() + 100
    monkeypatch.setattr(time, "time", lambda: late)
    first = open_pdfs("data.path", str(path), PDFS).signature()
    assert first and first == open_pdfs("data.path", str(path), PDFS).signature()
    monkeypatch.setattr(pypdf, "__version__", "0.1")
    assert open_pdfs("data.path", str(path), PDFS).signature() not in ("", first)
    monkeypatch.undo()
    monkeypatch.setattr(time, "time", lambda: late)
    os.utime(path, (1, 1))
    assert open_pdfs("data.path", str(path), PDFS).signature() not in ("", first)


def test_what_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pdf")
    corpus = open_pdfs("data.path", str(path), PDFS)
    path.unlink()
    with pytest.raises(InputError, match=r"^data\.path: got '\S+a\.pdf \(No such file"):
        "".join(next(iter(corpus)).pieces)
    (tmp_path / "b.pdf.gz").write_bytes(b"")
    with pytest.raises(InputError, match="uncompressed PDFs"):
        open_pdfs("data.path", str(tmp_path), PDFS)
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(InputError) as caught:
        open_pdfs("data.path", str(path), PDFS)
    assert str(caught.value) == (
        "data.source: got 'pdf'; expected the Python package pypdf; "
        "try pip install -r requirements/extras.txt"
    )
