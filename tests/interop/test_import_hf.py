"""Hugging Face directories become runs with the same logits, or are refused and leave nothing.

The recorded models are those of `make_golden.py`.
"""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.schema import Config
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.generation import engine
from sheepop_jax.interop import hub_tensors, import_hf, transformers_model
from sheepop_jax.interop.export_hf import export_hf
from sheepop_jax.interop.hub_config import read_config
from sheepop_jax.interop.hub_tokenizer import read_tokenizer
from sheepop_jax.interop.reference import HubReference
from sheepop_jax.interop.safetensors_files import write_weights
from tests.interop.fake import fake_transformers

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CHARACTERS = train_char(["abcdefghijklmnopqrstuvwxyz .,"])


def defaults() -> Config:
    return Config.from_dict(base.get_config())


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hub(tmp_path: Path, case: str) -> Path:
    """A copy of a recorded model; one without a tokenizer gets a small one."""
    directory = tmp_path / "hub"
    shutil.copytree(GOLDEN / case, directory)
    if not (directory / "tokenizer.json").exists():
        (directory / "tokenizer.json").write_text(CHARACTERS.to_json(), encoding="utf-8")
        config = read(directory / "config.json")
        change(directory, bos_token_id=0, eos_token_id=0, vocab_size=config["vocab_size"])
    return directory


def change(directory: Path, file: str = "config.json", **values: Any) -> None:
    found = read(directory / file) if (directory / file).exists() else {}
    (directory / file).write_text(json.dumps(found | values), encoding="utf-8")


def drawn(tmp_path: Path, tokenizer: str, **values: Any) -> Path:
    """A random Starcoder2 with the tokenizer of a recorded model."""
    directory = tmp_path / "hub"
    directory.mkdir()
    shutil.copy(GOLDEN / "starcoder2" / "config.json", directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / tokenizer / name, directory)
    ids = {name: read(GOLDEN / tokenizer / "config.json")[name] for name in ("eos_token_id",)}
    change(directory, **({"vocab_size": 345, "bos_token_id": None} | ids | values))
    generator = np.random.default_rng(0)
    wanted = hub_tensors.tensors(read_config(read(directory / "config.json")))
    tensors = {t.name: 0.3 * generator.standard_normal(t.shape) for t in wanted}
    write_weights(directory, tensors, dtype=np.float32)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    import_hf.import_hf(hub(tmp_path, case), tmp_path / "run", defaults(), verify=False)
    golden = np.load(GOLDEN / case / "golden.npz")
    ids_BT, greedy_N = golden["ids_BT"], golden["greedy_N"]
    prompt = golden["prompt_T"].tolist()
    rows = [*ids_BT.tolist(), [*prompt, *greedy_N.tolist()[:-1]]]
    length = max(map(len, rows))
    padded_BT = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    logits_BTV = import_hf.logits_of(open_run(tmp_path / "run"), padded_BT)
    found, expected = logits_BTV[:2, golden["positions_P"]], golden["logits_BPV"]
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    start = len(prompt) - 1
    assert logits_BTV[2, start : start + len(greedy_N)].argmax(-1).tolist() == greedy_N.tolist()


@pytest.mark.parametrize("case", [p.parent.name for p in sorted(GOLDEN.glob("*/tokenizer.json"))])
def test_a_tokenizer_encodes_as_transformers_does(case, tmp_path):
    directory = GOLDEN / case
    config = read(directory / "config.json")
    tokenizer = read_tokenizer(directory, config, config["vocab_size"])
    again = Tokenizer.from_json(tokenizer.to_json())
    # Qwen's `<|im_end|>` ends a turn of a chat, not a document.
    ends = {"qwen2": 296}
    for found in (tokenizer, again):
        assert found.end_of_text == ends.get(case, config["eos_token_id"])
        for expected in read(directory / "tokenizer_cases.json"):
            ids = expected.get("literal", expected["ids"])
            assert found.encode(expected["text"]) == ids
            assert found.encode_prompt(expected["text"]) == expected["bos"] + ids
            assert found.decode(expected["ids"], skip_special=False) == expected["decoded"]
        assert len(found.prompt_start) == (1 if case.startswith("llama") else 0)


