"""A run as a Hugging Face directory: what is in the files, refusals, and full disks."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.interop import export_hf as module
from sheepop_jax.interop.export_hf import export_hf
from sheepop_jax.interop.families import for_export
from sheepop_jax.interop.hub_config import read_config
from sheepop_jax.interop.hub_tensors import tensors
from sheepop_jax.interop.model_card import model_card
from sheepop_jax.interop.safetensors_files import WeightFiles
from sheepop_jax.interop.tokenizer_files import tokenizer_json
from tests.interop.models import MODELS, config_of, nested, random_params

SAVED = Path(__file__).parent.parent / "saved_run" / "run"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
STEP = 30
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def run() -> Run:
    """The run in the repository: LayerNorm, RoPE, 23 characters."""
    return open_run(SAVED)


@pytest.fixture(scope="module")
def params(run: Run) -> Any:
    return run.params()[0]


@pytest.fixture(scope="module")
def exported(run: Run, params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("there") / "exports" / "model"
    export_hf(run, params, STEP, out)
    return out


def other(run: Run, **fields: Any) -> Run:
    """The run with another model."""
    model = dataclasses.replace(run.config.model, **fields)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))


def read(directory: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The weights, and our parameters from them."""
    model = read_config(json.loads((directory / "config.json").read_text()))
    files = WeightFiles(directory)
    weights = {name: files.load(name) for name in files.tensors}
    assert set(weights) == {tensor.name for tensor in tensors(model)}
    parts = [tensor.unpack(weights[tensor.name]) for tensor in tensors(model)]
    return weights, nested({path: array for part in parts for path, array in part.items()})


def test_the_files_give_the_parameters_back(run, params, exported) -> None:
    assert set(os.listdir(exported)) == FILES
    assert os.listdir(exported.parent) == [exported.name]
    weights, again = read(exported)
    vocab = run.tokenizer.vocab_size
    assert weights["model.embed_tokens.weight"].shape == (vocab, run.config.model.d_model)
    again["embedding"][vocab:] = params["embedding"][vocab:]
    jax.tree.map(np.testing.assert_array_equal, again, dict(params))


@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_is_written_and_read(name, run, tmp_path) -> None:
    config = config_of(MODELS[name][1])
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=config))
    model = for_export(config, run.tokenizer.vocab_size)
    params = random_params(model)
    assert export_hf(run, params, 7, tmp_path / "out") == model
    weights, again = read(tmp_path / "out")
    for table in {"embedding", "output_embedding"} & again.keys():
        again[table][model.vocab_size :] = params[table][model.vocab_size :]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert ("lm_head.weight" in weights or "embed_out.weight" in weights) != config.tie_embeddings


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_to_the_dtype(dtype, run, params, tmp_path) -> None:
    export_hf(run, params, STEP, tmp_path / "out", dtype)
    kernel = np.asarray(params["block_0"]["attention"]["key"]["kernel"])
    wanted = kernel.T.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    found = WeightFiles(tmp_path / "out").load("model.layers.0.self_attn.k_proj.weight")
    assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_float16_refuses_a_weight_that_it_does_not_hold(run, params, tmp_path) -> None:
    large = jax.tree.map(np.array, dict(params))
    large["final_norm"]["scale"][3] = -70000
    with pytest.raises(InputError, match=r"dtype: got 'float16'.*70000.*model.norm.weight.*bfloat"):
        export_hf(run, large, STEP, tmp_path / "out", "float16")
    assert not os.listdir(tmp_path)


