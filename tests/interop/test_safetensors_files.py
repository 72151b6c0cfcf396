"""Writing and reading weights: what was given is read back, and nothing else is accepted."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.interop.safetensors_files import INDEX, WEIGHTS, WeightFiles, write_weights

TENSORS = {
    "b": np.arange(15, dtype=np.float32).reshape(3, 5),
    "a": (np.arange(7) / 8).astype(ml_dtypes.bfloat16),
    "c": (np.arange(22) / 4).astype(np.float16).reshape(2, 11),
}


def shards(directory: Path) -> Path:
    """Writes `TENSORS` as three shards: b, a, c."""
    write_weights(directory, TENSORS, shard_bytes=50)
    return directory


def rewrite_index(directory: Path, **changes: str | None) -> None:
    """Changes the file of tensors in the index; None removes a tensor."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (directory / INDEX).write_text(json.dumps(index))


def test_one_file_is_read_back_bit_for_bit(tmp_path):
    write_weights(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    files = WeightFiles(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in files.tensors.items()} == {
        "a": ((7,), "BF16"),
        "b": ((3, 5), "F32"),
        "c": ((2, 11), "F16"),
    }
    for name, tensor in TENSORS.items():
        loaded = files.load(name)
        assert loaded.dtype == tensor.dtype
        np.testing.assert_array_equal(loaded, tensor)


def test_the_file_says_that_it_has_the_layout_of_pytorch(tmp_path):
    write_weights(tmp_path, TENSORS)
    content = (tmp_path / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_other_users_can_read_the_file_as_any_other_file(tmp_path):
    write_weights(tmp_path, TENSORS)
    (tmp_path / "plain").touch()
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "view",
    [
        np.arange(15, dtype=np.float32).reshape(3, 5).T,
        np.arange(30, dtype=np.float32)[::2],
        np.arange(6, dtype=np.float32)[::-1],
        np.broadcast_to(np.float32(3), (2, 3)),
        np.array(7, np.float32),
    ],
    ids=["transposed", "strided", "reversed", "broadcast", "scalar"],
)
def test_an_array_is_stored_by_its_values_whatever_its_strides(tmp_path, view):
    write_weights(tmp_path, {"x": view})
    np.testing.assert_array_equal(load_file(tmp_path / WEIGHTS)["x"], view)


def test_arrays_are_converted_to_a_dtype(tmp_path):
    write_weights(tmp_path, {"x": np.float32([[1.001, 2], [3, 4]]).T}, dtype=ml_dtypes.bfloat16)
    loaded = WeightFiles(tmp_path).load("x")
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded.astype(np.float32), [[1, 3], [2, 4]])


def test_a_dtype_that_is_not_for_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x is float64"):
        write_weights(tmp_path, {"x": np.zeros(2)})


def test_shards_are_at_most_as_large_as_asked(tmp_path):
    shards(tmp_path)  # 60, 14 and 44 bytes: b is larger than a shard
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 118},
        "weight_map": {
            "a": "model-00002-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
        },
    }
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, *index["weight_map"].values()}
    files = WeightFiles(tmp_path)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(files.load(name), tensor)


def test_a_shard_is_written_before_the_next_tensor_is_built(tmp_path):
    class Lazy(dict):
        def items(self):
            yield "x", np.zeros(9, np.float32)
            yield "y", np.zeros(9, np.float32)
            assert len(list(tmp_path.iterdir())) == 1
            yield "z", np.zeros(9, np.float32)

    write_weights(tmp_path, Lazy(), shard_bytes=40)
    assert len(WeightFiles(tmp_path).tensors) == 3


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(RunFailed, match="cannot write the weights") as error:
        write_weights(tmp_path / "missing", TENSORS)
    assert "\n" not in str(error.value)


