"""The log of a run: `train.log` in the run directory, with the time of each line."""

import contextlib
import logging
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sheepop_jax.errors import MaskingFormatter
from sheepop_jax.runtime import streams

NAME = "train.log"
_KEPT_LINES = 10_000  # before the run directory exists; preprocessing may log for days

# For lines that reach the terminal in another way than by logging.
only_in_file = logging.getLogger("sheepop_jax.only_in_file")
only_in_file.setLevel(logging.INFO)
only_in_file.propagate = False
only_in_file.addHandler(logging.NullHandler())


class RunLog(logging.Handler):
    """Appends all log lines to `train.log`; until `open`, keeps them in memory.

    It is written besides stderr, whose reader may go away. A write error turns it off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(MaskingFormatter("%(asctime)s %(message)s"))
        self._kept: deque[str] | None = deque(maxlen=_KEPT_LINES)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "RunLog":
        for logger in (logging.getLogger(), only_in_file):
            logger.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for logger in (logging.getLogger(), only_in_file):
            logger.removeHandler(self)
        self.close()

    def open(self, directory: Path) -> None:
        """Starts to write to a run directory, with the lines kept so far."""
        with self.lock or contextlib.nullcontext():
            kept, self._kept = self._kept, None
            with self._giving_up():
                self._file = (directory / NAME).open("ab", buffering=0)
            for line in kept or ():
                self._write(line)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, after what is known of streams that were turned off."""
        try:
            self._report_streams()
            self._write(self.format(record))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Closes the file."""
        self._report_streams()
        file, self._file = self._file, None
        if file:
            with self._giving_up():  # a network file system reports a full disk here
                file.close()
        super().close()

    def _report_streams(self) -> None:
        while streams.turned_off:
            note = logging.makeLogRecord({"msg": streams.turned_off.pop(0)})
            self._write(self.format(note))

    def _write(self, line: str) -> None:
        if self._kept is not None:
            self._kept.append(line)
        elif self._file:
            with self._giving_up():
                self._file.write(f"{line}\n".encode(errors="backslashreplace"))

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            if file:
                with contextlib.suppress(OSError):
                    file.close()
            # Not by logging, which may be what calls this.
            print(f"{NAME}: turned off ({error.strerror})", file=sys.stderr)
