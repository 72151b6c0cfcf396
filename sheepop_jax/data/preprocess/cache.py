"""The cache directory of token shards and unfinished work.

KEY              complete shards
.tokens-KEY      a tokenizer and the finished units
.spool-FINGER    a complete corpus store; deleted once its tokens are written
.reading-*       a corpus store being written; deleted on failure
.deleted-*       a deletion in progress
sources/         per source: its corpus fingerprint in a given state, and a lock
"""

import contextlib
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
from sheepop_jax.files import sha256_of_json, try_lock, write_atomic

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_ABANDONED_SECONDS = 86_400.0  # unfinished work untouched for a day is deleted
# Delete only matching names: a user may keep other files in the directory.
_UNFINISHED = re.compile(r"\.(tokens|spool|deleted)-[0-9a-f]{16}|\.reading-\d+-[0-9a-f]{8}")


class Cache:
    """The cache entries of one source in one state."""

    def __init__(self, directory: Path, state: Any, known: bool):
        """Opens the cache; creates nothing.

        Args:
            directory: the cache directory.
            state: the source and the options that affect its text, as JSON values.
            known: whether `state` also identifies the content.
        """
        self.directory = directory
        self._existed = directory.exists()
        self._known = known
        name = sha256_of_json(state)[:16]
        self._memory = directory / "sources" / f"{name}.json"
        self._lock = directory / "sources" / f"{name}.lock"
        self._remembered = False

    def recall(self) -> str:
        """The fingerprint of the source's text, or "" if the text must be read."""
        try:
            return str(json.loads(self._memory.read_text())["fingerprint"]) if self._known else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def remember(self, fingerprint: str) -> None:
        """Stores a fingerprint for `recall`."""
        if self._known:
            self._remembered = self._remembered or not self._memory.exists()
            write_atomic(self._memory, json.dumps({"fingerprint": fingerprint}))

    def spool(self, fingerprint: str) -> Path:
        """The directory of a complete corpus store."""
        return self.directory / f".spool-{fingerprint[:16]}"

    def tokens(self, key: str) -> Path:
        """The directory of unfinished shards."""
        return self.directory / f".tokens-{key}"

    @contextlib.contextmanager
    def reading(self) -> Iterator[Path]:
        """A temporary directory for reading, deleted on exit unless renamed."""
        path = self.directory / f".reading-{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir()
        try:
            yield path
        finally:
            delete(path)

    @contextlib.contextmanager
    def lock(self, check: Callable[[], None]) -> Iterator[None]:
        """Holds the source's lock; the kernel releases the lock of a dead process.

        The lock only avoids duplicate work: without it the results are the same. `check` is called
        while waiting and may raise.
        """
        with self._acquire(check):
            yield

    def _acquire(self, check: Callable[[], None]) -> TextIO:
        """Returns the locked lock file; retries if another process deleted it meanwhile."""
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
                if try_lock(file):
                    return
            except OSError as error:  # a file system without locks
                logger.debug("%s: %s", self._lock, error.strerror)
                return
            if not told:
                logger.info("data: waiting for another process that prepares the same text")
            told = True
            check()
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Explains write errors, and removes all traces of the source after bad input.

        Raises:
            InputError: the cache directory cannot be written.
        """
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
            expected = "a writable directory with room for the text and its tokens"
            raise InputError("data.cache_dir", got, expected, "another `data.cache_dir`") from error
        finally:
            self._tidy()

    def _tidy(self) -> None:
        """Deletes an unused lock of a source without fingerprint, then empty directories."""
        with contextlib.suppress(OSError):  # e.g. directory not empty
            if not self._memory.exists():
                with self._lock.open("rb") as file:
                    if try_lock(file):
                        self._lock.unlink()
                        self._lock.parent.rmdir()
                        if not self._existed:
                            self.directory.rmdir()

    def delete_abandoned(self) -> None:
        """Deletes unfinished work untouched for a day; running processes keep theirs newer."""
        for path in self.directory.iterdir():
            if not _UNFINISHED.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                times = [p.stat().st_mtime for p in (path, *path.glob("*"))]
                if time.time() - max(times) > _ABANDONED_SECONDS:
                    logger.info("data: deleting %s: unfinished, untouched for over a day", path)
                    delete(path)


def delete(*directories: Path) -> None:
    """Deletes directories, which may not exist; renames each first, so that deletion is atomic."""
    for directory in directories:
        doomed = directory.with_name(f".deleted-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            os.replace(directory, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(directory: Path) -> None:
    """Deletes unit markers and temporary files from complete shards."""
    for pattern in ("unit-*.json", ".*.json-*", ".*.bin-*", ".*.marks-*"):
        for path in directory.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
