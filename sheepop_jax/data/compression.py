"""Bits per byte of general-purpose compressors, a baseline for a model's bits per byte."""

import lzma
import zlib
from collections.abc import Iterable

GZIP_BYTES = 64_000_000  # of a validation split, compressed at most


def gzip_bits_per_byte(pieces: Iterable[bytes]) -> float:
    """Bits per byte of `gzip -9` on the concatenated `pieces`, header included."""
    compressor = zlib.compressobj(9, wbits=31)  # 31 selects the gzip header
    compressed = size = 0
    for piece in pieces:
        size += len(piece)
        compressed += len(compressor.compress(piece))
    return 8 * (compressed + len(compressor.flush())) / size


def xz_bits_per_byte(content: bytes) -> float:
    """Bits per byte of `xz -9`."""
    return 8 * len(lzma.compress(content, preset=9)) / len(content)
