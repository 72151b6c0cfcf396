"""How much device memory a run needs, by its shapes; and what to do when there is not enough.

Alphabet: A microbatches, B sequences in one (here: of one device), T time, M = B·T tokens, D model
width, N layers, H query heads, K key/value heads, C head width, F feed-forward width, V vocabulary
(padded), P bytes of parameters. What each term is was read from XLA's buffer assignment on the CPU
(`--xla_dump_to`), two for GPU and TPU from the compiled step: docs/scaling.md has the formula, and
how near it is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config import Config
from sheepop_jax.errors import RunFailed
from sheepop_jax.model.attention import causal_share
from sheepop_jax.model.partitioning import state_shardings
from sheepop_jax.model.transformer import Transformer, padded_vocab_size
from sheepop_jax.training.loss import chunk_elements, chunk_length
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_params, init_state

GB = 1e9
_FP32 = 4  # bytes

# What there is while Muon runs, in sizes of the matrices that it updates: their gradients, and its
# iterates of all at once (the CPU's XLA keeps those of each iteration).
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
            f"about {readable_bytes(self.total)}: {readable_bytes(state)} of parameters, gradients "
            f"and optimizer, {readable_bytes(self.total - state)} of activations and logits"
        )


def readable_bytes(count: float) -> str:
    """3.7 GB, 86 MB."""
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.3g} MB"


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
    return Shapes(jax.eval_shape(lambda: init_params(model, 0)), state)


def estimate_memory(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str, shapes: Shapes
) -> MemoryEstimate:
    """Adds up the large arrays at four moments of an update, and takes the largest sum.

    The moments: the loss, where all activations are there and the logits of a chunk; the first
    block of the backward pass; its last block, where the gradients are complete; the optimizer.

    Args:
        config: of the run.
        model: with its vocabulary, dtype and attention.
        mesh: the devices, here or imagined.
        platform: "cpu", "cuda" or "tpu".
        shapes: from `abstract_state`.
    """
    parameters, moments, table = held(shapes, mesh)
    m, own, fsdp = config.model, sum(parameters), mesh.shape["fsdp"]
    whole = own * fsdp  # without what fsdp splits
    tables = table * fsdp * (1 if m.tie_embeddings else 2)
    of_a_block = (whole - tables) / m.num_layers
    accumulated = own if config.train.grad_accum_steps > 1 else 0.0
    # Elsewhere XLA keeps copies and gradients of matrices in the dtype that uses and makes them.
    narrow = 1.0 if platform == "cpu" else np.dtype(model.dtype).itemsize / _FP32
    gathered = 0.0
    if fsdp > 1 and platform == "cpu":
        # With remat each block's parameters are gathered when it is their turn, twice. Without, the
        # backward pass uses those of the forward pass; and a loop over microbatches, which changes
        # no parameter, gathers all before it begins.
        by_turns = m.remat != "none" and not accumulated
        gathered = table * fsdp + of_a_block if by_turns else whole
        if m.tie_embeddings:  # once for the lookup, once for the logits
            gathered += table * fsdp
    elif fsdp > 1:  # see communication.py; the table for the logits
        by_turns = m.remat != "none" or platform == "tpu"
        gathered = narrow * (table * fsdp + (of_a_block if by_turns else whole - tables))
    # The gradients of all blocks but the last to go backward. Those of a microbatch go into the
    # sums one by one, unless the devices first exchange them, all in one.
    alone = mesh.size == mesh.shape["tensor"]
    others = tables + narrow * (whole - tables - of_a_block)
    last = narrow * of_a_block if alone else of_a_block / fsdp
    made = others + last if alone else own
    fresh = made - last
    if accumulated:
        fresh = 0.0 if alone else others
    matrices = own - sum(moments) / 2 if config.optimizer.name == "muon" else 0.0
    matrices *= 2  # the optimizer has one moment of each, and two of what is no matrix
    # AdamW's are the gradients; on the CPU XLA writes them once more, divided to clip them.
    adam = 2.0 if platform == "cpu" else (accumulated or made) / own
    updating = adam * (own - matrices) + _MUON_UPDATE[platform] * matrices
    sizes = _Sizes.of(config, model, mesh, platform)
    first_block = sizes.kept + sizes.head + sizes.backward
    moments_of_update: tuple[tuple[float, list[float], list[float]], ...] = (
        (gathered + accumulated, sizes.kept + sizes.head, sizes.loss),
        (gathered + accumulated, first_block, sizes.loss_grads),
        (gathered + accumulated + fresh, sizes.block + sizes.backward, []),
        (updating, [], []),
    )
    batch = 3.0 * _FP32 * config.train.grad_accum_steps * sizes.tokens

    def at(gradients: float, activations: list[float], loss: list[float]) -> MemoryEstimate:
        rest = sum(activations), sum(loss), batch
        return MemoryEstimate(own, sum(moments), gradients, *rest)

    return max((at(*moment) for moment in moments_of_update), key=lambda found: found.total)


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


class _Sizes(NamedTuple):
    """Bytes of arrays on one device, in lists of what there is at a time.

    Attributes:
        tokens: M.
        block: what the backward pass of one block reads.
        kept: of all blocks, from the forward pass to the backward pass.
        head: the embeddings looked up, and the final norm.
        backward: gradients of activations of one sublayer, and with remat what it computes again.
        loss: of a chunk.
        loss_grads: what the loss hands on.
    """

    tokens: float
    block: list[float]
    kept: list[float]
    head: list[float]
    backward: list[float]
    loss: list[float]
    loss_grads: list[float]

    @classmethod
    def of(
        cls, config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str
    ) -> "_Sizes":
        """By the formula."""
        m, tensor = config.model, mesh.shape["tensor"]
        rows = config.train.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
        time = config.data.seq_len
        tokens = rows * time
        size = np.dtype(model.dtype).itemsize
        stream = tokens * m.d_model * size
        heads = tokens * m.d_model * size / tensor
        kv_heads = tokens * m.kv_heads * m.head_dim * size / tensor
        wide = tokens * m.d_ff * size / tensor
        # Dropout keeps the two random words that each element's decision came from.
        words = [2 * _FP32 * tokens * m.d_model] if m.dropout else []
        # Two norms' outputs, what each sublayer adds; q and the attention's output; k and v; the
        # feed-forward layer before its activation and after it.
        block = 4 * [stream] + 2 * [heads] + 2 * [kv_heads] + 2 * [wide]
        pairs = rows * m.num_heads / tensor * time**2
        match model.implementation:
            case "xla":  # exponentials and weights of the pairs of positions that are formed
                pairs *= causal_share(time)
                scores = [_FP32 * pairs, size * pairs]
                if m.attention_dropout:
                    scores += [2 * _FP32 * pairs, size * pairs]
            case "cudnn":  # one sum of exponentials for each row
                scores = [_FP32 * pairs / time]
            case _:
                raise ValueError(f"unknown attention {model.implementation!r}")
        block += scores
        padded = padded_vocab_size(model.vocab_size)
        most = chunk_elements(platform)
        chunk = chunk_length(int(tokens), padded, most)
        table = _FP32 * padded * m.d_model / tensor  # its gradient, before it is split by fsdp
        logits = chunk * padded / tensor
        # Logits and their exponentials; elsewhere logits and their gradients: the rest is fused.
        loss = [_FP32 * logits, (_FP32 if platform == "cpu" else size) * logits]
        if platform == "cpu" and mesh.size > 1:  # a copy, of which the targets' logits are taken
            loss.append(_FP32 * logits)
        if chunk < tokens:
            if platform == "cpu":  # gradients of the logits, and what they add to the table's
                loss[1] = max(loss[1], table)
            loss += [table, stream]  # carried, and stacked
        kept = {
            "none": block + 2 * words,  # random words that are drawn again are used at once
            # Its input, q, k, v, what attention adds, and the feed-forward layer before activation.
            "dots": 2 * [stream] + [heads] + 2 * [kv_heads] + [wide],
            "full": [stream],
        }
        # The larger sublayer's: by the time of attention's, the feed-forward layer's are gone.
        again = m.remat != "none"
        feed_forward = 3 * [stream] + [wide] + again * (2 * [stream] + [wide])
        attention = 3 * [stream] + scores[:1] + again * ([stream] + [heads] + scores)
        return cls(
            tokens=tokens,
            block=kept[m.remat] if again else block,
            kept=m.num_layers * kept[m.remat],
            head=2 * [stream] + words,
            backward=max(feed_forward, attention, key=sum),
            loss=loss,
            loss_grads=[table, stream],
        )


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
