"""Validation metrics over every token of a stream."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sheepop_jax.data.batch import Batch
from sheepop_jax.data.loader import EvaluationBatches, PackingConfig
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.model.loss import EvaluationSums, chunk_length, evaluation_sums
from sheepop_jax.model.partitioning import global_batch, own_rows, sum_over_replicas
from sheepop_jax.model.transformer import Transformer, output_embedding
from sheepop_jax.progress import Progress


@dataclass(frozen=True)
class EvaluationMetrics:
    """The result of one evaluation.

    Attributes:
        loss: nats per predicted token.
        perplexity: e^loss.
        bits_per_byte: total loss in bits per UTF-8 byte of the documents; comparable between
            tokenizers.
        accuracy: fraction of tokens predicted correctly by the argmax.
        tokens: number of predicted tokens, including end-of-text.
        bytes: UTF-8 bytes of the documents that these tokens encode.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    bytes: int

    def to_dict(self) -> dict[str, float | int]:
        """Returns plain values, as printed by `evaluate --json`."""
        return asdict(self)


@partial(jax.jit, static_argnums=0)
def _batch_sums(model: Transformer, params: Any, batch: Batch) -> EvaluationSums:
    inputs_BT, targets_BT, weights_BT, segments_BT = jax.tree.map(jnp.asarray, batch)
    hidden_BTD, _ = model.apply({"params": params}, inputs_BT, segments_BT=segments_BT)

    def sums(embedding_VD: Any, rows: tuple[jax.Array, ...]) -> EvaluationSums:
        hidden_BTD, targets_BT, weights_BT = rows
        chunk = chunk_length(targets_BT.size, embedding_VD.shape[0])
        softcap = model.config.logit_softcap
        return evaluation_sums(
            hidden_BTD, embedding_VD, targets_BT, weights_BT, model.vocab_size, softcap, chunk
        )

    def over_fsdp(embedding_VD: Any, rows: tuple[jax.Array, ...]) -> EvaluationSums:
        return sum_over_replicas("fsdp", sums, embedding_VD, rows, row_axis=0)

    rows = hidden_BTD, targets_BT, weights_BT
    return sum_over_replicas("data", over_fsdp, output_embedding(params), rows, row_axis=0)


def evaluate(
    model: Transformer, params: Any, batches: Iterable[Batch], bytes_per_token: float
) -> EvaluationMetrics:
    """Computes metrics over all batches: sums first, one division at the end.

    Args:
        model: the model, with the dtype to compute in.
        params: model parameters, fp32 or quantized.
        batches: [B, T] batches, on the host or on devices; ignored tokens have weight 0.
        bytes_per_token: UTF-8 bytes of the documents per predicted token.

    Raises:
        ValueError: all tokens have weight 0.
    """
    totals = [0.0, 0.0, 0.0]  # float64: fp32 cannot count beyond 2**24
    queued: list[EvaluationSums] = []

    def add(sums: EvaluationSums) -> None:
        for i, value in enumerate(sums):
            totals[i] += float(value)

    for batch in batches:
        queued.append(_batch_sums(model, params, batch))
        if len(queued) > 1:  # fetch sums while the next batch is computed
            add(queued.pop(0))
    for sums in queued:
        add(sums)
    loss_sum, correct, tokens = totals
    if tokens == 0:
        raise ValueError("evaluation without tokens: all weights are 0")
    loss, num_bytes = loss_sum / tokens, tokens * bytes_per_token
    return EvaluationMetrics(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss_sum / math.log(2) / num_bytes,
        accuracy=correct / tokens,
        tokens=round(tokens),
        bytes=round(num_bytes),
    )


@dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters on one token stream.

    Attributes:
        model: the model, with the dtype to compute in.
        stream: token stream from `prepare` or `TokenStream.from_array`.
        packing: how the stream is split into windows.
        batch_size: B, sequences per batch over all devices.
        overlap: tokens of context that a window shares with the previous one.
        max_batches: maximum number of batches; 0 evaluates the whole stream.
        mesh: devices that share each batch; None for the default device.
        check: called before each batch; may raise to stop the evaluation.
        lossless: whether decoding restores the text; otherwise bits per byte mean nothing.
    """

    model: Transformer
    stream: TokenStream
    packing: PackingConfig
    batch_size: int
    overlap: int = 0
    max_batches: int = 0
    mesh: Mesh | None = None
    check: Callable[[], None] = lambda: None
    lossless: bool = True

    def __call__(self, params: Any) -> EvaluationMetrics:
        """Evaluates parameters (fp32 or quantized); shows a progress bar on a terminal."""
        bytes_per_token = self.stream.num_bytes / self.stream.num_targets
        return evaluate(self.model, params, self._on_device(self._batches()), bytes_per_token)

    def validate(self, params: Any) -> dict[str, float]:
        """Evaluates parameters; returns `val_loss`, `val_perplexity`, `val_bits_per_byte` (unless
        the tokenizer loses text) and `val_accuracy`.
        """
        metrics = self(params)
        names = ("loss", "perplexity", *(["bits_per_byte"] if self.lossless else []), "accuracy")
        return {f"val_{name}": getattr(metrics, name) for name in names}

    @property
    def num_tokens(self) -> int:
        """The tokens from the start of the stream that are evaluated, as context or targets."""
        return self._batches().stop

    def _batches(self) -> EvaluationBatches:
        return EvaluationBatches(
            self.stream,
            self.packing,
            batch_size=self.batch_size,
            overlap=self.overlap,
            max_batches=self.max_batches,
            rows=own_rows(self.mesh, self.batch_size) if self.mesh else None,
        )

    def _on_device(self, batches: EvaluationBatches) -> Iterator[Batch]:
        show = jax.process_index() == 0
        with Progress("evaluating", len(batches), unit="batch", show=show) as progress:
            for batch in batches:
                self.check()
                yield global_batch(self.mesh, self.batch_size, 0, batch) if self.mesh else batch
                progress.update()
