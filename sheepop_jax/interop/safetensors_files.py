"""The safetensors files of a Hugging Face model directory: sharded, checked, one tensor at a time.

Weights are in `model.safetensors`, or in shards that `model.safetensors.index.json` lists. Only
safetensors are read: a pickle file can run code when it is opened.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.files import read_text, write_atomic

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Name in the format -> NumPy dtype, for the types of weights.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def write_weights(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
) -> None:
    """Writes tensors to `model.safetensors`, or to shards and their index.

    Memory: each tensor is read from the mapping once, so a mapping may build its arrays on demand;
    converted and noncontiguous arrays are copied, one shard at a time.

    Args:
        directory: an existing directory without weights.
        tensors: arrays by name, in the order of the file; views with any strides.
        shard_bytes: largest total size of a shard's tensors; a larger tensor gets its own shard.
        dtype: float32, float16 or bfloat16 to convert to; None keeps each array's own.

    Raises:
        RunFailed: a file cannot be written, as on a full disk.
        ValueError: an array has another dtype.
    """
    places: dict[str, int] = {}  # tensor -> number of its shard, from 0
    total = count = 0
    for shard in _shards(tensors, shard_bytes, dtype):
        _write(directory / _pending(count), shard)
        places |= dict.fromkeys(shard, count)
        total += sum(tensor.nbytes for tensor in shard.values())
        count += 1
    if count == 1:
        os.replace(directory / _pending(0), directory / WEIGHTS)
        return
    names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    for index, name in enumerate(names):  # their names hold the number of shards
        os.replace(directory / _pending(index), directory / name)
    index_file = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[place] for name, place in sorted(places.items())},
    }
    write_atomic(directory / INDEX, json.dumps(index_file, indent=2) + "\n")


def _shards(
    tensors: Mapping[str, np.ndarray], shard_bytes: int, dtype: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Groups converted tensors, in order, into shards of at most `shard_bytes`; at least one."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors.items():
        # The library copies bytes from the array's start, whatever its strides.
        converted = np.ascontiguousarray(tensor, dtype or tensor.dtype).reshape(tensor.shape)
        if converted.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {converted.dtype}, not float32, float16 or bfloat16")
        if shard and size + converted.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = converted
        size += converted.nbytes
    yield shard


def _pending(index: int) -> str:
    return f".model-{index}.safetensors"


def _write(path: Path, shard: dict[str, np.ndarray]) -> None:
    """Writes one file and syncs it to disk."""
    try:
        path.touch()
        mode = path.stat().st_mode  # the library's file is private to the user, whatever the umask
        # Older readers of PyTorch weights refuse a file without this format.
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise RunFailed(f"{path.parent}: cannot write the weights ({error})") from None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, before it is loaded.

    Attributes:
        file: name of its file in the directory.
        shape: its shape.
        dtype: its type's name in the format: a key of `DTYPES`, or another as I64.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The weights of a Hugging Face directory: all headers checked, tensors loaded on demand.

    Attributes:
        directory: the directory.
        tensors: every tensor, by name.
    """

    def __init__(self, directory: str | Path):
        """Reads and checks the headers.

        Raises:
            InputError: no safetensors, a shard that is missing or invalid, or an index that does
                not match the shards.
        """
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        listed = self._listed()
        for file in sorted(set(listed.values())) if listed is not None else [WEIGHTS]:
            for name, info in self._header(file).items():
                if name in self.tensors:
                    got = f"{name} in {self.tensors[name].file} and {file}"
                    raise InputError(str(self.directory), got, "each tensor in one file")
                self.tensors[name] = info
        if listed is None:
            return
        index = str(self.directory / INDEX)
        for name, info in self.tensors.items():
            if listed.get(name) != info.file:
                place = f"lists it in {listed[name]}" if name in listed else "does not list it"
                raise InputError(index, f"{name} in {info.file}", f"the index's files ({place})")
        for name, file in listed.items():
            if name not in self.tensors:
                raise InputError(index, f"no {name} in {file}", "every tensor of the index")

    def load(self, name: str) -> np.ndarray:
        """Loads one tensor: float32, float16 or `ml_dtypes.bfloat16`, as stored.

        Raises:
            InputError: its type is another, or the file has changed since.
        """
        info = self.tensors[name]
        path = self.directory / info.file
        if info.dtype not in DTYPES:
            raise InputError(str(path), f"{name} of type {info.dtype}", " or ".join(DTYPES))
        # Closed after each tensor: the file is mapped, and its pages count as memory of the process
        # until then.
        try:
            with safe_open(path, framework="numpy") as file:
                tensor = np.asarray(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise InputError(str(path), f"{name}: {error}", "a readable file") from None
        if tensor.shape != info.shape or tensor.dtype != DTYPES[info.dtype]:
            raise InputError(str(path), f"another {name}", "the file as it was when it was opened")
        return tensor

    def _listed(self) -> dict[str, str] | None:
        """The index, tensor -> file; None if one file holds all weights."""
        whole, index = self.directory / WEIGHTS, self.directory / INDEX
        if whole.is_file() and index.is_file():
            got = f"{WEIGHTS} and {INDEX}"
            raise InputError(str(self.directory), got, "one of them")
        if whole.is_file():
            return None
        if index.is_file():
            return _read_index(index)
        if not self.directory.is_dir():
            raise InputError(str(self.directory), "no directory", "a Hugging Face directory")
        present = sorted(path.name for path in self.directory.iterdir())
        pickles = [name for name in present if name.lower().endswith(_PICKLES)]
        if pickles:
            got = f"{', '.join(pickles[:3])} (pickle can run code; not opened)"
            hint = "saving the model with `safe_serialization=True`"
            raise InputError(str(self.directory), got, f"{WEIGHTS} or {INDEX}", hint)
        found = ", ".join(present[:5]) or "no files"
        raise InputError(str(self.directory), found, f"{WEIGHTS} or {INDEX}")

    def _header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of one file; the library checks its size and offsets."""
        path = self.directory / file
        if not path.is_file():
            raise InputError(str(path), "no file", f"a shard that {INDEX} lists")
        found = {}
        try:
            with safe_open(path, framework="numpy") as opened:
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    found[name] = TensorInfo(file, shape, str(tensor.get_dtype()))
        except (OSError, SafetensorError) as error:
            reason = f"invalid or truncated ({error})"
            raise InputError(str(path), reason, "a whole safetensors file") from None
        return found


def _read_index(path: Path) -> dict[str, str]:
    """Reads and checks an index: tensor -> name of a file beside it."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(str(path), f"{twice} twice", "each name once")
        return content

    try:
        text = read_text(path, str(path))
        listed = json.loads(text, object_pairs_hook=without_duplicates)["weight_map"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError(str(path), got, "JSON with a `weight_map`") from None
    if not isinstance(listed, dict) or not listed:
        raise InputError(str(path), "no tensors", "a `weight_map` of tensors to files")
    for file in listed.values():
        if not isinstance(file, str) or not _is_plain(file):
            raise InputError(str(path), file, "names of .safetensors files in the same directory")
    return listed


def _is_plain(file: str) -> bool:
    """Whether a name denotes a safetensors file in the same directory, on any system."""
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0")
