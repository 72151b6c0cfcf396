"""Resource plan of a run without compilation: memory, FLOPs, time and advice."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
from sheepop_jax.formatting import format_count
from sheepop_jax.model.partitioning import abstract_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.communication import bytes_sent
from sheepop_jax.planning.flops import flops_per_token
from sheepop_jax.planning.memory import (
    MemoryEstimate,
    OutOfMemory,
    abstract_state,
    estimate_memory,
    explain,
)
from sheepop_jax.runtime.devices import Runtime

# The rest is reserved by XLA's allocators or lost to fragmentation. JAX preallocates 75% of a GPU
# and grows from there.
USABLE = 0.92


@dataclass(frozen=True)
class Advice:
    """A change that lowers the memory.

    Attributes:
        flags: the change, as command-line flags.
        total: bytes on the fullest device after the change.
        fits: whether the run then fits.
    """

    flags: str
    total: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The resources of a run on a mesh.

    Attributes:
        device_kind: device name from JAX or the user.
        mesh: axis → size.
        parameters: number of parameters.
        trained: number of those that the optimizer updates: all, or those of adapters.
        memory: bytes per device.
        device_memory: memory of a device in bytes; 0 if unknown.
        tokens: tokens per update, over all devices.
        flops: model FLOPs per update, over all devices, without rematerialization.
        peak_flops: FLOP/s of all devices together; 0 if unknown.
        sent: mesh axis → bytes that each device sends per update.
        advice: changes that lower the memory, if the run does not fit: model.remat, smaller
            microbatches, mesh.fsdp, then all together.
    """

    device_kind: str
    mesh: dict[str, int]
    parameters: int
    trained: int
    memory: MemoryEstimate
    device_memory: float
    tokens: int
    flops: float
    peak_flops: float
    sent: dict[str, float]
    advice: tuple[Advice, ...] = ()

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool | None:
        """Whether the run fits; None if the device memory is unknown."""
        return _fits(self.memory.total, self.device_memory) if self.device_memory else None

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token."""
        return self.flops / self.tokens

    def seconds(self, mfu: float) -> float | None:
        """Seconds per update at an MFU in (0, 1]; None if the peak is unknown."""
        return self.flops / (mfu * self.peak_flops) if self.peak_flops else None

    def summary(self) -> tuple[str, str]:
        """Returns two lines for the log at the start of a run."""
        return (
            f"{self.counts()} on {self.on_devices()}; an update is {self.tokens:,} tokens and "
            f"{self.flops:.3g} FLOPs",
            f"each device needs {self.memory}{self.verdict()}",
        )

    def counts(self) -> str:
        """The number of parameters, and of trained and frozen ones if not all are trained."""
        total, frozen = format_count(self.parameters), self.parameters - self.trained
        if not frozen:
            return f"{total} parameters"
        return (
            f"{total} parameters ({format_count(self.trained)} trained, {format_count(frozen)} "
            "frozen)"
        )

    def on_devices(self) -> str:
        """Describes the devices and the mesh."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        return f"{self.devices} x {self.device_kind} ({axes})"

    def verdict(self) -> str:
        """Whether the run fits, as text that follows its bytes; empty if unknown."""
        if self.fits is None:
            return ""
        return f" of {self.device_memory / 1e9:.0f} GB: {'fits' if self.fits else 'DOES NOT FIT'}"

    def explain(self, error: jax.errors.JaxRuntimeError) -> OutOfMemory | None:
        """Returns an error with advice if a device ran out of memory, else None."""
        return explain(error, self.memory)

    def to_dict(self, mfu: float) -> dict[str, Any]:
        """Returns all fields and derived values, as printed by `plan --json`."""
        derived = {"devices": self.devices, "fits": self.fits, "mfu": mfu}
        derived["seconds"] = self.seconds(mfu)
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | derived | {"memory": memory}


def make_plan(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, machine: Runtime
) -> Plan:
    """Plans a run by `jax.eval_shape` and `jax.make_jaxpr`, without compiling or computing.

    Args:
        config: the complete configuration.
        model: the model, with its vocabulary, training dtype and attention.
        mesh: the devices, real or abstract.
        machine: the machine of these devices, real or hypothetical.
    """
    shapes, platform = abstract_state(config, model), machine.platform
    tokens = config.train.sequences_per_update * config.data.seq_len
    trained = _count(shapes.state.params)
    plan = Plan(
        device_kind=machine.device_kind,
        mesh=dict(mesh.shape),
        parameters=trained + _count(shapes.frozen),
        trained=trained,
        memory=estimate_memory(config, model, mesh, platform, shapes),
        device_memory=machine.device_memory,
        tokens=tokens,
        flops=tokens * flops_per_token(model, config.data.seq_len),
        peak_flops=machine.peak_flops,
        sent=bytes_sent(config, model, mesh, platform, shapes),
    )
    if plan.fits is not False:
        return plan

    def judge(fields: dict[str, Any]) -> Advice:
        changed = _changed(config, fields)
        changed_mesh = abstract_mesh(changed.mesh, plan.devices)
        changed_model = model.clone(config=changed.model)
        total = estimate_memory(changed, changed_model, changed_mesh, platform, shapes).total
        flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
        return Advice(flags, total, _fits(total, plan.device_memory))

    return replace(plan, advice=tuple(_advice(config, plan, judge)))


def _count(shapes: Any) -> int:
    """The number of elements in a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes)))


def _fits(total: float, device_memory: float) -> bool:
    return total <= USABLE * device_memory


def _advice(
    config: Config, plan: Plan, judge: Callable[[dict[str, Any]], Advice]
) -> Iterator[Advice]:
    """Yields single changes, then all combined. The sequences per update stay the same."""
    together: dict[str, Any] = {}
    for options in (
        _with_remat(config),
        _with_smaller_batches(config, plan),
        _with_fsdp(config, plan),
    ):
        judged = [(fields, judge(fields)) for fields in options]
        if not judged:
            continue
        # The mildest option that fits, else the one that saves most.
        enough = [pair for pair in judged if pair[1].fits]
        fields, advice = enough[0] if enough else min(judged, key=lambda pair: pair[1].total)
        if advice.total < plan.memory.total:
            together |= fields
            yield advice
    if together:
        yield judge(together)


def _with_remat(config: Config) -> list[dict[str, Any]]:
    ways = ["none", "dots", "full"]
    return [{"model.remat": way} for way in ways[ways.index(config.model.remat) + 1 :]]


def _with_smaller_batches(config: Config, plan: Plan) -> list[dict[str, Any]]:
    """Halves the microbatch repeatedly, while every device keeps at least one sequence."""
    batch, accum = config.train.batch_size, config.train.grad_accum_steps
    replicas = plan.mesh["data"] * plan.mesh["fsdp"]
    options = []
    while batch % (2 * replicas) == 0:
        batch, accum = batch // 2, accum * 2
        options.append({"train.batch_size": batch, "train.grad_accum_steps": accum})
    return options


def _with_fsdp(config: Config, plan: Plan) -> list[dict[str, Any]]:
    """Moves devices from the data axis to fsdp, which shards the state, by factors of two."""
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    options = []
    while data % 2 == 0:
        data, fsdp = data // 2, fsdp * 2
        if config.model.d_model % fsdp:
            break
        options.append({"mesh.data": data, "mesh.fsdp": fsdp})
    return options


def _changed(config: Config, fields: dict[str, Any]) -> Config:
    for name, value in fields.items():
        section, field = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config
