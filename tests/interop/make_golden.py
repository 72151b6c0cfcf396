"""Draws the tiny random Hugging Face models that the tests of import and export read.

Not part of the test suite: it needs torch and transformers, in an environment of their own.

    python -m venv ../hf
    ../hf/bin/pip install torch==2.13.0 transformers==5.24.0
    ../hf/bin/python tests/interop/make_golden.py            # writes tests/interop/golden/
    ../hf/bin/python tests/interop/make_golden.py --check    # reloads what is there and compares

Each folder `golden/<case>/` holds a checkpoint as `save_pretrained` writes it and `golden.npz`:

    ids_BT         int32     token ids, two rows
    positions_P    int32     the positions whose logits are kept
    logits_BPV     float32   from a forward pass in float64 (norms and rotary angles stay float32)
    prompt_T       int32     a prompt
    greedy_N       int32     its greedy continuation, without end-of-text
    greedy_margin  float32   the smallest lead of a greedy token over the next best logit

A case with a tokenizer also holds `tokenizer.json`, `tokenizer_config.json` and
`tokenizer_cases.json` (see `golden_tokenizers.tokenizer_cases`). `golden/versions.json` names the
libraries. Run `make_golden_v4.py` afterwards: it adds `config_v4.json` to every folder.

A model is drawn again until greedy decoding is safe from rounding, and refused where a wrongly
ordered tensor or a wrong field of the configuration would leave the logits as they are.
"""

import argparse
import itertools
import json
import platform
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from golden_tokenizers import tokenizer_cases, write_tokenizer

GOLDEN = Path(__file__).parent / "golden"
GREEDY = 16
CHANGE = 1e-3  # how much of the largest logit a mistake must change


@dataclass(frozen=True)
class Case:
    """One checkpoint. `wrong` lists fields whose other value must show in the logits."""

    config: transformers.PretrainedConfig
    wrong: tuple[dict[str, Any], ...] = ()
    length: int = 24
    prompt: int = 8
    embedding: float = 0.02  # small, so that the norms' epsilon matters
    tokenizer: str = ""
    unused_rows: int = 0  # of the embedding, beyond the tokenizer's tokens
    dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)


def rope(theta: float, **more: Any) -> dict[str, Any]:
    """The rotary parameters as transformers 5 writes them."""
    return {"rope_type": "default", "rope_theta": theta, **more}


