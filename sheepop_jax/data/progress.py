"""How far a pass over the text is, for whoever waits for it."""

import logging
import time

import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far a pass over the text is, once it takes more than 2 s.

    A bar where stderr is a terminal; elsewhere a line in the log every 10 s.
    """

    def __init__(self, label: str, total: int):
        """`total` is in characters, 0 if unknown."""
        self._label, self._total, self._done = label, total, 0
        self._bar = tqdm.tqdm(
            total=total or None, desc=label, unit="char", unit_scale=True, delay=2, disable=None
        )
        self._start = time.monotonic()
        self._next_line = self._start + 2

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, chars: int) -> None:
        """Counts `chars` more characters."""
        self._bar.update(chars)
        self._done += chars
        now = time.monotonic()
        if not self._bar.disable or now < self._next_line:
            return
        self._next_line = now + 10
        rate = self._done / (now - self._start)
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total else ""
        done = f"{self._done / 1e6:.1f}M chars, {rate / 1e6:.2f}M/s"
        logger.info("%s: %s%s", self._label, done, left)
