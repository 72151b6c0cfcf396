"""Device memory estimate of a run, and the out-of-memory error.

The terms were read from XLA's buffer assignment on the CPU (`--xla_dump_to`), and two for GPU and
TPU from the compiled step. docs/scaling.md has the formulas and their accuracy.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.config.schema import Config, OptimizerConfig
from sheepop_jax.errors import RunFailed
from sheepop_jax.formatting import format_bytes
from sheepop_jax.model.lora import trained_shapes
from sheepop_jax.model.partitioning import state_shardings
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.planning.activations import FP32, Activations
from sheepop_jax.training.optimizer import make_optimizer, make_schedule

# Peak bytes during Muon's update, as a multiple of the size of its matrices: their gradients, and
# the iterates of all matrices at once (on the CPU, XLA keeps those of every iteration).
_MUON_UPDATE = {"cpu": 6.2, "cuda": 2.7, "tpu": 2.7}


class OutOfMemory(RunFailed):
    """A device ran out of memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of an update on the fullest device, in bytes.

    Attributes:
        parameters: fp32 parameters.
        optimizer: fp32 optimizer state.
        gradients: gradients at the peak, sums over microbatches, and parameters gathered by fsdp.
        activations: residuals and working set of one microbatch's backward pass.
        loss: all copies of one chunk of logits, and the carry of the loop over chunks.
        batch: tokens of one update.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    batch: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        state = self.parameters + self.optimizer + self.gradients
        return state + self.activations + self.loss + self.batch

    def __str__(self) -> str:
        state = self.parameters + self.optimizer + self.gradients
        return (
            f"about {format_bytes(self.total)}: {format_bytes(state)} of parameters, gradients "
            f"and optimizer, {format_bytes(self.total - state)} of activations and logits"
        )


class Shapes(NamedTuple):
    """An abstract training state.

    Attributes:
        boxed: what is trained, with Flax's logical-axis metadata.
        state: a `TrainState` of `jax.ShapeDtypeStruct`s.
        frozen: the parameters below adapters, as `boxed`; None if all parameters are trained.
    """

    boxed: Any
    state: Any
    frozen: Any = None


def abstract_state(config: Config, model: Transformer) -> Shapes:
    """Computes the shapes of a run's state by `jax.eval_shape`."""
    # cuDNN attention cannot be traced without cuDNN.
    return _abstract_state(config.optimizer, model.clone(implementation="xla"))


@lru_cache(maxsize=4)
def _abstract_state(config: OptimizerConfig, model: Transformer) -> Shapes:
    optimizer = make_optimizer(config, make_schedule(config, 2))
    boxed = trained_shapes(model)
    params = nn.meta.unbox(boxed)
    frozen = boxed_shapes(model) if model.lora else None
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    return Shapes(boxed, TrainState(count, count, params, opt_state), frozen)


def estimate_memory(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str, shapes: Shapes
) -> MemoryEstimate:
    """Estimates the peak memory of an update: the maximum over four points in time.

    The points are the loss (all residuals and one chunk of logits), the first block of the backward
    pass, its last block (all gradients), and the optimizer update.

    Args:
        config: the run's configuration.
        model: the model, with its vocabulary, dtype and attention.
        mesh: the devices, real or abstract.
        platform: "cpu", "cuda" or "tpu".
        shapes: the result of `abstract_state`.
    """
    parameters, optimizer, table, frozen = held(shapes, mesh)
    trained, fsdp = sum(parameters), mesh.shape["fsdp"]
    own = trained + frozen
    weights = _Weights(
        own=own,
        whole=own * fsdp,
        table=table * fsdp,
        tables=table * fsdp * (1 if config.model.tie_embeddings else 2),
        # GPU and TPU: copies and gradients of matrices are in the compute dtype.
        narrow=1.0 if platform == "cpu" else np.dtype(model.dtype).itemsize / FP32,
        num_layers=config.model.num_layers,
    )
    accumulated = trained if config.train.grad_accum_steps > 1 else 0.0
    # Without data and fsdp axes, no gradients are exchanged.
    alone = mesh.size == mesh.shape["tensor"]
    if frozen:  # the adapters' gradients, all at once: they are small
        made = fresh = trained
    else:
        made, fresh = _gradients(weights, fsdp, alone, bool(accumulated))
    gathered = _gathered(config, weights, fsdp, platform)
    updating = _while_updating(config, trained, optimizer, accumulated or made, platform)
    sizes = Activations.of(config, model, mesh, platform)
    residuals = sizes.kept + sizes.head
    instants = (
        (gathered + accumulated, residuals, sizes.loss),
        (gathered + accumulated, residuals + sizes.backward, sizes.loss_grads),
        (gathered + accumulated + fresh, sizes.block + sizes.backward, 0.0),
        (updating, 0.0, 0.0),
    )
    batch = 3.0 * FP32 * config.train.grad_accum_steps * sizes.tokens

    def at(gradients: float, activations: float, loss: float) -> MemoryEstimate:
        return MemoryEstimate(own, sum(optimizer), gradients, activations, loss, batch)

    return max((at(*instant) for instant in instants), key=lambda found: found.total)


