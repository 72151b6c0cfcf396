"""Imports a Hugging Face model directory as a run that can be sampled, evaluated and trained on.

Strict: every key of config.json and every tensor is used exactly once, or the import is refused
before any weights are loaded. Nothing in the directory is executed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.config.schema import SCHEMA, Config
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.files import sha256_of_file, write_atomic
from sheepop_jax.interop.families import HubModel
from sheepop_jax.interop.hub_config import read_config
from sheepop_jax.interop.hub_tensors import Tensor, canonical_name, output_name, tensors
from sheepop_jax.interop.hub_tokenizer import read_json, read_tokenizer
from sheepop_jax.interop.new_directory import check_new, new_directory
from sheepop_jax.interop.reference import HubReference
from sheepop_jax.interop.safetensors_files import DTYPES, WeightFiles
from sheepop_jax.interop.transformers_model import (
    NotCompared,
    NotReadable,
    one_line,
    transformers_model,
)
from sheepop_jax.model.transformer import logits

# Windows of `evaluate`; those of some public models do not fit into memory.
_LONGEST_WINDOW = 2048
# Of the largest logit. fp32 differs from float64 by less than 1e-5 in shallow models; a wrong
# tensor or field by more than 1e-2.
LARGEST_ERROR = 1e-3
_TEXT = "In the year 1843, the shepherd's dog wasn't in the café; it had counted 27 sheep.\n\tThen"
_TOKENS = 32  # per row of the verification


@dataclass(frozen=True)
class HubFiles:
    """A Hugging Face directory that can be imported; the weights are not loaded yet.

    Attributes:
        directory: the directory.
        model: its architecture.
        weights: its safetensors.
        names: name of a tensor in `weights` for each of `tensors(model)`.
        copy: name of a copy of the embedding, which a tied model may have; or "".
        tokenizer: its tokenizer, with BOS and end-of-text.
    """

    directory: Path
    model: HubModel
    weights: WeightFiles
    names: Mapping[str, str]
    copy: str
    tokenizer: Tokenizer

    @property
    def num_parameters(self) -> int:
        """The number of weights that are imported."""
        used = [self.weights.tensors[name] for name in self.names.values()]
        return sum(int(np.prod(info.shape, dtype=np.int64)) for info in used)

    @property
    def dtypes(self) -> str:
        """The types of the weights in the files."""
        used = {self.weights.tensors[name].dtype for name in self.names.values()}
        return ", ".join(sorted(str(DTYPES[name]) for name in used))


@dataclass(frozen=True)
class Verification:
    """The imported run against another program that reads the imported files.

    Attributes:
        reference: the other program.
        positions: number of positions compared.
        max_error: largest difference of a logit, relative to the largest logit.
        mean_kl: mean KL divergence of the next token, in nats.
        same_token: number of positions with the same most likely token.
    """

    reference: str
    positions: int
    max_error: float
    mean_kl: float
    same_token: int


@dataclass(frozen=True)
class Verified:
    """What the imported run was compared with.

    Attributes:
        results: the comparisons: with `HubReference`, and with transformers where installed.
        notes: what was not compared, and why.
    """

    results: tuple[Verification, ...]
    notes: tuple[str, ...]


def check_hf_files(directory: Path) -> HubFiles:
    """Checks a Hugging Face directory: configuration, headers of the weights, tokenizer.

    Raises:
        InputError: something is missing, unknown, contradictory or not built; names it.
    """
    if not directory.is_dir():
        hint = "downloading it first, with `hf download NAME --local-dir DIR`".replace("`", "'")
        raise InputError("hf", str(directory), "a local directory", hint)
    path = directory / "config.json"
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "nothing"
        raise InputError(str(path), f"no file beside {present}", "a Hugging Face model directory")
    config = read_json(path)
    model = read_config(config, str(path))
    weights = WeightFiles(directory)
    if model.config.num_layers > len(weights.tensors):  # before naming the tensors of each
        expected = f"at most {len(weights.tensors)}, the number of tensors"
        raise InputError(f"{path}: number of layers", model.config.num_layers, expected)
    names, copy = _assign(weights, model)
    tokenizer = read_tokenizer(directory, config, model.vocab_size)
    return HubFiles(directory, model, weights, names, copy, tokenizer)


def import_hf(
    directory: Path, out: Path, defaults: Config, verify: bool = True
) -> tuple[HubFiles, Verified | None]:
    """Imports a Hugging Face directory as the run `out`, which appears whole by one rename.

    Peak memory is the fp32 weights, and of the largest tensor two more copies.

    Args:
        directory: a local directory with config.json, safetensors and tokenizer.json.
        out: the run directory; it does not exist, or is empty.
        defaults: the configuration of everything but the model.
        verify: whether to compare the logits of the run with those of `HubReference`, and of
            transformers where it is installed.

    Returns:
        What was imported, and the results of the verification.

    Raises:
        InputError: see `check_hf_files`; or `out` exists. Nothing is written.
        RunFailed: the disk is full, or the logits differ. Nothing is written.
    """
    check_new(out, "out")
    files = check_hf_files(directory)
    with new_directory(out, "out") as pending:
        record = _record(files, _config(files.model, defaults))
        (pending / "tokenizer.json").write_text(files.tokenizer.to_json(), encoding="utf-8")
        write_atomic(pending / "config.json", json.dumps(record, indent=1) + "\n")
        CheckpointSaver(pending / "checkpoints").save_params(load_params(files))
        verification = None
        if verify:
            verification = _verify(files, open_run(pending))
    return files, verification


def load_params(files: HubFiles) -> dict[str, Any]:
    """Loads the parameters of `Transformer`, a nested dict of fp32 arrays, tensor by tensor.

    Raises:
        InputError: a weight is not finite, or the copy of a tied embedding differs from it.
    """
    wanted = {tensor.name: tensor for tensor in tensors(files.model)}
    if files.copy:
        _check_copy(files)
    params: dict[str, Any] = {}
    # The largest first: the copies of a tensor that is being loaded add to all before it.
    for name in sorted(wanted, key=lambda name: -int(np.prod(wanted[name].shape, dtype=np.int64))):
        stored = files.names[name]
        loaded = files.weights.load(stored)
        if not np.isfinite(loaded).all():
            where = files.directory / files.weights.tensors[stored].file
            raise InputError(str(where), f"{stored} with inf or nan", "finite weights")
        for path, array in wanted[name].unpack(loaded).items():
            place = params
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = jnp.asarray(array.astype(np.float32, copy=False))
        del loaded
    return params


def _assign(weights: WeightFiles, model: HubModel) -> tuple[dict[str, str], str]:
    """The stored name of each tensor of the model, and of a copy of the embedding.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or not of floats.
    """
    wanted: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors(model)}
    found: dict[str, str] = {}
    where, copy = str(weights.directory), ""
    for stored, info in weights.tensors.items():
        name = canonical_name(model, stored)
        if name is None:  # a mask or frequencies, which follow from the configuration
            continue
        if name in found:
            raise InputError(where, f"{stored} and {found[name]}", "each tensor once")
        tensor = wanted.get(name)
        if tensor is None and name == output_name(model) and not copy:
            copy, tensor = stored, next(iter(wanted.values()))  # the embedding
        elif tensor is None:
            kind = model.family.title
            expected = f"only tensors of {kind} with {model.config.num_layers} layers"
            raise InputError(where, f"an unknown tensor {stored}", expected)
        else:
            found[name] = stored
        if info.shape != tensor.shape:
            expected = f"{list(tensor.shape)}, by config.json"
            raise InputError(f"{where}: {stored}", f"shape {list(info.shape)}", expected)
        if info.dtype not in DTYPES:
            raise InputError(f"{where}: {stored}", f"type {info.dtype}", " or ".join(DTYPES))
    if missing := [name for name in wanted if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        expected = f"every tensor of {model.family.title} (tie_word_embeddings = "
        expected += f"{str(model.config.tie_embeddings).lower()})"
        raise InputError(where, f"no {missing[0]}{more}", expected)
    return found, copy


def _check_copy(files: HubFiles) -> None:
    """Checks that the copy of a tied embedding is one."""
    embedding = next(iter(tensors(files.model))).name
    first, second = (files.weights.load(n) for n in (files.names[embedding], files.copy))
    if first.dtype != second.dtype or not np.array_equal(first, second):
        expected = f"a copy of {files.names[embedding]}, since tie_word_embeddings is true"
        raise InputError(f"{files.directory}: {files.copy}", "other values", expected)


def _config(model: HubModel, defaults: Config) -> Config:
    length = min(model.config.max_seq_len, _LONGEST_WINDOW)
    return replace(defaults, model=model.config, data=replace(defaults.data, seq_len=length))


def _record(files: HubFiles, config: Config) -> dict[str, Any]:
    """The content of the run's config.json: no data, shards or gzip figure."""
    weights = sorted({info.file for info in files.weights.tensors.values()})
    return {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "vocab_size": files.model.vocab_size,
        "imported": {
            "format": "hf",
            "directory": str(files.directory.resolve()),
            "architecture": files.model.family.architecture,
            "dtype": files.dtypes,
            "sha256": {name: sha256_of_file(files.directory / name) for name in weights},
        },
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "safetensors")},
    }


