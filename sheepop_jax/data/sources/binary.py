"""Recognizes files that are not text, and names what they are."""

import re

# Control bytes that text does not use: all except tab, line and page breaks, and escape.
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# Counted against the limit below: without backspace, which formatted manual pages are full of.
_COUNTED = bytes([*range(0x08), *range(0x0E, 0x1B), *range(0x1C, 0x20)])
_MAX_SHARE = 0.1  # of control bytes in text
_FEW = 32  # control bytes that a text of any length may have
HEAD_BYTES = 512  # the start of a file that `kind_of` needs

# (pattern at the start of the file, what it is, what to do; {0} is the path)
_UNPACK = "unpacking it and passing the directory"
_PANDOC = "pandoc --to=plain --output={0}.txt {0}"
_KINDS = [
    (rb"(?s).{257}ustar", "a tar archive", _UNPACK),
    (rb"PK\x03\x04(?s:.{26})mimetypeapplication/epub", "an EPUB book", _PANDOC),
    (rb"PK\x03\x04(?s:.{0,400})word/", "a Word document", _PANDOC),
    (rb"PK\x03\x04(?s:.{0,400})xl/", "an Excel workbook", "saving its sheet as CSV"),
    (rb"PK\x03\x04(?s:.{26})mimetypeapplication/vnd.oasis", "an OpenDocument file", _PANDOC),
    (rb"PK[\x03\x05]", "a zip archive", "renaming it to {0}.zip, or " + _UNPACK),
    (rb"\x1f\x8b", "gzip data", "renaming it to {0}.gz"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", "renaming it to {0}.bz2"),
    (rb"\xfd7zXZ\x00", "xz data", "renaming it to {0}.xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd data", "renaming it to {0}.zst"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"%PDF-\d\.\d", "a PDF", "`data.source=pdf`"),
    (rb"SQLite format 3\x00", "an SQLite database", "`data.source=sql` with `data.query`"),
    (rb"PAR1", "a parquet table", "`data.source=parquet`"),
    (rb"ARROW1|Obj\x01|ORC", "an Arrow, Avro or ORC table", "converting it to parquet"),
    (rb"\x89HDF\r\n|\x93NUMPY", "an array file", ""),
    (rb"\x89PNG\r\n", "a PNG image", ""),
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"GIF8[79]a", "a GIF image", ""),
    (rb"RIFF.{4}|OggS|ID3[\x02-\x04]|fLaC|(?s:.{4})ftyp", "audio or video", ""),
    (rb"\x7fELF|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe", "a program", ""),
    (rb"\x00asm|\xca\xfe\xba\xbe", "compiled code", ""),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document",
     "soffice --headless --convert-to txt {0}"),
    (rb"(?:[\t\n\r -~]\x00){16}", "UTF-16 text", "iconv -f UTF-16LE -t UTF-8 {0} > {0}.txt"),
    (rb"(?:\x00[\t\n\r -~]){16}", "UTF-16 text", "iconv -f UTF-16BE -t UTF-8 {0} > {0}.txt"),
]  # fmt: skip  # a kind a row


def kind_of(head: bytes, path: object) -> tuple[str, str]:
    """What a file that begins with `head` is, and a hint how to read it; ("", "") if unknown."""
    for pattern, kind, hint in _KINDS:
        if re.match(pattern, head):
            return kind, hint.format(path)
    return "", ""


class BinaryCheck:
    """Reads the blocks of a file, which may be valid UTF-8, and tells whether it is binary."""

    def __init__(self) -> None:
        self.head = b""
        self._size = self._control = 0
        self._looked = False

    def is_binary(self, block: bytes) -> bool:
        """Whether the file cannot be text, up to and with this block; an empty one ends it."""
        self.head += block[: HEAD_BYTES - len(self.head)]
        self._size += len(block)
        self._control += len(block) - len(block.translate(None, _COUNTED))
        if self._control > max(_FEW, _MAX_SHARE * self._size):
            return True
        if self._looked or (block and len(self.head) < HEAD_BYTES):
            return False
        self._looked = True
        # An archive of text has few control bytes. Text may begin like a binary file, but has none.
        kind, _ = kind_of(self.head, "")
        return bool(kind) and (kind == "a PDF" or CONTROL.search(self.head) is not None)

    @property
    def share(self) -> float:
        """The share of control bytes so far."""
        return self._control / max(1, self._size)
