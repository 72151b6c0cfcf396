"""Adapters of the recorded Hugging Face models, and a program that writes them for PEFT.

python -m tests.interop.peft_adapters DIR    # DIR/<case>/adapter_*: see make_golden_peft.py
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sheepop_jax.config.schema import LoraConfig
from sheepop_jax.interop.export_peft import ADAPTERS, CONFIG, peft_config, peft_tensors
from sheepop_jax.interop.families import HubModel
from sheepop_jax.interop.hub_config import read_config
from sheepop_jax.interop.safetensors_files import write_weights
from sheepop_jax.model.lora import init_trained
from sheepop_jax.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
# Two that have query, key and value in one layer, and three that have not.
CASES = ("gpt2", "gpt_neox", "llama", "qwen3", "starcoder2")
LORA = LoraConfig(rank=2, alpha=6.0, dropout=0.0)


def hub_model(case: str) -> HubModel:
    """A recorded model."""
    return read_config(json.loads((GOLDEN / case / "config.json").read_text()))


def adapters_of(model: HubModel) -> dict[str, Any]:
    """Adapters that change every layer; no two numbers are equal."""
    transformer = Transformer(model.config, model.vocab_size, lora=LORA)
    shapes = jax.eval_shape(lambda: init_trained(transformer, 0))
    start = itertools.count(1, 10_000)

    def draw(leaf: Any) -> np.ndarray:
        numbers = np.arange(leaf.size) + next(start)
        return (0.3 * np.sin(numbers.reshape(leaf.shape) * 1.7)).astype(np.float32)

    drawn: dict[str, Any] = jax.tree.map(draw, shapes)
    return drawn


def main(out: Path) -> None:
    """Writes the adapters of each case."""
    for case in CASES:
        (out / case).mkdir(parents=True)
        model = hub_model(case)
        write_weights(out / case, dict(peft_tensors(model, adapters_of(model))))
        (out / case / "model.safetensors").rename(out / case / ADAPTERS)
        (out / case / CONFIG).write_text(json.dumps(peft_config(model, LORA)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
