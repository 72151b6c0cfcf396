"""Window spans and the order of windows, as stateless functions."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np

from sheepop_jax.data.stream import TokenStream
from sheepop_jax.errors import InputError

_PATTERN = 10_000  # period of a mixture in windows: shares are exact to 0.01%


class Windows(Protocol):
    """The windows of one stream in one epoch; together they cover every target.

    Attributes:
        slack: largest offset, in tokens, by which an epoch's windows may be shifted.
    """

    slack: int

    def __len__(self) -> int: ...

    def span(self, window: int, offset: int = 0) -> tuple[int, int]:
        """The token range [start, stop) of a window, at most T + 1 tokens."""
        ...


class StreamWindows:
    """Windows of T + 1 tokens at stride T across document boundaries, shifted by an offset."""

    def __init__(self, stream_len: int, seq_len: int):
        if stream_len < seq_len + 1:
            expected = f"at most {stream_len - 1} for a stream of {stream_len} tokens"
            raise InputError("data.seq_len", seq_len, expected)
        self._seq_len = seq_len
        # One window fewer than fits at offset 0, so that every offset below T fits.
        self._num = max(1, (stream_len - seq_len) // seq_len)
        self.slack = min(seq_len - 1, stream_len - 1 - self._num * seq_len)

    def __len__(self) -> int:
        return self._num

    def span(self, window: int, offset: int = 0) -> tuple[int, int]:
        """See `Windows`; `offset` is in [0, slack]."""
        start = offset + window * self._seq_len
        return start, start + self._seq_len + 1


class DocumentWindows:
    """Windows aligned with documents: end-of-text (or BOS), then up to T tokens of one document.

    A document longer than T is split into consecutive windows.
    """

    slack = 0

    def __init__(self, stream: TokenStream, seq_len: int, end_of_text: int, bos: int | None = None):
        self._seq_len = seq_len
        ends = stream.positions_of(end_of_text)
        if bos is None:
            self._starts, self._ends = ends[:-1], ends[1:]
        else:
            self._starts, self._ends = stream.positions_of(bos), ends
        targets = self._ends - self._starts  # includes the end-of-text after each document
        self._first = np.concatenate([[0], np.cumsum(-(-targets // seq_len))])

    def __len__(self) -> int:
        return int(self._first[-1])

    def span(self, window: int, offset: int = 0) -> tuple[int, int]:
        """See `Windows`; a window may be shorter than T + 1 tokens."""
        document = int(np.searchsorted(self._first, window, side="right")) - 1
        within = window - int(self._first[document])
        start = int(self._starts[document]) + within * self._seq_len
        return start, min(start + self._seq_len, int(self._ends[document])) + 1


class ConversationWindows:
    """Windows of at most T + 1 tokens that hold whole conversations."""

    slack = 0

    def __init__(self, stream: TokenStream, seq_len: int, several: bool):
        """Args:
        stream: conversations of at most T + 1 tokens each.
        seq_len: T.
        several: whether a window holds as many as fit, in the order of the stream, or one.

        Raises:
            InputError: a conversation is longer than a window.
        """
        ends = np.append(stream.conversation_starts(), len(stream))
        longest = int(np.diff(ends).max(initial=0))
        if longest > seq_len + 1:
            expected = f"at least {longest - 1}: a conversation has {longest} tokens"
            raise InputError("data.seq_len", seq_len, expected)
        first, firsts = 0, [0]
        while several and first < len(ends) - 1:
            first = int(np.searchsorted(ends, ends[first] + seq_len + 1, side="right")) - 1
            firsts.append(first)
        self._ends = ends[firsts] if several else ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def span(self, window: int, offset: int = 0) -> tuple[int, int]:
        """See `Windows`; a window may be shorter than T + 1 tokens."""
        return int(self._ends[window]), int(self._ends[window + 1])


def make_windows(
    stream: TokenStream, seq_len: int, packing: str, end_of_text: int, bos: int | None = None
) -> StreamWindows | DocumentWindows | ConversationWindows:
    """The windows of a stream, by `data.packing`."""
    if stream.has_marks:
        return ConversationWindows(stream, seq_len, several=packing == "whole")
    if packing == "one_per_window":
        return DocumentWindows(stream, seq_len, end_of_text, bos)
    return StreamWindows(len(stream), seq_len)


class MixtureSampler:
    """Maps k, counted over all epochs, to the k-th training window.

    Each epoch of a source visits every window once, with its own shuffle and offset (offset 0 in
    the first epoch). Sources are interleaved deterministically by weight; a source that is
    exhausted starts its next epoch.

    Attributes:
        lengths: windows per epoch of each source.
        num_windows: the sum of `lengths`.
        shares: the fraction of windows from each source.
    """

    def __init__(self, sources: Sequence[Windows], seed: int, weights: Sequence[float] = (1.0,)):
        self._sources, self._seed = list(sources), seed
        self.lengths = [len(source) for source in sources]
        self.num_windows = sum(self.lengths)
        counts = _counts(weights)
        self.shares = realised_shares(weights)
        # A source's turns are evenly spaced in the pattern: turn j of c at (j + 1/2) / c.
        turns = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
        owners = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((owners, turns))
        self._owner = owners[order]
        self._turn = np.concatenate([np.arange(c) for c in counts])[order]
        self._counts = counts
        self._shuffled = [self._shuffle(number) for number in range(len(self._sources))]

    def _shuffle(self, source: int) -> grain.MapDataset:
        # The first source uses the run's seed. `MapDataset.range` sees the index modulo n; the
        # index after `repeat` holds the epoch.
        num = len(self._sources[source])
        seed = (self._seed + source * 0x9E3779B1) % 2**32
        windows = grain.MapDataset.range(num).seed(seed).shuffle().repeat()
        return windows.map_with_index(lambda index, window: (index // num, int(window)))

    def offset(self, source: int, epoch: int) -> int:
        """Offset of an epoch's first window, in [0, slack]."""
        if epoch == 0:
            return 0
        # A hash rather than a random generator: stable across library versions.
        name = f"window offset {self._seed} {epoch}" + (f" {source}" if source else "")
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest, "big") % (self._sources[source].slack + 1)

    def span(self, k: int) -> tuple[int, int, int]:
        """Source and token range (source, start, stop) of the k-th window."""
        block, place = divmod(k, len(self._owner))
        source = int(self._owner[place])
        turn = block * int(self._counts[source]) + int(self._turn[place])
        epoch, window = self._shuffled[source][turn]
        return source, *self._sources[source].span(window, self.offset(source, epoch))


def realised_shares(weights: Sequence[float]) -> list[float]:
    """The fraction of windows from each source: the weights as `MixtureSampler` rounds them."""
    counts = _counts(weights)
    return [float(share) for share in counts / counts.sum()]


def _counts(weights: Sequence[float]) -> np.ndarray:
    """Turns of each source per pattern, int64, proportional to its weight, at least one."""
    if len(weights) == 1:
        return np.ones(1, np.int64)
    exact = np.array(weights) / sum(weights) * _PATTERN
    counts = np.maximum(exact.astype(np.int64), 1)
    largest_rest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_rest_first[: max(0, _PATTERN - int(counts.sum()))]] += 1
    return counts
