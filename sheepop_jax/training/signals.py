"""Graceful stop on signals; a second SIGTERM or SIGINT exits at once."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable

from sheepop_jax.training.run_log import only_in_file

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to resume
_GRACE_SECONDS = 1.0  # for the main thread to exit if nothing must be saved
_INSISTENT = (signal.SIGTERM, signal.SIGINT)  # the second of these exits at once
# A closed terminal, and SLURM's warnings before the time limit. Not every platform has them.
_OTHERS = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


class StopRequested(Exception):
    """Raised by `StopSignal.check` at a point where it is safe to stop."""


class StopSignal:
    """Set by a signal. A second SIGTERM or SIGINT exits at once with 128 + its number.

    The others may come several times, or before a SIGTERM: a shell and the kernel both send SIGHUP
    when a terminal is closed, and SLURM sends SIGTERM at the time limit after its warning. So they
    never end a save.

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
        for number in (*_INSISTENT, *_OTHERS):
            if number in _INSISTENT or signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                signal.signal(number, lambda number, frame: None)  # the thread handles it
        threading.Thread(target=self._wait, args=(read_end,), daemon=True, name="signals").start()
        return self

    def request(self, reason: str) -> None:
        """Stops at the next `check`, as a signal would."""
        self._name = self._name or reason

    def check(self) -> None:
        """Checks for a signal to this process or, after `something_to_save`, to any process.

        Raises:
            StopRequested: a signal arrived.
        """
        if self._agreed(bool(self._name)):
            if not self._name:
                log.info("another process received a stop signal: saving and stopping")
            only_in_file.info("%s: stopping", self._name or "another process")
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
        insisted = 0
        while True:
            number = os.read(read_end, 1)[0]
            if number not in (*_INSISTENT, *_OTHERS):
                continue
            insisted += number in _INSISTENT
            if insisted > 1:
                os._exit(128 + number)
            if self._name:
                continue
            self._name = signal.Signals(number).name
            what = "saving and stopping" if self._must_save else "stopping"
            again = "send again" if insisted else "send SIGTERM twice"
            # Bypass logging: the main thread may hold its locks.
            with contextlib.suppress(OSError):  # e.g. the terminal was closed
                os.write(2, f"\n{self._name}: {what}; {again} to exit at once\n".encode())
            if not self._must_save:
                threading.Timer(_GRACE_SECONDS, os._exit, (EXIT_STOPPED,)).start()