def test_large_weights_are_written_as_shards(run, params, exported, tmp_path) -> None:
    export_hf(run, params, STEP, tmp_path / "out", shard_bytes=3000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    whole, parts = read(exported)[0], read(tmp_path / "out")[0]
    assert {name: a.tobytes() for name, a in whole.items()} == {
        name: a.tobytes() for name, a in parts.items()
    }


@pytest.mark.parametrize(
    ("fields", "dtype", "field"),
    [
        ({"logit_softcap": 30.0}, "float32", "model.logit_softcap"),
        ({"position": "sinusoidal"}, "float32", "model.position"),
        ({}, "q8_0", "dtype"),
    ],
)
def test_a_refusal_writes_nothing(fields, dtype, field, run, params, tmp_path) -> None:
    with pytest.raises(InputError) as error:
        export_hf(other(run, **fields), params, STEP, tmp_path / "new/out", dtype)
    assert error.value.field == field
    assert not os.listdir(tmp_path)


def test_something_in_the_way_stays_as_it_is(run, params, tmp_path, monkeypatch) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("text")
    file.write_text("text")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, got in (
        (full, "a directory with files"),
        (file, "a file"),
        (tmp_path / "broken", "a broken link"),
        (Path("."), "the current directory"),
    ):
        with pytest.raises(InputError, match=got) as error:
            export_hf(run, params, STEP, out)
        assert error.value.field == "out"
    assert sorted(os.listdir(tmp_path)) == ["broken", "file", "full", "here"]
    assert (full / "precious").read_text() == file.read_text() == "text"


def test_an_empty_directory_is_filled(run, params, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    export_hf(run, params, STEP, Path("empty"))
    assert set(os.listdir("empty")) == FILES and os.listdir() == ["empty"]


@pytest.mark.parametrize("place", range(6))
def test_a_full_disk_leaves_nothing(place, run, params, tmp_path, monkeypatch) -> None:
    """Each of the six files in turn."""
    left = iter([True] * place)
    sync = os.fsync

    def full(file: int) -> None:
        if not next(left, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left on device") as error:
        export_hf(run, params, STEP, tmp_path / "new/out")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


def test_an_interrupt_leaves_nothing(run, params, tmp_path, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(run, params, STEP, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_the_tokenizer_encodes_as_ours(run, exported) -> None:
    """`split_special_tokens` is `encode_special_tokens` of the library."""
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    config = json.loads((exported / "tokenizer_config.json").read_text())
    theirs.encode_special_tokens = config["split_special_tokens"]
    assert config["split_special_tokens"] is True  # text has no characters of a special token here
    for text in ("the sheep", " ", "", "a.\n\nb", "up  to"):
        assert theirs.encode(text).ids == run.tokenizer.encode(text)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    names = {config[f"{role}_token"] for role in ("bos", "eos", "pad")}
    assert names == {"<|endoftext|>"}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert json.loads((exported / "generation_config.json").read_text()) == ids
    assert ids.items() <= json.loads((exported / "config.json").read_text()).items()


def test_a_public_tokenizer_adds_no_tokens_that_training_did_not() -> None:
    content = train_bpe(iter(["the cat sat on the mat"] * 9), 270).to_json()
    inner = tokenizers.Tokenizer.from_str(content)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ours = Tokenizer.from_json(inner.to_str())
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    assert inner.encode("the cat").ids[0] == 0
    assert theirs.encode("the cat").ids == ours.encode("the cat") == inner.encode("the cat").ids[1:]


def test_the_card_has_the_figures_of_the_checkpoint_and_no_local_path(run, exported) -> None:
    card = (exported / "README.md").read_text()
    for part in ("Starcoder2ForCausalLM", "step 30", "text.txt", "7.267k", "2.4771", "3.5781"):
        assert part in card
    assert "Not verified" in card
    data = dataclasses.replace(run.config.data, path="/home/me/secret/a.txt, https://u:p@x.org/b|c")
    config = dataclasses.replace(run.config, data=data)
    model = for_export(config.model, run.tokenizer.vocab_size)
    card = model_card(dataclasses.replace(run, config=config), model, STEP, "float32", "TABLE")
    assert "secret" not in card and "u:p" not in card and "a.txt" in card
    assert "TABLE" in card and "Not verified" not in card
    assert r"b\|c" in card


def test_the_card_says_where_parameters_came_from(run) -> None:
    model = for_export(run.config.model, run.vocab_size)
    record = {"directory": "/somewhere/smollm2", "dtype": "bfloat16"}
    card = model_card(dataclasses.replace(run, imported=record), model, 0, "float32")
    assert "imported from | smollm2 |" in card and "bfloat16" in card and "## Training" not in card
    assert "learning rate" not in card and "/somewhere" not in card
    train = dataclasses.replace(run.config.train, init_from="/elsewhere/base")
    tuned = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    card = model_card(tuned, model, STEP, "float32")
    assert "parameters at the start | base |" in card and "/elsewhere" not in card


def test_transformers_4_gets_no_token_types(exported) -> None:
    """It would pass them on to the model; GPT-2 adds their embedding to its input."""
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_the_card_of_qwen2_does_not_load_the_tokenizer_of_the_public_models(run) -> None:
    for name, loader in (("qwen2", "PreTrainedTokenizerFast"), ("qwen3", "AutoTokenizer")):
        model = for_export(config_of(MODELS[name][1]), 23)
        assert f"tokenizer = {loader}.from_pretrained" in model_card(run, model, STEP, "float32")
