"""The log-probability of given tokens, with the most probable tokens at each position.

Alphabet: B rows, T time, D model width, M tokens of a chunk, V vocabulary (padded), K candidates,
R = 1 + K: the token itself, then its candidates.

One compiled function serves all callers. It recompiles for a new length bucket, number of rows or
number of candidates (1 or 20). The full logits are never materialized.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.model.loss import chunk_length, over_chunks
from sheepop_jax.model.transformer import Transformer, logits, padded_vocab_size
from sheepop_jax.progress import Progress

MOST_CANDIDATES = 20
_SHORTEST_ROW = 16  # rows are padded to this length, or twice that, four times and so on


@dataclass(frozen=True)
class TokenScores:
    """The scores of a text of n tokens.

    Attributes:
        logprobs: [n], the log-probability of each token given those before it, in nats; fp32
            values. The first is nan: nothing stands before it.
        top: [n], the k most probable tokens at each position as (id, log-probability), in order of
            their logits, and of their ids where logits are equal. If the text's own token is among
            them, its value is bitwise that in `logprobs`. The first is empty.
    """

    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]


def score(
    model: Transformer,
    params: Any,
    texts: Sequence[Sequence[int]],
    *,
    top: int = 0,
    context: int | None = None,
    batch_size: int = 8,
) -> list[TokenScores]:
    """Scores every token of each text given the tokens before it.

    A text longer than the context is split into windows by `rolling_windows`. Rows of similar
    length share a batch.

    Args:
        model: the model, with the dtype to compute in.
        params: model parameters, fp32 or quantized.
        texts: token ids, BOS included; may be empty.
        top: k, from 0 to 20; at most the whole vocabulary is returned.
        context: maximum positions of a row, at least 1; None for `model.max_seq_len`.
        batch_size: rows per batch. Smaller batches are padded to this size.

    Raises:
        InputError: `top` is out of range, a token id is outside the vocabulary, or the logits are
            not finite.
    """
    if not 0 <= top <= MOST_CANDIDATES:
        raise InputError("top", top, f"0 to {MOST_CANDIDATES}")
    limit = model.config.max_seq_len if context is None else context
    rows, places = [], []  # places: of each row, its text and the text's first token in it
    for i, text in enumerate(texts):
        _check_ids("text", text, model.vocab_size)
        first = 1
        for before, after in rolling_windows(text[1:], text[0], limit) if text else ():
            rows.append(_Row([*before, *after], len(after)))
            places.append((i, first))
            first += len(after)
    scores = [TokenScores([math.nan] * len(text), [()] * len(text)) for text in texts]
    candidates = 1 if top <= 1 else MOST_CANDIDATES
    for row, ids_PR, logprobs_PR in _scored(model, params, rows, limit, batch_size, candidates):
        i, first = places[row]
        predicted = slice(first, first + len(ids_PR))
        scores[i].logprobs[predicted] = logprobs_PR[:, 0].tolist()
        if top:
            best = ids_PR[:, 1 : 1 + top].tolist(), logprobs_PR[:, 1 : 1 + top].tolist()
            scores[i].top[predicted] = [
                tuple(zip(*pair, strict=True)) for pair in zip(*best, strict=True)
            ]
    return scores


def continuation_log_likelihoods(
    model: Transformer,
    params: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    context: int | None = None,
    batch_size: int = 8,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation after its context.

    Rows of similar length share a batch. Contexts that are too long lose tokens at the start.

    Args:
        model: the model, with the dtype to compute in.
        params: model parameters, fp32 or quantized.
        pairs: token ids of (context, continuation); the context has at least one.
        context: maximum positions of a row, at least 1; None for `model.max_seq_len`.
        batch_size: rows per batch.

    Returns:
        For each pair, in order: the sum of log p(token) over the continuation in nats, and whether
        each of its tokens is the most probable one.

    Raises:
        InputError: a continuation is longer than the context, a token id is outside the
            vocabulary, or the logits are not finite.
        ValueError: a context is empty.
    """
    limit = model.config.max_seq_len if context is None else context
    rows = [_Row.of(before, after, limit, model.vocab_size) for before, after in pairs]
    found = [(0.0, True)] * len(rows)
    for row, ids_PR, logprobs_PR in _scored(model, params, rows, limit, batch_size, 1):
        greedy = bool((ids_PR[:, 0] == ids_PR[:, 1]).all())
        found[row] = float(logprobs_PR[:, 0].sum(dtype=np.float64)), greedy
    return found


