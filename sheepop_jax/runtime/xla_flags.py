"""XLA flags and compiler options, each with its reason, version and measurement."""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

# The autotuner compiles every fusion a second time with Triton to find the faster version. Fusions
# that draw random numbers take minutes: over 2.5 for GPT-2's initial weights on an H200.
_NO_FUSION_AUTOTUNER = "--xla_gpu_experimental_enable_fusion_autotuner=false"


# Otherwise XLA's CPU backend copies the optimizer moments at the start of each step: it does not
# detect that the new parameters are computed before the moments are overwritten.
_MOMENTS_IN_PLACE = "--xla_cpu_copy_insertion_use_region_analysis=true"


def xla_flags(jaxlib: str) -> list[str]:
    """Returns the XLA flags for a jaxlib version; empty for untested versions.

    On the CPU, jaxlib 0.10 fuses reductions through a library that computes wrong sums, so that
    fusion is disabled. In 0.12 the sums are correct, and fusing only matmuls makes a training step
    a quarter faster; `individual_dot` multiplies int8 without widening, which makes
    `--quantize int8` fast. Every build of jaxlib accepts the flags of all platforms. An unknown
    flag would abort the process, hence only tested versions get flags.
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


def set_xla_flags() -> None:
    """Adds the flags for the installed jaxlib to XLA_FLAGS; values set by the user win."""
    users = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in xla_flags(version("jaxlib")) if flag.split("=")[0] not in users]
    if ours:
        os.environ["XLA_FLAGS"] = " ".join([users, *ours]).strip()


def init_compiler_options() -> dict[str, Any] | None:
    """Compiler options for parameter initialization.

    On GPUs (2026-11, CUDA 13.0), XLA otherwise fuses the random draws of all matrices of one shape
    into a single kernel, which ptxas takes a minute to compile for GPT-2.
    """
    import jax

    separate_kernels = {"xla_disable_hlo_passes": "multi_output_fusion"}
    return separate_kernels if jax.default_backend() == "gpu" else None


def step_compiler_options(mesh: "Mesh", remat: str) -> dict[str, Any] | None:
    """Compiler options for a train step on a mesh.

    Args:
        mesh: the devices.
        remat: `model.remat`. With rematerialization, XLA must not use the saved memory elsewhere.
    """
    match mesh.devices.flat[0].platform:
        case "gpu" if mesh.size == 1:
            # The latency-hiding scheduler reorders a step to overlap communication, and a single
            # device has none. With microbatches and remat=full it delays the weight gradients to
            # the end of the backward pass and keeps every block's residuals alive. Compiled for
            # an H100 (2026-11, jax 0.11.2 and 0.12): 21.8 to 14.2 GB at 0.71B parameters.
            return {"xla_gpu_enable_latency_hiding_scheduler": False}
        case "tpu" if mesh.size > 1 and remat == "full":
            # A windowed einsum overlaps a collective with its matmul, and XLA allocates the results
            # at the start of the step: recomputed activations are then held for every block. The
            # threshold is in MiB; this one is never reached. An option of libtpu 0.0.42 and 0.0.50.
            return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return None
