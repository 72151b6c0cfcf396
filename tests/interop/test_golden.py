"""The recorded Hugging Face models are whole: see `make_golden.py`, which made them."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
MOST_BYTES = 500_000
MODEL = {"config.json", "config_v4.json", "generation_config.json", "golden.npz"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer_cases.json"}
WITH_TOKENIZER = {"gpt2", "llama_rope_linear", "llama_rope_llama3", "qwen2"}
SHARDED = {"llama_sharded_bf16"}
FAMILIES = {
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_neox_sequential": "gpt_neox",
    "llama": "llama",
    "llama_rope_linear": "llama",
    "llama_rope_llama3": "llama",
    "llama_sharded_bf16": "llama",
    "llama_tied": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder2": "starcoder2",
    "starcoder2_no_bias": "starcoder2",
    "starcoder2_window": "starcoder2",
}
BYTES = {"F32": 4, "BF16": 2}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(path: Path) -> dict[str, str]:
    """The dtype of every tensor in a safetensors file, whose sizes must add up."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    size = sum(np.prod(t["shape"], dtype=int) * BYTES[t["dtype"]] for t in header.values())
    assert start + size == len(data)
    return {name: tensor["dtype"] for name, tensor in header.items()}


def test_all_golden_files_together_are_small():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert {path.relative_to(GOLDEN).parts[0] for path in files} == {*FAMILIES, "versions.json"}
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_versions_are_named():
    versions = read(GOLDEN / "versions.json")
    libraries = {"torch", "transformers", "transformers_4", "safetensors", "tokenizers", "numpy"}
    assert set(versions) == {"python", *libraries} and all(versions.values())
    for name in FAMILIES:
        for suffix, library in (("", "transformers"), ("_v4", "transformers_4")):
            config = read(GOLDEN / name / f"config{suffix}.json")
            assert config["transformers_version"] == versions[library]


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_is_whole(name):
    folder = GOLDEN / name
    weights = {"model.safetensors"}
    if name in SHARDED:
        index = read(folder / "model.safetensors.index.json")["weight_map"]
        shards = {shard: tensors(folder / shard) for shard in index.values()}
        assert len(shards) > 2
        assert index == {tensor: shard for shard, held in shards.items() for tensor in held}
        weights = {*shards, "model.safetensors.index.json"}
        dtypes = {dtype for held in shards.values() for dtype in held.values()}
    else:
        dtypes = set(tensors(folder / "model.safetensors").values())
    assert dtypes == ({"BF16"} if name in SHARDED else {"F32"})
    expected = MODEL | weights | (TOKENIZER if name in WITH_TOKENIZER else set())
    assert {path.name for path in folder.iterdir()} == expected
    for file in ("config.json", "config_v4.json"):
        assert read(folder / file)["model_type"] == FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_file_names_a_machine(name):
    for path in (GOLDEN / name).glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("_name_or_path", "/tmp", "/home", "://")), path


@pytest.mark.parametrize("name", FAMILIES)
def test_arrays_fit_the_configuration(name):
    config = read(GOLDEN / name / "config.json")
    vocab_size = config["vocab_size"]
    longest = config.get("n_positions") or config["max_position_embeddings"]
    with np.load(GOLDEN / name / "golden.npz") as golden:
        arrays = dict(golden)
    ids_BT, positions_P, logits_BPV = (
        arrays[key] for key in ("ids_BT", "positions_P", "logits_BPV")
    )
    prompt_T, greedy_N = arrays["prompt_T"], arrays["greedy_N"]
    for ids in (ids_BT, positions_P, prompt_T, greedy_N):
        assert ids.dtype == np.int32 and ids.min() >= 0
    for ids in (ids_BT, prompt_T, greedy_N):
        assert ids.max() < vocab_size
    assert len(greedy_N) == 16 and config["eos_token_id"] not in greedy_N
    assert len(prompt_T) + len(greedy_N) <= longest
    assert positions_P[0] == 0 and positions_P[-1] == ids_BT.shape[1] - 1 < longest
    assert logits_BPV.dtype == np.float32
    assert logits_BPV.shape == (2, len(positions_P), vocab_size)
    assert np.isfinite(logits_BPV).all() and logits_BPV.std(axis=2).min() > 0.1
    assert arrays["greedy_margin"] > 0.01 * np.abs(logits_BPV).max()


@pytest.mark.parametrize("name", sorted(WITH_TOKENIZER))
def test_tokenizer_gives_the_recorded_ids(name):
    tokenizer = Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))
    cases = read(GOLDEN / name / "tokenizer_cases.json")
    assert len(cases) > 20 and "" in [case["text"] for case in cases]
    for case in cases:
        tokenizer.encode_special_tokens = False
        assert tokenizer.encode(case["text"]).ids == case["bos"] + case["ids"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
        tokenizer.encode_special_tokens = True
        literal = tokenizer.encode(case["text"], add_special_tokens=False).ids
        assert literal == case.get("literal", case["ids"])
    assert any("literal" in case for case in cases)
    assert tokenizer.get_vocab_size() <= read(GOLDEN / name / "config.json")["vocab_size"]
