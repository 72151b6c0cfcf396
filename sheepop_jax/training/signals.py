"""Graceful stop on SIGTERM and SIGINT; a second signal exits at once."""

import logging
import os
import signal
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to resume
_GRACE_SECONDS = 1.0  # for the main thread to exit if nothing must be saved
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):
    """Raised by `StopSignal.check` at a point where it is safe to stop."""


class StopSignal:
    """Set by SIGTERM or SIGINT. A second signal exits at once with 128 + its number.

    Python signal handlers run only after native code returns, minutes later while XLA compiles; a
    thread that reads the wake-up descriptor does not wait. Before `something_to_save`, the process
    exits with 75 if the main thread does not exit within a second.
    """

    def __init__(self) -> None:
        self._name = ""
        self._must_save = False
        self._agreed: Callable[[bool], bool] = bool

    def install(self) -> "StopSignal":
        """Installs the handlers; call from the main thread only."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: None)  # the thread handles it
        threading.Thread(target=self._wait, args=(read_end,), daemon=True, name="signals").start()
        return self

    def check(self) -> None:
        """Checks for a signal to this process or, after `something_to_save`, to any process.

        Raises:
            StopRequested: a signal arrived.
        """
        if self._agreed(bool(self._name)):
            if not self._name:
                log.info("another process received a stop signal: saving and stopping")
            raise StopRequested(self._name)

    def something_to_save(self, agreed: Callable[[bool], bool] = bool) -> None:
        """From now on, a signal waits for the current step and the save.

        Args:
            agreed: maps whether this process received a signal to whether any process did. With
                several processes, all must call `check` equally often.
        """
        self.check()
        self._must_save, self._agreed = True, agreed

    def _wait(self, read_end: int) -> None:
        while True:
            number = os.read(read_end, 1)[0]
            if number not in _SIGNALS:
                continue
            if self._name:
                os._exit(128 + number)
            self._name = signal.Signals(number).name
            what = "saving and stopping" if self._must_save else "stopping"
            # Bypass logging: the main thread may hold its locks.
            os.write(2, f"\n{self._name}: {what}; send again to exit at once\n".encode())
            if not self._must_save:
                threading.Timer(_GRACE_SECONDS, os._exit, (EXIT_STOPPED,)).start()
