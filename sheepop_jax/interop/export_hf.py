"""Writes a run as a Hugging Face model directory, for transformers, vLLM and others."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.files import write_atomic
from sheepop_jax.interop.families import HubModel, for_export
from sheepop_jax.interop.hub_config import write_config
from sheepop_jax.interop.hub_tensors import Tensor, tensors
from sheepop_jax.interop.model_card import CARD, model_card
from sheepop_jax.interop.new_directory import check_new, new_directory
from sheepop_jax.interop.safetensors_files import write_weights
from sheepop_jax.interop.tokenizer_files import special_ids, write_tokenizer

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


def check_hf(run: Run, out: Path, dtype: str = "float32") -> HubModel:
    """Checks what can be checked without the parameters.

    Args:
        run: the run.
        out: the directory to write.
        dtype: of the weights: a key of `DTYPES`.

    Returns:
        The model as Hugging Face files hold it.

    Raises:
        InputError: no architecture computes the same (names the field and the nearest that works),
            `out` exists, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", dtype, "one of " + ", ".join(DTYPES) + " for `format=hf`")
    model = for_export(run.config.model, run.model().vocab_size)
    check_new(out, "out")
    return model


def export_hf(
    run: Run,
    params: Mapping[str, Any],
    step: int,
    out: Path,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> HubModel:
    """Writes weights, configuration, tokenizer and model card.


    `out` appears by one rename when everything is written and synced to disk.

    Args:
        run: the run.
        params: its parameters: a nested dict of fp32 arrays.
        step: the step of the parameters.
        out: a directory that does not exist or is empty.
        dtype: of the weights: a key of `DTYPES`.
        shard_bytes: weights above this size are written as several files.

    Returns:
        The model as Hugging Face files hold it.

    Raises:
        InputError: see `check_hf`; or float16 does not hold a weight. Nothing is written.
        RunFailed: a file cannot be written, as on a full disk. Nothing is left.
    """
    model = check_hf(run, out, dtype)
    with new_directory(out, "out") as pending:
        config = {
            **write_config(model),
            **special_ids(run.tokenizer),
            "dtype": dtype,
            "torch_dtype": dtype,  # its name in transformers 4
        }
        write_atomic(pending / "config.json", json.dumps(config, indent=2) + "\n")
        write_tokenizer(pending, run.tokenizer, model.config.max_seq_len)
        write_atomic(pending / CARD, model_card(run, model, step, dtype))
        write_weights(pending, _Packed(model, params, DTYPES[dtype]), shard_bytes, DTYPES[dtype])
    return model


def write_card(
    run: Run, model: HubModel, step: int, out: Path, dtype: str, verification: str
) -> None:
    """Writes the model card of an exported directory again, with the result of its verification.

    Raises:
        RunFailed: it cannot be written.
    """
    try:
        write_atomic(out / CARD, model_card(run, model, step, dtype, verification))
    except OSError as error:
        raise RunFailed(f"{out / CARD}: cannot be written ({error.strerror or error})") from None


class _Packed(Mapping[str, np.ndarray]):
    """The tensors of a model's file by name, each packed when it is read."""

    def __init__(self, model: HubModel, params: Mapping[str, Any], dtype: np.dtype[Any]):
        self._tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors(model)}
        self._params, self._dtype = params, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        packed = self._tensors[name].pack(self._params)
        if self._dtype == np.float16 and packed.size:
            largest = float(np.max(np.abs(packed)))
            if largest > LARGEST_FLOAT16:
                expected = f"a dtype that holds {largest:.6g}, the largest weight of {name}"
                raise InputError("dtype", "float16", expected, "`dtype=bfloat16`")
        return packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
