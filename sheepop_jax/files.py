"""File utilities: atomic writes, exclusive locks and SHA-256 checksums."""

import functools
import hashlib
import json
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import IO, Any

from sheepop_jax.errors import InputError

try:
    import fcntl

    HAS_LOCKS = True
except ModuleNotFoundError:  # Windows
    HAS_LOCKS = False

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """The user's cache directory for this program; it need not exist.

    A user without a home directory that can be written, as in a container, has one in the temporary
    directory.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sheepop_jax"
    try:
        home = Path.home()
    except RuntimeError:
        return _temporary_cache()
    usable = (home / ".cache").is_dir() or os.access(home, os.W_OK)
    return home / ".cache" / "sheepop_jax" if usable else _temporary_cache()


@functools.cache  # logs once
def _temporary_cache() -> Path:
    """A cache directory in the temporary directory that only this user can write to."""
    directory = Path(tempfile.gettempdir()) / f"sheepop_jax-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():
        directory = Path(tempfile.mkdtemp(prefix="sheepop_jax-"))  # the name is somebody else's
    log.warning("no home directory: cache in %s; set XDG_CACHE_HOME to keep it", directory)
    return directory


def pending_name(path: Path) -> Path:
    """A temporary name for writing `path`; random, since hosts may reuse process ids."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def write_atomic(path: Path, content: str) -> None:
    """Writes a file atomically and syncs it to disk."""
    pending = pending_name(path)
    try:
        with pending.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(pending, path)
    finally:
        pending.unlink(missing_ok=True)


def try_lock(file: IO[Any]) -> bool:
    """Acquires the exclusive lock of an open file; returns False if another process holds it.

    The kernel releases the lock when the process ends. Without `fcntl`, nothing is locked.

    Raises:
        OSError: the file system does not support locks.
    """
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a value serialized as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 of a manifest's content as the field `sha256`."""
    return {**manifest, "sha256": sha256_of_json(manifest)}


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a manifest written with `sealed`, verifies it, and removes the field `sha256`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or its content does not match its SHA-256.
    """
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != sha256_of_json(manifest):
        raise ValueError("its content has changed")
    return manifest


def read_text(path: Path, field: str) -> str:
    """Reads a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        field: field name for error messages.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(field, f"{path} ({error.strerror})", "a readable file") from None
    return decode(content, str(path), field)


def decode(content: bytes, name: str, field: str) -> str:
    """Decodes UTF-8 bytes, without a byte order mark.

    Args:
        content: the bytes.
        name: source of the bytes, for error messages.
        field: field name for error messages.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"{name}, invalid at byte {error.start}"
        raise InputError(field, got, "UTF-8 text") from None