def _verify(files: HubFiles, run: Run) -> Verified:
    """Compares logits of a text, and of ids from the whole vocabulary.

    Raises:
        RunFailed: they differ.
    """
    length, tokenizer = min(_TOKENS, files.model.config.max_seq_len), run.tokenizer
    spread = np.linspace(0, files.model.vocab_size - 1, length).astype(np.int32)
    text = spread[::-1]  # a vocabulary of characters may lack those of the text
    if not tokenizer.has_fixed_characters:
        ids = tokenizer.encode(_TEXT) * length
        text = np.array([*tokenizer.prompt_start, *ids][:length], np.int32)
    ids_BT = np.stack([text, spread])
    ours_BTV = logits_of(run, ids_BT)

    def compared(name: str, expected_BTV: np.ndarray, unused: str = "") -> Verification:
        found = compare_logits(name, ours_BTV, expected_BTV)
        if not found.max_error <= LARGEST_ERROR:
            raise RunFailed(
                f"{files.directory}: the imported model computes other logits than {name} "
                f"(relative error {found.max_error:.1e}, allowed {LARGEST_ERROR:.0e}{unused}); "
                "nothing was written"
            )
        return found

    reference = HubReference(files.directory)
    results = [compared("a float64 computation", np.stack(list(reference.logits(ids_BT))))]
    try:
        name, theirs, unused = transformers_model(files.directory)
    except NotCompared as error:
        return Verified(tuple(results), (str(error),))
    except NotReadable as error:  # by an older release, perhaps; the other reader has agreed
        return Verified(tuple(results), (f"{error.name}: not compared ({error})",))
    try:
        expected_BTV = np.stack([theirs(ids_T) for ids_T in ids_BT])
    except Exception as error:  # of any type
        return Verified(tuple(results), (f"{name}: not compared ({one_line(error)})",))
    results.append(compared(name, expected_BTV, f", {unused}"[:300] if unused else ""))
    return Verified(tuple(results), ())


