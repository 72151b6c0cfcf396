"""Batches from token streams. Batch k is a function of (seed, k) alone."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from sheepop_jax.config.data import DataConfig
from sheepop_jax.data.batch import Batch
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.windows import MixtureSampler, Windows, make_windows
from sheepop_jax.errors import InputError


@dataclass(frozen=True)
class PackingConfig:
    """How token streams are packed into batch rows.

    Attributes:
        seq_len: T, predicted tokens per window.
        end_of_text: id of the token between documents.
        packing: "stream" packs across documents; "one_per_window" pads each document; "whole" packs
            as many conversations as fit.
        document_mask: whether batches carry segment ids.
        bos: id of the token at the beginning of each document (`Tokenizer.document_bos`), or None.
            It has weight 0 as a target.
    """

    seq_len: int
    end_of_text: int
    packing: str = "stream"
    document_mask: bool = False
    bos: int | None = None

    @classmethod
    def of(cls, config: DataConfig, end_of_text: int, bos: int | None = None) -> "PackingConfig":
        """The packing of a `data` section."""
        bos = None if config.is_chat else bos  # the template writes it
        return cls(config.seq_len, end_of_text, config.packing, config.document_mask, bos)

    def batch(
        self, tokens: np.ndarray, weights: np.ndarray, begins: np.ndarray | None = None
    ) -> Batch:
        """Builds a batch from windows [..., T + 1].

        Args:
            tokens: token ids [..., T + 1].
            weights: of the targets [..., T].
            begins: whether each token is the first of a conversation; None for text.
        """
        inputs, targets = tokens[..., :-1], tokens[..., 1:]
        segments = None
        if self.bos is not None:
            weights = np.where(targets == self.bos, np.float32(0), weights)
        if self.document_mask:
            first = self.end_of_text if self.bos is None else self.bos
            is_first = inputs == first if begins is None else begins[..., :-1]
            documents = np.cumsum(is_first, axis=-1, dtype=np.int32)
            segments = documents - documents[..., :1]
        return Batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets), weights, segments)


def window_order(
    streams: Sequence[TokenStream],
    layout: PackingConfig,
    seed: int,
    weights: Sequence[float] = (1.0,),
) -> MixtureSampler:
    """The order in which training visits the windows of a corpus."""
    sources = [
        make_windows(stream, layout.seq_len, layout.packing, layout.end_of_text, layout.bos)
        for stream in streams
    ]
    return MixtureSampler(sources, seed, weights)


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of one process.

    Row b of microbatch a at step s is window (s * A + a) * B + b of `MixtureSampler`. The training
    text therefore does not depend on the number of processes.

    Attributes:
        streams: one token stream per source.
        packing: how streams become windows.
        seed: of the order of windows.
        accum: A, microbatches in one update.
        batch_size: B, sequences in one microbatch over all processes.
        weights: the share of windows that each source gives.
        rows: the rows of a microbatch that this process holds; None is all.
    """

    streams: Sequence[TokenStream]
    packing: PackingConfig
    seed: int
    accum: int
    batch_size: int
    weights: Sequence[float] = (1.0,)
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raises InputError where a stream does not fill a window."""
        self._order  # noqa: B018 - computed now, so that the error comes before training

    @functools.cached_property
    def _order(self) -> MixtureSampler:
        return window_order(self.streams, self.packing, self.seed, self.weights)

    @property
    def steps_per_epoch(self) -> int:
        """Updates in which every window is visited once."""
        return -(-self._order.num_windows // (self.accum * self.batch_size))

    def epochs(self, step: int) -> float:
        """Passes over the text after `step` updates; of the most repeated source."""
        windows = step * self.accum * self.batch_size
        order = zip(self._order.shares, self._order.lengths, strict=True)
        return max(windows * share / length for share, length in order)

    def batch_at(self, step: int) -> Batch:
        """This process's rows [A, rows, T] of the global batch of `step`."""
        rows = range(self.batch_size) if self.rows is None else self.rows
        shape = (self.accum, len(rows), self.packing.seq_len)
        tokens = np.zeros((*shape[:2], shape[2] + 1), np.int32)
        weights = np.zeros(shape, np.float32)
        begins = np.zeros(tokens.shape, bool) if self.streams[0].has_marks else None
        for a in range(self.accum):
            for i, b in enumerate(rows):
                window = (step * self.accum + a) * self.batch_size + b
                source, start, stop = self._order.span(window)
                stream = self.streams[source]
                tokens[a, i, : stop - start] = stream.read(start, stop)
                weights[a, i, : stop - start - 1] = stream.weights(start + 1, stop)
                if begins is not None:
                    begins[a, i, : stop - start] = stream.begins(start, stop)
        return self.packing.batch(tokens, weights, begins)

    def iterate(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yields `batch_at` for steps [first_step, last_step), prefetched by grain's threads."""
        steps = grain.MapDataset.range(first_step, last_step).map(self.batch_at)
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


class EvaluationBatches:
    """Batches [rows, T] that count every token of the stream once, except the first and BOS."""

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
        """Plans the batches.

        Args:
            stream: N tokens; the weights of all batches sum to its `num_targets`.
            layout: the packing.
            batch_size: B, over all processes.
            overlap: context tokens repeated from the previous window, not counted again; must be
                0 except with "stream" packing.
            max_batches: upper limit on the number of batches; 0 means all.
            rows: indices of this process's rows in each batch of B; None means all.

        Raises:
            InputError: overlap is not in [0, T), or not 0 except with "stream" packing.
        """
        seq_len = layout.seq_len
        if not 0 <= overlap < seq_len:
            raise InputError("overlap", overlap, f"an integer in [0, {seq_len})")
        self._stream, self._layout, self._overlap = stream, layout, overlap
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._documents: Windows | None = None
        if layout.packing != "stream":
            if overlap:
                expected = f"0 with `data.packing={layout.packing}`"
                raise InputError("overlap", overlap, expected)
            self._documents = make_windows(
                stream, seq_len, layout.packing, layout.end_of_text, layout.bos
            )
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
            # Static shapes: zero-pad past the end of the stream and past the last window.
            tokens = np.zeros((len(self._rows), seq_len + 1), np.int32)
            weights = np.zeros((len(self._rows), seq_len), np.float32)
            begins = np.zeros(tokens.shape, bool) if self._stream.has_marks else None
            for i, b in enumerate(self._rows):
                window = index * self._batch_size + b
                if window >= self._windows:
                    break
                start, stop = self._span(window)
                tokens[i, : stop - start] = self._stream.read(start, stop)
                counted = max(stop - start - 1, 0)
                weights[i, :counted] = self._stream.weights(stop - counted, stop)
                weights[i, : self._overlap if window else 0] = 0
                if begins is not None:
                    begins[i, : stop - start] = self._stream.begins(start, stop)
            yield self._layout.batch(tokens, weights, begins)

    @property
    def stop(self) -> int:
        """The end of the last window in the stream."""
        return self._span(min(self._count * self._batch_size, self._windows) - 1)[1]

    def _span(self, window: int) -> tuple[int, int]:
        if self._documents is not None:
            return self._documents.span(window)
        start = window * (self._layout.seq_len - self._overlap)
        return start, min(start + self._layout.seq_len + 1, len(self._stream))
