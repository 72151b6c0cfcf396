"""Right numbers on every version, and a platform that is what it says."""

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sheepop_jax import files
from sheepop_jax.errors import InputError
from sheepop_jax.model.transformer import Transformer, init_params
from sheepop_jax.runtime import devices, platform, xla_flags

FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
ALL_VERSIONS = [
    "--xla_cpu_copy_insertion_use_region_analysis=true",
    "--xla_gpu_experimental_enable_fusion_autotuner=false",
]


# What only a new process shows: prepare's flags come before jax, and a platform is chosen once.
FRESH = """
import json
from sheepop_jax.runtime import devices, platform
from sheepop_jax import files
from sheepop_jax.errors import InputError
from jax.extend import backend

errors = {}
for name in ("tpu", "cuda"):
    try:
        platform.prepare(name)
    except InputError as error:
        errors[name] = [error.field, error.got]
    backend.clear_backends()

checks = []
devices.DEVICES = (("cpu", 3.0, 5.0),)
platform.check_numbers = lambda: checks.append("checked")
machine = platform.prepare("cpu")
import jax, jax.numpy as jnp, numpy as np
rows = np.random.default_rng(0).standard_normal((32769, 3)).astype(np.float32)
found = jax.jit(jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2)))(rows)
print(json.dumps({
    "errors": errors,
    "checks": checks,
    "machine": [machine.platform, machine.device_count, machine.peak_flops, machine.device_memory],
    "settings": {name: getattr(jax.config, name, value) for name, value in platform.PINNED.items()},
    "cache": jax.config.jax_compilation_cache_dir,
    "off": float(np.abs(found - (rows.astype(np.float64) ** 2).sum(-1)).max()),
}))
"""


