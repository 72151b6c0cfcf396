"""One optimizer update: microbatches → mean gradient → update, as a pure function of the state.

Alphabet: A microbatches, B sequences in one, T time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from sheepop_jax.data.batch import Batch
from sheepop_jax.model.transformer import Transformer, output_embedding
from sheepop_jax.training.loss import CHUNK_ELEMENTS, chunk_length, cross_entropy_sum
from sheepop_jax.training.optimizer import is_outlier


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        step: int32, the data cursor: batches consumed so far.
        updates: int32, updates applied so far; behind `step` by those skipped. The optimizer's own
            counts equal it.
        params: fp32.
        opt_state: the optimizer's.
    """

    step: jax.Array
    updates: jax.Array
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: jax.Array  # nats per counted token
    grad_norm: jax.Array  # global, before clipping
    learning_rate: jax.Array
    tokens: jax.Array  # counted targets
    skipped: jax.Array  # whether the update was left out for its gradients


def init_params(model: Transformer, seed: int) -> Any:
    """Fresh parameters, with Flax's metadata of logical axes around each."""
    init_key = jax.random.fold_in(jax.random.key(seed), 0)
    return model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step: plain arrays, no metadata."""
    params = nn.meta.unbox(init_params(model, seed))
    # Two counters, not one twice: a buffer can be donated only once.
    step, updates = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, updates, params, optimizer.init(params))


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    max_grad_zscore: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the step; the caller jits it, donating the state.

    A batch [A, B, T] gives the gradient of Σ weight · loss / Σ weight over all its tokens, whatever
    their distribution over microbatches. Dropout's randomness is a function of (seed, step,
    microbatch). Non-finite gradients leave parameters and optimizer untouched, and so do those that
    `optimizer.is_outlier` finds, if `max_grad_zscore` is above 0; `step` advances. The loss
    makes `chunk_elements` logits at a time.
    """
    dropout_root = jax.random.fold_in(jax.random.key(seed), 1)

    def microbatch_loss(params: Any, batch: Batch, dropout_key: jax.Array) -> jax.Array:
        inputs_BT, targets_BT, weights_BT, segments_BT = batch
        hidden_BTD, _ = model.apply(
            {"params": params},
            inputs_BT,
            deterministic=False,
            segments_BT=segments_BT,
            rngs={"dropout": dropout_key},
        )
        embedding_VD = output_embedding(params)
        chunk = chunk_length(inputs_BT.shape, embedding_VD.shape[0], chunk_elements)
        return cross_entropy_sum(
            hidden_BTD, embedding_VD, targets_BT, weights_BT, model.vocab_size, chunk
        )

    def gradient_sums(params: Any, batch: Batch, dropout_key: jax.Array) -> tuple[jax.Array, Any]:
        def accumulate(sums: Any, xs: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, microbatch = xs
            key = jax.random.fold_in(dropout_key, index)
            new = jax.value_and_grad(microbatch_loss)(params, microbatch, key)
            return jax.tree.map(jnp.add, sums, new), None

        microbatches = batch.inputs.shape[0]
        if microbatches == 1:  # no second copy of the gradients
            only = jax.tree.map(lambda x: x[0], batch)
            return jax.value_and_grad(microbatch_loss)(
                params, only, jax.random.fold_in(dropout_key, 0)
            )
        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(accumulate, zero, (jnp.arange(microbatches), batch))
        return sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        dropout_key = jax.random.fold_in(dropout_root, state.step)
        loss_sum, grad_sums = gradient_sums(state.params, batch, dropout_key)
        tokens = jnp.sum(batch.weights)
        weight = jnp.maximum(tokens, 1.0)  # a batch without targets has zero gradients
        grads = jax.tree.map(lambda g: g / weight, grad_sums)
        grad_norm = optax.tree.norm(grads)
        ok = jnp.isfinite(grad_norm) & jnp.isfinite(loss_sum)
        if max_grad_zscore:
            ok &= ~is_outlier(state.opt_state, grad_norm, max_grad_zscore)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A select inside the update's own elementwise loop: no branch, no second pass over memory.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = StepMetrics(
            loss=loss_sum / weight,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(state.updates), jnp.float32),
            tokens=tokens,
            skipped=~ok,
        )
        state = TrainState(state.step + 1, state.updates + ok, params, opt_state)
        return state, metrics

    return train_step
