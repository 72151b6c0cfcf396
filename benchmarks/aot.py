"""Compiles the train step ahead of time for TPUs or GPUs and compares it with the plan.

    python benchmarks/aot.py --topology v5e:2x4 --mesh 8,1,1 1,8,1 2,2,2
    python benchmarks/aot.py --target_config h100.txtpb --config.train.batch_size=64

Nothing runs. The memory that the compiler reports and the collectives in the compiled program are
compared with `planning/memory.py` and `planning/communication.py`. The last column counts how often
a full gradient crosses the data axis in an update (expected: 1). Every field of the configuration
can be set, as for train.py.

TPUs need `pip install "jax[tpu]"`. GPUs need jax-cuda12-plugin and jax-cuda12-pjrt of JAX's
version, and a GpuTargetConfigProto in text format: XLA's sources have one per card
(xla/backends/gpu/target_config/specs).
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
from benchmarks.lib.collectives import sent_over
from benchmarks.lib.report import default_out, publish

ROOT = Path(__file__).resolve().parent.parent

# For libtpu: do not query the metadata server.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def sizes(words: str) -> tuple[int, ...]:
    """Parses "8,1,1" to (8, 1, 1)."""
    found = tuple(map(int, words.split(",")))
    if len(found) != 3 or min(found) < 1:
        raise ValueError(words)
    return found


def main() -> None:
    """Prints one row per mesh."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", default=str(ROOT / "configs/gpt2_124m.py"), metavar="PATH")
    made.add_argument("--topology", default="v5e:2x4", help="TPU topology (default v5e:2x4)")
    made.add_argument("--target_config", type=Path, metavar="PATH", help="target GPU instead")
    made.add_argument("--devices", type=int, default=8, help="GPUs per node (default 8)")
    made.add_argument(
        "--mesh", type=sizes, nargs="+", default=[(8, 1, 1), (1, 8, 1), (2, 2, 2)], metavar="D,F,T"
    )
    made.add_argument("--vocab", type=int, default=50257, help="vocabulary size (default 50257)")
    made.add_argument("--out", type=Path, default=default_out(), metavar="DIR")
    flags, overrides = made.parse_known_args()
    for word in overrides:
        if not (word.startswith("--config.") and "=" in word):
            made.error(f"unknown argument {word}")
    os.environ.update(ALONE)
    # After setting the environment, which determines JAX's devices.
    from sheepop_jax.config.loading import load_config
    from sheepop_jax.errors import InputError

    platform = "cuda" if flags.target_config else "tpu"
    try:
        assignments = [word.removeprefix("--config.") for word in overrides]
        config = load_config(flags.config, [*assignments, f"train.platform={platform}"])
        devices = imagined_devices(flags)
        rows = [row(config, platform, devices, mesh, flags.vocab) for mesh in flags.mesh]
    except InputError as error:
        sys.exit(f"error: {error}")
    about = {"device": devices[0].device_kind, "microbatches": config.train.grad_accum_steps}
    publish(f"aot_{platform}", rows, about, flags.out)


def imagined_devices(flags: argparse.Namespace) -> Any:
    """Returns the devices to compile for; exits with an error if their compiler is missing."""
    from jax.experimental.topologies import get_topology_desc

    try:
        if flags.target_config is None:
            return get_topology_desc(flags.topology, platform="tpu").devices
        options = {"target_config": flags.target_config.read_text()}
        options["topology"] = f"1x1x{flags.devices}"
        return get_topology_desc("", platform="cuda", **options).devices
    except (OSError, RuntimeError, NotImplementedError, ValueError) as error:
        needs = "jax-cuda12-plugin and jax-cuda12-pjrt" if flags.target_config else "jax[tpu]"
        sys.exit(f"error: no compiler for it (pip install {needs}): {str(error).splitlines()[0]}")


def row(config: Any, platform: str, devices: Any, mesh_sizes: tuple[int, ...], vocab: int) -> Any:
    """Compiles for one mesh and compares with the plan."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sheepop_jax.config.schema import MeshConfig
    from sheepop_jax.data.batch import Batch
    from sheepop_jax.model.flash_attention import choose_implementation
    from sheepop_jax.model.loss import chunk_elements
    from sheepop_jax.model.partitioning import (
        batch_sharding,
        check_mesh,
        make_mesh,
        state_shardings,
    )
    from sheepop_jax.model.transformer import Transformer
    from sheepop_jax.planning.communication import bytes_sent
    from sheepop_jax.planning.memory import abstract_state, estimate_memory
    from sheepop_jax.training.optimizer import make_optimizer, make_schedule
    from sheepop_jax.training.step import jit_step, make_train_step

    mesh = make_mesh(MeshConfig(*mesh_sizes), devices[: np.prod(mesh_sizes)])
    check_mesh(config, mesh)
    m, train, dtype = config.model, config.train, jnp.dtype(jnp.bfloat16)
    attention = choose_implementation(platform, dtype, m.head_width, m.attention_dropout)
    model = Transformer(m, vocab, dtype, attention)
    schedule = make_schedule(config.optimizer, train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    shapes = abstract_state(config, model)
    places = state_shardings(shapes.boxed, shapes.state, mesh)
    state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes.state, places)
    rows = (train.grad_accum_steps, train.batch_size, config.data.seq_len), batch_sharding(mesh, 1)
    kinds = (np.int32, np.int32, np.float32)
    batch = Batch(*(jax.ShapeDtypeStruct(rows[0], kind, sharding=rows[1]) for kind in kinds))
    step = make_train_step(
        model,
        optimizer,
        schedule,
        config.seed,
        max_grad_zscore=config.optimizer.max_grad_zscore,
        chunk_elements=chunk_elements(platform),
    )
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jit_step(step, places, mesh, m.remat).lower(state, batch).compile()
    seconds = time.perf_counter() - started
    reported = compiled.memory_analysis()
    results = reported.output_size_in_bytes - reported.alias_size_in_bytes
    memory = reported.argument_size_in_bytes + results + reported.temp_size_in_bytes
    planned = estimate_memory(config, model, mesh, platform, shapes).total
    expected = bytes_sent(config, model, mesh, platform, shapes)
    sent = sent_over(compiled.as_text(), dict(mesh.shape))
    over_data = sum(count for axes, count in sent.items() if "data" in axes)
    return {
        "data, fsdp, tensor": ", ".join(map(str, mesh_sizes)),
        "compile, s": seconds,
        "memory, MB": memory / 1e6,
        "planned / reported": planned / memory,
        "sent, MB": sum(sent.values()) / 1e6,
        "planned / program": sum(expected.values()) / max(sum(sent.values()), 1.0),
        "gradients over data": over_data / expected["data"] if expected["data"] else None,
    }


if __name__ == "__main__":
    main()
