"""PDF files, one document each, read page by page with pypdf.

Pages are separated by one line feed (none if the page already ends with one); pages without text
are skipped. pypdf's text is kept as is, except surrogates, which UTF-8 cannot encode: a pair
becomes its character, a lone one U+FFFD.
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
    """A list of PDF files; see `documents.Corpus`.

    Damaged PDFs, PDFs without text and PDFs that need a password raise `SkipDocument` when read.
    """

    def __init__(self, field: str, value: str, found: Found, version: str):
        """`version`: pypdf's version, on which the extracted text depends."""
        self.field, self.value, self.skipped = field, value, found.skipped
        self.num_bytes = 0  # unknown: a PDF's size says little about its text
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
        """Yields the text of each page.

        Raises:
            SkipDocument: the PDF is damaged or needs a password.
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
                # pypdf tries the empty password, which opens most protected PDFs.
                reader = pypdf.PdfReader(file)
                for page in reader.pages:
                    yield _encodable(page.extract_text())
                    # pypdf caches every object it has read, page contents included.
                    reader.resolved_objects.clear()
            except FileNotDecryptedError:
                raise SkipDocument("PDFs that need a password") from None
            except DependencyError:
                reason = "encrypted PDFs that need the Python package cryptography"
                raise SkipDocument(reason) from None
            # Damaged files make pypdf raise many types besides its own errors.
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                logger.warning("skipping damaged PDF %s (%s)", path, reason)
                raise SkipDocument("damaged PDFs") from error


def open_pdfs(field: str, spec: str, walk: Walk) -> Pdfs:
    """Finds the PDFs of `spec`; reads none.

    Args:
        field: the configuration field, for messages.
        spec: a file, a directory, a glob, or several separated by commas.
        walk: the rules for directories.

    Raises:
        InputError: pypdf is not installed, `spec` has no PDF, or all PDFs are compressed.
    """
    try:
        import pypdf
    except ImportError:
        hint = "pip install -r requirements/extras.txt"
        raise InputError("data.source", "pdf", "the Python package pypdf", hint) from None
    # pypdf logs every irregularity, and most files have some.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    found = find_files(field, spec, walk)
    # Reading a PDF needs random access, which a compressed file does not have.
    plain = [(name, path) for name, path in found.files if path.suffix.lower() not in COMPRESSED]
    if not plain:
        raise InputError(field, spec, "uncompressed PDFs", "decompressing them")
    if packed := len(found.files) - len(plain):
        found.skipped["compressed PDFs"] += packed
        found.files = plain
    return Pdfs(field, spec, found, pypdf.__version__)


def _encodable(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
