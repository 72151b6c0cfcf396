"""How much device memory a run needs, by its shapes; and what to do when there is not enough.

What each term is was read from XLA's buffer assignment on the CPU (`--xla_dump_to`), two for GPU
and TPU from the compiled step: docs/scaling.md has the formula, and how near it is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
from sheepop_jax.errors import RunFailed
from sheepop_jax.formatting import format_bytes
from sheepop_jax.model.partitioning import state_shardings
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.activations import FP32, Activations
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import boxed_shapes, init_state

# Peak bytes during Muon's update, as a multiple of the size of the matrices that it updates: their
# gradients, and its iterates of all at once (the CPU's XLA keeps those of each iteration).
_MUON_UPDATE = {"cpu": 6.2, "cuda": 2.7, "tpu": 2.7}


class OutOfMemory(RunFailed):
    """The device has not enough memory for the run."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device at the moment of an update when it holds most.

    Attributes:
        parameters: fp32.
        optimizer: its state, fp32.
        gradients: those that exist then, with the sums over microbatches, and the parameters that
            fsdp has gathered.
        activations: what the backward pass of one microbatch keeps, and works on.
        loss: one chunk of logits, as often as it is there, and what is carried between chunks.
        batch: the tokens of one update.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    batch: float

    @property
    def total(self) -> float:
        """All of them."""
        state = self.parameters + self.optimizer + self.gradients
        return state + self.activations + self.loss + self.batch

    def __str__(self) -> str:
        state = self.parameters + self.optimizer + self.gradients
        return (
            f"about {format_bytes(self.total)}: {format_bytes(state)} of parameters, gradients "
            f"and optimizer, {format_bytes(self.total - state)} of activations and logits"
        )


class Shapes(NamedTuple):
    """A training state without its arrays.

    Attributes:
        boxed: the parameters, with Flax's metadata of logical axes.
        state: the `TrainState`.
    """

    boxed: Any
    state: Any


def abstract_state(config: Config, model: Transformer) -> Shapes:
    """The shapes of a run's state, by `jax.eval_shape`."""
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 2))
    model = model.clone(implementation="xla")  # cuDNN's cannot even be traced where it is missing
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    return Shapes(boxed_shapes(model), state)


def estimate_memory(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str, shapes: Shapes
) -> MemoryEstimate:
    """Adds up the large arrays at four instants of an update, and takes the largest sum.

    The instants: the loss, where all activations are there and the logits of a chunk; the first
    block of the backward pass; its last block, where the gradients are complete; the optimizer.

    Args:
        config: of the run.
        model: with its vocabulary, dtype and attention.
        mesh: the devices, here or imagined.
        platform: "cpu", "cuda" or "tpu".
        shapes: from `abstract_state`.
    """
    parameters, optimizer, table = held(shapes, mesh)
    own, fsdp = sum(parameters), mesh.shape["fsdp"]
    weights = _Weights(
        own=own,
        whole=own * fsdp,
        table=table * fsdp,
        tables=table * fsdp * (1 if config.model.tie_embeddings else 2),
        # Elsewhere XLA keeps copies and gradients of matrices in the dtype that uses them.
        narrow=1.0 if platform == "cpu" else np.dtype(model.dtype).itemsize / FP32,
        num_layers=config.model.num_layers,
    )
    accumulated = own if config.train.grad_accum_steps > 1 else 0.0
    # One device, or several that share every row: no gradients are exchanged.
    alone = mesh.size == mesh.shape["tensor"]
    made, fresh = _gradients(weights, fsdp, alone, bool(accumulated))
    gathered = _gathered(config, weights, fsdp, platform)
    updating = _while_updating(config, own, optimizer, accumulated or made, platform)
    sizes = Activations.of(config, model, mesh, platform)
    backward = sizes.kept + sizes.head + sizes.backward
    instants: tuple[tuple[float, list[float], list[float]], ...] = (
        (gathered + accumulated, sizes.kept + sizes.head, sizes.loss),
        (gathered + accumulated, backward, sizes.loss_grads),
        (gathered + accumulated + fresh, sizes.block + sizes.backward, []),
        (updating, [], []),
    )
    batch = 3.0 * FP32 * config.train.grad_accum_steps * sizes.tokens

    def at(gradients: float, activations: list[float], loss: list[float]) -> MemoryEstimate:
        rest = sum(activations), sum(loss), batch
        return MemoryEstimate(own, sum(optimizer), gradients, *rest)

    return max((at(*instant) for instant in instants), key=lambda found: found.total)