def cases() -> dict[str, Case]:
    """All checkpoints by folder. Sizes are small, and unequal where the architecture allows it."""
    from transformers import (
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        Qwen2Config,
        Qwen3Config,
        Starcoder2Config,
    )

    def starcoder2(**fields: Any) -> Starcoder2Config:
        shape = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 19,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 48,
            "rope_parameters": rope(300.0),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return Starcoder2Config(**(shape | fields))

    def gpt_neox(**fields: Any) -> GPTNeoXConfig:
        shape = {
            "vocab_size": 67,
            "hidden_size": 16,
            "intermediate_size": 23,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
            "rope_parameters": rope(200.0, partial_rotary_factor=0.25),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return GPTNeoXConfig(**(shape | fields))

    def llama(**fields: Any) -> LlamaConfig:
        shape = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 19,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
        }
        return LlamaConfig(**(shape | fields))

    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    # Three frequencies, with wavelengths 6.3, 23 and 85: one in each band (below 8, between, above
    # 32). The texts are longer than the original context.
    llama3_rope = {"rope_type": "llama3", "rope_theta": 50.0, **llama3}

    return {
        "gpt2": Case(
            GPT2Config(
                vocab_size=293,
                n_positions=40,
                n_embd=15,
                n_layer=2,
                n_head=3,
                n_inner=23,
                bos_token_id=292,
                eos_token_id=292,
            ),
            ({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}),
            embedding=0.15,
            tokenizer="gpt2",
        ),
        "starcoder2": Case(
            starcoder2(
                hidden_size=24,
                num_attention_heads=6,
                tie_word_embeddings=False,
                norm_epsilon=1e-4,
            ),
            ({"norm_epsilon": 1e-5}, {"rope_parameters": rope(1e4)}),
        ),
        "starcoder2_no_bias": Case(starcoder2(use_bias=False), embedding=0.2),
        "starcoder2_window": Case(
            starcoder2(sliding_window=5),
            ({"sliding_window": None}, {"sliding_window": 4}, {"sliding_window": 6}),
            embedding=0.2,
        ),
        "gpt_neox": Case(
            gpt_neox(layer_norm_eps=1e-4),
            (
                {"use_parallel_residual": False},
                {"layer_norm_eps": 1e-5},
                {"rope_parameters": rope(200.0, partial_rotary_factor=0.5)},
                {"hidden_act": "gelu_pytorch_tanh"},
            ),
        ),
        "gpt_neox_sequential": Case(
            # int(6 * 0.7): four of a head's six channels are rotary.
            gpt_neox(
                hidden_size=12,
                intermediate_size=17,
                use_parallel_residual=False,
                rope_parameters=rope(200.0, partial_rotary_factor=0.7),
            ),
            (
                {"use_parallel_residual": True},
                {"rope_parameters": rope(1e4, partial_rotary_factor=0.7)},
            ),
        ),
        "llama": Case(
            llama(
                hidden_size=24,
                num_attention_heads=6,
                rope_parameters=rope(50000.0),
            ),
            ({"rms_norm_eps": 1e-6}, {"rope_parameters": rope(1e4)}),
        ),
        "llama_tied": Case(
            # SmolLM2: tied, and no bias anywhere.
            llama(tie_word_embeddings=True, rope_parameters=rope(1e5)),
            embedding=0.2,
        ),
        "llama_rope_llama3": Case(
            llama(
                vocab_size=306,
                num_hidden_layers=1,
                hidden_size=18,
                num_attention_heads=3,
                num_key_value_heads=1,
                tie_word_embeddings=True,
                rope_parameters=llama3_rope,
                bos_token_id=301,
                eos_token_id=302,
            ),
            (
                {"rope_parameters": rope(50.0)},
                {"rope_parameters": {**llama3_rope, "factor": 4.0}},
                {"rope_parameters": {**llama3_rope, "low_freq_factor": 0.9}},
                {"rope_parameters": {**llama3_rope, "high_freq_factor": 4.4}},
                {"rope_parameters": {**llama3_rope, "original_max_position_embeddings": 64}},
            ),
            length=44,
            prompt=36,
            embedding=0.2,
            tokenizer="llama3",
        ),
        "llama_rope_linear": Case(
            llama(
                vocab_size=339,
                hidden_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
            ),
            ({"rope_parameters": rope(1000.0)},),
            embedding=0.2,
            tokenizer="llama2",
        ),
        "llama_sharded_bf16": Case(
            llama(rope_parameters=rope(1e4)),
            dtype=torch.bfloat16,
            save={"max_shard_size": "4KB"},
        ),
        "qwen2": Case(
            Qwen2Config(
                vocab_size=309,
                hidden_size=16,
                intermediate_size=19,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=48,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                rope_parameters=rope(2000.0),
                bos_token_id=296,
                eos_token_id=298,
            ),
            ({"rms_norm_eps": 1e-3},),
            embedding=0.2,
            tokenizer="qwen2",
            unused_rows=10,
        ),
        "qwen3": Case(
            Qwen3Config(
                vocab_size=61,
                hidden_size=20,
                intermediate_size=23,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=6,
                max_position_embeddings=48,
                rms_norm_eps=1e-3,
                tie_word_embeddings=True,
                rope_parameters=rope(3000.0),
                bos_token_id=1,
                eos_token_id=2,
            ),
            ({"rms_norm_eps": 1e-4}, {"rope_parameters": rope(1e4)}),
            embedding=0.2,
        ),
    }


def draw(case: Case, rng: np.random.Generator) -> torch.nn.Module:
    """A model with every parameter random: biases are not 0 and norm weights not 1."""
    model = transformers.AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.standard_normal(parameter.shape)
            if parameter is embedding or "wpe" in name:
                values *= case.embedding
            elif name.endswith("bias"):
                values *= 0.3
            elif parameter.ndim == 1:  # the weight of a norm
                values = 1 + 0.3 * values
            else:
                conv1d = "c_" in name and case.config.model_type == "gpt2"  # [in, out]
                values *= 1.5 * parameter.shape[0 if conv1d else 1] ** -0.5
            parameter.copy_(torch.from_numpy(values))
    return model.to(case.dtype).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids_BT: np.ndarray) -> np.ndarray:
    """The logits of every position, in the model's own dtype."""
    return model(input_ids=torch.from_numpy(ids_BT).long()).logits.double().numpy()


def reload(folder: Path, dtype: torch.dtype, **fields: Any) -> torch.nn.Module:
    """The model in a folder, by transformers' own reader, with some fields replaced."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def greedy(model: torch.nn.Module, prompt_T: np.ndarray) -> tuple[np.ndarray, float]:
    """The continuation by whole forward passes, without a cache, and its smallest margin."""
    ids_T, margin = prompt_T, np.inf
    for _ in range(GREEDY):
        logits_V = logits_of(model, ids_T[None])[0, -1]
        second, first = np.sort(logits_V)[-2:]
        margin = min(margin, first - second)
        ids_T = np.append(ids_T, np.int32(logits_V.argmax()))
    return ids_T[len(prompt_T) :], float(margin)


def change(logits: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, as a fraction of the largest logit."""
    return float(np.abs(logits - other).max() / np.abs(logits).max())


