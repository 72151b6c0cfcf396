"""Says when a step takes far longer than the others did, and what the process is doing then."""

import collections
import faulthandler
import logging
import statistics
import tempfile
import threading
import time

log = logging.getLogger(__name__)

_TIMES = 10.0  # the median of the steps before
_AT_LEAST_SECONDS = 10.0  # short steps are late for many reasons
_STEPS = 50  # that the median is over
_LOOK_SECONDS = 1.0  # between looks: a thread woken at every step would cost each of them


class Watchdog:
    """A thread that is told of every step; it only speaks, and once for each late step."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._lock = threading.Condition()
        self._since: float | None = None
        self._step = 0
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def resume(self) -> None:
        """A step begins."""
        with self._lock:
            self._since = time.monotonic()

    def pause(self) -> None:
        """No step is under way: evaluation and saving take what they take."""
        with self._lock:
            self._since = None

    def step(self, step: int) -> None:
        """A step has ended, and the next begins."""
        with self._lock:
            now = time.monotonic()
            if self._since is not None:
                self._seconds.append(now - self._since)
                self._since = now
            self._step = step

    def close(self) -> None:
        """Ends the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def limit(self) -> float:
        """Seconds after which a step is late; infinite before there are steps to compare with."""
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
                    "the step after %d has taken %.0f s so far, the median is %.3g s: a stuck "
                    "device, a stuck disk, or a machine that is asleep? The stacks of all threads:"
                    "\n%s",
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
