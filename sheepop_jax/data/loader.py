"""Token streams to batches: which tokens make up batch k, a function of (seed, k) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from sheepop_jax.config.data import DataConfig
from sheepop_jax.data.batch import Batch
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.windows import DocumentWindows, MixtureSampler, make_windows
from sheepop_jax.errors import InputError


@dataclass(frozen=True)
class PackingConfig:
    """How streams become rows of a batch.

    Attributes:
        seq_len: T, tokens to predict in one window.
        end_of_text: the token between documents.
        packing: "stream", windows across documents, or "one_per_window", padded.
        document_mask: whether batches carry segments.
    """

    seq_len: int
    end_of_text: int
    packing: str = "stream"
    document_mask: bool = False

    @classmethod
    def of(cls, config: DataConfig, end_of_text: int) -> "PackingConfig":
        """As configured."""
        return cls(config.seq_len, end_of_text, config.packing, config.document_mask)

    def batch(self, tokens: np.ndarray, weights: np.ndarray) -> Batch:
        """Inputs and targets of windows [..., T + 1]."""
        inputs, targets = tokens[..., :-1], tokens[..., 1:]
        segments = None
        if self.document_mask:
            documents = np.cumsum(inputs == self.end_of_text, axis=-1, dtype=np.int32)
            segments = documents - documents[..., :1]
        return Batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets), weights, segments)


def window_order(
    streams: Sequence[TokenStream],
    layout: PackingConfig,
    seed: int,
    weights: Sequence[float] = (1.0,),
) -> MixtureSampler:
    """The order in which the windows of a corpus are trained on."""
    sources = [
        make_windows(stream, layout.seq_len, layout.packing, layout.end_of_text)
        for stream in streams
    ]
    return MixtureSampler(sources, seed, weights)


class TrainBatches:
    """The training batches of one process: `rows` of a global batch [A, B, T]; None is all.

    Row b of microbatch a at step s is window (s * A + a) * B + b of `MixtureSampler`, so that what is
    trained on does not depend on how many processes there are.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        layout: PackingConfig,
        *,
        seed: int,
        accum: int,
        batch_size: int,
        weights: Sequence[float] = (1.0,),
        rows: Sequence[int] | None = None,
    ):
        self._order = window_order(streams, layout, seed, weights)
        self._rows = range(batch_size) if rows is None else rows
        self._streams, self._layout = list(streams), layout
        self._accum, self._batch_size = accum, batch_size
        self.steps_per_epoch = -(-self._order.num_windows // (accum * batch_size))

    def batch_at(self, step: int) -> Batch:
        """This process's rows [A, rows, T] of the global batch of `step`."""
        shape = (self._accum, len(self._rows), self._layout.seq_len)
        tokens = np.zeros((*shape[:2], shape[2] + 1), np.int32)
        weights = np.zeros(shape, np.float32)
        for a in range(self._accum):
            for i, b in enumerate(self._rows):
                window = (step * self._accum + a) * self._batch_size + b
                source, start, stop = self._order.span(window)
                tokens[a, i, : stop - start] = self._streams[source].read(start, stop)
                weights[a, i, : stop - start - 1] = 1
        return self._layout.batch(tokens, weights)

    def iterate(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """`batch_at` for first_step up to last_step - 1, made ahead by threads of grain."""
        steps = grain.MapDataset.range(first_step, last_step).map(self.batch_at)
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


class EvaluationBatches:
    """Batches [rows, T] in which every token of the stream but the first counts once."""

    def __init__(
        self,
        stream: TokenStream,
        layout: PackingConfig,
        *,
        batch_size: int,
        overlap: int = 0,
        max_batches: int = 0,
        rows: Sequence[int] | None = None,
    ):
        """Nothing is read yet.

        Args:
            stream: N tokens; the weights of all batches sum to N - 1.
            layout: the windows.
            batch_size: B, over all processes.
            overlap: tokens that a window repeats from the one before, as context that does not
                count; 0 where each document has windows of its own.
            max_batches: stops after so many; 0 means all.
            rows: of each batch of B, those to give; None is all.

        Raises:
            InputError: overlap is not in [0, T).
        """
        seq_len = layout.seq_len
        if not 0 <= overlap < seq_len:
            raise InputError("overlap", overlap, f"a whole number in [0, {seq_len})")
        self._stream, self._layout, self._overlap = stream, layout, overlap
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._documents = None
        if layout.packing == "one_per_window":
            if overlap:
                expected = "0, since each document has windows of its own (data.packing)"
                raise InputError("overlap", overlap, expected)
            self._documents = DocumentWindows(stream, seq_len, layout.end_of_text)
            self._windows = len(self._documents)
        else:
            beyond_first = max(len(stream) - 1 - seq_len, 0)
            self._windows = 1 + -(-beyond_first // (seq_len - overlap))
        count = -(-self._windows // batch_size)
        self._count = min(count, max_batches) if max_batches else count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        seq_len = self._layout.seq_len
        for index in range(self._count):
            # Zeros beyond the end of the stream, and in rows beyond the last window: shapes stay.
            tokens = np.zeros((len(self._rows), seq_len + 1), np.int32)
            weights = np.zeros((len(self._rows), seq_len), np.float32)
            for i, b in enumerate(self._rows):
                window = index * self._batch_size + b
                if window >= self._windows:
                    break
                start, stop = self._span(window)
                tokens[i, : stop - start] = self._stream.read(start, stop)
                weights[i, self._overlap if window else 0 : max(stop - start - 1, 0)] = 1
            yield self._layout.batch(tokens, weights)

    def _span(self, window: int) -> tuple[int, int]:
        if self._documents is not None:
            return self._documents.span(window)
        start = window * (self._layout.seq_len - self._overlap)
        return start, min(start + self._layout.seq_len + 1, len(self._stream))
