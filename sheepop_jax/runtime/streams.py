"""Standard output and error that never fail: an error in writing turns the stream off."""

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

turned_off: list[str] = []  # what to report of streams that were turned off; readers remove it


def never_fail() -> None:
    """Replaces `sys.stdout` and `sys.stderr`, for the rest of the process.

    A reader that went away (EPIPE), a closed terminal (EIO) or a full disk (ENOSPC) must not end a
    run. Everything that Python writes ends in these streams: `print`, log handlers, progress bars,
    and what is flushed at exit.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue  # closed, or in memory
        if not isinstance(getattr(stream, "buffer", None), _LenientBuffer):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, lenient(descriptor, name, stream))


def lenient(descriptor: int, name: str, like: TextIO) -> TextIO:
    """A text stream on a descriptor that never fails, with the encoding and buffering of `like`."""
    unbuffered = getattr(like, "write_through", False)
    return io.TextIOWrapper(
        _LenientBuffer(_Lenient(descriptor, name)),
        encoding=like.encoding,
        errors=like.errors,
        # Under `python -u`, a text stream has no buffer, but this one does.
        line_buffering=getattr(like, "line_buffering", False) or unbuffered,
        write_through=unbuffered,
    )


class _LenientBuffer(io.BufferedWriter):
    """The buffer of a stream that never fails."""


class _Lenient(io.FileIO):
    """A file that drops what it cannot write."""

    def __init__(self, descriptor: int, name: str):
        super().__init__(descriptor, "w", closefd=False)
        self._label, self._off = name, False

    def write(self, data: Any) -> int:
        """Writes `data`, or drops it if a write failed before or fails now."""
        while not self._off:
            try:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # non-blocking, and full
            except OSError as error:
                self._off = True  # do not log here: the log may be what failed
                reason = os.strerror(error.errno or 0)
                turned_off.append(f"cannot write to {self._label} ({reason}); turned off")
        return memoryview(data).nbytes
