"""A watchdog that warns about slow steps and logs the stacks of all threads."""

import collections
import faulthandler
import logging
import statistics
import tempfile
import threading
import time

log = logging.getLogger(__name__)

_TIMES = 10.0  # limit as a multiple of the median step time
_AT_LEAST_SECONDS = 10.0  # minimum limit: short steps vary too much
_STEPS = 50  # steps in the median
_LOOK_SECONDS = 1.0  # polling interval; waking the thread at every step would slow steps down


class Watchdog:
    """A thread that logs a warning, once per slow step; it never interrupts training."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._lock = threading.Condition()
        self._since: float | None = None
        self._step = 0
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def resume(self) -> None:
        """Starts timing a step."""
        with self._lock:
            self._since = time.monotonic()

    def pause(self) -> None:
        """Stops timing, for evaluation and saving."""
        with self._lock:
            self._since = None

    def step(self, step: int) -> None:
        """Records the end of a step and starts timing the next."""
        with self._lock:
            now = time.monotonic()
            if self._since is not None:
                self._seconds.append(now - self._since)
                self._since = now
            self._step = step

    def close(self) -> None:
        """Stops the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def limit(self) -> float:
        """Seconds after which a step is slow; infinite before three steps are recorded."""
        if len(self._seconds) < 3:
            return float("inf")
        return max(_TIMES * statistics.median(self._seconds), _AT_LEAST_SECONDS)

    def _watch(self) -> None:
        warned: float | None = None
        with self._lock:
            while not self._closed:
                since = self._since
                if since is None or since == warned or time.monotonic() < since + self.limit():
                    self._lock.wait(_LOOK_SECONDS)
                    continue
                warned = since
                median = statistics.median(self._seconds)
                log.warning(
                    "the step after %d has taken %.0f s so far (median %.3g s); the device or the "
                    "disk may hang, or the machine may be suspended. Stacks of all threads:\n%s",
                    self._step,
                    time.monotonic() - since,
                    median,
                    _stacks(),
                )


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
