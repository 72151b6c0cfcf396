"""Writes the adapters of a run for PEFT, Hugging Face's library, on its base model as exported.

Alphabet: r rank, D model width. Our A [in, r] and B [r, out] are PEFT's transposed.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.config.schema import LoraConfig
from sheepop_jax.errors import InputError
from sheepop_jax.files import write_atomic
from sheepop_jax.interop.families import HubModel, for_export
from sheepop_jax.interop.hub_tensors import Tensor, tensors
from sheepop_jax.interop.new_directory import check_new, new_directory
from sheepop_jax.interop.safetensors_files import WEIGHTS, write_weights

ADAPTERS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_peft(run: Run, out: Path, dtype: str = "float32") -> HubModel:
    """Checks what can be checked without the adapters.

    Args:
        run: the run.
        out: the directory to write.
        dtype: of the weights; adapters are small, and only float32 is written.

    Returns:
        The adapted model as Hugging Face files hold it.

    Raises:
        InputError: the run has no adapters, no architecture computes its model, `out` exists, or
            another dtype.
    """
    if run.config.train.lora is None:
        expected = "a run with adapters (train.lora_rank) for `format=peft`"
        raise InputError("ckpt", str(run.directory), expected, "`format=hf`")
    if dtype != "float32":
        raise InputError("dtype", dtype, "float32 for `format=peft`")
    model = for_export(run.config.model, run.model().vocab_size)
    check_new(out, "out")
    return model


def export_peft(run: Run, adapters: Mapping[str, Any], out: Path) -> HubModel:
    """Writes `adapter_model.safetensors` and `adapter_config.json`.

    `out` appears by one rename when everything is written and synced to disk.

    Args:
        run: the run.
        adapters: its adapters: a nested dict of fp32 arrays.
        out: a directory that does not exist or is empty.

    Returns:
        The adapted model as Hugging Face files hold it.

    Raises:
        InputError: see `check_peft`. Nothing is written.
        RunFailed: a file cannot be written, as on a full disk. Nothing is left.
    """
    model, lora = check_peft(run, out), run.config.train.lora
    if lora is None:
        raise ValueError(f"{run.directory} has no adapters")
    with new_directory(out, "out") as pending:
        config = json.dumps(peft_config(model, lora), indent=2)
        write_atomic(pending / CONFIG, config + "\n")
        write_weights(pending, dict(peft_tensors(model, adapters)), sys.maxsize)
        os.replace(pending / WEIGHTS, pending / ADAPTERS)
    return model


def peft_config(model: HubModel, lora: LoraConfig) -> dict[str, Any]:
    """`adapter_config.json`, as PEFT reads it; each layer's factor is its alpha / rank."""
    modules = {_module(layer).rpartition(".")[2]: len(layer.paths) for layer in _layers(model)}
    joined = {name: parts for name, parts in modules.items() if parts > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        # Query, key and value in one layer: their factors side by side, with the same alpha / rank.
        "rank_pattern": {name: parts * lora.rank for name, parts in joined.items()},
        "alpha_pattern": {name: parts * lora.alpha for name, parts in joined.items()},
        "fan_in_fan_out": model.family.name == "gpt2",
        "bias": "none",
    }


def _layers(model: HubModel) -> list[Tensor]:
    """The weights of the linear layers."""
    return [t for t in tensors(model) if t.paths and t.paths[0][-1] == "kernel"]


def _module(layer: Tensor) -> str:
    return layer.name.removesuffix(".weight")


def peft_tensors(model: HubModel, adapters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the file, by name."""
    for layer in _layers(model):
        a_RI, b_OR = _factors(layer, adapters)
        name = f"base_model.model.{_module(layer)}"
        yield f"{name}.lora_A.weight", a_RI
        yield f"{name}.lora_B.weight", b_OR


def _factors(layer: Tensor, adapters: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A [R, in] and B [out, R]; R is r, or 3 r where query, key and value are one layer.

    Then B is packed as the layer's kernel, with each part's factor in rows of its own: the product
    is that of each part.
    """
    parts = []
    for path in layer.paths:
        found: Any = adapters
        for name in path[:-1]:
            found = found[name]
        parts.append((np.asarray(found["lora_A"]), np.asarray(found["lora_B"])))
    rank, count = parts[0][1].shape[0], len(parts)
    placed: dict[str, Any] = {}
    for number, (path, (_, b)) in enumerate(zip(layer.paths, parts, strict=True)):
        rows = np.zeros((count * rank, b.shape[1]), b.dtype)
        rows[number * rank : (number + 1) * rank] = b
        inner = placed
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner["kernel"] = rows
    shapes = tuple((count * rank, shape[1]) for shape in layer.shapes)
    outputs_first = layer.layout in ("transposed", "per_head")
    outputs = layer.shape[0] if outputs_first else layer.shape[1]
    shape = (outputs, count * rank) if outputs_first else (count * rank, outputs)
    b = replace(layer, shape=shape, shapes=shapes).pack(placed)
    return np.concatenate([a.T for a, _ in parts]), b if outputs_first else b.T
