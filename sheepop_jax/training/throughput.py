"""Throughput: train time, tokens and FLOPs per second, MFU, and step time."""

import time


class Throughput:
    """A clock of train time: it runs during updates, not while compiling, evaluating or saving."""

    def __init__(
        self, step: int, train_seconds: float, tokens_per_step: int, flops: float, peak: float
    ):
        """Creates a stopped clock.

        Args:
            step: steps of earlier sessions.
            train_seconds: train time of earlier sessions.
            tokens_per_step: tokens per update.
            flops: FLOPs per token.
            peak: FLOP/s of all devices together; 0 if unknown.
        """
        self._tokens_per_step, self._flops, self._peak = tokens_per_step, flops, peak
        self.flops_per_step = tokens_per_step * flops
        self._stopped_at = train_seconds
        self._running_since: float | None = None
        self._session = self._interval = (step, train_seconds)
        self.warm_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Train time in seconds, including earlier sessions."""
        running = self._running_since
        return self._stopped_at + (time.perf_counter() - running if running is not None else 0.0)

    def start(self) -> None:
        """Starts the clock."""
        self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock; may be called twice."""
        self._stopped_at, self._running_since = self.seconds, None

    def warmed_up(self, step: int) -> None:
        """Excludes the steps up to `step`, often slow, from `seconds_per_step`."""
        self.warm_seconds = self.seconds - self._session[1]
        self._session = (step, self.seconds)

    def seconds_per_step(self, step: int) -> float:
        """Mean step time of this process up to `step`, without warm-up steps."""
        first, seconds = self._session
        return (self.seconds - seconds) / (step - first) if step > first else self.warm_seconds

    def interval(self, step: int) -> dict[str, float | None]:
        """Returns tokens so far and mean speeds since the last call; starts a new interval."""
        first, seconds = self._interval
        self._interval = (step, self.seconds)
        tokens = (step - first) * self._tokens_per_step
        tokens_per_second = tokens / max(self._interval[1] - seconds, 1e-9)
        flops = tokens_per_second * self._flops
        return {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops,
            "mfu": flops / self._peak if self._peak else None,
            "train_seconds": self._interval[1],
        }
