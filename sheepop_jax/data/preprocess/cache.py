"""The directory that keeps token shards, and whatever is under way to becoming some.

KEY              shards, whole
.tokens-KEY      a tokenizer and the units that are done
.spool-FINGER    a corpus, read whole; deleted when its tokens are made
.reading-*       a corpus while it is read; gone if that fails
.deleted-*       what is being deleted
sources/         which corpus a source gave in which state; a lock for each source
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_ABANDONED_SECONDS = 86_400.0  # unfinished work that nobody has touched for a day is deleted
# Nothing else is ever deleted: a user may keep more in that directory than a cache.
_UNFINISHED = re.compile(r"\.(tokens|spool|deleted)-[0-9a-f]{16}|\.reading-\d+-[0-9a-f]{8}")


class Cache:
    """What one source, in one state, has in the cache."""

    def __init__(self, directory: Path, state: Any, known: bool):
        """`state` names the source and what shapes its text; `known`: it also names its content."""
        self.directory = directory
        self._existed = directory.exists()
        self._known = known
        name = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        self._memory = directory / "sources" / f"{name}.json"
        self._lock = directory / "sources" / f"{name}.lock"
        self._remembered = False

    def recall(self) -> str:
        """The fingerprint of the source's text, or "" if it has to be read."""
        try:
            return str(json.loads(self._memory.read_text())["fingerprint"]) if self._known else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def remember(self, fingerprint: str) -> None:
        """Keeps it for `recall`."""
        if self._known:
            self._remembered = self._remembered or not self._memory.exists()
            write_text(self._memory, json.dumps({"fingerprint": fingerprint}))

    def spool(self, fingerprint: str) -> Path:
        """Where a corpus lies that was read whole."""
        return self.directory / f".spool-{fingerprint[:16]}"

    def tokens(self, key: str) -> Path:
        """Where its units are made."""
        return self.directory / f".tokens-{key}"

    @contextlib.contextmanager
    def reading(self) -> Iterator[Path]:
        """A directory to read into; gone afterwards, unless it was renamed."""
        path = self.directory / f".reading-{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir()
        try:
            yield path
        finally:
            delete(path)

    @contextlib.contextmanager
    def lock(self, check: Callable[[], None]) -> Iterator[None]:
        """One process at a time; the kernel frees the lock of a dead one.

        It saves work, no more: without it work is done twice, to the same end. `check` is called
        while waiting and may raise.
        """
        with self._acquire(check):
            yield

    def _acquire(self, check: Callable[[], None]) -> TextIO:
        """The lock file, locked: the one that is there, should another have been deleted."""
        while True:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
                file = stack.enter_context(self._lock.open("w"))
                self._wait(file, check)
                if os.path.samestat(self._lock.stat(), os.fstat(file.fileno())):
                    stack.pop_all()
                    return file

    def _wait(self, file: TextIO, check: Callable[[], None]) -> None:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    logger.info("data: another process prepares the same text; waiting for it")
                told = True
            except OSError as error:  # a file system without locks
                logger.debug("%s: %s", self._lock, error.strerror)
                return
            check()
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Says what to do when it cannot be written; bad input leaves nothing."""
        try:
            yield
        except InputError:
            if self._remembered:
                self._memory.unlink(missing_ok=True)
            raise
        except OSError as error:
            there = next(p for p in (self.directory, *self.directory.parents) if p.is_dir())
            free = shutil.disk_usage(there).free / 1e6
            got = f"{self.directory} ({error.strerror or error}; {free:.0f} MB free)"
            expected = "a directory that can be written, with room for the text and its tokens"
            raise InputError("data.cache_dir", got, expected, "another data.cache_dir") from error
        finally:
            self._tidy()

    def _tidy(self) -> None:
        """Deletes the lock, if there is nothing beside it and nobody has it; and what is empty."""
        with contextlib.suppress(OSError):  # such as: directory not empty
            if not self._memory.exists():
                with self._lock.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._lock.unlink()
                    self._lock.parent.rmdir()
                    if not self._existed:
                        self.directory.rmdir()

    def delete_abandoned(self) -> None:
        """Deletes unfinished work of the past; what a living process writes to is younger."""
        for path in self.directory.iterdir():
            if not _UNFINISHED.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                times = [p.stat().st_mtime for p in (path, *path.glob("*"))]
                if time.time() - max(times) > _ABANDONED_SECONDS:
                    logger.info("data: deleting %s, unfinished for over a day", path)
                    delete(path)


def delete(*directories: Path) -> None:
    """Deletes directories, there or not; under another name, so that none is found in part."""
    for directory in directories:
        doomed = directory.with_name(f".deleted-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            os.replace(directory, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(directory: Path) -> None:
    """Deletes from whole shards what only unfinished ones need, or a killed process left there."""
    for pattern in ("unit-*.json", ".*.json-*", ".*.bin-*"):
        for path in directory.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: Path, content: str) -> None:
    """Writes a file that is there whole or not at all, and on the disk when this returns."""
    pending = pending_name(path)
    try:
        with pending.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(pending, path)
    finally:
        pending.unlink(missing_ok=True)


def pending_name(path: Path) -> Path:
    """A name for a file until it is whole; two hosts may have processes of the same id."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")