def logits_of(run: Run, ids_BT: np.ndarray) -> np.ndarray:
    """The logits [B, T, V] of a run in fp32, on the first local device."""
    params, _ = run.params()
    model = run.model(jnp.float32)

    @jax.jit
    def forward(params: Any, ids_BT: jax.Array) -> jax.Array:
        hidden_BTD, _ = model.apply({"params": params}, ids_BT)
        logits_BTV = logits(model, params, hidden_BTD)
        return logits_BTV[..., : model.vocab_size]

    with jax.default_matmul_precision("highest"):  # GPUs round the factors otherwise
        return np.asarray(forward(params, jnp.asarray(ids_BT, jnp.int32)))


def compare_logits(
    reference: str, logits_BTV: np.ndarray, expected_BTV: np.ndarray
) -> Verification:
    """Compares logits with those of a reference, in float64."""
    found, expected = logits_BTV.astype(np.float64), expected_BTV.astype(np.float64)
    logp, expected_logp = _log_softmax(found), _log_softmax(expected)
    kl_BT = np.sum(np.exp(expected_logp) * (expected_logp - logp), -1)
    return Verification(
        reference=reference,
        positions=kl_BT.size,
        max_error=float(np.abs(found - expected).max() / np.abs(expected).max()),
        mean_kl=float(kl_BT.mean()),
        same_token=int(np.count_nonzero(found.argmax(-1) == expected.argmax(-1))),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