PINNED = {  # of another value than `platform.PINNED`
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "3",
    "JAX_ENABLE_CUSTOM_PRNG": "1",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What `platform.prepare` did in a process without the flags that the tests set themselves."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_DEBUG_INFS": "1",  # reported only
        **PINNED,
    }
    result = subprocess.run(
        [sys.executable, "-c", FRESH],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    more = {"wanted_cache": cache / "sheepop_jax" / "xla", "stderr": result.stderr}
    return json.loads(result.stdout) | more


def test_the_known_wrong_case_comes_out_right_in_a_fresh_process(fresh):
    assert fresh["off"] < 1e-4


def test_wrong_numbers_are_noticed(monkeypatch):
    platform.check_numbers()
    right = jnp.sum
    monkeypatch.setattr(jnp, "sum", lambda x: 1.001 * right(x))
    with pytest.raises(RuntimeError, match="wrong numbers"):
        platform.check_numbers()


@pytest.mark.parametrize(
    ("jaxlib", "flags"),
    [
        ("0.10.2", [f"{FUSIONS}=-reduce", *ALL_VERSIONS]),
        ("0.11.1", ALL_VERSIONS),
        ("0.12.0.1", [f"{FUSIONS}=dot,individual_dot", *ALL_VERSIONS]),
        ("0.13.0", []),
        ("1.0", []),
    ],
)
def test_flags_by_version(jaxlib, flags):
    assert xla_flags.xla_flags(jaxlib) == flags


def test_the_users_flags_are_kept_and_win(monkeypatch):
    others = " ".join(ALL_VERSIONS)
    monkeypatch.setattr(xla_flags, "version", lambda name: "0.12.0.1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {FUSIONS}=dot,individual_dot {others}"
    monkeypatch.setenv("XLA_FLAGS", f"{FUSIONS}=none")
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == f"{FUSIONS}=none {others}"


def test_what_prepare_settles_in_a_fresh_process(fresh):
    assert fresh["checks"] == ["checked"]
    assert fresh["machine"] == ["cpu", 2, 6.0, 5.0]
    assert fresh["cache"] == str(fresh["wanted_cache"])
    assert fresh["wanted_cache"].is_dir()


def test_the_environment_changes_no_types_and_no_random_numbers(fresh):
    assert fresh["settings"] == platform.PINNED
    warned = re.findall(r"^(JAX_\w+)=(\S+)", fresh["stderr"], re.MULTILINE)
    assert {name for name, _ in warned} == {*PINNED, "JAX_DEBUG_INFS"}


def test_parameters_are_fp32_with_x64(small_config):
    with jax.enable_x64(True):
        model = Transformer(small_config.model, 11)
        params = jax.eval_shape(lambda: init_params(model, 0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_an_unavailable_platform_of_the_environment_is_named(prepare, monkeypatch):
    def missing():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(InputError) as caught:
        prepare()
    assert (caught.value.field, caught.value.got) == ("JAX_PLATFORMS", "cpu")
    assert "no cpu backend" in caught.value.expected and "JAX_PLATFORMS" in caught.value.hint


@pytest.mark.parametrize("name", ["tpu", "cuda"])
def test_a_missing_platform_is_an_error_not_a_silent_cpu(fresh, name):
    if name not in fresh["errors"] and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a card")
    assert fresh["errors"][name] == ["platform", name]


@pytest.fixture
def prepare(monkeypatch):
    """`platform.prepare` in this process, whose settings stay as they are."""
    monkeypatch.setattr(platform, "set_xla_flags", lambda: None)
    monkeypatch.setattr(platform, "_use_compile_cache", lambda jax: None)
    monkeypatch.setattr(platform.allocator, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(platform, "check_numbers", lambda: None)
    return platform.prepare


@pytest.mark.parametrize("taken", [False, True])
def test_a_user_without_a_home_has_a_temporary_cache(taken, tmp_path, monkeypatch, caplog):
    """A user id without a passwd entry; `taken`: the name is another user's."""

    def no_entry(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"sheepop_jax-{os.getuid()}"
    if taken:
        own.symlink_to(tmp_path)
    files._temporary_cache.cache_clear()
    directory = files.cache_directory()
    assert files.cache_directory() == directory and directory.parent == tmp_path
    assert (directory == own) is not taken
    assert directory.stat().st_mode & 0o777 == 0o700
    [message] = caplog.messages
    assert str(directory) in message and "XDG_CACHE_HOME" in message
    files._temporary_cache.cache_clear()


def test_a_home_that_cannot_be_written_has_a_cache_only_if_it_is_there(tmp_path, monkeypatch):
    """As `/` is for a user of a container."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert files.cache_directory() == home / ".cache" / "sheepop_jax"
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (home, os.W_OK))
    files._temporary_cache.cache_clear()
    assert files.cache_directory().parent == tmp_path
    files._temporary_cache.cache_clear()
    (home / ".cache").mkdir()
    assert files.cache_directory() == home / ".cache" / "sheepop_jax"


def test_dtypes_by_platform(caplog):
    cpu = devices.Runtime("cpu", "cpu", 1, 0.0)
    gpu = devices.Runtime("cuda", "H100", 1, 989e12)
    old = devices.hypothetical("T4", 1)
    names = ("auto", "float32", "bfloat16")
    assert [cpu.compute_dtype(name).name for name in names] == ["float32", "float32", "bfloat16"]
    assert [gpu.compute_dtype(name).name for name in names] == ["bfloat16", "float32", "bfloat16"]
    assert [old.compute_dtype(name).name for name in names] == ["float32", "float32", "bfloat16"]
    caplog.clear()
    with caplog.at_level("INFO"):
        for machine in (cpu, gpu, old):
            assert all(machine.compute_dtype(name) for name in names)
    by_cpu, by_old = caplog.messages  # once by each for which it is no good choice
    assert "bfloat16 on a CPU is no faster than float32" in by_cpu
    assert "bfloat16 on T4 saves memory but is no faster than float32" in by_old


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [("gpu", "7.5", False), ("gpu", "8.0", True), ("gpu", "12.0", True), ("tpu", None, True)],
)
def test_the_generation_by_compute_capability(monkeypatch, prepare, platform, capability, has):
    device = SimpleNamespace(platform=platform, device_kind="a card")
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert prepare().ampere is has


def test_the_generation_of_cards_that_are_not_here():
    kinds = [name for name, _, _ in devices.DEVICES]
    without = [kind for kind in kinds if not devices.hypothetical(kind, 1).ampere]
    assert without == [kind for kind in kinds if "V100" in kind or kind == "T4"]
    assert not devices.hypothetical("Tesla T4", 1).ampere  # as jax calls it
    assert devices.known_figures("NVIDIA T400 4GB") == (0, 0)
    assert devices.known_figures("NVIDIA GH200 480GB")[1] == 96e9


@pytest.mark.parametrize(("wanted", "warned"), [("auto", True), ("cpu", False)])
def test_an_nvidia_card_that_jax_cannot_use_is_reported(
    wanted, warned, prepare, tmp_path, monkeypatch, caplog
):
    """Unless the CPU was asked for."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho GPU 0: a card\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    before = jax.config.jax_platforms
    try:
        assert prepare(wanted).platform == "cpu"
    finally:
        jax.config.update("jax_platforms", before)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == warned
    assert all("NVIDIA" in record.message for record in warnings)