class _Weights(NamedTuple):
    """Bytes of the parameters, fp32; all but `own` as if fsdp split nothing.

    Attributes:
        own: what one device holds.
        whole: all of them.
        table: the token embedding.
        tables: the same, and the output's where it is another.
        narrow: what an element of a copy or a gradient takes, of fp32.
        num_layers: blocks.
    """

    own: float
    whole: float
    table: float
    tables: float
    narrow: float
    num_layers: int

    @property
    def block(self) -> float:
        """One block's."""
        return (self.whole - self.tables) / self.num_layers


def _gathered(config: Config, weights: _Weights, fsdp: int, platform: str) -> float:
    """Bytes of the copies of parameters that a device makes, of what fsdp splits."""
    remat, tied = config.model.remat != "none", config.model.tie_embeddings
    if fsdp == 1:
        return 0.0
    if platform != "cpu":  # see communication.py; the table for the logits
        by_turns = remat or platform == "tpu"
        blocks = weights.block if by_turns else weights.whole - weights.tables
        return weights.narrow * (weights.table + blocks)
    # With remat each block's parameters are gathered when it is their turn, twice. Without, the
    # backward pass uses those of the forward pass; and a loop over microbatches, which changes
    # no parameter, gathers all before it begins.
    by_turns = remat and config.train.grad_accum_steps == 1
    gathered = weights.table + weights.block if by_turns else weights.whole
    return gathered + tied * weights.table  # once for the lookup, once for the logits


def _gradients(weights: _Weights, fsdp: int, alone: bool, accumulates: bool) -> tuple[float, float]:
    """Bytes of an update's gradients, and of those there are when the last block makes its own."""
    others = weights.tables + weights.narrow * (weights.whole - weights.tables - weights.block)
    last = weights.narrow * weights.block if alone else weights.block / fsdp
    made = others + last if alone else weights.own
    if not accumulates:
        return made, made - last
    # Those of a microbatch go into the sums one by one, unless the devices first exchange them, all
    # in one.
    return made, 0.0 if alone else others


def _while_updating(
    config: Config, own: float, optimizer: list[float], gradients: float, platform: str
) -> float:
    """Bytes beside parameters and optimizer while the optimizer runs."""
    # Muon has one moment of each matrix, Adam two of whatever it updates.
    matrices = 2 * own - sum(optimizer) if config.optimizer.name == "muon" else 0.0
    # AdamW's are the gradients; on the CPU XLA writes them once more, divided to clip them.
    adam = 2.0 if platform == "cpu" else gradients / own
    return adam * (own - matrices) + _MUON_UPDATE[platform] * matrices


class Held(NamedTuple):
    """Bytes on one device: of each parameter, of each array of the optimizer's, of one table."""

    parameters: list[float]
    optimizer: list[float]
    table: float


def held(shapes: Shapes, mesh: Mesh | AbstractMesh) -> Held:
    """What a device holds of a state, by the table of layouts that training uses."""
    places = state_shardings(shapes.boxed, shapes.state, mesh)

    def bytes_of(leaf: Any, place: Any) -> float:
        return float(np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    found = jax.tree.map(bytes_of, shapes.state, places)
    parameters, optimizer = map(jax.tree.leaves, (found.params, found.opt_state))
    return Held(parameters, optimizer, found.params["embedding"])


def explain(error: jax.errors.JaxRuntimeError, estimate: MemoryEstimate) -> OutOfMemory | None:
    """The error that says what to do, if the device ran out of memory; else None."""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "out of memory" not in said.lower():
        return None
    return OutOfMemory(
        f"the device ran out of memory; the run needs {estimate}. Halve train.batch_size and "
        "double train.grad_accum_steps (the update stays the same), set model.remat=dots or full, "
        f"or split the state over more devices with mesh.fsdp ({said.splitlines()[0][:120]})"
    )
