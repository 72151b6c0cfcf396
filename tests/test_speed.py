"""What makes it fast stays so: nothing is timed here, see BENCHMARKS.md for that."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sheepop_jax.pipeline import train
from sheepop_jax.runtime.devices import Runtime

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parent.parent
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"
COMPILED = "/jax/core/compile/backend_compile_duration"


def test_a_run_compiles_nothing_after_its_first_evaluation_sample_and_save(make_config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
    config = make_config(
        {
            "model.num_layers": 1,
            "data.path": str(text),
            "data.cache_dir": str(tmp_path / "cache"),
            "data.tokenizer": "char",
            "train.batch_size": 8,
            "train.num_steps": 12,
            "train.log_every": 1,
            "train.eval_every": 3,
            "train.sample_tokens": 4,
            "checkpoint.save_every": 2,
        }
    )
    compiled: list[int] = []

    def listen(event, duration, **labels):
        if event == COMPILED:
            compiled.append(len(metrics_lines()))

    def metrics_lines():
        path = tmp_path / "run/metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(config, tmp_path / "run", Runtime("cpu", "cpu", 8, 0.0))
    finally:
        jax.monitoring.clear_event_listeners()
    lines = [json.loads(line) for line in metrics_lines()]
    evaluated = [i for i, line in enumerate(lines) if "val_loss" in line]
    assert len(evaluated) == 4
    assert compiled, "the listener hears nothing"
    # The sample comes after the evaluation's line, the save after that, in the same step.
    assert max(compiled) <= evaluated[0] + 1, (compiled, evaluated)


@pytest.fixture
def one_device(process_env):
    """The environment of a program that sees one device, whatever the tests see."""
    return {name: value for name, value in process_env.items() if name != "XLA_FLAGS"}


@pytest.mark.slow
def test_the_fast_recipe_reaches_its_loss(tmp_path, one_device):
    if not SHAKESPEARE.exists():
        pytest.skip(f"no {SHAKESPEARE.name} beside the checkout")
    words = ["--config", "configs/shakespeare_fast.py", f"--config.data.path={SHAKESPEARE}"]
    command = [sys.executable, "train.py", *words, "--workdir", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=one_device)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 320
    assert json.loads(lines[-1])["val_loss"] <= 1.8857  # nanoGPT's, by its recipe for a CPU


# One work after another as `python -m benchmarks.lib.ours` does it, with one turn for each.
TURNS = """
import io, os, sys
from benchmarks.lib import ours

out, flags = os.dup(1), sys.argv[1:]
for work in ("train_step", "decode", "loss"):
    os.dup2(out, 1)
    sys.stdin, sys.argv = io.StringIO("go\\n"), ["ours", work, "small", *flags]
    ours.main()
"""


def test_gpu_benchmarks_need_no_more_than_a_gpu_image_has(tmp_path, one_device):
    """benchmarks/gpu.sh runs where jax, flax, optax and tokenizers are, and little else."""
    missing = "grain ml_collections datasets orbax tensorboardX pandas pyarrow tqdm".split()
    for name in missing:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    sizes = {"layers": 1, "width": 32, "heads": 2, "feed_forward": 32, "vocab": 65, "time": 16}
    sizes |= {"batch": 2, "prompt": 4, "new_tokens": 4}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    environment = {**one_device, "PYTHONPATH": f"{tmp_path}:{ROOT}", "CONTENDER_STARTED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TURNS, *flags, "--platform", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 9
    for ready, turn, end in zip(*[iter(answers)] * 3, strict=True):
        assert ready and turn["seconds"] > 0 and end["peak_MB"] > 0
    step, decode, loss = (turn["result"] for turn in answers[1::3])
    assert step > 0 and decode == 4 and loss > 0
