"""Peak FLOP/s and memory of known devices, and a description of the machine."""

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

from sheepop_jax.errors import InputError

log = logging.getLogger(__name__)

# Substring of `device_kind`, peak matmul FLOP/s and memory in bytes of one JAX device, from vendor
# specifications; for TPU v2 and v3 a device is half a chip. The peak is for dense bf16, or for fp32
# without bf16 hardware. The first match wins, so longer names come first.
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
    # GeForce: the peak with fp32 accumulation, half of that with fp16. NVIDIA's whitepapers on
    # GA102, Ada and RTX Blackwell list it for the large cards. It is twice the fp32 peak: 4 FLOPs
    # per CUDA core and cycle of the boost clock. The others follow from this and NVIDIA's product
    # pages. Of two memory sizes, the smaller.
    ("RTX 5090", 210e12, 32e9),
    ("RTX 5080", 113e12, 16e9),
    ("RTX 5070 Ti", 88e12, 16e9),
    ("RTX 5070", 62e12, 12e9),
    ("RTX 5060 Ti", 47.4e12, 8e9),
    ("RTX 5060", 38.4e12, 8e9),
    ("RTX 4090 D", 147e12, 24e9),
    ("RTX 4090", 165e12, 24e9),
    ("RTX 4080 SUPER", 104e12, 16e9),
    ("RTX 4080", 97e12, 16e9),
    ("RTX 4070 Ti SUPER", 88e12, 16e9),
    ("RTX 4070 Ti", 80e12, 12e9),
    ("RTX 4070 SUPER", 71e12, 12e9),
    ("RTX 4070", 58.3e12, 12e9),
    ("RTX 4060 Ti", 44.1e12, 8e9),
    ("RTX 4060", 30.2e12, 8e9),
    ("RTX 3090 Ti", 80e12, 24e9),
    ("RTX 3090", 71e12, 24e9),
    ("RTX 3080 Ti", 68e12, 12e9),
    ("RTX 3080", 59.5e12, 10e9),
    ("RTX 3070 Ti", 43.5e12, 8e9),
    ("RTX 3070", 40.6e12, 8e9),
    ("RTX 3060 Ti", 32.4e12, 8e9),
    ("RTX 3060", 25.5e12, 12e9),
    ("RTX 3050", 18.2e12, 8e9),
    ("TPU v6", 918e12, 32e9),
    ("TPU v5p", 459e12, 95e9),
    ("TPU v5 lite", 197e12, 16e9),
    ("TPU v5e", 197e12, 16e9),
    ("TPU v4", 275e12, 32e9),
    ("TPU v3", 61.5e12, 16e9),
    ("TPU v2", 22.5e12, 8e9),
)


# NVIDIA GPUs older than Ampere: XLA computes bf16 in fp32, and cuDNN has no flash attention.
AMPERE = 8.0  # compute capability
BEFORE_AMPERE = (
    *("V100", "V100S-PCIE-32GB", "P100", "T4", "TITAN RTX", "RTX 2060", "RTX 2070", "RTX 2080"),
    *("GTX 1060", "GTX 1070", "GTX 1080", "GTX 1650", "GTX 1660"),
)


def known_figures(device_kind: str) -> tuple[float, float]:
    """Returns peak FLOP/s and memory in bytes of one device; zeros if unknown."""
    if "Laptop" in device_kind:  # a smaller chip by the name of the desktop card
        return 0.0, 0.0
    found = ((peak, memory) for name, peak, memory in DEVICES if _is_in(name, device_kind))
    return next(found, (0.0, 0.0))


def _is_in(name: str, device_kind: str) -> bool:
    """Matches whole words only: a T400 is not a T4."""
    return re.search(rf"\b{re.escape(name)}\b", device_kind) is not None


@dataclass(frozen=True)
class Runtime:
    """The machine as seen by JAX.

    Attributes:
        platform: "cpu", "cuda" or "tpu".
        device_kind: the vendor's device name.
        device_count: devices over all processes.
        peak_flops: peak matmul FLOP/s of all devices together, from `DEVICES`; 0 if unknown.
        device_memory: memory of one device in bytes; 0 if unknown.
        ampere: on "cuda", whether the device is Ampere or newer and thus supports bf16 and cuDNN
            flash attention.
    """

    platform: str
    device_kind: str
    device_count: int
    peak_flops: float
    device_memory: float = 0.0
    ampere: bool = True

    def with_devices(self, count: int) -> "Runtime":
        """A machine with `count` devices of the same kind."""
        peak_flops = self.peak_flops / self.device_count * count
        return replace(self, device_count=count, peak_flops=peak_flops)

    def compute_dtype(self, name: str) -> Any:
        """Resolves `train.dtype` to the dtype of the activations.

        "auto" is bf16 on TPUs and GPUs since Ampere, and fp32 on older GPUs and the CPU.
        """
        import jax.numpy as jnp

        if name == "auto":
            name = "bfloat16" if self.platform != "cpu" and self.ampere else "float32"
        if name == "bfloat16" and self.platform == "cpu":
            log.info(
                "bfloat16 on a CPU is no faster than float32, except for generating several texts "
                "at once (BENCHMARKS.md)"
            )
        elif name == "bfloat16" and not self.ampere:
            log.info(
                "bfloat16 on %s saves memory but is no faster than float32: XLA computes it in "
                "float32",
                self.device_kind,
            )
        return jnp.dtype(name)


def hypothetical(
    device_kind: str, count: int, memory: float | None = None, flops: float | None = None
) -> Runtime:
    """Describes a machine with `count` devices, without accessing it.

    Args:
        device_kind: "cpu", a kind in `DEVICES`, or with `memory` any other.
        count: number of devices.
        memory: bytes of memory of one device; None takes the value in `DEVICES`.
        flops: peak matmul FLOP/s of one device; None takes the value in `DEVICES`, or 0.

    Raises:
        InputError: the kind is neither in `DEVICES` nor "cpu", and its memory is not given.
    """
    known = {name.lower(): name for name, _, _ in DEVICES} | {"cpu": "cpu"}
    device_kind = known.get(device_kind.lower(), device_kind)
    known_peak, known_memory = known_figures(device_kind)
    peak = known_peak if flops is None else flops
    memory = known_memory if memory is None else memory
    if not memory and device_kind != "cpu":
        names = ", ".join(name for name, _, _ in DEVICES)
        hint = "`device_memory` and `device_flops` for another one"
        raise InputError("device", device_kind, f"cpu or one of {names}", hint)
    platform = "cpu" if device_kind == "cpu" else "tpu" if "TPU" in device_kind else "cuda"
    ampere = not any(_is_in(name, device_kind) for name in BEFORE_AMPERE)
    return Runtime(platform, device_kind, count, peak * count, memory, ampere)
