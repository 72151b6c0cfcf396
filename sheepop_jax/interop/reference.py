"""A float64 NumPy forward pass of a Hugging Face directory, to verify files that others will read.

It computes from `config.json` and the safetensors alone, and shares no code with `model/` or with
the tables of the export, so that a mistake there cannot hide here.

Alphabet: B sequences, T tokens, D model width, H heads, K key/value heads, C head width, R rotary
width, F feed-forward width, V vocabulary of the file.

Sources: GPT-2, Radford et al. 2019; GPT-NeoX, Black et al. 2022; Llama, Touvron et al. 2023;
RoPE, Su et al. 2021 (arXiv:2104.09864), in the form that pairs component i with i + R / 2; RMSNorm,
Zhang and Sennrich 2019; SwiGLU, Shazeer 2020 (arXiv:2002.05202); scaling of Llama 3.1, Dubey et al.
2024.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import erf

from sheepop_jax.errors import InputError
from sheepop_jax.files import read_text
from sheepop_jax.interop.safetensors_files import WeightFiles

_QUERIES = 256  # attention scores are [H, 256, T] at a time
# Values of keys that a config.json may leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tied": True},
    "gpt_neox": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tied": False},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tied": True},
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tied": False},
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tied": False},
    "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tied": False},
}
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(x / 2))  # x · sigmoid(x), without overflow


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": _silu,
}


@dataclass(frozen=True)
class _Linear:
    """y = x · kernel + bias; `kernel_IO` is [in, out]."""

    kernel_IO: np.ndarray
    bias_O: np.ndarray | None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.kernel_IO
        return y if self.bias_O is None else y + self.bias_O


@dataclass(frozen=True)
class _Norm:
    """LayerNorm, or RMSNorm without a bias: over the last axis."""

    scale: np.ndarray
    bias: np.ndarray | None
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.bias is None:
            return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.eps) * self.scale
        centered = x - np.mean(x, -1, keepdims=True)
        variance = np.mean(centered**2, -1, keepdims=True)
        return centered / np.sqrt(variance + self.eps) * self.scale + self.bias


class HubReference:
    """A Hugging Face model directory: gpt2, gpt_neox, starcoder2, llama, qwen2 or qwen3.

    Attributes:
        vocab_size: V.
        max_length: positions that the configuration allows.
        weights: its safetensors.
    """

    def __init__(self, directory: str | Path):
        """Reads the configuration and the headers of the weights.

        Raises:
            InputError: not such a model, or the weights are invalid (see `WeightFiles`).
        """
        self._path = Path(directory) / "config.json"
        try:
            self._config = json.loads(read_text(self._path, str(self._path)))
            self._family = self._config["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            got = f"{type(error).__name__}: {error}"
            raise InputError(str(self._path), got, "the configuration of a model") from None
        if self._family not in _DEFAULTS:
            expected = "one of " + ", ".join(_DEFAULTS)
            raise InputError(f"{self._path}: model_type", self._family, expected)
        self.weights = WeightFiles(directory)
        gpt2 = self._family == "gpt2"
        self.vocab_size = self._size("vocab_size")
        self.max_length = self._size("n_positions" if gpt2 else "max_position_embeddings")
        self._d = self._size("n_embd" if gpt2 else "hidden_size")
        self._layers = self._size("n_layer" if gpt2 else "num_hidden_layers")
        self._h = self._size("n_head" if gpt2 else "num_attention_heads")
        self._k = self._get("num_key_value_heads") or self._h
        self._c = self._get("head_dim") or self._d // self._h
        self._f = self._get("n_inner" if gpt2 else "intermediate_size") or 4 * self._d
        self._eps = float(
            self._first("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "rms_norm_eps")
        )
        name = self._first("activation_function" if gpt2 else "hidden_act")
        if name not in _ACTIVATIONS:
            raise InputError(str(self._path), name, "one of " + ", ".join(_ACTIVATIONS))
        self._activation = _ACTIVATIONS[name]
        self._frequencies = None if gpt2 else self._rotary_frequencies()
        self._window = self._get("sliding_window") if self._family == "starcoder2" else None
        # Without this key, GPT-NeoX adds both branches to the block's input.
        self._parallel = self._family == "gpt_neox" and self._get("use_parallel_residual", True)
        for key in ("use_sliding_window", "scale_attn_by_inverse_layer_idx"):
            if self._get(key):
                raise InputError(f"{self._path}: {key}", True, "False")

    def logits(self, ids_BT: np.ndarray) -> Iterator[np.ndarray]:
        """The logits of each sequence, [T, V] float64; every position sees those before it.

        Reads each tensor once; keeps the parameters of one block in memory.

        Args:
            ids_BT: [B, T] token ids.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        embedding_VD = self._load(self._name("embed"), self.vocab_size, self._d)
        x_BTD = embedding_VD[ids_BT]
        length = ids_BT.shape[1]
        if self._family == "gpt2":
            table_TD = self._load("transformer.wpe.weight", self.max_length, self._d)
            x_BTD = x_BTD + table_TD[:length]
        for index in range(self._layers):
            x_BTD = self._block(index, x_BTD)
        x_BTD = self._norm(self._name("final"))(x_BTD)
        if not self._get("tie_word_embeddings", _DEFAULTS[self._family]["tied"]):
            name = "embed_out.weight" if self._family == "gpt_neox" else "lm_head.weight"
            embedding_VD = self._load(name, self.vocab_size, self._d)
        for x_TD in x_BTD:
            yield x_TD @ embedding_VD.T

    def _block(self, index: int, x_BTD: np.ndarray) -> np.ndarray:
        prefix = self._name("block") + f"{index}."
        gpt2 = self._family == "gpt2"
        attention_norm = self._norm(prefix + ("ln_1" if gpt2 else "input_layernorm"))
        feed_forward_norm = self._norm(prefix + ("ln_2" if gpt2 else "post_attention_layernorm"))
        attended_BTD = self._attention(prefix, attention_norm(x_BTD))
        if self._parallel:
            return x_BTD + attended_BTD + self._feed_forward(prefix, feed_forward_norm(x_BTD))
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self._feed_forward(prefix, feed_forward_norm(x_BTD))

    def _feed_forward(self, prefix: str, x_BTD: np.ndarray) -> np.ndarray:
        d, f = self._d, self._f
        match self._family:
            case "gpt2" | "starcoder2":
                bias = self._family == "gpt2" or self._get("use_bias", True)
                up = self._linear(prefix + "mlp.c_fc", d, f, bias)
                down = self._linear(prefix + "mlp.c_proj", f, d, bias)
            case "gpt_neox":
                up = self._linear(prefix + "mlp.dense_h_to_4h", d, f, True)
                down = self._linear(prefix + "mlp.dense_4h_to_h", f, d, True)
            case _:
                bias = self._family == "llama" and self._get("mlp_bias", False)
                gate = self._linear(prefix + "mlp.gate_proj", d, f, bias)
                up = self._linear(prefix + "mlp.up_proj", d, f, bias)
                down = self._linear(prefix + "mlp.down_proj", f, d, bias)
                return down(self._activation(gate(x_BTD)) * up(x_BTD))
        return down(self._activation(up(x_BTD)))

    def _attention(self, prefix: str, x_BTD: np.ndarray) -> np.ndarray:
        d, h, k, c = self._d, self._h, self._k, self._c
        match self._family:
            case "gpt2":  # side by side
                qkv = self._linear(prefix + "attn.c_attn", d, 3 * d, True)(x_BTD)
                q_BTHC, k_BTKC, v_BTKC = (self._split(y, h) for y in np.split(qkv, 3, -1))
                output = self._linear(prefix + "attn.c_proj", d, d, True)
            case "gpt_neox":  # head by head: its query, key and value
                bias = self._get("attention_bias", True)
                qkv = self._linear(prefix + "attention.query_key_value", d, 3 * d, bias)(x_BTD)
                q_BTHC, k_BTKC, v_BTKC = np.split(self._split(qkv, h), 3, -1)
                output = self._linear(prefix + "attention.dense", d, d, bias)
            case _:
                prefix += "self_attn."
                bias = self._qkv_bias()
                q_BTHC = self._split(self._linear(prefix + "q_proj", d, h * c, bias)(x_BTD), h)
                k_BTKC = self._split(self._linear(prefix + "k_proj", d, k * c, bias)(x_BTD), k)
                v_BTKC = self._split(self._linear(prefix + "v_proj", d, k * c, bias)(x_BTD), k)
                bias = bias and self._family != "qwen2"
                output = self._linear(prefix + "o_proj", h * c, d, bias)
        if self._family == "qwen3":
            q_BTHC = self._norm(prefix + "q_norm", c)(q_BTHC)
            k_BTKC = self._norm(prefix + "k_norm", c)(k_BTKC)
        if self._frequencies is not None:
            q_BTHC = _rotated(q_BTHC, self._frequencies)
            k_BTKC = _rotated(k_BTKC, self._frequencies)
        rows = zip(q_BTHC, k_BTKC, v_BTKC, strict=True)
        mixed_BTD = np.stack([_attended(*row, self._window) for row in rows])
        return output(mixed_BTD)

    def _qkv_bias(self) -> bool:
        match self._family:
            case "starcoder2":
                return bool(self._get("use_bias", True))
            case "qwen2":
                return True
        return bool(self._get("attention_bias", False))

    @staticmethod
    def _split(x_BTE: np.ndarray, heads: int) -> np.ndarray:
        return x_BTE.reshape(*x_BTE.shape[:2], heads, -1)

    def _rotary_frequencies(self) -> np.ndarray:
        """Radians per token of each pair of components, [R / 2], of either style of configuration.

        transformers 5 writes `rope_parameters`; 4 `rope_theta` with `rope_scaling`, for GPT-NeoX
        `rotary_emb_base` and `rotary_pct`.
        """
        new, old = self._get("rope_parameters") or {}, self._get("rope_scaling") or {}
        scaling = {**old, **new}
        neox = self._family == "gpt_neox"
        theta = new.get("rope_theta") or self._get("rope_theta")
        theta = theta or (self._get("rotary_emb_base") if neox else None) or 10_000.0
        fraction = 1.0
        if neox:
            found = new.get("partial_rotary_factor"), self._get("partial_rotary_factor")
            fraction = next((x for x in (*found, self._get("rotary_pct")) if x is not None), 0.25)
        width = int(self._c * fraction)
        frequencies = float(theta) ** -(np.arange(0, width, 2) / width)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return frequencies
        if kind == "linear":
            return frequencies / scaling["factor"]
        if kind != "llama3":
            raise InputError(f"{self._path}: rope_type", kind, "default, linear or llama3")
        # Waves of more than `original / low` tokens are stretched, shorter than `original / high`
        # kept; linear in the number of waves that the original context holds between the two.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._config.get(key)
        return default if value is None else value

    def _first(self, *keys: str) -> Any:
        """The value of the one of `keys` that the architecture has."""
        [key] = [key for key in keys if key in _DEFAULTS[self._family]]
        return self._get(key, _DEFAULTS[self._family][key])

    def _size(self, key: str) -> int:
        value = self._get(key)
        if type(value) is not int or value < 1:
            raise InputError(f"{self._path}: {key}", value, "an integer above 0")
        return value

    def _name(self, part: str) -> str:
        gpt2, neox = self._family == "gpt2", self._family == "gpt_neox"
        prefix = _PREFIXES.get(self._family, "model.")
        match part:
            case "embed":
                name = "wte" if gpt2 else "embed_in" if neox else "embed_tokens"
                return f"{prefix}{name}.weight"
            case "block":
                return f"{prefix}{'h' if gpt2 else 'layers'}."
            case _:
                return prefix + ("ln_f" if gpt2 else "final_layer_norm" if neox else "norm")

    def _norm(self, name: str, width: int = 0) -> _Norm:
        width = width or self._d
        has_bias = self._family in ("gpt2", "gpt_neox", "starcoder2")
        bias = self._load(f"{name}.bias", width) if has_bias else None
        return _Norm(self._load(f"{name}.weight", width), bias, self._eps)

    def _linear(self, name: str, inputs: int, outputs: int, bias: bool) -> _Linear:
        if self._family == "gpt2":
            kernel = self._load(f"{name}.weight", inputs, outputs)
        else:
            kernel = self._load(f"{name}.weight", outputs, inputs).T
        return _Linear(kernel, self._load(f"{name}.bias", outputs) if bias else None)

    def _load(self, name: str, *shape: int) -> np.ndarray:
        """A tensor in float64. Older files of GPT-2 leave out the prefix."""
        short = name.removeprefix(_PREFIXES.get(self._family, "model."))
        stored = name if name in self.weights.tensors else short
        info = self.weights.tensors.get(stored)
        if info is None:
            raise InputError(str(self.weights.directory), f"no {name}", "every tensor of the model")
        if info.shape != shape:
            where = f"{self.weights.directory}: {name}"
            raise InputError(where, list(info.shape), f"{list(shape)} (config.json)")
        return self.weights.load(stored).astype(np.float64)


