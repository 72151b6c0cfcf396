"""The tables of docs/scaling.md: large models on many devices, on paper.

    python benchmarks/paper_plan.py

Each row is a mesh, planned as `python -m sheepop_jax plan` does; nothing is run. What is added
here: the bandwidth of the links, and how long an update's traffic takes beside its arithmetic.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After the path is set, so that it runs from anywhere.
from sheepop_jax.cli.common import load_config
from sheepop_jax.model.attention import choose_implementation
from sheepop_jax.model.partitioning import abstract_mesh, check_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import platform
from sheepop_jax.training.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent

CONFIG = "configs/gpt2_124m.py"
MFU = 0.4  # while a device computes
# Bytes a second that a device can send: half of a bidirectional figure.
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9, "ICI": 300e9}
NODE = 8  # H100s that NVLink joins
STORAGE = 20e9  # bytes a second that a shared file system takes
BYTES_PER_TOKEN = 2  # of a shard: uint16, with fewer than 65,536 ids

MODELS = {
    "1.3B": "model.d_model=2048 model.num_layers=24 model.num_heads=16 model.d_ff=8192",
    "7B": "model.d_model=4096 model.num_layers=32 model.num_heads=32 model.d_ff=16384",
    "70B": "model.d_model=8192 model.num_layers=80 model.num_heads=64 model.num_kv_heads=8 "
    "model.d_ff=44032",
}
ALL = "model.max_seq_len=2048 data.seq_len=2048 model.remat=full train.grad_accum_steps=1"


class Row(NamedTuple):
    """A model on a mesh; `batch` in windows of 2,048 tokens."""

    model: str
    device: str
    devices: int
    fsdp: int
    tensor: int
    batch: int

    @property
    def overrides(self) -> list[str]:
        own = f"mesh.fsdp={self.fsdp} mesh.tensor={self.tensor} train.batch_size={self.batch}"
        fields = f"{MODELS[self.model]} {ALL} {own}".split()
        return [f"--config.{field}" for field in fields]

    @property
    def command(self) -> str:
        """What prints this row's plan."""
        flags = f'--devices {self.devices} --device "{self.device}" --json'
        return f"python -m sheepop_jax plan --config {CONFIG} {flags} {' '.join(self.overrides)}"


ROWS = (
    Row("1.3B", "H100", 8, 8, 1, 64),
    Row("1.3B", "H100", 64, 8, 1, 512),
    Row("7B", "H100", 8, 8, 1, 64),
    Row("7B", "H100", 64, 8, 1, 512),
    Row("7B", "H100", 256, 8, 1, 2048),
    Row("70B", "H100", 256, 32, 8, 256),
    Row("70B", "H100", 1024, 64, 8, 1024),
    Row("1.3B", "TPU v5p", 64, 8, 1, 512),
    Row("7B", "TPU v5p", 256, 16, 1, 2048),
    Row("70B", "TPU v5p", 1024, 128, 1, 2048),
)


class Figures(NamedTuple):
    """A row's plan with the time of its traffic.

    Attributes:
        plan: of the run.
        compute: seconds of arithmetic in an update, at `MFU`.
        traffic: mesh axis → seconds.
        batch: windows in an update at which the arithmetic takes as long as the traffic that does
            not grow with them.
    """

    plan: Plan
    compute: float
    traffic: dict[str, float]
    batch: float


def link(row: Row, axis: str) -> str:
    """The slowest link on an axis: devices are numbered tensor first, then fsdp, then data."""
    if row.device != "H100":
        return "ICI"
    reach = {"tensor": row.tensor, "fsdp": row.tensor * row.fsdp, "data": row.devices}[axis]
    return "NVLink" if reach <= NODE else "InfiniBand"


@cache
def figures(row: Row) -> Figures:
    """Plans a row; nothing is computed."""
    config = load_config(str(ROOT / CONFIG), row.overrides)
    machine = platform.imagine(row.device, row.devices)
    dtype = machine.compute_dtype(config.train.dtype)
    heads = config.model.head_dim, config.model.attention_dropout
    implementation = choose_implementation(machine.platform, dtype, *heads)
    mesh = abstract_mesh(config.mesh, row.devices)
    check_mesh(config, mesh)
    plan = make_plan(
        config,
        Transformer(config.model, config.data.vocab_size, dtype, implementation),
        mesh,
        platform=machine.platform,
        device_kind=row.device,
        device_memory=machine.device_memory,
        peak_flops=machine.peak_flops,
    )
    compute = plan.flops / (MFU * plan.peak_flops)
    traffic = {axis: sent / LINKS[link(row, axis)] for axis, sent in plan.sent.items()}
    hidden = row.batch * (traffic["data"] + traffic["fsdp"]) / compute
    return Figures(plan, compute, traffic, hidden)


def main_table() -> str:
    """Mesh, memory and work of each row."""
    lines = [
        "| model | devices | data x fsdp x tensor | batch, tokens | memory, GB of | fits |"
        " FLOPs | s at 40% |",
        "|---|---|---|--:|--:|---|--:|--:|",
    ]
    for row in ROWS:
        plan = figures(row).plan
        mesh = " x ".join(str(size) for size in plan.mesh.values())
        lines.append(
            f"| {row.model} | {row.devices} {row.device} | {mesh} | {plan.tokens / 1e6:.2f} M |"
            f" {plan.memory.total / 1e9:.1f} of {plan.device_memory / 1e9:.0f} |"
            f" {'yes' if plan.fits else 'no'} | {plan.flops:.2e} |"
            f" {plan.seconds(MFU):.2f} |"
        )
    return "\n".join(lines)


def traffic_table() -> str:
    """What is sent, over which link, for how long; and what share of the peak that leaves."""
    lines = [
        "| model | devices | GB sent: data, fsdp, tensor | s: data, fsdp, tensor | compute, s |"
        " share of peak, exposed to hidden | windows that hide it |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in ROWS:
        found = figures(row)
        sent = ", ".join(f"{value / 1e9:.1f}" for value in found.plan.sent.values())
        seconds = ", ".join(f"{value:.2f}" for value in found.traffic.values())
        tensor = found.traffic["tensor"]
        rest = found.traffic["data"] + found.traffic["fsdp"]
        worst = MFU * found.compute / (found.compute + tensor + rest)
        best = MFU * found.compute / (tensor + max(found.compute, rest))
        lines.append(
            f"| {row.model} | {row.devices} {row.device} | {sent} | {seconds} |"
            f" {found.compute:.2f} | {worst:.0%} to {best:.0%} | {found.batch:.0f} of {row.batch} |"
        )
    return "\n".join(lines)


def storage_table() -> str:
    """Checkpoints and data."""
    lines = [
        "| model | devices | checkpoint, GB | s to write it | updates/s | data, MB/s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in ROWS:
        found = figures(row)
        size = 12.0 * found.plan.parameters  # parameters and two moments, fp32
        rate = 1 / found.compute
        data = rate * found.plan.tokens * BYTES_PER_TOKEN
        lines.append(
            f"| {row.model} | {row.devices} {row.device} | {size / 1e9:.0f} |"
            f" {size / STORAGE:.0f} | {rate:.2f} | {data / 1e6:.1f} |"
        )
    return "\n".join(lines)


def commands() -> str:
    """One for each row."""
    return "\n".join(row.command for row in ROWS)


def main(argv: list[str]) -> int:
    """Prints the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    print(main_table(), traffic_table(), storage_table(), commands(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
