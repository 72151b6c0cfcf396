"""What must be settled before JAX starts: platform, XLA flags, compile cache, right numbers.

The one place that knows the platform. `prepare` comes before the first computation; it imports jax
itself, after the environment is set.
"""

import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sheepop_jax.errors import InputError
from sheepop_jax.runtime import allocator, distributed

log = logging.getLogger(__name__)

# By a part of jax's `device_kind`: one device's matrix peak, FLOP/s, and its memory, bytes: the
# makers' figures. The peak is of dense bf16, or of fp32 where bf16 has no units. A device is what
# jax counts as one, so for TPU v2 and v3 half a chip. The first match counts: longer names first.
DEVICES = (
    ("GH200", 989e12, 96e9),
    ("H200", 989e12, 141e9),
    ("H100", 989e12, 80e9),
    ("B200", 2250e12, 180e9),
    ("A100-SXM4-40GB", 312e12, 40e9),
    ("A100-PCIE-40GB", 312e12, 40e9),
    ("A100", 312e12, 80e9),
    ("A10G", 70e12, 24e9),
    ("L40S", 362e12, 48e9),
    ("L40", 181e12, 48e9),
    ("L4", 121e12, 24e9),
    ("V100-SXM2-32GB", 15.7e12, 32e9),
    ("V100-DGXS-32GB", 15.7e12, 32e9),
    ("V100-PCIE-32GB", 14e12, 32e9),
    ("V100S-PCIE-32GB", 16.4e12, 32e9),
    ("V100", 15.7e12, 16e9),
    ("T4", 8.1e12, 16e9),
    ("RTX 4090", 165e12, 24e9),
    ("RTX 3090", 71e12, 24e9),
    ("TPU v6", 918e12, 32e9),
    ("TPU v5p", 459e12, 95e9),
    ("TPU v5 lite", 197e12, 16e9),
    ("TPU v5e", 197e12, 16e9),
    ("TPU v4", 275e12, 32e9),
    ("TPU v3", 61.5e12, 16e9),
    ("TPU v2", 22.5e12, 8e9),
)

# Of those, NVIDIA's from before Ampere. XLA computes bf16 there by way of fp32, and cuDNN has no
# flash attention for them.
BEFORE_AMPERE = ("V100", "V100S-PCIE-32GB", "T4")
_AMPERE = 8.0  # compute capability


@dataclass(frozen=True)
class Runtime:
    """The machine as JAX sees it.

    Attributes:
        platform: "cpu", "cuda" or "tpu".
        device_kind: the maker's name of a device.
        device_count: devices over all processes.
        peak_flops: matrix peak of all devices together, FLOP/s, as in `DEVICES`; 0 where unknown.
        device_memory: bytes of one device; 0 where unknown.
        ampere: on "cuda", whether the device is of that generation or later, hence has units for
            bf16 and cuDNN's flash attention.
    """

    platform: str
    device_kind: str
    device_count: int
    peak_flops: float
    device_memory: float = 0.0
    ampere: bool = True

    def with_devices(self, count: int) -> "Runtime":
        """The same kind of machine with so many devices."""
        peak_flops = self.peak_flops / self.device_count * count
        return replace(self, device_count=count, peak_flops=peak_flops)

    def compute_dtype(self, name: str) -> Any:
        """The activations' dtype for `train.dtype`.

        "auto" is bf16 on TPUs and on GPUs from Ampere on, and fp32 on other GPUs and the CPU.
        """
        import jax.numpy as jnp

        if name == "auto":
            name = "bfloat16" if self.platform != "cpu" and self.ampere else "float32"
        if name == "bfloat16" and self.platform == "cpu":
            log.info(
                "bfloat16 on a CPU: no faster than float32 unless it writes several texts at once "
                "(BENCHMARKS.md)"
            )
        elif name == "bfloat16" and not self.ampere:
            log.info(
                "bfloat16 on a %s: less memory, but no faster than float32, by way of which it is "
                "computed there",
                self.device_kind,
            )
        return jnp.dtype(name)


def prepare(
    platform: str = "auto", member: distributed.DistributedConfig = distributed.ALONE
) -> Runtime:
    """Settles platform, flags and caches, starts JAX, and checks that it computes right numbers.

    Args:
        platform: "auto" takes the best that jax finds; a named one ("cpu", "cuda", "tpu") that is
            missing is an error, never a silent CPU.
        member: of several processes, which this is; by default it is alone.

    Raises:
        InputError: the named platform cannot be used, or the other processes were not found.
        RuntimeError: this version of jax computes wrong numbers on this machine.
    """
    _set_xla_flags()
    allocator.keep_freed_memory()
    import jax

    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    jax.config.update("jax_threefry_partitionable", True)  # random numbers independent of layout
    _use_compile_cache(jax)
    distributed.join(member)
    try:
        device = jax.local_devices()[0]
    # An installed backend that fails raises RuntimeError; one that is not installed, in jax 0.12, a
    # bare AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or f"no {platform} backend is installed"
        hint = "auto, or ./setup.sh --accelerator" + (" cuda12" if platform == "cuda" else "")
        raise InputError(
            "platform", platform, f"a platform that jax can use here ({reason})", hint
        ) from None
    found = {"gpu": "cuda"}.get(device.platform, device.platform)
    if platform == "auto" and found == "cpu" and _nvidia_card():
        log.warning(
            "THIS MACHINE HAS AN NVIDIA CARD THAT JAX CANNOT USE: training runs on the CPU. "
            "Install the GPU set with ./setup.sh --accelerator cuda12."
        )
    if found == "cpu":
        check_numbers()
    count = jax.device_count()
    peak, memory = known_figures(device.device_kind)
    ampere = found != "cuda" or float(device.compute_capability) >= _AMPERE
    runtime = Runtime(found, device.device_kind, count, peak * count, memory, ampere)
    of = f", process 0 of {distributed.count()}" if distributed.count() > 1 else ""
    log.info("jax %s on %d x %s (%s%s)", jax.__version__, count, device.device_kind, found, of)
    return runtime