def test_a_type_that_is_not_for_weights_is_listed_and_not_loaded(tmp_path):
    save_file({"mask": np.ones(3, bool)}, tmp_path / WEIGHTS)
    files = WeightFiles(tmp_path)
    assert files.tensors["mask"].dtype == "BOOL"
    with pytest.raises(InputError, match="mask of type BOOL"):
        files.load("mask")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    write_weights(tmp_path, TENSORS)
    files = WeightFiles(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(InputError, match="a readable file"):
        files.load("a")
    save_file({**TENSORS, "a": np.zeros(2, np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="as it was when it was opened"):
        files.load("a")


def truncated(directory: Path) -> None:
    path = shards(directory) / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def header_only(directory: Path) -> None:
    path = shards(directory) / "model-00001-of-00003.safetensors"
    path.write_bytes(struct.pack("<Q", 10**15) + b"{}")


def missing_shard(directory: Path) -> None:
    (shards(directory) / "model-00002-of-00003.safetensors").unlink()


def tensor_in_the_index_only(directory: Path) -> None:
    rewrite_index(shards(directory), extra="model-00002-of-00003.safetensors")


def tensor_in_a_file_only(directory: Path) -> None:
    rewrite_index(shards(directory), c=None, more="model-00003-of-00003.safetensors")


def tensor_in_another_file(directory: Path) -> None:
    first, second = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    rewrite_index(shards(directory), a=first, b=second)


def tensor_in_two_files(directory: Path) -> None:
    path = shards(directory) / "model-00002-of-00003.safetensors"
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, path)


def name_twice(directory: Path) -> None:
    path = shards(directory) / INDEX
    path.write_text(path.read_text().replace('"c":', '"a":'))


def outside(directory: Path) -> None:
    (directory / "in").mkdir()
    write_weights(directory, {"c": TENSORS["c"]})
    os_path = "../model.safetensors"
    rewrite_index(shards(directory / "in"), c=os_path)


def absolute(directory: Path) -> None:
    write_weights(directory, {"c": TENSORS["c"]})
    (directory / "in").mkdir()
    rewrite_index(shards(directory / "in"), c=str(directory / WEIGHTS))


def windows(directory: Path) -> None:
    rewrite_index(shards(directory), c="C:model.safetensors")


def windows_parent(directory: Path) -> None:
    rewrite_index(shards(directory), c="..\\model.safetensors")


def pickle_in_the_index(directory: Path) -> None:
    rewrite_index(shards(directory), c="pytorch_model.bin")
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def not_a_name(directory: Path) -> None:
    rewrite_index(shards(directory), c=["model-00003-of-00003.safetensors"])


def pickle_only(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def both(directory: Path) -> None:
    write_weights(shards(directory), TENSORS)


def empty(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def no_directory(directory: Path) -> None:
    directory.rmdir()


def not_json(directory: Path) -> None:
    (directory / INDEX).write_text("{")


def deep_json(directory: Path) -> None:
    (directory / INDEX).write_text("[" * 100_000)


def no_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"metadata": {}}')


def empty_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": {}}')


BAD = {
    truncated: "model-00001-of-00003.safetensors: got 'invalid or truncated",
    header_only: "model-00001-of-00003.safetensors: got 'invalid or truncated",
    missing_shard: "model-00002-of-00003.safetensors: got 'no file'",
    tensor_in_the_index_only: "no extra in model-00002-of-00003",
    tensor_in_a_file_only: r"c in model-00003-of-00003.*does not list it",
    tensor_in_another_file: r"b in model-00001-of.*lists it in model-00002",
    tensor_in_two_files: "b in model-00001-of-00003.safetensors and model-00002",
    name_twice: "a twice",
    outside: "got '../model.safetensors'.*in the same directory",
    absolute: "model.safetensors'.*in the same directory",
    windows: "in the same directory",
    windows_parent: "in the same directory",
    pickle_in_the_index: "got 'pytorch_model.bin'.*in the same directory",
    not_a_name: "in the same directory",
    pickle_only: "pytorch_model.bin .pickle can run code",
    both: "expected one of them",
    empty: "got 'config.json'; expected model.safetensors",
    no_directory: "no directory",
    not_json: "JSONDecodeError",
    deep_json: "RecursionError",
    no_map: "KeyError",
    empty_map: "no tensors",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_weights_are_refused_by_one_line(tmp_path, damage):
    damage(tmp_path)
    inside = tmp_path / "in" if (tmp_path / "in").exists() else tmp_path
    with pytest.raises(InputError, match=BAD[damage]) as error:
        WeightFiles(inside)
    assert "\n" not in str(error.value)
