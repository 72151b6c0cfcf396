"""Runs written as GGUF, loaded by llama.cpp, and compared with the model."""

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import xllamacpp
from tokenizers import models, normalizers, pre_tokenizers, trainers

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.config.schema import Config
from sheepop_jax.data import chat_template
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.tokenizer import ChatSettings, Tokenizer
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.interop import export_gguf as module
from sheepop_jax.interop import verify_gguf as verify
from sheepop_jax.interop.export_gguf import GGUF_FILE, MODELFILE, GGUFTensor, export_gguf
from sheepop_jax.interop.families import HubModel
from sheepop_jax.interop.verification import VerificationReport
from sheepop_jax.interop.verification_text import Texts
from sheepop_jax.interop.verify_gguf import differing_tensor, verify_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")

TEXT = "".join(f"def line_{i}(x):\n    return {i * i} + x  # émile\n" for i in range(60))
STRINGS = [
    *(TEXT[i : i + 7] for i in range(0, 300, 5)),
    "  \n\n\t x's 12345 <|endoftext|>",
    "中\u0301 e\u0301",
]
GPT2 = {"position": "learned", "num_kv_heads": 0, "activation": "gelu_tanh"}
NEOX = {"num_kv_heads": 0, "partial_rotary": 0.4}
LLAMA = {"norm": "rmsnorm", "feed_forward": "gated", "activation": "silu"}
# Models that together use all that each architecture of llama.cpp, the first word, expresses.
MODELS: dict[str, dict[str, Any]] = {
    "starcoder2": {"qkv_bias": True, "rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "starcoder2 all": {"use_bias": True, "tie_embeddings": False, "rope_theta": 500.0},
    "gpt2": GPT2,
    "gpt2 all": {**GPT2, "use_bias": True, "tie_embeddings": False},
    "gptneox": {**NEOX, "parallel_residual": True, "qkv_bias": True},
    "gptneox all": {**NEOX, "use_bias": True, "tie_embeddings": False},
    "llama": LLAMA,
    "llama all": {
        **LLAMA,
        "head_dim": 14,
        "tie_embeddings": False,
        "rope_scaling": "llama3",
        "rope_theta": 50.0,
        "rope_original_length": 60,
    },
    "qwen2": {**LLAMA, "qkv_bias": True, "rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 14, "tie_embeddings": False},
}
ROWS = 310  # of the embedding: more than the tokenizers have tokens, and no multiple of 128
EPSILON = 0.02  # not the usual one, and large enough to show


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """About 300 tokens, fewer than a multiple of 128."""
    return train_bpe(iter([TEXT]), 300)


@pytest.fixture(scope="module")
def make_run(
    make_config: Callable[..., Config], random_params: Callable[..., Any], tokenizer: Tokenizer
) -> Callable[..., tuple[Run, Any]]:
    """`make_run("llama")`, or with fields of the model: a run in no directory, its parameters."""

    made: dict[str, Any] = {}  # of the models of MODELS

    def make(fields: dict[str, Any] | str, own: Tokenizer = tokenizer) -> tuple[Run, Any]:
        if isinstance(fields, str):
            if fields not in made:
                made[fields] = make(MODELS[fields])
            return made[fields]
        fields = {"norm_eps": EPSILON, **fields}
        words = {f"model.{name}": value for name, value in fields.items()}
        config = make_config(
            words | ({"data.seq_len": 1} if fields.get("max_seq_len") == 1 else {})
        )
        rows = max(own.vocab_size, ROWS)
        run = Run(Path("runs/small"), config, own, rows, {}, 0.0, Path("shards"), {})
        params = random_params(run.model())
        for name in ("embedding", "output_embedding", "positions"):
            if name in params:  # logits of a few units, as of trained models
                params[name] = params[name] * 0.1
        return run, jax.tree.map(np.asarray, params)

    return make


def verified(run: Run, params: Any, out: Path, dtype: str = "float32") -> VerificationReport:
    """`verify_gguf` on few prompts and strings."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, run.vocab_size, (2, 9)).tolist()
    strings = [s for s in STRINGS if not run.tokenizer.has_fixed_characters] or ["def line", "1+ x"]
    return verify_gguf(run, params, out / GGUF_FILE, dtype, prompts, strings)


def tensors_of(out: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out / GGUF_FILE).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_model(name, make_run, tmp_path):
    run, params = make_run(name)
    export_gguf(run, params, 7, tmp_path / "out")
    report = verified(run, params, tmp_path / "out")
    assert report.passed, report.table()
    fields = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields
    assert fields["general.architecture"].contents() == name.split()[0]
    assert not differing_tensor(run, params, tmp_path / "out" / GGUF_FILE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_narrow_matrices(dtype, make_run, tmp_path):
    run, params = make_run({"d_model": 64, "num_heads": 2, "num_kv_heads": 1, "d_ff": 97})
    export_gguf(run, params, 7, tmp_path / "out", dtype)
    found = tensors_of(tmp_path / "out")
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    narrow = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert {types["token_embd.weight"], types["blk.1.attn_q.weight"]} == {narrow}
    assert {types["blk.0.attn_norm.weight"], types["blk.1.ffn_up.bias"]} == {"F32"}
    # 97 is not a number of whole blocks.
    assert types["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else narrow)
    assert verified(run, params, tmp_path / "out", dtype).passed
    assert not differing_tensor(run, params, tmp_path / "out" / GGUF_FILE)


def test_learned_positions_stay_float32(make_run, tmp_path):
    run, params = make_run("gpt2")
    export_gguf(run, params, 7, tmp_path / "out", "float16")
    assert tensors_of(tmp_path / "out")["position_embd.weight"].tensor_type.name == "F32"


def altered(**fields: Any) -> Callable[[HubModel], HubModel]:
    return lambda model: dataclasses.replace(
        model, config=dataclasses.replace(model.config, **fields)
    )


# What a wrong export writes, by its name; each for one architecture.
MISTAKES: dict[str, tuple[str, Callable[[HubModel], HubModel]]] = {
    "eps dropped": ("starcoder2", altered(norm_eps=1e-5)),
    "rms eps dropped": ("qwen3", altered(norm_eps=1e-6)),
    "theta dropped": ("starcoder2 all", altered(rope_theta=10000.0)),
    "rope scaling dropped": ("llama all", altered(rope_scaling="none")),
    "tied flag": ("qwen3", altered(tie_embeddings=True)),
    "padding kept": ("qwen2", lambda model: dataclasses.replace(model, vocab_size=384)),
    "no parallel residual": ("gptneox", altered(parallel_residual=False)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verification_notices_a_wrong_model(mistake, make_run, tmp_path, monkeypatch):
    name, change = MISTAKES[mistake]
    run, params = make_run(name)
    right = module.checked_model(run)
    monkeypatch.setattr(module, "checked_model", lambda run: change(right))
    export_gguf(run, params, 7, tmp_path / "out")
    logprobs, _, strings = verified(run, params, tmp_path / "out").rows
    assert not logprobs.passed and strings.passed


# Layouts of one tensor, by a part of its name.
LAYOUTS: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "q of other pairs": ("llama", "blk.1.attn_q.", lambda x: swap_pairs(x)),
    "k of other pairs": ("llama", "blk.0.attn_k.", lambda x: swap_pairs(x)),
    "heads as Hugging Face": ("gptneox", "blk.0.attn_qkv.weight", lambda x: x.swapaxes(0, 1)),
    "transposed": ("starcoder2", "blk.1.attn_output.weight", lambda x: x.T),
    "biases swapped": ("starcoder2 all", "blk.0.attn_q.bias", lambda x: x[::-1]),
}


def swap_pairs(x: np.ndarray) -> np.ndarray:
    """Undoes the permutation of llama.cpp's Llama: [heads, C/2, 2, D] or flat."""
    split = x.reshape(-1, 5, 2, 60)
    return split.swapaxes(1, 2)


@pytest.mark.parametrize("mistake", LAYOUTS)
def test_verification_names_a_wrong_tensor(mistake, make_run, tmp_path, monkeypatch):
    name, part, change = LAYOUTS[mistake]
    run, params = make_run(name)
    make = module.gguf_tensors

    def wrong(*args: Any) -> Iterator[GGUFTensor]:
        for tensor in make(*args):
            mine = part in tensor.name
            pack = tensor.pack
            yield dataclasses.replace(
                tensor,
                pack=lambda params, pack=pack, mine=mine: (
                    change(pack(params)) if mine else pack(params)
                ),
            )

    monkeypatch.setattr(module, "gguf_tensors", wrong)
    export_gguf(run, params, 7, tmp_path / "out")
    [logprobs, *_] = verified(run, params, tmp_path / "out").rows
    assert not logprobs.passed
    assert part in logprobs.detail


def test_verification_notices_a_doubled_bos(make_run, tmp_path, monkeypatch):
    run, params = make_run("starcoder2")
    right = module.gguf_vocabulary(run.tokenizer, run.vocab_size)
    doubled = dataclasses.replace(right, bos=0)
    monkeypatch.setattr(module, "gguf_vocabulary", lambda *args: doubled)
    export_gguf(run, params, 7, tmp_path / "out")
    logprobs, _, strings = verified(run, params, tmp_path / "out").rows
    assert logprobs.passed and not strings.passed
    assert strings.detail.startswith("'def lin': [0, ")


def test_a_text_begins_with_bos(make_run, tmp_path):
    inner = tokenizers.Tokenizer.from_str(train_bpe(iter([TEXT]), 290).to_json())
    inner.add_special_tokens(["<s>"])
    bos = inner.token_to_id("<s>")
    own = Tokenizer.with_stream_tokens(inner.to_str(), "<s>", "<|endoftext|>")
    run, params = make_run({}, own)
    assert run.tokenizer.prompt_start == [bos]
    export_gguf(run, params, 7, tmp_path / "out")
    report = verified(run, params, tmp_path / "out")
    assert report.passed, report.table()


def test_ascii_characters(make_run, tmp_path):
    characters = train_char(["def line(x): + 1\n\t"])
    run, params = make_run({}, characters)
    export_gguf(run, params, 7, tmp_path / "out")
    report = verified(run, params, tmp_path / "out")
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("expression", "name"), [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"), ("", "smollm")]
)
def test_public_pre_tokenizers(expression, name, make_run, tmp_path):
    """As Llama 3, Qwen and SmolLM2 split text."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expression)
    first = pre_tokenizers.Digits(individual_digits=True)
    if expression:
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + expression
        words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        first = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    inner = tokenizers.Tokenizer.from_str(train_bpe(iter([]), 257).to_json())
    inner.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    run, params = make_run({}, Tokenizer(inner))
    export_gguf(run, params, 7, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    report = verified(run, params, tmp_path / "out")
    assert report.passed, report.table()


# Fields that llama.cpp lacks, with what the message names.
REFUSED = [
    ({"activation": "relu"}, "model.activation", "model.activation=gelu"),
    ({"sliding_window": 8}, "model.sliding_window", "model.sliding_window=0"),
    ({"rope_scaling": "llama3"}, "model.rope_scaling", "model.rope_scaling=linear"),
    ({"position": "sinusoidal"}, "model.position", "model.position=rope"),
    ({"max_seq_len": 1}, "model.max_seq_len", "model.max_seq_len=2"),
    ({"logit_softcap": 30.0}, "model.logit_softcap", "model.logit_softcap=0.0"),
]


@pytest.mark.parametrize(("fields", "field", "hint"), REFUSED)
def test_refuses_what_llama_cpp_lacks(fields, field, hint, make_run, tmp_path):
    run, _ = make_run(fields)
    with pytest.raises(InputError) as caught:
        export_gguf(run, None, 7, tmp_path / "out")
    assert caught.value.field == field and f"`{hint}`" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_refuses_other_tokenizers(make_run, tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    for other, got in (
        (train_char(["ab\u00e9"]), "a character tokenizer with '\\xe9' (1 outside ASCII)"),
        (Tokenizer(inner), "another kind of tokenizer (WordLevel, Whitespace)"),
    ):
        run, _ = make_run({}, other)
        with pytest.raises(InputError) as caught:
            export_gguf(run, None, 7, tmp_path / "out")
        assert (caught.value.field, caught.value.got) == ("data.tokenizer", got)
        assert "byte-level BPE" in caught.value.expected
    assert not list(tmp_path.iterdir())


def test_refuses_bad_requests(make_run, tmp_path, monkeypatch):
    run, params = make_run("starcoder2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    params = {**params, "embedding": params["embedding"] * 1e7}

    def field_and_got(*args: Any) -> tuple[str, Any]:
        with pytest.raises(InputError) as caught:
            export_gguf(run, params, 7, *args)
        return caught.value.field, caught.value.got

    assert field_and_got(tmp_path / "new", "q4_0") == ("dtype", "q4_0")
    assert field_and_got(tmp_path / "full")[0] == "out"
    field, got = field_and_got(tmp_path / "new", "float16")
    assert field == "dtype" and got.startswith("float16 (token_embd.weight has a weight of ")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert field_and_got(tmp_path / "new") == ("format", "no package gguf")
    with pytest.raises(InputError, match="pip install gguf xllamacpp"):
        verified(run, params, tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]


def test_a_full_disk_leaves_nothing(make_run, tmp_path, monkeypatch):
    run, params = make_run("starcoder2")
    written = gguf.GGUFWriter.write_tensor_data

    def full(writer: Any, tensor: np.ndarray) -> None:
        if len(writer.tensors[0]) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(RunFailed, match=r"out: cannot be written \(No space left on device\)"):
        export_gguf(run, params, 7, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_file_that_llama_cpp_does_not_load(make_run, tmp_path):
    run, params = make_run("starcoder2")
    (tmp_path / GGUF_FILE).write_bytes(b"GGUF")
    with pytest.raises(InputError, match="a file that llama.cpp does not load"):
        verified(run, params, tmp_path)


def test_modelfile(make_run, tmp_path):
    run, params = make_run("starcoder2")
    export_gguf(run, params, 7, tmp_path / "out")
    assert (tmp_path / "out" / MODELFILE).read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        "PARAMETER num_ctx 29\n"
        'PARAMETER stop "<|endoftext|>"\n'
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_model(make_run, tokenizer, tmp_path):
    """llama.cpp has its template, and ends a text at each of its ends, by the ids of the file."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.add_special_tokens(["<turn>", "<message>"])  # names that llama.cpp does not know
    chat = ChatSettings(("<turn>", "<message>"), CHATML)
    own = Tokenizer.with_stream_tokens(inner.to_str(), None, "<|endoftext|>", chat=chat)
    run, params = make_run({}, own)
    export_gguf(run, params, 7, tmp_path / "out")
    path = tmp_path / "out" / GGUF_FILE
    fields = gguf.GGUFReader(path).fields
    keys = ("ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id", "chat_template")
    assert [fields[f"tokenizer.{key}"].contents() for key in keys] == [*own.end_ids, CHATML]
    report = verified(run, params, tmp_path / "out")
    assert report.passed, report.table()
    text = (tmp_path / "out" / MODELFILE).read_text()
    assert "{{ range .Messages }}<|im_start|>{{ .Role }}" in text
    assert text.endswith('PARAMETER stop "<turn>"\nPARAMETER stop "<message>"\n')
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(path), 29, 0
    settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    reasons = []
    for index in (*own.end_ids, own.encode("d")[0]):
        request = {"prompt": [5, 6], "n_predict": 3, "logit_bias": [[index, 1e6]]}
        reasons.append(server.handle_completions(request)["choices"][0]["finish_reason"])
    del server
    assert reasons == ["stop", "stop", "stop", "length"]


def test_a_chat_model_needs_jinja_before_parameters_are_loaded(
    make_run, tokenizer, tmp_path, monkeypatch
):
    chat = ChatSettings((), CHATML)
    own = Tokenizer.with_stream_tokens(tokenizer.to_json(), None, "<|endoftext|>", chat=chat)
    run, _ = make_run({}, own)
    chat_template._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="no package jinja2"):
        module.check_gguf(run, tmp_path / "out")


def test_verifies_on_the_texts_of_a_run(make_run, tmp_path, monkeypatch):
    run, params = make_run("starcoder2")
    ids = np.array(run.tokenizer.encode(TEXT)[:29], np.int32)
    texts = Texts((ids, ids[3:20]), 8, "the run's validation text")
    monkeypatch.setattr(verify, "texts_of", lambda run, params: texts)
    export_gguf(run, params, 7, tmp_path / "out")
    report = verify_gguf(run, params, tmp_path / "out" / GGUF_FILE)
    assert report.passed, report.table()
    values = [row.value for row in report.rows]
    # Each text is continued to the end of the context, 29 tokens, from its first half.
    assert values[1:] == [f"{29 - 15 + 29 - 9} of {29 - 15 + 29 - 9}", "1,000 of 1,000"]
    assert report.notes == ("text: the run's validation text",)


def test_near_ties_pass_and_other_differences_fail():
    """Ours prefers token 1 to token 2 by `gap`, llama.cpp the other way round."""
    for gap, limit, passes in ((0.015, 0.01, True), (0.025, 0.01, False), (0.025, 0.03, True)):
        ours = np.array([[-9.0, -1.0, -1.0 - gap]])
        theirs = [verify._Step({2: -1.0 - gap, 1: -1.0})]
        logprobs, greedy = verify._compare_logprobs([ours], [theirs], limit)
        assert logprobs.passed and greedy.passed == passes
        assert greedy.value.startswith("0 of 1") and ("tied" in greedy.value) == passes
        assert greedy.detail == ("" if passes else "prompt 0, new token 0: 2, not 1")
