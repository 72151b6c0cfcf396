"""How far a pass over the text is, for whoever waits for it."""

import logging
import time
from collections.abc import Callable

import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far a pass over the text is, once it takes more than 2 s.

    A bar where stderr is a terminal; elsewhere a line in the log every 10 s.
    """

    def __init__(self, label: str, total: int, check: Callable[[], None] = lambda: None):
        """`total` is in bytes, 0 if unknown; `check` is called at each update and may raise."""
        self._label, self._total, self._done, self._check = label, total, 0, check
        self._bar = tqdm.tqdm(
            total=total or None, desc=label, unit="B", unit_scale=True, delay=2, disable=None
        )
        self._start = time.monotonic()
        self._next_line = self._start + 2

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, num_bytes: int) -> None:
        """Counts more bytes of text."""
        self._check()
        self._bar.update(num_bytes)
        self._done += num_bytes
        now = time.monotonic()
        if not self._bar.disable or now < self._next_line:
            return
        self._next_line = now + 10
        rate = self._done / (now - self._start)
        left = ""
        if rate and self._total > self._done:
            left = f", {(self._total - self._done) / rate:.0f} s left"
        done = f"{self._done / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s"
        logger.info("%s: %s%s", self._label, done, left)