def known_figures(device_kind: str) -> tuple[float, float]:
    """Peak FLOP/s and bytes of memory of one device of a kind; zeros where it is not known."""
    found = ((peak, memory) for name, peak, memory in DEVICES if _is_in(name, device_kind))
    return next(found, (0.0, 0.0))


def _is_in(name: str, device_kind: str) -> bool:
    """As words: a T400 is no T4."""
    return re.search(rf"\b{re.escape(name)}\b", device_kind) is not None


def imagine(device_kind: str, count: int) -> Runtime:
    """A machine that need not be here, by the table `DEVICES`.

    Raises:
        InputError: a kind that is not in it, and not "cpu".
    """
    known = {name.lower(): name for name, _, _ in DEVICES} | {"cpu": "cpu"}
    device_kind = known.get(device_kind.lower(), device_kind)
    peak, memory = known_figures(device_kind)
    if not peak and device_kind != "cpu":
        names = ", ".join(name for name, _, _ in DEVICES)
        raise InputError("--device", device_kind, f"cpu or one of {names}")
    platform = "cpu" if not peak else "tpu" if "TPU" in device_kind else "cuda"
    ampere = not any(_is_in(name, device_kind) for name in BEFORE_AMPERE)
    return Runtime(platform, device_kind, count, peak * count, memory, ampere)


# The autotuner compiles every fusion a second time, by Triton, to see which is faster. Where a
# fusion draws random numbers that takes minutes: more than two and a half for GPT-2's initial
# weights on an H200.
_NO_FUSION_AUTOTUNER = "--xla_gpu_experimental_enable_fusion_autotuner=false"

# Without it XLA's CPU backend copies the optimizer's moments at the beginning of each step: it does
# not see that the new parameters are made before the new moments take the old ones' place.
_MOMENTS_IN_PLACE = "--xla_cpu_copy_insertion_use_region_analysis=true"


def xla_flags(jaxlib: str) -> list[str]:
    """The XLA flags that a version of jaxlib needs; none where nothing is known.

    On the CPU, jaxlib 0.10 fuses reductions by a library that computes wrong sums: the fusion is
    turned off. 0.12 is right, and fusing matrix products alone makes a training step a quarter
    faster; products of int8 without widening them first, as `individual_dot` says, are what makes
    `--quantize int8` fast. The other flags have their reasons beside them. Each version knows the
    flags of all platforms. A flag that it does not know would end the process: none beyond those
    tried.
    """
    major_minor = tuple(int(part) for part in jaxlib.split(".")[:2])
    fusions = "--xla_cpu_experimental_ynn_fusion_type="
    all_versions = [_MOMENTS_IN_PLACE, _NO_FUSION_AUTOTUNER]
    match major_minor:
        case (0, 10):
            return [f"{fusions}-reduce", *all_versions]
        case (0, 11):
            return all_versions
        case (0, 12):
            return [f"{fusions}dot,individual_dot", *all_versions]
    return []


def check_numbers() -> None:
    """Computes a sum that broken versions of XLA's CPU backend get wrong.

    Raises:
        RuntimeError: the sum is wrong.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    rows = np.linspace(-1, 1, 32769 * 3, dtype=np.float32).reshape(-1, 3)
    norms = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    off = float(np.abs(np.asarray(norms) - (rows.astype(np.float64) ** 2).sum(-1)).max())
    if not off < 1e-5:
        raise RuntimeError(
            f"jax {jax.__version__} computes wrong numbers on this CPU (a sum of squares is off by "
            f"{off:.2g}); unset XLA_FLAGS, or install another version of jax"
        )


def cache_directory() -> Path:
    """The user's cache directory for this program; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sheepop_jax"


def _set_xla_flags() -> None:
    users = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in xla_flags(version("jaxlib")) if flag.split("=")[0] not in users]
    if ours:  # the user's own values win
        os.environ["XLA_FLAGS"] = " ".join([users, *ours]).strip()


def _use_compile_cache(jax: Any) -> None:
    if jax.config.jax_compilation_cache_dir:  # the user's own
        return
    directory = cache_directory() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no persistent compile cache: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _nvidia_card() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    return subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0
