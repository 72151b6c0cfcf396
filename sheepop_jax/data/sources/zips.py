"""Zip archives: the text files in them, read without unpacking."""

import stat
import zipfile
from collections.abc import Generator
from pathlib import Path, PurePosixPath

from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.paths import VENDORED, Walk
from sheepop_jax.errors import InputError

_BLOCK_BYTES = 2**20


def members(
    field: str, path: Path, walk: Walk, max_bytes: int
) -> Generator[tuple[str, Generator[bytes, None, None]], None, None]:
    """Yields the name and the blocks of each member of an archive.

    Reading the blocks of a member that is not text raises `SkipDocument`. Nothing is written to
    disk, so a member's name cannot name a place outside the archive.

    Args:
        field: the configuration field, for messages.
        path: the archive.
        walk: the rules for the files of a directory; `.gitignore` files are not applied.
        max_bytes: the declared size of all text together, at most. A member ends at its size.

    Raises:
        InputError: the archive is damaged, or expands to more than `max_bytes`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            reasons = {name: _reason(info, walk) for name, info in inside.items()}
            text = sum(info.file_size for name, info in inside.items() if not reasons[name])
            if text > max_bytes:
                raise OSError(f"its text has {text} bytes; unpack it first")
            for name in sorted(inside):
                if reason := reasons[name]:
                    yield name, _skip(reason)
                else:
                    yield name, _blocks(field, path, archive, inside[name])
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(field, path, error) from error


def _reason(info: zipfile.ZipInfo, walk: Walk) -> str:
    """Why a member is skipped, or ""."""
    name = PurePosixPath(info.filename)
    if any(part.startswith(".") or part in {*VENDORED, "__MACOSX"} for part in name.parts):
        return "hidden or vendored files"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "links"
    if walk.suffixes is not None and name.suffix.lower() not in walk.suffixes:
        return f"{name.suffix.lower() or 'suffixless'} files"
    if 0 < walk.max_file_bytes < info.file_size:
        return "files larger than data.max_file_bytes"
    # Python decompresses other methods without a limit on the memory.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "files compressed by other methods than deflate"
    return "encrypted files" if info.flag_bits & 1 else ""


def _skip(reason: str) -> Generator[bytes, None, None]:
    yield from ()
    raise SkipDocument(reason)


def _blocks(
    field: str, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Generator[bytes, None, None]:
    """Yields the bytes of a member, and an empty block at the end."""
    try:
        with archive.open(info) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
        yield b""
    # A damaged stream also raises the errors of zlib and lzma, which have no common base.
    except Exception as error:
        raise _damaged(field, f"{path}/{info.filename}", error) from error


def _damaged(field: str, where: object, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputError(field, f"{where} ({reason})", "a readable zip archive")
