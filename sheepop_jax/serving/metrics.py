"""Counters and histograms in the text format of Prometheus.

Counted and read in one thread, that of the event loop.
"""

import bisect
from collections.abc import Iterable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "sheepop_jax_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number for each set of labels, which only grows."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        self._values: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> Iterable[str]:
        yield from _header(self.name, self.text, "counter")
        for labels, value in sorted(self._values.items() or [((), 0.0)]):
            yield _sample(self.name, labels, value)


class Histogram:
    """Seconds, counted by size."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        self._counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self._counts)

    def lines(self) -> Iterable[str]:
        yield from _header(self.name, self.text, "histogram")
        below = 0
        for bound, count in zip((*_SECONDS, float("inf")), self._counts, strict=True):
            below += count
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield _sample(f"{self.name}_bucket", (("le", le),), below)
        yield _sample(f"{self.name}_sum", (), self.sum)
        yield _sample(f"{self.name}_count", (), below)


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.requests = Counter(
            PREFIX + "requests_total", "Requests answered, by route and HTTP status."
        )
        self.refused = Counter(PREFIX + "queue_full_total", "Requests refused, queue full (429).")
        self.left = Counter(
            PREFIX + "disconnects_total", "Requests whose client left before the end."
        )
        self.prompt_tokens = Counter(PREFIX + "prompt_tokens_total", "Prompt tokens of requests.")
        self.new_tokens = Counter(PREFIX + "generation_tokens_total", "Tokens generated.")
        self.latency = Histogram(
            PREFIX + "request_seconds", "Time of a completion request, to its last byte."
        )
        self.first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "Time of a request to its first token.",
        )

    def render(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """The page: all counters, and current values as (name, description, value)."""
        parts = (
            *(self.requests, self.refused, self.left, self.prompt_tokens, self.new_tokens),
            *(self.latency, self.first_token),
        )
        lines = [line for part in parts for line in part.lines()]
        for name, text, value in gauges:
            lines += [*_header(PREFIX + name, text, "gauge"), _sample(PREFIX + name, (), value)]
        return "\n".join(lines) + "\n"


def _header(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _sample(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{shown}}} {_number(value)}" if shown else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
