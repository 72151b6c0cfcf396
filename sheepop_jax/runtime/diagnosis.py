"""Machine diagnosis for `doctor`: versions, devices, precision, caches, performance advice."""

import os
import platform as python_platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sheepop_jax.runtime import platform
from sheepop_jax.runtime.devices import Runtime

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers")
_LOW_MEMORY, _LOW_DISK = 4e9, 5e9  # bytes; `advice` warns below these


@dataclass(frozen=True)
class Diagnosis:
    """The state of one machine.

    Attributes:
        versions: versions of Python and of the main packages; "" if missing.
        platform: "cpu", "cuda" or "tpu".
        reason: why this platform was selected.
        devices: number and kind of devices.
        device_memory: memory of one device in bytes, from the vendor; 0 if unknown.
        peak_flops: peak FLOP/s of all devices together; 0 if unknown.
        bf16: whether the devices support bfloat16; training then uses it.
        flash_attention: whether training uses cuDNN flash attention.
        numbers: "right", or the error found in the computed numbers.
        compile_cache: directory of the compile cache; "" if disabled.
        compile_cache_bytes: its size.
        cpu_count: CPUs available to this process.
        memory_available: available host memory in bytes; 0 if unknown.
        disk_free: free bytes in the current directory's file system.
        advice: performance problems and errors to expect, with remedies.
    """

    versions: dict[str, str]
    platform: str
    reason: str
    devices: str
    device_memory: float
    peak_flops: float
    bf16: bool
    flash_attention: bool
    numbers: str
    compile_cache: str
    compile_cache_bytes: int
    cpu_count: int
    memory_available: int
    disk_free: int
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as printed by `doctor --json`."""
        return asdict(self)


def diagnose(wanted: str = "auto") -> Diagnosis:
    """Starts JAX on a platform and inspects the machine.

    Args:
        wanted: "auto", "cpu", "cuda" or "tpu", as in `train.platform`.

    Raises:
        InputError: the platform is not available.
    """
    numbers = "right"
    try:
        machine = platform.prepare(wanted)
    except RuntimeError as error:
        numbers, machine = str(error), Runtime("cpu", "cpu", 1, 0.0)
    import jax

    bf16 = machine.platform != "cpu" and machine.ampere
    cache = jax.config.jax_compilation_cache_dir or ""
    memory, disk = _memory_available(), shutil.disk_usage(".").free
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Diagnosis(
        versions=_versions(),
        platform=machine.platform,
        reason=_reason(wanted, machine.platform),
        devices=f"{machine.device_count} x {machine.device_kind}",
        device_memory=machine.device_memory,
        peak_flops=machine.peak_flops,
        bf16=bf16,
        flash_attention=machine.platform == "cuda" and machine.ampere,
        numbers=numbers,
        compile_cache=cache,
        compile_cache_bytes=_size(Path(cache)) if cache else 0,
        cpu_count=cpus or 1,
        memory_available=memory,
        disk_free=disk,
        advice=tuple(_advice(machine, numbers, cache, memory, disk)),
    )


def _versions() -> dict[str, str]:
    found = {"python": python_platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def _reason(wanted: str, found: str) -> str:
    if wanted != "auto":
        return "requested"
    if named := os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS={named}"
    if found != "cpu":
        return "accelerator found by JAX"
    if platform.has_nvidia_card():
        return "JAX cannot use the NVIDIA GPU of this machine"
    return "no GPU or TPU found"


def _advice(machine: Runtime, numbers: str, cache: str, memory: int, disk: int) -> list[str]:
    advice = []
    if numbers != "right":
        advice.append(f"training will not start: {numbers}")
    if machine.platform == "cpu":
        if platform.has_nvidia_card():
            advice.append("install the GPU packages: ./setup.sh --accelerator cuda12")
        advice.append(
            "a CPU trains about 1M parameters in minutes (configs/quickstart.py); configs/base.py "
            "and larger presets need a GPU or TPU"
        )
    elif not machine.ampere:
        advice.append(
            f"{machine.device_kind} supports neither bfloat16 nor flash attention: training uses "
            "float32, several times slower than on newer GPUs"
        )
    if not machine.peak_flops and machine.platform != "cpu":
        advice.append(f"peak FLOP/s of {machine.device_kind} unknown: MFU is not logged")
    if not cache:
        advice.append("no compile cache: every start recompiles; make ~/.cache writable")
    if 0 < memory < _LOW_MEMORY:
        advice.append(f"only {memory / 1e9:.1f} GB of memory free: lower train.batch_size")
    if disk < _LOW_DISK:
        advice.append(f"only {disk / 1e9:.1f} GB of disk free: lower checkpoint.keep")
    if "XLA_FLAGS" in platform.USER_ENVIRONMENT:
        advice.append("XLA_FLAGS is set: its values override the built-in flags")
    return advice


def _memory_available() -> int:
    """Available host memory in bytes; 0 if the system does not report it."""
    if sys.platform != "linux":
        return 0
    with open("/proc/meminfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