def _rotated(x_BTHC: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotates each pair (i, i + R / 2) by frequency · position; the last C - R components stay."""
    half = len(frequencies)
    angles_T1R = np.arange(x_BTHC.shape[1])[:, None, None] * frequencies
    first, second, rest = np.split(x_BTHC, [half, 2 * half], -1)
    cos, sin = np.cos(angles_T1R), np.sin(angles_T1R)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _attended(
    q_THC: np.ndarray, k_TKC: np.ndarray, v_TKC: np.ndarray, window: int | None
) -> np.ndarray:
    """Causal attention of one sequence, [T, H · C]; a window includes the query's own token."""
    length, heads, width = q_THC.shape
    group = heads // k_TKC.shape[1]
    k_HCT = np.repeat(k_TKC, group, 1).transpose(1, 2, 0)
    v_HTC = np.repeat(v_TKC, group, 1).transpose(1, 0, 2)
    keys = np.arange(length)
    mixed = []
    for start in range(0, length, _QUERIES):
        q_HQC = q_THC[start : start + _QUERIES].transpose(1, 0, 2)
        scores_HQT = q_HQC @ k_HCT / np.sqrt(width)
        age_QT = np.arange(start, start + q_HQC.shape[1])[:, None] - keys
        visible_QT = (age_QT >= 0) & (age_QT < (window or length))
        scores_HQT = np.where(visible_QT, scores_HQT, -np.inf)
        weights = np.exp(scores_HQT - scores_HQT.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed.append((weights @ v_HTC).transpose(1, 0, 2))
    return np.concatenate(mixed).reshape(length, -1)
