"""The train step: microbatches → mean gradient → update, a pure function of the state.

Dimensions: A microbatches, B sequences per microbatch, T tokens per sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.data.batch import Batch
from sheepop_jax.model.lora import adapted, init_trained
from sheepop_jax.model.loss import CHUNK_ELEMENTS, chunk_length, cross_entropy_sum
from sheepop_jax.model.partitioning import sum_over_replicas
from sheepop_jax.model.transformer import Transformer, output_embedding
from sheepop_jax.runtime.xla_flags import init_compiler_options, step_compiler_options
from sheepop_jax.training.optimizer import is_outlier


class StepMetrics(NamedTuple):
    """Scalar metrics of one step, on the device."""

    loss: jax.Array  # nats per counted token
    grad_norm: jax.Array  # global, before clipping
    learning_rate: jax.Array
    tokens: jax.Array  # counted targets
    skipped: jax.Array  # whether the update was skipped for its gradients


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The initial training state."""
    params = init_trained(model, seed)
    # Two separate arrays: a buffer can be donated only once.
    step, updates = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, updates, params, optimizer.init(params))


def jit_init(init: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """Compiles an initializer with `jax.jit`; its outputs get `shardings` if given."""
    return jax.jit(init, out_shardings=shardings, compiler_options=init_compiler_options())


def jit_step(
    step: Callable[..., tuple[TrainState, StepMetrics]],
    shardings: Any,
    mesh: Mesh,
    remat: str,
) -> Any:
    """Compiles a train step with `jax.jit`; donates the state, the new one gets `shardings`."""
    options = step_compiler_options(mesh, remat)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    max_grad_zscore: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Builds the train step, a function (state, batch) → (state, metrics) for `jit_step`.

    A model with adapters takes its frozen parameters as a third argument: (state, batch, frozen).
    Only the adapters are differentiated, updated and donated.

    The gradient is that of Σ weight · loss / Σ weight over all tokens of the batch [A, B, T],
    independent of how they are split into microbatches and over devices. Each replica of the mesh's
    `data` axis sums over its own rows; one all-reduce adds the sums. Dropout is a function of
    (seed, step, row in the update). Non-finite gradients skip the update: parameters and optimizer
    state are unchanged and only `step` advances.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        schedule: the learning rate, for the metrics.
        seed: seed of dropout.
        max_grad_zscore: if positive, also skip gradients that `optimizer.is_outlier` finds.
        chunk_elements: logits that the chunked loss computes at a time.
    """
    lora = model.lora
    drops = model.config.dropout > 0 or model.config.attention_dropout > 0
    drops |= lora is not None and lora.dropout > 0
    dropout_root = jax.random.fold_in(jax.random.key(seed), 1)

    def microbatch_loss(
        trained: Any, frozen: Any, batch: Batch, dropout_keys_B: jax.Array | None
    ) -> jax.Array:
        params = trained if lora is None else adapted(frozen, trained, lora, dropout_keys_B)
        inputs_BT, targets_BT, weights_BT, segments_BT = batch
        hidden_BTD, _ = model.apply(
            {"params": params},
            inputs_BT,
            dropout_keys_B=dropout_keys_B,
            segments_BT=segments_BT,
        )

        def loss(embedding_VD: jax.Array, rows: tuple[jax.Array, ...]) -> jax.Array:
            chunk = chunk_length(rows[1].size, embedding_VD.shape[0], chunk_elements)
            softcap = model.config.logit_softcap
            return cross_entropy_sum(
                rows[0], embedding_VD, *rows[1:], model.vocab_size, softcap, chunk
            )

        rows = hidden_BTD, targets_BT, weights_BT
        return sum_over_replicas("fsdp", loss, output_embedding(params), rows, row_axis=0)

    def gradient_sums(
        params: tuple[Any, Any], microbatches: tuple[Batch, Any]
    ) -> tuple[jax.Array, Any]:
        def accumulate(sums: Any, microbatch: tuple[Batch, Any]) -> tuple[Any, None]:
            new = jax.value_and_grad(microbatch_loss)(*params, *microbatch)
            return jax.tree.map(jnp.add, sums, new), None

        if len(microbatches[0].inputs) == 1:  # avoids a second copy of the gradients
            only = jax.tree.map(lambda x: x[0], microbatches)
            return jax.value_and_grad(microbatch_loss)(*params, *only)
        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params[0])
        sums, _ = jax.lax.scan(accumulate, zero, microbatches)
        return sums

    def dropout_keys(step: jax.Array, microbatches: int, batch: int) -> jax.Array:
        key = jax.random.fold_in(dropout_root, step)
        rows = jnp.arange(microbatches * batch)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows).reshape(microbatches, batch)

    def train_step(
        state: TrainState, batch: Batch, frozen: Any = None
    ) -> tuple[TrainState, StepMetrics]:
        keys_AB = dropout_keys(state.step, *batch.inputs.shape[:2]) if drops else None
        loss_sum, grad_sums = sum_over_replicas(
            "data", gradient_sums, (state.params, frozen), (batch, keys_AB), row_axis=1
        )
        tokens = jnp.sum(batch.weights)
        weight = jnp.maximum(tokens, 1.0)  # a batch without targets has zero gradients
        # Multiply by the reciprocal: XLA fuses the product into each loop that reads a gradient,
        # but would materialize the quotients of a division.
        grads = jax.tree.map(lambda g: g * (1 / weight), grad_sums)
        grad_norm = optax.tree.norm(grads)
        ok = jnp.isfinite(grad_norm) & jnp.isfinite(loss_sum)
        if max_grad_zscore:
            ok &= ~is_outlier(state.opt_state, grad_norm, max_grad_zscore)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The select fuses into the update's elementwise loop: no branch, no second memory pass.
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
