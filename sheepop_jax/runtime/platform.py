"""JAX startup: platform, XLA flags, compile cache, and a check for wrong numbers.

Call `prepare` before the first computation. It sets the environment, then imports jax.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from sheepop_jax.errors import InputError
from sheepop_jax.files import cache_directory
from sheepop_jax.runtime import allocator
from sheepop_jax.runtime.devices import AMPERE, Runtime, known_figures
from sheepop_jax.runtime.xla_flags import set_xla_flags

log = logging.getLogger(__name__)

USER_ENVIRONMENT = dict(os.environ)  # before `prepare` adds XLA flags

# Settings of JAX that would change types, random numbers, precision or which programs are valid. A
# run has its own, so that it can be resumed and sampled in any environment.
PINNED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,  # random numbers independent of sharding
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_matmul_precision": None,  # that of the platform
}
# Settings left to the user, with their effect.
REPORTED = {
    "jax_debug_nans": "a non-finite value ends the run instead of skipping the update",
    "jax_debug_infs": "a non-finite value ends the run instead of skipping the update",
    "jax_disable_jit": "nothing is compiled",
    "jax_disable_most_optimizations": "compiled programs are slow",
}


def prepare(platform: str = "auto", connect: Callable[[], None] = lambda: None) -> Runtime:
    """Configures and starts JAX, and on a CPU checks that it computes correct numbers.

    Args:
        platform: "auto" selects the best available platform. A named platform ("cpu", "cuda",
            "tpu") that is missing is an error; there is no silent fallback to the CPU.
        connect: called after JAX is configured and before it initializes devices, to connect to the
            other processes (`distributed.initialize`). By default a no-op.

    Returns:
        The machine: platform, devices, peak FLOP/s and memory.

    Raises:
        InputError: the named platform is not available, or `connect` failed.
        RuntimeError: this version of jax computes wrong numbers on this machine.
    """
    set_xla_flags()
    allocator.keep_freed_memory()
    import jax

    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    _settle(jax.config)
    _use_compile_cache(jax)
    connect()
    try:
        device = jax.local_devices()[0]
    # An installed backend that fails raises RuntimeError; a missing backend raises a bare
    # AssertionError in jax 0.12.
    except (RuntimeError, AssertionError) as error:
        chosen = jax.config.jax_platforms or jax.config.values["jax_platform_name"]
        reason = str(error).partition("\n")[0] or f"no {chosen} backend is installed"
        if platform == "auto" and chosen:
            variable = "JAX_PLATFORMS" if jax.config.jax_platforms else "JAX_PLATFORM_NAME"
            expected = f"a platform available to JAX ({reason})"
            raise InputError(variable, chosen, expected, f"unsetting {variable}") from None
        hint = "auto or ./setup.sh --accelerator" + (" cuda12" if platform == "cuda" else "")
        raise InputError(
            "platform", platform, f"a platform available to JAX ({reason})", hint
        ) from None
    found = {"gpu": "cuda"}.get(device.platform, device.platform)
    if platform == "auto" and found == "cpu" and has_nvidia_card():
        log.warning(
            "THIS MACHINE HAS AN NVIDIA GPU THAT JAX CANNOT USE; running on the CPU. Install the "
            "GPU packages with ./setup.sh --accelerator cuda12."
        )
    if found == "cpu":
        check_numbers()
    count = jax.device_count()
    peak, memory = known_figures(device.device_kind)
    ampere = found != "cuda" or float(device.compute_capability) >= AMPERE
    runtime = Runtime(found, device.device_kind, count, peak * count, memory, ampere)
    processes = jax.process_count()
    of = f", process {jax.process_index()} of {processes}" if processes > 1 else ""
    log.info("jax %s on %d x %s (%s%s)", jax.__version__, count, device.device_kind, found, of)
    return runtime


def _settle(config: Any) -> None:
    """Pins the settings in `PINNED` and reports those in `REPORTED`; versions of JAX lack some."""
    for name, value in PINNED.items():
        if config.values.get(name, value) != value:
            shown = f"{name.upper()}={config.values[name]}"
            log.warning(
                "%s is ignored: runs use %s", shown, "the default" if value is None else value
            )
            config.update(name, value)
    for name, effect in REPORTED.items():
        if value := config.values.get(name):
            log.warning("%s=%s: %s", name.upper(), value, effect)


def check_numbers() -> None:
    """Checks a sum that some versions of XLA's CPU backend compute incorrectly.

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
            f"{off:.2g}); unset XLA_FLAGS or install another version of jax"
        )


def _use_compile_cache(jax: Any) -> None:
    if jax.config.jax_compilation_cache_dir:  # set by the user
        return
    directory = cache_directory() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no persistent compile cache: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def has_nvidia_card() -> bool:
    """Whether the NVIDIA driver detects a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    return subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0
