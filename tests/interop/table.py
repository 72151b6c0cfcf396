"""Prints docs/interop.md's table of measured errors, with the recorded models of `make_golden.py`.

    python -m tests.interop.table

Needs gguf and xllamacpp, not transformers: its logits are in the recorded arrays.
"""

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from configs import base
from sheepop_jax import pipeline
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.loading import load_config
from sheepop_jax.config.schema import Config
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.errors import InputError
from sheepop_jax.interop.export_gguf import GGUF_FILE, export_gguf
from sheepop_jax.interop.export_hf import export_hf
from sheepop_jax.interop.import_hf import import_hf, logits_of
from sheepop_jax.interop.verification import VerificationReport
from sheepop_jax.interop.verify import verify_hf
from sheepop_jax.interop.verify_gguf import verify_gguf
from sheepop_jax.runtime import platform

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {
    "GPT-2": "gpt2",
    "GPT-NeoX (Pythia)": "gpt_neox",
    "Starcoder2": "starcoder2",
    "Llama (SmolLM2)": "llama_tied",
    "Llama 3, scaled RoPE": "llama_rope_llama3",
    "Qwen2 (Qwen2.5)": "qwen2",
    "Qwen3": "qwen3",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
TEXT = "the sheep saw a green hill, and the sheep went up to eat. " * 60


def hub_directory(case: str, directory: Path) -> Path:
    """A copy of a recorded model; one without a tokenizer gets one of characters."""
    shutil.copytree(GOLDEN / case, directory)
    if not (directory / "tokenizer.json").exists():
        (directory / "tokenizer.json").write_text(train_char([LETTERS]).to_json())
        path = directory / "config.json"
        config = json.loads(path.read_text()) | {"bos_token_id": 0, "eos_token_id": 0}
        path.write_text(json.dumps(config))
    return directory


def figure(report: VerificationReport, words: str) -> str:
    """The value of a row, and whether the whole report passed."""
    (value,) = [row.value for row in report.rows if words in row.name]
    return value if report.passed else f"{value} (FAILED)"


def row(case: str, root: Path) -> list[str]:
    """The cells of one model."""
    defaults = Config.from_dict(base.get_config())
    import_hf(hub_directory(case, root / "hub"), root / "run", defaults)
    run = open_run(root / "run")
    golden = np.load(GOLDEN / case / "golden.npz")
    found, expected = (
        logits_of(run, golden["ids_BT"])[:, golden["positions_P"]],
        golden["logits_BPV"],
    )
    imported = f"{np.abs(found - expected).max() / np.abs(expected).max():.1e}"
    params, step = run.params()
    export_hf(run, params, step, root / "hf")
    exported = figure(verify_hf(run, params, root / "hf"), "logit error")
    try:
        export_gguf(run, params, step, root / "gguf")
        gguf = figure(verify_gguf(run, params, root / "gguf" / GGUF_FILE), "log-probability")
    except InputError as error:
        gguf = f"refused: {error.field}"
    (root / "text.txt").write_text(TEXT)
    length = min(16, run.config.model.max_seq_len)
    words = {
        "train.init_from": root / "run", "data.path": root / "text.txt", "data.seq_len": length,
        "data.cache_dir": root / "cache", "train.num_steps": 20, "train.batch_size": 4,
        "train.grad_accum_steps": 1, "optimizer.warmup_steps": 2, "train.sample_tokens": 0,
        "train.eval_every": 0, "train.platform": "cpu", "optimizer.learning_rate": 1e-2,
        "train.trackers": "",
    }  # fmt: skip
    config = load_config("base", [f"{name}={value}" for name, value in words.items()])
    pipeline.train(config, root / "tuned", platform.prepare("cpu"))
    tuned = open_run(root / "tuned")
    params, step = tuned.params()
    export_hf(tuned, params, step, root / "tuned_hf")
    return [imported, exported, gguf, figure(verify_hf(tuned, params, root / "tuned_hf"), "logit")]


def main() -> None:
    """Prints the table."""
    logging.disable(logging.CRITICAL)
    platform.prepare("cpu")
    print("| architecture | import | export hf | export gguf | fine-tune, export hf |")
    print("|---|---|---|---|---|")
    for name, case in FAMILIES.items():
        with tempfile.TemporaryDirectory() as root:
            cells = row(case, Path(root))
        cells = [re.sub(r"e-0(\d)", r"e-\1", cell) for cell in cells]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
