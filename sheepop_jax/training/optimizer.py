"""The optimizer: global-norm clipping, AdamW or Muon, weight decay on matrices, a schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sheepop_jax.config.schema import OptimizerConfig

# Matches the typical RMS of an AdamW update, so that learning rates transfer (Liu et al. 2025,
# "Muon is scalable for LLM training").
MUON_UPDATE_RMS = 0.2
NORMS = 128  # gradient norms kept for outlier detection


def make_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Builds the learning rate schedule for updates n = 0 … num_updates - 1.

    Linear warmup, learning_rate · (n + 1) / warmup_steps, so that the first update is not zero;
    then decay from learning_rate to final_lr_fraction · learning_rate at the last update.
    Cosine: Loshchilov & Hutter 2017, "SGDR", equation 5.
    """
    peak, floor, warmup = config.learning_rate, config.final_lr_fraction, config.warmup_steps
    decay_steps = max(1, num_updates - warmup - 1)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=floor)
        case "linear":
            decay = optax.linear_schedule(peak, floor * peak, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
        case _:
            raise ValueError(f"unknown schedule {config.schedule!r}")
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(params: Any) -> Any:
    """True for matrices (linear layers, embeddings), False for biases and LayerNorm parameters."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _muon_matrices(params: Any) -> Any:
    """Selects the linear layers' matrices for Muon; embeddings stay with Adam."""

    def numbers(path: tuple[Any, ...], p: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_kernel = path[-1].key == "kernel"
        return optax.contrib.MuonDimensionNumbers() if is_kernel else None

    return jax.tree_util.tree_map_with_path(numbers, params)


class NormHistory(NamedTuple):
    """Ring buffer of the latest global gradient norms.

    Attributes:
        norms: fp32 [NORMS].
        updates: int32, number of updates recorded.
    """

    norms: jax.Array
    updates: jax.Array


def remember_norms() -> optax.GradientTransformation:
    """An identity transformation that records gradient norms for `is_outlier`."""

    def init(params: Any) -> NormHistory:
        return NormHistory(jnp.zeros(NORMS, jnp.float32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: NormHistory, params: Any = None) -> tuple[Any, NormHistory]:
        norms = state.norms.at[state.updates % NORMS].set(optax.tree.norm(updates))
        return updates, NormHistory(norms, state.updates + 1)

    return optax.GradientTransformation(init, update)


def is_outlier(opt_state: Any, grad_norm: jax.Array, max_zscore: float) -> jax.Array:
    """Whether a norm exceeds the mean of the last ones by `max_zscore` standard deviations.

    False until `NORMS` norms are recorded.
    """
    history: NormHistory = opt_state[0]
    limit = jnp.mean(history.norms) + max_zscore * jnp.std(history.norms)
    return (history.updates >= NORMS) & (grad_norm > limit)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Builds the optax chain from mean gradients to parameter updates.

    With "muon", `b1`, `b2` and `eps` apply to the parameters optimized by Adam, which then uses
    Nesterov momentum; Muon's own momentum is optax's default, 0.95.

    Sources: Adam, Kingma & Ba 2015; decoupled decay, Loshchilov & Hutter 2019; Muon, Jordan et al.
    2024; clipping by global norm, Pascanu et al. 2013.
    """
    match config.name:
        case "adamw":
            direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
        case "muon":
            muon = optax.contrib.muon(
                learning_rate=1.0,
                eps=config.eps,
                adam_b1=config.b1,
                adam_b2=config.b2,
                muon_weight_dimension_numbers=_muon_matrices,
                consistent_rms=MUON_UPDATE_RMS,
            )
            direction = optax.chain(muon, optax.scale(-1.0))  # undo optax.contrib.muon's negation
        case _:
            raise ValueError(f"unknown optimizer {config.name!r}")
    return optax.chain(
        remember_norms(),  # first: `is_outlier` reads opt_state[0]
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