def rolling_windows(
    tokens: Sequence[int], first: int, context: int
) -> list[tuple[list[int], list[int]]]:
    """Splits a text into (context, continuation) pairs that predict each of its tokens once.

    Each window predicts up to `context` tokens; the last one, which has fewer, gets as many of the
    tokens before it as fit.

    Args:
        tokens: ids of the text.
        first: id that predicts the first token.
        context: maximum positions of a window.
    """
    text, windows = [first, *tokens], []
    for start in range(1, len(text), context):
        stop = min(start + context, len(text))
        windows.append((text[max(0, stop - 1 - context) : start], text[start:stop]))
    return windows


@dataclass(frozen=True)
class _Row:
    """The tokens of a context and its continuation, and how many are the continuation's."""

    tokens: list[int]
    predicted: int

    @classmethod
    def of(
        cls, before: Sequence[int], after: Sequence[int], context: int, vocab_size: int
    ) -> "_Row":
        if not before:
            raise ValueError("an empty context predicts nothing")
        if len(after) > context:
            raise InputError("continuation", f"{len(after)} tokens", f"at most {context} tokens")
        tokens = [*before, *after][-(context + 1) :]
        _check_ids("continuation", tokens, vocab_size)
        return cls(tokens, len(after))


def _check_ids(field: str, tokens: Sequence[int], vocab_size: int) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        rule = f"token ids from 0 to {vocab_size - 1}"
        raise InputError(field, [min(tokens), max(tokens)], rule)


def _scored(
    model: Transformer,
    params: Any,
    rows: list[_Row],
    context: int,
    batch_size: int,
    candidates: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields each row's number with `_scores` of its P predicted tokens: [P, R] ids and fp32."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    starts = range(0, len(order), batch_size)
    with Progress("scoring", len(starts), unit="batch", show=len(starts) > 1) as progress:
        for start in starts:
            chosen = order[start : start + batch_size]
            batch = _padded([rows[i] for i in chosen], batch_size, context)
            ids_BTR, logprobs_BTR = map(
                np.asarray, _scores(model, params, *batch, min(candidates, model.vocab_size))
            )
            for i, ids_TR, logprobs_TR in zip(chosen, ids_BTR, logprobs_BTR, strict=False):
                last = len(rows[i].tokens) - 1
                predicted = slice(last - rows[i].predicted, last)
                if np.isnan(logprobs_TR[predicted]).any():
                    raise InputError("parameters", "NaN logits", "finite logits", "another `step`")
                yield i, ids_TR[predicted], logprobs_TR[predicted]
            progress.update()


def _padded(rows: list[_Row], batch_size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32 [B, T], of rows; padded at the right."""
    longest = max(len(row.tokens) - 1 for row in rows)
    length = max(longest, min(max(_SHORTEST_ROW, 1 << (longest - 1).bit_length()), context), 1)
    inputs_BT, targets_BT = np.zeros((2, batch_size, length), np.int32)
    for i, row in enumerate(rows):
        last = len(row.tokens) - 1
        inputs_BT[i, :last], targets_BT[i, :last] = row.tokens[:-1], row.tokens[1:]
    return inputs_BT, targets_BT


@partial(jax.jit, static_argnums=(0, 4))
def _scores(
    model: Transformer, params: Any, inputs_BT: Any, targets_BT: Any, candidates: int
) -> tuple[jax.Array, jax.Array]:
    """Ids, int32 [B, T, R], and their log-probabilities, fp32.

    The first id is the target, the others are the K most probable ones, best first.
    """
    hidden_BTD, _ = model.apply({"params": params}, inputs_BT)

    def body(carry: tuple[()], hidden_MD: jax.Array, targets_M: jax.Array) -> Any:
        logits_MV = logits(model, params, hidden_MD)
        best_MK, ids_MK = jax.lax.top_k(logits_MV, candidates)
        # One gather for the target and the candidates, so that equal ids have equal bits.
        ids_MR = jnp.concatenate([targets_M[:, None], ids_MK], axis=1)
        shifted_MR = jnp.take_along_axis(logits_MV, ids_MR, axis=1) - best_MK[:, :1]
        total_M1 = jnp.exp(logits_MV - best_MK[:, :1]).sum(-1, keepdims=True)
        return carry, (ids_MR, shifted_MR - jnp.log(total_M1))

    chunk = chunk_length(targets_BT.size, padded_vocab_size(model.vocab_size))
    _, found = over_chunks(body, (), (hidden_BTD, targets_BT), chunk)
    return found
