"""Held-out figures: loss, perplexity, bits per byte and accuracy, exact over every token."""

import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sheepop_jax.data.batch import Batch
from sheepop_jax.data.loader import EvaluationBatches, PackingConfig
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.model.loss import EvaluationSums, chunk_length, evaluation_sums
from sheepop_jax.model.partitioning import sum_over_replicas
from sheepop_jax.model.transformer import Transformer, output_embedding


@dataclass(frozen=True)
class Figures:
    """What one evaluation found.

    Attributes:
        loss: nats per predicted token.
        perplexity: e^loss.
        bits_per_byte: loss in bits over all tokens, per UTF-8 byte of the documents; comparable
            between tokenizers.
        accuracy: share of tokens whose most probable prediction was right.
        tokens: predicted, end-of-text included.
        bytes: of the documents they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    bytes: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain values, as `evaluate --json` prints them."""
        return asdict(self)


@partial(jax.jit, static_argnums=0)
def _batch_sums(model: Transformer, params: Any, batch: Batch) -> EvaluationSums:
    inputs_BT, targets_BT, weights_BT, segments_BT = jax.tree.map(jnp.asarray, batch)
    hidden_BTD, _ = model.apply({"params": params}, inputs_BT, segments_BT=segments_BT)

    def sums(embedding_VD: Any, rows: tuple[jax.Array, ...]) -> EvaluationSums:
        hidden_BTD, targets_BT, weights_BT = rows
        chunk = chunk_length(targets_BT.size, embedding_VD.shape[0])
        return evaluation_sums(
            hidden_BTD, embedding_VD, targets_BT, weights_BT, model.vocab_size, chunk
        )

    def over_fsdp(embedding_VD: Any, rows: tuple[jax.Array, ...]) -> EvaluationSums:
        return sum_over_replicas("fsdp", sums, embedding_VD, rows, row_axis=0)

    rows = hidden_BTD, targets_BT, weights_BT
    return sum_over_replicas("data", over_fsdp, output_embedding(params), rows, row_axis=0)


def evaluate(
    model: Transformer, params: Any, batches: Iterable[Batch], bytes_per_token: float
) -> Figures:
    """Sums over all batches, divided once.

    Args:
        model: with the dtype to compute in.
        params: fp32 or quantised.
        batches: [B, T] with weight 0 on what does not count; on the device or not.
        bytes_per_token: UTF-8 bytes of the documents over all predicted tokens.

    Raises:
        ValueError: no token counts.
    """
    totals = [0.0, 0.0, 0.0]  # float64, since fp32 stops counting at 2**24
    queued: list[EvaluationSums] = []

    def add(sums: EvaluationSums) -> None:
        for i, value in enumerate(sums):
            totals[i] += float(value)

    for batch in batches:
        queued.append(_batch_sums(model, params, batch))
        if len(queued) > 1:  # fetch a batch's numbers while the next one is computed
            add(queued.pop(0))
    for sums in queued:
        add(sums)
    loss_sum, correct, tokens = totals
    if tokens == 0:
        raise ValueError("an evaluation without a single counted token")
    loss, num_bytes = loss_sum / tokens, tokens * bytes_per_token
    return Figures(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss_sum / math.log(2) / num_bytes,
        accuracy=correct / tokens,
        tokens=round(tokens),
        bytes=round(num_bytes),
    )


def evaluate_stream(
    model: Transformer,
    params: Any,
    stream: TokenStream,
    layout: PackingConfig,
    *,
    batch_size: int,
    overlap: int = 0,
    max_batches: int = 0,
    rows: Sequence[int] | None = None,
    show: bool = True,
    put: Callable[[Batch], Batch] = lambda batch: batch,
    check: Callable[[], None] = lambda: None,
) -> Figures:
    """Evaluates over a token stream, showing how far it is.

    Args:
        model: with the dtype to compute in.
        params: fp32 or quantised.
        stream: from `prepare` or `TokenStream.from_array`.
        layout: its windows.
        batch_size: B.
        overlap: tokens of context that a window shares with the one before.
        max_batches: 0 = all.
        rows: of each batch, those of this process; None is all.
        show: whether to show a bar.
        put: moves a batch [rows, T] to the devices.
        check: called before each batch; may raise to leave.
    """
    batches = EvaluationBatches(
        stream,
        layout,
        batch_size=batch_size,
        overlap=overlap,
        max_batches=max_batches,
        rows=rows,
    )

    def on_device() -> Iterator[Batch]:
        for batch in batches:
            check()
            yield put(batch)

    # On a terminal a bar, gone when done; elsewhere nothing.
    shown = tqdm(
        on_device(),
        total=len(batches),
        desc="evaluating",
        leave=False,
        delay=2,
        disable=None if show else True,
        dynamic_ncols=True,
    )
    return evaluate(model, params, shown, stream.num_bytes / (len(stream) - 1))


def compression_figures(content: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` need, in bits per byte of the content: to compare a model with."""
    sizes = {
        # 31: with gzip's own header, as the command writes it
        "gzip_bits_per_byte": len(zlib.compress(content, 9, wbits=31)),
        "xz_bits_per_byte": len(lzma.compress(content, preset=9)),
    }
    return {name: 8 * size / len(content) for name, size in sizes.items()}
