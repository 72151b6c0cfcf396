"""What a run will need, before anything is compiled: memory, FLOPs, time, what to change."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
from sheepop_jax.model.partitioning import abstract_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.communication import bytes_sent
from sheepop_jax.training.memory import MemoryEstimate, abstract_state, estimate_memory
from sheepop_jax.training.throughput import flops_per_token

# XLA's allocators keep a part of the device for themselves and for fragments; jax takes three
# quarters of a GPU at once and grows from there.
USABLE = 0.92


@dataclass(frozen=True)
class Advice:
    """A change that lowers the memory, and what the run would then need."""

    flags: str
    total: float  # bytes on the fullest device
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A run on a mesh.

    Attributes:
        device_kind: as jax or the user names it.
        mesh: axis → size.
        parameters: their number.
        memory: bytes on each device.
        device_memory: bytes that each device has; 0 where unknown.
        tokens: of one update, over all devices.
        flops: of one update, over all devices: what the model's mathematics needs.
        peak_flops: of all devices together, FLOP/s; 0 where unknown.
        sent: mesh axis → bytes that each device sends in one update.
        advice: what to change where it does not fit, most useful first.
    """

    device_kind: str
    mesh: dict[str, int]
    parameters: int
    memory: MemoryEstimate
    device_memory: float
    tokens: int
    flops: float
    peak_flops: float
    sent: dict[str, float]
    advice: tuple[Advice, ...] = ()

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough; None where the device's is not known."""
        return _fits(self.memory.total, self.device_memory) if self.device_memory else None

    def seconds(self, mfu: float) -> float | None:
        """Of one update at an MFU, a share of the peak; None where the peak is not known."""
        return self.flops / (mfu * self.peak_flops) if self.peak_flops else None

    def to_dict(self, mfu: float) -> dict[str, Any]:
        """Everything, the derived figures too, for `plan --json`."""
        derived = {"devices": self.devices, "fits": self.fits, "mfu": mfu}
        derived["seconds"] = self.seconds(mfu)
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | derived | {"memory": memory}


def make_plan(
    config: Config,
    model: Transformer,
    mesh: Mesh | AbstractMesh,
    *,
    platform: str,
    device_kind: str,
    device_memory: float,
    peak_flops: float,
) -> Plan:
    """The plan of a run, by `jax.eval_shape`: nothing is computed.

    Args:
        config: the whole configuration.
        model: with the vocabulary, the dtype and the attention to train with.
        mesh: the devices, here or imagined.
        platform: theirs: "cpu", "cuda" or "tpu".
        device_kind: what to call them.
        device_memory: bytes of one; 0 where unknown.
        peak_flops: of all together, FLOP/s; 0 where unknown.
    """
    shapes = abstract_state(config, model)
    params = shapes.state.params
    tokens = config.train.sequences_per_update * config.data.seq_len
    plan = Plan(
        device_kind=device_kind,
        mesh=dict(mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        memory=estimate_memory(config, model, mesh, platform, shapes),
        device_memory=device_memory,
        tokens=tokens,
        flops=tokens * flops_per_token(params, config),
        peak_flops=peak_flops,
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
        return Advice(flags, total, _fits(total, device_memory))

    return replace(plan, advice=tuple(_advice(config, plan, judge)))


def _fits(total: float, device_memory: float) -> bool:
    return total <= USABLE * device_memory


def _advice(
    config: Config, plan: Plan, judge: Callable[[dict[str, Any]], Advice]
) -> Iterator[Advice]:
    """Each change by itself, then all together; the sequences of an update stay as many."""
    together: dict[str, Any] = {}
    for options in (
        _with_remat(config),
        _with_smaller_batches(config, plan),
        _with_fsdp(config, plan),
    ):
        judged = [(fields, judge(fields)) for fields in options]
        if not judged:
            continue
        # The gentlest that is enough, else the one that saves most.
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
    """Microbatches halved and more of them, as far as every device keeps a whole sequence."""
    batch, accum = config.train.batch_size, config.train.grad_accum_steps
    replicas = plan.mesh["data"] * plan.mesh["fsdp"]
    options = []
    while batch % (2 * replicas) == 0:
        batch, accum = batch // 2, accum * 2
        options.append({"train.batch_size": batch, "train.grad_accum_steps": accum})
    return options


def _with_fsdp(config: Config, plan: Plan) -> list[dict[str, Any]]:
    """The devices of the data axis moved, by factors of two, to the axis that splits the state."""
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
