"""Stopping on a signal: the first asks, the second insists."""

import logging
import os
import signal
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to go on
_GRACE_SECONDS = 1.0  # for the main thread to leave by itself where nothing has to be saved
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):
    """Raised at a point where stopping loses nothing that matters."""


class StopSignal:
    """Set by SIGTERM or SIGINT. A second one ends the process at once, with 128 + its number.

    A Python signal handler waits until compiled code returns, which takes minutes while XLA
    compiles; a thread on the wake-up descriptor does not. Until `something_to_save`, the process is
    ended with 75 when the main thread does not get to it.
    """

    def __init__(self) -> None:
        self._name = ""
        self._must_save = False
        self._agreed: Callable[[bool], bool] = bool

    def install(self) -> "StopSignal":
        """Takes over the two signals; only a process's main thread may do so."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: None)  # the thread does what is to be done
        threading.Thread(target=self._wait, args=(read_end,), daemon=True, name="signals").start()
        return self

    def check(self) -> None:
        """Raises `StopRequested` if a signal came, here or, once they agree, anywhere."""
        if self._agreed(bool(self._name)):
            if not self._name:
                log.info("another process is to stop: saving and stopping")
            raise StopRequested(self._name)

    def something_to_save(self, agreed: Callable[[bool], bool] = bool) -> None:
        """From now on a signal waits for the step in hand, and for the save.

        `agreed` turns whether this process was told to stop into whether any was; with several,
        all have to check equally often.
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
            # The log may be what the main thread is in the middle of: write without its locks.
            os.write(2, f"\n{self._name}: {what}; once more to leave at once\n".encode())
            if not self._must_save:
                threading.Timer(_GRACE_SECONDS, os._exit, (EXIT_STOPPED,)).start()