@pytest.mark.parametrize(
    ("options", "has_bos"),
    [
        ({}, True),
        ({"add_bos_token": None}, True),
        ({"add_bos_token": False}, False),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, True),
    ],
)
def test_whether_texts_begin_with_bos(options, has_bos, tmp_path):
    directory = hub(tmp_path, "llama_rope_linear")
    (directory / "tokenizer_config.json").write_text(json.dumps(options))
    assert read_tokenizer(directory, {"eos_token_id": 2}, 339).bos_id == (1 if has_bos else None)
    change(directory, "tokenizer.json", post_processor=None)
    explicit = bool(options.get("add_bos_token"))
    assert read_tokenizer(directory, {"eos_token_id": 2}, 339).bos_id == (1 if explicit else None)


def test_a_chain_of_post_processors_may_hold_the_template(tmp_path):
    directory = hub(tmp_path, "llama_rope_llama3")
    (directory / "tokenizer_config.json").unlink()
    template = read(directory / "tokenizer.json")["post_processor"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    chain = {"type": "Sequence", "processors": [{**byte_level, "use_regex": True}, template]}
    change(directory, "tokenizer.json", post_processor=chain)
    tokenizer = read_tokenizer(directory, {"eos_token_id": [302, 304]}, 306)
    assert (tokenizer.bos_id, tokenizer.end_of_text) == (301, 302)


def test_more_rows_than_tokens_are_part_of_the_vocabulary(tmp_path, run_program):
    import_hf.import_hf(hub(tmp_path, "starcoder2"), tmp_path / "run", defaults(), verify=False)
    run = open_run(tmp_path / "run")
    tokens = run.tokenizer.vocab_size
    assert tokens < run.vocab_size == run.model().vocab_size == 61
    assert run.tokenizer.decode([1, tokens, 60, 2]) == run.tokenizer.decode([1, 2])
    words = ["--ckpt", str(tmp_path / "run"), "--prompt", "a", "--max_new_tokens", "9", "--json"]
    code, out, err, _ = run_program("sample", [*words, "--temperature", "3"])
    assert code == 0, err
    ids = json.loads(out)["tokens"]
    assert max(ids) >= tokens  # a row without a token was drawn, and the rest is decoded
    assert "trained on windows" not in err


def test_a_run_with_bos_is_sampled_and_evaluated_from_bos(tmp_path, run_program, monkeypatch):
    directory = drawn(tmp_path, "llama_rope_linear", eos_token_id=2)
    code, out, err, _ = run_program(
        "tools", ["import", "--hf", str(directory), "--out", str(tmp_path / "run")]
    )
    assert code == 0, err
    assert "Starcoder2ForCausalLM" in out and "1 <s>" in out and "2 </s>" in out
    assert "64 of 64" in out and "345 rows, 339 tokens" in out
    reference, tokenizer = HubReference(directory), open_run(tmp_path / "run").tokenizer

    def logits(ids: list[int]) -> np.ndarray:
        return next(iter(reference.logits(np.array([ids], np.int32))))

    prompts: list[list[int]] = []
    generate = engine.generate

    def note(model: Any, params: Any, given: list[list[int]], *rest: Any) -> Any:
        prompts.extend(given)
        return generate(model, params, given, *rest)

    monkeypatch.setattr(engine, "generate", note)
    for text in ("the sheep", ""):
        ids = [1, *tokenizer.encode(text)]
        words = ["--prompt", text, "--temperature", "0", "--max_new_tokens", "3", "--json"]
        code, out, err, _ = run_program("sample", ["--ckpt", str(tmp_path / "run"), *words])
        assert code == 0, err
        assert prompts.pop() == ids
        for token in json.loads(out)["tokens"]:
            assert token == logits(ids)[-1].argmax()
            ids.append(token)
    documents, nats, count = ["the sheep sleeps.", "<s> sheep </s>"], 0.0, 0
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
        ids = [1, *tokenizer.encode(text), 2]
        assert not {1, 2} & {*ids[1:-1]}
        rows = logits(ids)[:-1]
        for row, token in zip(rows, ids[1:], strict=True):
            nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]
            count += 1
    change(tmp_path / "run", config=_one_per_window(read(tmp_path / "run/config.json")["config"]))
    words = ["--ckpt", str(tmp_path / "run"), "--data", str(tmp_path / "texts"), "--json"]
    code, out, err, _ = run_program("tools", ["evaluate", *words])
    assert code == 0, err
    found = json.loads(out)
    assert (found["tokens"], found["bytes"]) == (count, sum(map(len, documents)))
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)


def _one_per_window(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"data": config["data"] | {"packing": "one_per_window"}}


