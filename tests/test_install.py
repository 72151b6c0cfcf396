"""`pip install .`: the console script, the presets and README's example work outside a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sheepop_jax.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--config.train.platform=cpu --config.train.num_steps=2 --config.optimizer.warmup_steps=1 "
    "--config.train.eval_batches=1 --config.train.sample_tokens=0 --config.model.d_model=16 "
    "--config.model.num_layers=1 --config.model.d_ff=16 --config.data.path=text.txt "
    "--config.data.tokenizer=char --config.data.cache_dir=cache --config.data.seq_len=16 "
    "--config.optimizer.name=adamw"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an environment in `venv`, into which a copy of the project was installed.

    The environment finds this one's packages, and nothing of the checkout.
    """
    place = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests")
    shutil.copytree(ROOT, place / "copy", ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    [packages] = (place / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, place / "copy"], check=True)
    shutil.rmtree(place / "copy")
    (place / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
    return place


def run(place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    program, *rest = map(str, words)
    result = subprocess.run(
        [place / "venv/bin" / program, *rest], cwd=place, env=kept, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_page_of_the_server_is_installed(place: Path) -> None:
    [page] = place.glob("venv/lib/python*/site-packages/sheepop_jax/serving/page.html")
    assert page.read_bytes() == (ROOT / "sheepop_jax/serving/page.html").read_bytes()


def test_every_command_starts(place: Path) -> None:
    listed = run(place, "sheepop-jax", "--help").stdout
    # One process asks all of them: importing the project each time would cost seconds.
    program = (
        "import contextlib, sys\nfrom sheepop_jax.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit):\n        main([name, '--help'])\n"
    )
    shown = run(place, "python", "-c", program, *COMMANDS).stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", listed, re.M)
    assert shown.count("usage: ") == len(COMMANDS)


def test_a_preset_trains_and_samples(place: Path) -> None:
    run(place, "sheepop-jax", "train", "--config", "quickstart", *TINY)
    sampled = run(
        place, "sheepop-jax", "sample", "--ckpt", "runs/quickstart-text", "--prompt", "line"
    )
    assert sampled.stdout.startswith("line")