class _Weights(NamedTuple):
    """Bytes of the fp32 parameters. All fields except `own` ignore fsdp sharding.

    Attributes:
        own: shard of one device.
        whole: all parameters.
        table: the token embedding.
        tables: the token embedding, and the output embedding if it is not tied.
        narrow: size of an element of a copy or gradient, relative to fp32.
        num_layers: number of blocks.
    """

    own: float
    whole: float
    table: float
    tables: float
    narrow: float
    num_layers: int

    @property
    def block(self) -> float:
        """Bytes of one block."""
        return (self.whole - self.tables) / self.num_layers


def _gathered(config: Config, weights: _Weights, fsdp: int, platform: str) -> float:
    """Bytes of the parameters that a device gathers over fsdp."""
    remat, tied = config.model.remat != "none", config.model.tie_embeddings
    if fsdp == 1:
        return 0.0
    if platform != "cpu":  # the logits' table and the blocks; see communication.py
        by_turns = remat or platform == "tpu"
        blocks = weights.block if by_turns else weights.whole - weights.tables
        return weights.narrow * (weights.table + blocks)
    # With remat, each block is gathered when needed, in the forward and the backward pass. Without,
    # the backward pass reuses the gathered parameters. XLA hoists gathers out of a microbatch loop.
    by_turns = remat and config.train.grad_accum_steps == 1
    gathered = weights.table + weights.block if by_turns else weights.whole
    return gathered + tied * weights.table  # once for the lookup, once for the logits


def _gradients(weights: _Weights, fsdp: int, alone: bool, accumulates: bool) -> tuple[float, float]:
    """Bytes of an update's gradients: in total, and before the last block of the backward pass."""
    others = weights.tables + weights.narrow * (weights.whole - weights.tables - weights.block)
    last = weights.narrow * weights.block if alone else weights.block / fsdp
    made = others + last if alone else weights.own
    if not accumulates:
        return made, made - last
    # A microbatch's gradients are added to the sums one by one, unless a single collective for all
    # of them comes first.
    return made, 0.0 if alone else others


def _while_updating(
    config: Config, own: float, optimizer: list[float], gradients: float, platform: str
) -> float:
    """Bytes during the optimizer update, in addition to parameters and optimizer state."""
    # Muon keeps one moment per matrix, Adam two per parameter.
    matrices = 2 * own - sum(optimizer) if config.optimizer.name == "muon" else 0.0
    # AdamW needs the gradients; on the CPU, XLA also writes the clipped gradients.
    adam = 2.0 if platform == "cpu" else gradients / own
    return adam * (own - matrices) + _MUON_UPDATE[platform] * matrices


class Held(NamedTuple):
    """Bytes on one device.

    Attributes:
        parameters: of each trained parameter.
        optimizer: of each optimizer array.
        table: of the token embedding.
        frozen: of all parameters below adapters.
    """

    parameters: list[float]
    optimizer: list[float]
    table: float
    frozen: float


def held(shapes: Shapes, mesh: Mesh | AbstractMesh) -> Held:
    """Returns the bytes of a state's shards on one device, with the shardings of training."""
    places = state_shardings(shapes.boxed, shapes.state, mesh)

    def bytes_of(leaf: Any, place: Any) -> float:
        return float(np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    found = jax.tree.map(bytes_of, shapes.state, places)
    parameters, optimizer = map(jax.tree.leaves, (found.params, found.opt_state))
    if shapes.frozen is None:
        return Held(parameters, optimizer, found.params["embedding"], 0.0)
    below = nn.meta.unbox(shapes.frozen)
    sizes = jax.tree.map(bytes_of, below, state_shardings(shapes.frozen, below, mesh))
    return Held(parameters, optimizer, sizes["embedding"], sum(jax.tree.leaves(sizes)))


def explain(error: jax.errors.JaxRuntimeError, estimate: MemoryEstimate) -> OutOfMemory | None:
    """Returns an error with advice if a device ran out of memory, else None."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    return OutOfMemory(
        f"the device ran out of memory; the run needs {estimate}. Halve train.batch_size and "
        "double train.grad_accum_steps (same update), set model.remat=dots or full, or shard the "
        f"state over more devices with mesh.fsdp ({message.splitlines()[0][:120]})"
    )
