"""The model card (README.md) of an exported model."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sheepop_jax.checkpoint.checkpoints import DamagedCheckpoint
from sheepop_jax.checkpoint.run import Run
from sheepop_jax.config.data import DataConfig
from sheepop_jax.errors import InputError, masked
from sheepop_jax.formatting import format_count
from sheepop_jax.interop.families import HubModel
from sheepop_jax.interop.hub_tensors import tensors

CARD = "README.md"
UNVERIFIED = "Not verified: exported without the comparison with the original run."
# Figures of a checkpoint: name in its manifest → name in the card.
_FIGURES = {
    "val_loss": "validation loss (nats per token)",
    "val_perplexity": "validation perplexity",
    "val_bits_per_byte": "validation bits per byte",
    "val_accuracy": "validation accuracy",
}


def model_card(
    run: Run, model: HubModel, step: int, dtype: str, verification: str = UNVERIFIED
) -> str:
    """Formats the card in Markdown.

    Args:
        run: the run.
        model: its model as Hugging Face files hold it.
        step: the exported step.
        dtype: of the weights.
        verification: the verification table, or a sentence.
    """
    config = model.config
    size = sum(math.prod(tensor.shape) for tensor in tensors(model) if tensor.paths)
    heads = f"{config.num_heads} query heads, {config.kv_heads} key/value heads"
    shape = f"{config.num_layers} layers, width {config.d_model}, {heads} of width"
    rows = {
        "architecture": f"`{model.family.architecture}`",
        "parameters": format_count(size),
        "shape": f"{shape} {config.head_width}, feed-forward width {config.d_ff}",
        "context": f"{config.max_seq_len} tokens",
        "vocabulary": f"{model.vocab_size} tokens",
        "dtype of the weights": dtype,
    }
    name = run.directory.resolve().name
    made, origin = "trained with", "Training"
    if run.imported:
        made, origin = "imported into", "Origin"
    # AutoTokenizer of transformers 5 gives any Qwen2 the tokenizer of the public models.
    loader = "PreTrainedTokenizerFast" if model.family.name == "qwen2" else "AutoTokenizer"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- sheepop_jax
---

# {name}

A decoder-only language model, {made} sheepop_jax and exported at step {step}.

```python
from transformers import AutoModelForCausalLM, {loader}

tokenizer = {loader}.from_pretrained(".")  # this directory
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```

## Model

{_table(rows)}

## {origin}

{_table(dict(_training(run, step)))}

## Verification

{verification}
"""


def _table(rows: dict[str, str]) -> str:
    lines = []
    for name, value in rows.items():
        escaped = value.replace("|", "\\|")
        lines.append(f"| {name} | {escaped} |")
    return "\n".join(["| | |", "|---|---|", *lines])


def _training(run: Run, step: int) -> Iterator[tuple[str, str]]:
    config, identity = run.config, run.data_identity
    if run.imported:
        yield "imported from", Path(run.imported["directory"]).name
        yield "dtype of those weights", run.imported["dtype"]
        return
    if config.train.init_from:
        yield "parameters at the start", Path(config.train.init_from).name
    if lora := config.train.lora:
        yield "trained", f"adapters (LoRA) of rank {lora.rank}, alpha {lora.alpha:g}; merged"
    sources = [_source(part.config) for part in config.data.parts]
    yield "text", ", ".join(dict.fromkeys(sources))
    for side in ("train", "validation"):
        if (count := identity.get(f"{side}_tokens")) is not None:
            yield f"{side} tokens", format_count(count)
    yield "updates", str(step)
    yield "sequences per update", str(config.train.sequences_per_update)
    yield "tokens per sequence", str(config.data.seq_len)
    yield "optimizer", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"
    for name, title in _FIGURES.items():
        if (value := _figures(run, step).get(name)) is not None:
            yield title, f"{value:.4f}"


def _source(data: DataConfig) -> str:
    """Where the text came from, without local directories, which are nobody else's business."""
    source = data.resolved_source
    if source == "stdlib":
        return "Python's standard library"
    if source == "hub":
        return f"dataset {data.name} {data.subset}".strip()
    items = map(str.strip, data.path.split(","))
    names = (masked(item) if "://" in item else Path(item).name for item in items)
    return f"{source}: " + ", ".join(names)


def _figures(run: Run, step: int) -> dict[str, Any]:
    """The metrics of a checkpoint; empty if it was not evaluated."""
    with contextlib.suppress(DamagedCheckpoint, InputError, KeyError):
        return dict(run.checkpoints.manifest(step)["figures"])
    return {}
