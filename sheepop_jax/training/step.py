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
from jax.sharding import Mesh

from sheepop_jax.data.batch import Batch
from sheepop_jax.model.loss import CHUNK_ELEMENTS, chunk_length, cross_entropy_sum
from sheepop_jax.model.partitioning import sum_over_replicas
from sheepop_jax.model.transformer import Transformer, output_embedding
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


def _boxed_params(model: Transformer, seed: int) -> Any:
    init_key = jax.random.fold_in(jax.random.key(seed), 0)
    return model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(model: Transformer, seed: int) -> Any:
    """Fresh parameters: plain arrays, fp32."""
    return nn.meta.unbox(_boxed_params(model, seed))


def boxed_shapes(model: Transformer) -> Any:
    """The parameters' shapes, with Flax's metadata of logical axes around each."""
    return jax.eval_shape(lambda: _boxed_params(model, 0))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step."""
    params = init_params(model, seed)
    # Two counters, not one twice: a buffer can be donated only once.
    step, updates = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, updates, params, optimizer.init(params))


def jit_init(init: Callable[[], Any], shardings: Any = None) -> Callable[[], Any]:
    """`jax.jit` of a function that draws initial parameters, laid out by `shardings` if there are.

    On GPUs a kernel for each array: left alone, XLA joins the draws of all matrices of one shape
    in a single kernel, which ptxas of CUDA 13.0 takes a minute to compile for GPT-2's.
    """
    separately = {"xla_disable_hlo_passes": "multi_output_fusion"}
    options = separately if jax.default_backend() == "gpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)


def jit_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    shardings: Any,
    mesh: Mesh,
    remat: str,
) -> Any:
    """`jax.jit` of a train step: the state is donated, the next one laid out by `shardings`.

    `remat` is the model's: where it is to save memory, XLA is kept from spending that elsewhere.
    """
    options: dict[str, Any] | None = None
    match mesh.devices.flat[0].platform:
        case "gpu" if mesh.size == 1:
            # Left alone, XLA orders a step so that it hides what devices send one another: with
            # microbatches and remat=full it then puts off the gradients of matrices until the end
            # of the backward pass, and keeps what they come from, of all blocks.
            options = {"xla_gpu_enable_latency_hiding_scheduler": False}
        case "tpu" if mesh.size > 1 and remat == "full":
            # A product with a matrix that is sent is taken apart, to send and multiply at once (a
            # windowed einsum), and its result set aside at the beginning: what blocks compute again
            # is then held for all of them. Only from so many MiB on: never. An option of libtpu's
            # own, known to 0.0.42 and 0.0.50.
            options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
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
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the step, for `jit_step`.

    A batch [A, B, T] gives the gradient of Σ weight · loss / Σ weight over all its tokens, whatever
    their distribution over microbatches and devices. Each replica of the mesh's `data` axis sums
    over its own rows, and the sums cross devices once. Dropout's randomness is a function of (seed,
    step, number of the row in the update). Non-finite gradients leave parameters and optimizer
    untouched, and so do those that `optimizer.is_outlier` finds, if `max_grad_zscore` is above 0;
    `step` advances. The loss makes `chunk_elements` logits at a time.
    """
    drops = model.config.dropout > 0 or model.config.attention_dropout > 0
    dropout_root = jax.random.fold_in(jax.random.key(seed), 1)

    def microbatch_loss(params: Any, batch: Batch, dropout_keys_B: jax.Array | None) -> jax.Array:
        inputs_BT, targets_BT, weights_BT, segments_BT = batch
        hidden_BTD, _ = model.apply(
            {"params": params},
            inputs_BT,
            dropout_keys_B=dropout_keys_B,
            segments_BT=segments_BT,
        )

        def loss(embedding_VD: jax.Array, rows: tuple[jax.Array, ...]) -> jax.Array:
            chunk = chunk_length(rows[1].size, embedding_VD.shape[0], chunk_elements)
            return cross_entropy_sum(rows[0], embedding_VD, *rows[1:], model.vocab_size, chunk)

        rows = hidden_BTD, targets_BT, weights_BT
        return sum_over_replicas("fsdp", loss, output_embedding(params), rows, row_axis=0)

    def gradient_sums(params: Any, microbatches: tuple[Batch, Any]) -> tuple[jax.Array, Any]:
        def accumulate(sums: Any, microbatch: tuple[Batch, Any]) -> tuple[Any, None]:
            new = jax.value_and_grad(microbatch_loss)(params, *microbatch)
            return jax.tree.map(jnp.add, sums, new), None

        if len(microbatches[0].inputs) == 1:  # no second copy of the gradients
            only = jax.tree.map(lambda x: x[0], microbatches)
            return jax.value_and_grad(microbatch_loss)(params, *only)
        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(accumulate, zero, microbatches)
        return sums

    def dropout_keys(step: jax.Array, microbatches: int, batch: int) -> jax.Array:
        key = jax.random.fold_in(dropout_root, step)
        rows = jnp.arange(microbatches * batch)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows).reshape(microbatches, batch)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys_AB = dropout_keys(state.step, *batch.inputs.shape[:2]) if drops else None
        loss_sum, grad_sums = sum_over_replicas(
            "data", gradient_sums, state.params, (batch, keys_AB), row_axis=1
        )
        tokens = jnp.sum(batch.weights)
        weight = jnp.maximum(tokens, 1.0)  # a batch without targets has zero gradients
        # A product with the reciprocal: XLA repeats it in each loop that reads a gradient, where it
        # would write the quotients of all gradients to memory once.
        grads = jax.tree.map(lambda g: g * (1 / weight), grad_sums)
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
