"""Token streams to batches: which tokens make up batch k, a function of (seed, k) alone."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from sheepop_jax.data.stream import TokenStream
from sheepop_jax.errors import InputError


class Batch(NamedTuple):
    """What one update ([A, B, T]) or one evaluation step ([B, T]) sees.

    Attributes:
        inputs: token ids, int32.
        targets: the token that follows each input, int32.
        weights: 1 where the target counts, 0 where it is padding or overlap, float32.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class WindowOrder:
    """Which T + 1 tokens the k-th training window covers; no memory, no state.

    An epoch is n windows at stride T from an offset, each once, in an order of its own. The offset
    of epoch 0 is 0; later ones move, so that windows begin elsewhere in each epoch.
    """

    def __init__(self, stream_len: int, seq_len: int, seed: int):
        if stream_len < seq_len + 1:
            expected = f"at most {stream_len - 1} for a stream of {stream_len} tokens"
            raise InputError("data.seq_len", seq_len, expected)
        self._seq_len, self._seed = seq_len, seed
        self.num_windows = num_windows(stream_len, seq_len)
        self._slack = min(seq_len - 1, stream_len - 1 - self.num_windows * seq_len)
        # The source sees the index modulo n; the epoch is in the index after `repeat`.
        windows = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()
        self._epoch_and_window = windows.map_with_index(
            lambda index, window: (index // self.num_windows, int(window))
        )

    def offset(self, epoch: int) -> int:
        """Where the epoch's first window begins, in [0, slack]."""
        if epoch == 0:
            return 0
        # A hash, not a generator: the same in every version of every library.
        digest = hashlib.sha256(f"window offset {self._seed} {epoch}".encode()).digest()
        return int.from_bytes(digest, "big") % (self._slack + 1)

    def span(self, k: int) -> tuple[int, int]:
        """First token, and one beyond the last, of the k-th window; k counts over all epochs."""
        epoch, window = self._epoch_and_window[k]
        start = self.offset(epoch) + window * self._seq_len
        return start, start + self._seq_len + 1


def num_windows(stream_len: int, seq_len: int) -> int:
    """Windows in one epoch: one less than would fit, so that every offset below T does."""
    return max(1, (stream_len - seq_len) // seq_len)


def steps_per_epoch(stream_len: int, seq_len: int, sequences_per_update: int) -> int:
    """Updates in which every window of an epoch has been seen once."""
    return -(-num_windows(stream_len, seq_len) // sequences_per_update)


class TrainBatches:
    """The training batches of one process: rows of a global batch [A, B, T].

    Row b of microbatch a at step s is window (s * A + a) * B + b of `WindowOrder`. A process holds
    a contiguous share of the B rows, so what is trained on does not depend on their number.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        seed: int,
        accum: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._order = WindowOrder(len(stream), seq_len, seed)
        self._rows = _own_rows(batch_size, process_index, process_count)
        self._stream, self._seq_len = stream, seq_len
        self._accum, self._batch_size = accum, batch_size

    def batch_at(self, step: int) -> Batch:
        """This process's rows [A, B / processes, T] of the global batch of `step`."""
        tokens = np.empty((self._accum, len(self._rows), self._seq_len + 1), np.int32)
        for a in range(self._accum):
            for i, b in enumerate(self._rows):
                window = (step * self._accum + a) * self._batch_size + b
                tokens[a, i] = self._stream.read(*self._order.span(window))
        return _batch(tokens, np.ones(tokens[..., 1:].shape, np.float32))

    def iterate(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """`batch_at` for first_step up to last_step - 1, made ahead by threads of grain."""
        steps = grain.MapDataset.range(first_step, last_step).map(self.batch_at)
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


def evaluation_batches(
    stream: TokenStream,
    *,
    seq_len: int,
    batch_size: int,
    overlap: int = 0,
    max_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches [B / processes, T] in which every token of the stream but the first counts once.

    Args:
        stream: N tokens; the weights of all batches sum to N - 1.
        seq_len: T.
        batch_size: B, over all processes.
        overlap: tokens that a window repeats from the one before, as context that does not count.
        max_batches: stops after so many; 0 means all.
        process_index: which contiguous share of the rows to give.
        process_count: how many shares there are.

    Raises:
        InputError: overlap is not in [0, T), or B is no multiple of the processes.
    """
    windows = _num_evaluation_windows(len(stream), seq_len, overlap)
    rows = _own_rows(batch_size, process_index, process_count)
    count = num_evaluation_batches(
        len(stream),
        seq_len=seq_len,
        batch_size=batch_size,
        overlap=overlap,
        max_batches=max_batches,
    )
    for index in range(count):
        # Zeros beyond the end of the stream, and in rows beyond the last window: shapes stay.
        tokens = np.zeros((len(rows), seq_len + 1), np.int32)
        weights = np.zeros((len(rows), seq_len), np.float32)
        for i, b in enumerate(rows):
            window = index * batch_size + b
            if window >= windows:
                break
            start = window * (seq_len - overlap)
            found = stream.read(start, min(start + seq_len + 1, len(stream)))
            tokens[i, : len(found)] = found
            weights[i, overlap if window else 0 : max(len(found) - 1, 0)] = 1
        yield _batch(tokens, weights)


def num_evaluation_batches(
    stream_len: int, *, seq_len: int, batch_size: int, overlap: int = 0, max_batches: int = 0
) -> int:
    """How many batches `evaluation_batches` gives."""
    count = -(-_num_evaluation_windows(stream_len, seq_len, overlap) // batch_size)
    return min(count, max_batches) if max_batches else count


def _num_evaluation_windows(stream_len: int, seq_len: int, overlap: int) -> int:
    if not 0 <= overlap < seq_len:
        raise InputError("overlap", overlap, f"a whole number in [0, {seq_len})")
    beyond_first = max(stream_len - 1 - seq_len, 0)
    return 1 + -(-beyond_first // (seq_len - overlap))


def _own_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        expected = f"a multiple of the {process_count} processes"
        raise InputError("train.batch_size", batch_size, expected)
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _batch(tokens: np.ndarray, weights: np.ndarray) -> Batch:
    """Inputs and targets of windows [..., T + 1]."""
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    return Batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets), weights)
