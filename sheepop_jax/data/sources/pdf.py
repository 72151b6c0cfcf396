"""PDF files: each is a document, the text of its pages in order, read one page at a time.

Between two pages that have text stands one line feed, none if the first ends with one; pages
without text add nothing. What pypdf makes of a page is taken as it is, but for half surrogates,
which no UTF-8 text can hold: a pair becomes the character it stands for, a lone one U+FFFD.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from sheepop_jax.config.data import COMPRESSED
from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.data.sources.paths import Found, Walk, find_files, signature_of
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)


class Pdfs:
    """The text of a list of PDF files; see `documents.Corpus`.

    Reading a document raises `SkipDocument` if the PDF is damaged, needs a password or has no text.
    """

    def __init__(self, field: str, value: str, found: Found, version: str):
        """`version`: that of pypdf, which decides what the text of a page is."""
        self.field, self.value, self.skipped = field, value, found.skipped
        self.num_bytes = 0  # how much of a PDF is text cannot be told
        self._files, self._version = found.files, version

    def signature(self) -> str:
        return signature_of((path for _, path in self._files), ("pdf", 1, self._version))

    def __iter__(self) -> Iterator[Document]:
        for name, path in self._files:
            yield Document(name, self._text(path))

    def _text(self, path: Path) -> Iterator[str]:
        readable = False
        at_line_start = True
        for page in self._pages(path):
            if not page:
                continue
            if not at_line_start:
                yield "\n"
            yield page
            at_line_start = page.endswith("\n")
            readable = readable or not page.isspace()
        if not readable:
            raise SkipDocument("PDFs without text (scanned pages need OCR first)")

    def _pages(self, path: Path) -> Iterator[str]:
        """The text of each page.

        Raises:
            SkipDocument: the PDF is damaged, or needs a password.
            InputError: the file cannot be opened.
        """
        import pypdf
        from pypdf.errors import DependencyError, FileNotDecryptedError

        try:
            file = path.open("rb")
        except OSError as error:
            got = f"{path} ({error.strerror})"
            raise InputError(self.field, got, "a readable file") from error
        with file:
            try:
                # By itself it tries the empty password, with which most protected PDFs open.
                reader = pypdf.PdfReader(file)
                for page in reader.pages:
                    yield _encodable(page.extract_text())
                    # It keeps every object it has read, content of pages included.
                    reader.resolved_objects.clear()
            except FileNotDecryptedError:
                raise SkipDocument("PDFs that need a password") from None
            except DependencyError:
                reason = "encrypted PDFs that need the Python package cryptography"
                raise SkipDocument(reason) from None
            # Whatever it stumbles over: its own errors are but some of those that it raises.
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                logger.warning("%s is damaged and left out (%s)", path, reason)
                raise SkipDocument("damaged PDFs") from error


def open_pdfs(field: str, spec: str, walk: Walk) -> Pdfs:
    """The PDFs that `spec` means; none is read yet.

    Args:
        field: the configuration field, for messages.
        spec: a file, a directory, a glob, or several separated by commas.
        walk: what is taken from a directory.

    Raises:
        InputError: pypdf is missing, `spec` gives no file, or all of them are compressed.
    """
    try:
        import pypdf
    except ImportError:
        hint = "pip install -r requirements/extras.txt"
        raise InputError("data.source", "pdf", "the Python package pypdf", hint) from None
    # It logs each oddity of each file, and most files have some.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    found = find_files(field, spec, walk)
    # A PDF is read from its end and back and forth, which a compressed file cannot give.
    plain = [(name, path) for name, path in found.files if path.suffix.lower() not in COMPRESSED]
    if not plain:
        raise InputError(field, spec, "PDFs that are not compressed", "decompressing them")
    if packed := len(found.files) - len(plain):
        found.skipped["compressed PDFs"] += packed
        found.files = plain
    return Pdfs(field, spec, found, pypdf.__version__)


def _encodable(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