@torch.no_grad()
def check_that_mistakes_show(case: Case, folder: Path, ids_BT: np.ndarray) -> None:
    """Raises AssertionError where a mistake in reading the folder would not change the logits."""
    model = reload(folder, torch.float64)
    logits = logits_of(model, ids_BT)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.copy_(parameter.flatten().roll(1).reshape(parameter.shape))
        assert change(logits, logits_of(model, ids_BT)) > CHANGE, name
        parameter.copy_(kept)
    assert change(logits, logits_of(model, ids_BT)) == 0
    for fields in case.wrong:
        wrong = logits_of(reload(folder, torch.float64, **fields), ids_BT)
        moved = change(logits, wrong)
        print(f"  {fields}: {moved:.1e}")
        # GELU's two forms differ by at most 5e-4.
        assert moved > (CHANGE / 10 if "act" in str(fields) else CHANGE), fields


def write_model(name: str, case: Case) -> None:
    """Draws and saves one case, with another seed until greedy decoding is unambiguous."""
    folder = GOLDEN / name
    eos = case.config.eos_token_id
    vocab_size = case.config.vocab_size
    for seed in itertools.count():
        rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
        draw(case, rng).save_pretrained(folder, **case.save)
        model = reload(folder, torch.float64)
        ids_BT = rng.integers(0, vocab_size, (2, case.length), dtype=np.int32)
        ids_BT[1, 1::3] = ids_BT[1, 0]  # repeats, which only positions tell apart
        prompt_T = rng.integers(0, vocab_size, case.prompt, dtype=np.int32)
        greedy_N, margin = greedy(model, prompt_T)
        scale = np.abs(logits_of(model, ids_BT)).max()
        if margin > 0.01 * scale and len(set(greedy_N)) >= 6 and eos not in greedy_N:
            break
    positions_P = np.unique(np.linspace(0, case.length - 1, 4).astype(np.int32))
    logits_BPV = logits_of(model, ids_BT)[:, positions_P].astype(np.float32)
    np.savez_compressed(
        folder / "golden.npz",
        ids_BT=ids_BT,
        positions_P=positions_P,
        logits_BPV=logits_BPV,
        prompt_T=prompt_T,
        greedy_N=greedy_N,
        greedy_margin=np.float32(margin),
    )
    print(f"{name}: seed {seed}, largest logit {scale:.2f}, margin {margin:.3f}")
    check_that_mistakes_show(case, folder, ids_BT)


def versions() -> dict[str, str]:
    """What the arrays were made with."""
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, transformers, safetensors, tokenizers, np)},
    }


@torch.no_grad()
def check(name: str, case: Case) -> None:
    """Reloads a folder in float32 and compares; raises AssertionError where something differs."""
    folder = GOLDEN / name
    golden = np.load(folder / "golden.npz")
    for attention in ("eager", "sdpa"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
        logits_BPV = logits_of(model, golden["ids_BT"])[:, golden["positions_P"]]
        error = change(golden["logits_BPV"], logits_BPV)
        assert error < 1e-5, (name, attention, error)
        print(f"{name}: {attention} float32 is within {error:.1e} of the largest logit")
    model.generation_config.eos_token_id = None
    prompt_BT = torch.from_numpy(golden["prompt_T"])[None].long()
    text_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=GREEDY,
        do_sample=False,
        pad_token_id=0,
    )
    assert text_BT[0, prompt_BT.shape[1] :].tolist() == golden["greedy_N"].tolist(), name
    if case.tokenizer:
        recorded = json.loads((folder / "tokenizer_cases.json").read_text(encoding="utf-8"))
        assert recorded == tokenizer_cases(folder), name
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == case.config.vocab_size - case.unused_rows, name


def main() -> None:
    parser = argparse.ArgumentParser(description="Write or check the golden models.")
    parser.add_argument("--check", action="store_true", help="only compare what is there")
    only_check = parser.parse_args().check
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not only_check:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        for name, case in cases().items():
            write_model(name, case)
            if case.tokenizer:
                write_tokenizer(GOLDEN / name, case.tokenizer)
        (GOLDEN / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    for name, case in cases().items():
        check(name, case)
    print(f"{sum(f.stat().st_size for f in GOLDEN.rglob('*') if f.is_file()):,} bytes")


if __name__ == "__main__":
    main()
