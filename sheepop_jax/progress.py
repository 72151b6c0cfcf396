"""Progress of long data passes: a bar on a terminal, log lines elsewhere; the seconds of a call."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import tqdm

logger = logging.getLogger(__name__)

_DELAY_SECONDS = 2.0  # shorter passes show nothing
_LINE_SECONDS = 10.0
_LEAST_SHARE = 0.01  # of the total; no rate and no time left before that


class Progress:
    """Shows progress and remaining time of passes that take more than two seconds.

    Shows a bar if stderr is a terminal; otherwise logs a line every ten seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        check: Callable[[], None] = lambda: None,
        unit: str = "B",
        show: bool = True,
    ):
        """Starts the clock.

        Args:
            label: name of the pass.
            total: total in bytes or other units; 0 if unknown.
            check: called at each update; may raise to abort the pass.
            unit: "B" for bytes, or the name of the unit.
            show: False disables all output.
        """
        self._label, self._total, self._done, self._check = label, total, 0, check
        self._unit, self._show = unit, show
        self._bar = tqdm.tqdm(
            total=total or None,
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            delay=_DELAY_SECONDS,
            disable=None if show else True,
            leave=unit == "B",
            dynamic_ncols=True,
        )
        self._start = time.monotonic()
        self._next_line = self._start + _DELAY_SECONDS
        # The rate is that since the first update: opening a source may take long.
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, amount: int = 1) -> None:
        """Adds to the finished amount."""
        self._check()
        self._bar.update(amount)
        self._done += amount
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._done
            self._bar.unpause()
        if not self._show or not self._bar.disable or now < self._next_line:
            return
        self._next_line = now + _LINE_SECONDS
        logger.info("%s: %s", self._label, ", ".join(self._parts(now, *self._first)))

    def _parts(self, now: float, since: float, before: int) -> Iterator[str]:
        """The amount, and the rate and the time left once they mean something."""
        if self._unit == "B":
            yield f"{self._done / 1e6:.1f} MB"
        else:
            of = f" of {self._total}" if self._total else ""
            yield f"{self._unit} {self._done}{of}"
        if now - since < _DELAY_SECONDS or self._done - before < _LEAST_SHARE * self._total:
            return
        rate = (self._done - before) / (now - since)
        if self._unit == "B":
            yield f"{rate / 1e6:.2f} MB/s"
        if rate and self._total > self._done:
            yield f"{(self._total - self._done) / rate:.0f} s left"


@contextlib.contextmanager
def elapsed(label: str) -> Iterator[None]:
    """Logs every ten seconds for how long a call has run that reports no progress of its own.

    The call must release the GIL.
    """
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(_LINE_SECONDS):
            logger.info("%s: %.0f s so far", label, time.monotonic() - start)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
