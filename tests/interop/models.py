"""One small model of each family, with other fields than the defaults; no two sizes are equal."""

import dataclasses
from typing import Any

import numpy as np

from configs import base
from sheepop_jax.config.schema import Config, ModelConfig
from sheepop_jax.interop.families import HubModel
from sheepop_jax.interop.hub_tensors import Path, tensors

BASE: dict[str, Any] = {
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "d_ff": 37,
    "max_seq_len": 29,
    "dropout": 0.25,
    "attention_dropout": 0.125,
    "norm_eps": 1e-3,
    "rope_theta": 77.5,
}
_RMS = {"norm": "rmsnorm", "feed_forward": "gated", "activation": "silu", "dropout": 0.0}
_GPT2 = {"position": "learned", "num_kv_heads": 0, "rope_theta": 10000.0}
_NEOX = {"num_kv_heads": 0, "partial_rotary": 0.5, "parallel_residual": True}
_LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_scaling_factor": 4.0,
    "rope_low_freq_factor": 1.5,
    "rope_high_freq_factor": 3.5,
    "rope_original_length": 11,
}
# Name → (family, fields).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "starcoder2": ("starcoder2", {}),
    "starcoder2-biases": ("starcoder2", {"use_bias": True, "tie_embeddings": False}),
    "starcoder2-qkv": ("starcoder2", {"qkv_bias": True, "activation": "gelu_tanh"}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 7, "activation": "relu"}),
    "gpt2": ("gpt2", {**_GPT2, "activation": "gelu_tanh", "use_bias": True}),
    "gpt2-no-biases": ("gpt2", {**_GPT2, "tie_embeddings": False}),
    "gpt2-qkv": ("gpt2", {**_GPT2, "qkv_bias": True}),
    "gpt_neox": ("gpt_neox", {**_NEOX, "tie_embeddings": False, "use_bias": True}),
    "gpt_neox-sequential": ("gpt_neox", {**_NEOX, "parallel_residual": False}),
    "gpt_neox-all-rotary": ("gpt_neox", {**_NEOX, "partial_rotary": 1.0, "qkv_bias": True}),
    "llama": ("llama", {**_RMS, "tie_embeddings": False}),
    "llama-head": ("llama", {**_RMS, "head_dim": 10}),
    "llama-linear": ("llama", {**_RMS, "rope_scaling": "linear", "rope_scaling_factor": 3.0}),
    "llama-llama3": ("llama", {**_RMS, **_LLAMA3}),
    "qwen2": ("qwen2", {**_RMS, "qkv_bias": True}),
    "qwen3": ("qwen3", {**_RMS, "qk_norm": True}),
    "qwen3-head": ("qwen3", {**_RMS, "qk_norm": True, "head_dim": 10, "num_heads": 10}),
}
VOCAB = 131  # 256 rows with padding


def config_of(fields: dict[str, Any]) -> ModelConfig:
    """The configuration with `BASE` and other fields."""
    model = Config.from_dict(base.get_config()).model
    return dataclasses.replace(model, **{**BASE, **fields})


def nested(flat: dict[Path, Any]) -> dict[str, Any]:
    """The nested dict of parameters by path."""
    params: dict[str, Any] = {}
    for path, array in flat.items():
        inside = params
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
        assert path[-1] not in inside, f"{path} twice"
        inside[path[-1]] = array
    return params


def random_params(model: HubModel, seed: int = 0) -> dict[str, Any]:
    """Parameters of the shapes that the file's tensors ask for; no two numbers are equal."""
    rng = np.random.default_rng(seed)
    return nested(
        {
            path: rng.normal(size=shape).astype(np.float32)
            for tensor in tensors(model)
            for path, shape in zip(tensor.paths, tensor.shapes, strict=True)
        }
    )
