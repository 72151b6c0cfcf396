"""How fast a run goes: seconds spent in updates, tokens and FLOPs per second, time left."""

import time
from typing import Any

import jax

from sheepop_jax.config.schema import Config


def flops_per_token(params: Any, config: Config) -> float:
    """Forward and backward FLOPs that the model's mathematics needs for one token.

    6 for each weight that multiplies (2 forward, 4 backward) and 12 · layers · T · D for the
    attention scores and their use. The output layer multiplies; looking up an untied token
    embedding or a position does not. Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    looked_up = {"positions"} | ({"embedding"} if "output_embedding" in params else set())
    weights = {name: tree for name, tree in params.items() if name not in looked_up}
    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    model = config.model
    return 6.0 * count + 12.0 * model.num_layers * config.data.seq_len * model.d_model


class Throughput:
    """A clock that runs during updates only: compiling, evaluating and saving stop it."""

    def __init__(
        self, step: int, train_seconds: float, tokens_per_step: int, flops: float, peak: float
    ):
        """Starts at a step with the seconds of earlier sessions, the clock standing still.

        Args:
            step: updates done before.
            train_seconds: spent in them.
            tokens_per_step: of one update.
            flops: FLOPs a token.
            peak: FLOP/s of all devices together; 0 where unknown.
        """
        self._tokens_per_step, self._flops, self._peak = tokens_per_step, flops, peak
        self.flops_per_step = tokens_per_step * flops
        self._stopped_at = train_seconds
        self._running_since: float | None = None
        self._session = self._interval = (step, train_seconds)
        self.warm_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Spent in updates so far, earlier sessions included."""
        running = self._running_since
        return self._stopped_at + (time.perf_counter() - running if running is not None else 0.0)

    def start(self) -> None:
        """Lets the clock run."""
        self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock; stopping twice is harmless."""
        self._stopped_at, self._running_since = self.seconds, None

    def warmed_up(self, step: int) -> None:
        """Leaves the steps up to `step` out of `seconds_per_step`: the first is often slow."""
        self.warm_seconds = self.seconds - self._session[1]
        self._session = (step, self.seconds)

    def seconds_per_step(self, step: int) -> float:
        """Mean over this process's steps after the warm one, up to `step`."""
        first, seconds = self._session
        return (self.seconds - seconds) / (step - first) if step > first else self.warm_seconds

    def interval(self, step: int) -> dict[str, float | None]:
        """Speeds since the last call, or the start, up to `step`; and begins a new interval."""
        first, seconds = self._interval
        self._interval = (step, self.seconds)
        tokens = (step - first) * self._tokens_per_step
        tokens_per_second = tokens / max(self._interval[1] - seconds, 1e-9)
        flops = tokens_per_second * self._flops
        return {
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops,
            "mfu": flops / self._peak if self._peak else None,
            "train_seconds": self._interval[1],
        }
