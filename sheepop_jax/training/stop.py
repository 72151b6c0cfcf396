"""Stopping on a signal: the first asks, the second insists."""

import logging
import os
import signal
from types import FrameType

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to go on


class StopRequested(Exception):
    """Raised where the work in hand can be left: nothing that is lost matters."""


class StopSignal:
    """Set by SIGTERM or SIGINT. A second one ends the process at once, with 128 + its number."""

    def __init__(self) -> None:
        self._name = ""

    def install(self) -> "StopSignal":
        """Takes over the two signals; only a process's main thread may do so."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def check(self) -> None:
        """Raises `StopRequested` if a signal came."""
        if self._name:
            raise StopRequested(self._name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._name:
            os._exit(128 + number)
        self._name = signal.Signals(number).name
        # The log may be what the signal interrupted: write without its locks.
        os.write(2, f"\n{self._name}: saving and stopping; once more to leave at once\n".encode())