def test_what_an_imported_run_lacks_is_asked_for(tmp_path, run_program):
    run = tmp_path / "run"
    directory = hub(tmp_path, "gpt2")
    files, _ = import_hf.import_hf(directory, run, defaults(), verify=False)
    record = read(run / "config.json")["imported"]
    assert record["directory"] == str(directory) and record["architecture"] == "GPT2LMHeadModel"
    assert list(record["sha256"]) == ["model.safetensors"]
    assert files.num_parameters == sum(
        a.size for a in load_file(directory / "model.safetensors").values()
    )
    code, _, err, _ = run_program("tools", ["evaluate", "--ckpt", str(run)])
    assert code == 2 and "imported" in err and "--data" in err and err.count("\n") == 1
    before = sorted(tmp_path.rglob("*"))
    code, _, err, _ = run_program("train", ["--workdir", str(run)])
    assert code == 2 and "imported" in err and "--config.train.init_from=" in err
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "lock") == before
    code, out, err, _ = run_program("tools", ["checkpoints", "--ckpt", str(run), "--verify"])
    assert code == 0 and "verified" in out, err


def test_buffers_and_copies_of_other_versions_are_known(tmp_path):
    """Old files of GPT-2: no prefix, causal masks, and the tied output layer once more."""
    directory = hub(tmp_path, "gpt2")
    tensors = load_file(directory / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    old["h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
    old["lm_head.weight"] = old["wte.weight"].copy()
    save_file(old, directory / "model.safetensors")
    files = import_hf.check_hf_files(directory)
    params = import_hf.load_params(files)
    assert np.array_equal(params["embedding"][:293], tensors["transformer.wte.weight"])
    assert not np.asarray(params["embedding"][293:]).any()
    old["lm_head.weight"][0, 0] += 1
    save_file(old, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: .*tie_word_embeddings is true"):
        import_hf.import_hf(directory, tmp_path / "run", defaults())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


@pytest.mark.parametrize(
    "case",
    [
        "gpt2",
        "gpt_neox_sequential",
        "starcoder2_no_bias",
        "llama_rope_linear",
        "llama_rope_llama3",
        "qwen2",
        "qwen3",
    ],
)
def test_an_exported_run_is_imported_bit_for_bit(case, tmp_path):
    """Parameters, architecture, vocabulary, BOS and end-of-text."""
    runs, params = [], []
    source = hub(tmp_path, case)
    for number in range(2):
        import_hf.import_hf(source, tmp_path / f"run{number}", defaults(), verify=False)
        runs.append(open_run(tmp_path / f"run{number}"))
        params.append(runs[-1].params()[0])
        source = tmp_path / f"export{number}"
        export_hf(runs[-1], params[-1], 0, source)
    jax.tree.map(np.testing.assert_array_equal, *params)
    first, second = runs
    assert second.config.model == first.config.model
    assert second.vocab_size == first.vocab_size
    for name in ("bos_id", "end_of_text", "prompt_start"):
        assert getattr(second.tokenizer, name) == getattr(first.tokenizer, name)
    assert second.tokenizer.encode_prompt("a sheep") == first.tokenizer.encode_prompt("a sheep")


def test_transformers_is_asked_where_it_is_installed(tmp_path, monkeypatch, run_program):
    directory = hub(tmp_path, "qwen2")
    fake_transformers(monkeypatch, directory, {"unexpected_keys": []})
    words = ["import", "--hf", str(directory), "--out", str(tmp_path / "run")]
    code, out, err, _ = run_program("tools", words)
    assert code == 0, err
    for reference in ("a float64 computation", "transformers 5.0"):
        said = out.partition(f"verified against {reference} from {directory}\n")[2].splitlines()
        assert "max relative error" in said[0] and float(said[0].split()[3]) < 1e-5
        assert said[2].split()[-3:] == ["64", "of", "64"]
    assert "not compared" not in out


def test_transformers_that_differs_fails_and_nothing_is_written(tmp_path, monkeypatch):
    directory = hub(tmp_path, "gpt2")
    fake_transformers(monkeypatch, directory, {"missing_keys": ["a.bias"]}, scale=1.01)
    said = r"other logits than transformers 5\.0 \(.*, missing_keys: a\.bias\); nothing was written"
    with pytest.raises(RunFailed, match=said):
        import_hf.import_hf(directory, tmp_path / "run", defaults())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


@pytest.mark.parametrize("place", ["missing", "import", "load", "forward"])
def test_without_an_answer_of_transformers_the_import_says_so(place, tmp_path, monkeypatch):
    directory = hub(tmp_path, "gpt2")
    fake_transformers(monkeypatch, directory, {})

    def fail(*given: Any, **options: Any) -> Any:
        raise ValueError("no\nqwen3")

    said = "transformers 5.0: not compared (no qwen3)"
    if place == "missing":
        monkeypatch.setattr(transformers_model.importlib.util, "find_spec", lambda name: None)
        said = "transformers: not compared (torch and transformers not installed)"
    elif place == "import":
        monkeypatch.setitem(sys.modules, "transformers", None)
        said = "transformers: not compared (import of transformers halted"
    elif place == "load":
        sys.modules["transformers"].AutoModelForCausalLM.from_pretrained = fail
    else:
        sys.modules["torch"].from_numpy = fail
    _, verified = import_hf.import_hf(directory, tmp_path / "run", defaults())
    assert [result.reference for result in verified.results] == ["a float64 computation"]
    [note] = verified.notes
    assert note.startswith(said)


@pytest.mark.parametrize("layout", ["transposed", "biases", "order"])
def test_a_model_with_other_logits_is_not_written(layout, tmp_path, monkeypatch):
    unpack = hub_tensors.Tensor.unpack

    def wrong(self: Any, array: np.ndarray) -> dict[Any, np.ndarray]:
        found = unpack(self, array)
        kinds = {path[-1] for path in found}
        if layout == "transposed" and kinds == {"kernel"}:
            return {p: a.T if a.shape[0] == a.shape[1] else a for p, a in found.items()}
        if layout == "biases" and kinds == {"bias"}:
            return {path: a[::-1] for path, a in found.items()}
        if layout == "order" and len(found) == 3:
            return dict(zip(found, reversed(found.values()), strict=True))
        return found

    monkeypatch.setattr(hub_tensors.Tensor, "unpack", wrong)
    with pytest.raises(RunFailed, match="other logits"):
        import_hf.import_hf(hub(tmp_path, "gpt2"), tmp_path / "run", defaults())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


MEASURE = """
import re, sys
from pathlib import Path
from configs import base
from sheepop_jax.config.schema import Config
from sheepop_jax.interop.import_hf import import_hf
from sheepop_jax.runtime import platform

def memory(field):  # not getrusage: its peak includes that of the parent before exec
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

platform.prepare("cpu")
small, large, out = map(Path, sys.argv[1:])
config = Config.from_dict(base.get_config())
import_hf(small, out / "first", config, verify=False)  # loads the libraries
before = memory("VmRSS")
files, _ = import_hf(large, out / "second", config, verify=False)
print(memory("VmHWM") - before, 4 * files.num_parameters)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_that_of_the_weights(tmp_path, process_env):
    width = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    large = drawn(
        tmp_path, "llama_rope_linear", **width, intermediate_size=2048, num_hidden_layers=8
    )
    (tmp_path / "small").mkdir()
    paths = map(str, (hub(tmp_path / "small", "gpt2"), large, tmp_path))
    words = [sys.executable, "-c", MEASURE, *paths]
    shown = subprocess.run(words, env=process_env, capture_output=True, text=True, check=True)
    used, weights = map(int, shown.stdout.split())
    assert weights > 1e8
    assert used < 1.3 * weights


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def shard(directory: Path, name: str, missing: bool = False) -> None:
    """Two shards, of which the index calls the second `name`."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first, *rest = tensors
    save_file({first: tensors[first]}, directory / "a.safetensors")
    if not missing:
        save_file({n: tensors[n] for n in rest}, (directory / name).resolve())
    places = {first: "a.safetensors"} | dict.fromkeys(rest, name)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (directory / "model.safetensors.index.json").write_text(index)


def retensor(edit: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def change_tensors(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return change_tensors


def vast(directory: Path) -> None:
    """A header that promises far more than the file and the machine hold."""
    header = {"x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    content = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


def retokenize(directory: Path, tokenizer: Tokenizer) -> None:
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    return retensor(lambda t: t.update({new: t.pop(old)}))


UP = "transformer.h.1.mlp.c_fc.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (pickled, "pickle"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "missing shard": (lambda d: shard(d, "b.safetensors", missing=True), "b.safetensors"),
    "path traversal": (lambda d: shard(d, "../b.safetensors"), "../b.safetensors"),
    "truncated": (truncate, "truncated"),
    "vast header": (vast, "truncated"),
    "extra tensor": (retensor(lambda t: t.update(extra=np.ones(3, np.float32))), "extra"),
    "extra layer": (lambda d: change(d, n_layer=1), "transformer.h.1."),
    "missing tensor": (retensor(lambda t: t.pop(UP)), f"no {UP}"),
    "missing layers": (lambda d: change(d, n_layer=3), "no transformer.h.2."),
    "one tensor twice": (
        retensor(lambda t: t.update({UP.removeprefix("transformer."): t[UP]})),
        UP,
    ),
    "another shape": (retensor(lambda t: t.update({UP: t[UP].T.copy()})), "shape [23, 15]"),
    "integers": (retensor(lambda t: t.update({UP: t[UP].astype(np.int32)})), "I32"),
    "not finite": (retensor(lambda t: t[UP].fill(np.nan)), "inf or nan"),
    "untied": (lambda d: change(d, tie_word_embeddings=False), "no lm_head.weight"),
    "architecture": (lambda d: change(d, architectures=["GPT2Model2"]), "architectures"),
    "model type": (lambda d: change(d, model_type="mamba"), "model_type"),
    "unknown key": (lambda d: change(d, attention_sinks=4), "attention_sinks"),
    "not built": (lambda d: change(d, scale_attn_by_inverse_layer_idx=True), "scale_attn"),
    "vast number": (lambda d: change(d, layer_norm_epsilon=10**400), "norm_eps"),
    "more layers than tensors": (lambda d: change(d, n_layer=2 * 10**9), "2000000000"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "save_pretrained"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text('{"model": 3}'), "tokenizer"),
    "empty template": (
        lambda d: change(
            d, "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": []}
        ),
        "not a tokenizer (IndexError",
    ),
    "an id that is no number": (
        lambda d: change(
            d, "tokenizer.json", model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}
        ),
        "not a tokenizer (TypeError",
    ),
    "unigram": (
        lambda d: change(d, "tokenizer.json", model={"type": "Unigram", "vocab": [["a", 0.0]]}),
        "Unigram",
    ),
    "more tokens than rows": (
        lambda d: retokenize(d, train_char(["".join(map(chr, range(100, 400)))])),
        "301 tokens",
    ),
    "fewer tokens than used ids": (lambda d: retokenize(d, CHARACTERS), "token_id: got 292"),
    "no end-of-text": (
        lambda d: (
            change(d, eos_token_id=None, bos_token_id=None),
            change(d, "generation_config.json", eos_token_id=None),
            change(d, "tokenizer_config.json", eos_token=None),
            (d / "tokenizer.json").write_text(
                (d / "tokenizer.json").read_text().replace("<|endoftext|>", "<stop>")
            ),
        ),
        "eos_token_id",
    ),
}


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("gpt2", {"n_special": 0, "predict_special_tokens": True, "output_past": True}),
        ("qwen2", {"use_mrope": False}),
        ("starcoder2", {"rms_norm_eps": 1e-5}),
    ],
)
def test_keys_of_the_public_models_that_today_s_transformers_drops(case, keys):
    config = read(GOLDEN / case / "config.json")
    assert read_config(config | keys).config == read_config(config).config


def test_a_tokenizer_without_optional_parts(tmp_path):
    directory = hub(tmp_path, "starcoder2")
    content = read(directory / "tokenizer.json")
    eos, kept = content["added_tokens"][0]["content"], read_tokenizer(directory, {}, 99).to_json()
    content = {key: content[key] for key in ("version", "model", "decoder", "added_tokens")}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokenizer(directory, {}, 99).to_json() == kept and eos == "<|endoftext|>"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, tmp_path, run_program):
    spoil, said = BAD[case]
    directory = hub(tmp_path, "gpt2")
    spoil(directory)
    before = sorted(tmp_path.rglob("*"))
    words = ["import", "--hf", str(directory), "--out", str(tmp_path / "new" / "run")]
    code, out, err, _ = run_program("tools", words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and said in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_and_the_hub_is_not_asked(tmp_path, run_program):
    directory = hub(tmp_path, "gpt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for hf, out, field in (
        (directory, tmp_path / "full", "--out"),
        (directory, directory / "config.json", "--out"),
        ("openai-community/gpt2", tmp_path / "run", "--hf"),
    ):
        code, _, err, _ = run_program("tools", ["import", "--hf", str(hf), "--out", str(out)])
        assert code == 2 and err.startswith(f"error: {field}: ") and err.count("\n") == 1
    assert (tmp_path / "full" / "note").read_text() == "mine"
    assert not (tmp_path / "run").exists()
