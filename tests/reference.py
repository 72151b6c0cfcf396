"""The model's forward pass in numpy float64, written from the formulas, for tests to compare with.

One sequence, one head and one query at a time, with no mask: query t meets the keys 0 … t, and
nothing else exists for it. Sources, by function: Vaswani et al. 2017 (attention, feed-forward,
sinusoids), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped heads), Ba et al. 2016 (LayerNorm),
Hendrycks & Gimpel 2016 (GELU). Fed with random weights of `Starcoder2ForCausalLM` (transformers
5.23, torch 2.13, in float64; with and without biases, tied and not, 6 query and 2 key/value heads),
it gave that model's logits to 1e-7 relative, and to 1e-15 once that model's RoPE tables, which are
fp32, were float64 as well.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sheepop_jax.config.schema import ModelConfig


def logits(params: Mapping[str, Any], config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits, float64 [B, T, V] over all V rows of the embedding, padded ones included."""
    table_VD = _f64(params["embedding" if config.tie_embeddings else "output_embedding"])
    return hidden_states(params, config, tokens_BT) @ table_VD.T


def hidden_states(
    params: Mapping[str, Any], config: ModelConfig, tokens_BT: np.ndarray
) -> np.ndarray:
    """Hidden states after the final LayerNorm, float64 [B, T, D]."""
    return np.stack([_sequence(params, config, tokens_T) for tokens_T in np.asarray(tokens_BT)])


def _sequence(params: Mapping[str, Any], config: ModelConfig, tokens_T: np.ndarray) -> np.ndarray:
    x_TD = _f64(params["embedding"])[tokens_T]
    if config.position == "sinusoidal":
        x_TD = x_TD + sinusoids(len(tokens_T), config.d_model)
    if config.position == "learned":
        x_TD = x_TD + _f64(params["positions"])[: len(tokens_T)]
    for i in range(config.num_layers):
        block, eps = params[f"block_{i}"], config.norm_eps
        normed_TD = layer_norm(x_TD, block["attention_norm"], eps)
        x_TD = x_TD + _multi_head(normed_TD, block["attention"], config)
        normed_TD = layer_norm(x_TD, block["feed_forward_norm"], eps)
        inner_TF = ACTIVATIONS[config.activation](
            linear(normed_TD, block["feed_forward"]["up"], config.use_bias)
        )
        x_TD = x_TD + linear(inner_TF, block["feed_forward"]["down"], config.use_bias)
    return layer_norm(x_TD, params["final_norm"], config.norm_eps)


def _multi_head(x_TD: np.ndarray, params: Mapping[str, Any], config: ModelConfig) -> np.ndarray:
    width = config.d_model // config.num_heads
    kv_heads = config.num_kv_heads if config.num_kv_heads > 0 else config.num_heads
    group = config.num_heads // kv_heads
    queries, keys, values = (
        linear(x_TD, params[name], config.use_bias) for name in ("query", "key", "value")
    )
    heads = []
    for head in range(config.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        q_TC, k_TC, v_TC = queries[:, own], keys[:, shared], values[:, shared]
        if config.position == "rope":
            q_TC, k_TC = rotate(q_TC, config.rope_theta), rotate(k_TC, config.rope_theta)
        rows = [
            softmax(k_TC[: t + 1] @ q_TC[t] / math.sqrt(width)) @ v_TC[: t + 1]
            for t in range(len(x_TD))
        ]
        heads.append(np.stack(rows))
    return linear(np.concatenate(heads, axis=1), params["output"], config.use_bias)


def rotate(x_TC: np.ndarray, theta: float, first_position: int = 0) -> np.ndarray:
    """RoPE as a product of complex numbers: (x_i + j x_{i + C/2}) · exp(j t θ^(-2i / C))."""
    steps, width = x_TC.shape
    half = width // 2
    out = np.empty((steps, width))
    for t in range(steps):
        for i in range(half):
            angle = (first_position + t) * theta ** (-2 * i / width)
            z = complex(x_TC[t, i], x_TC[t, i + half]) * complex(math.cos(angle), math.sin(angle))
            out[t, i], out[t, i + half] = z.real, z.imag
    return out


def sinusoids(steps: int, width: int) -> np.ndarray:
    """PE(t, 2i) = sin(t / 10000^(2i / D)), PE(t, 2i + 1) = cos(the same): [T, D]."""
    out = np.empty((steps, width))
    for t in range(steps):
        for d in range(width):
            angle = t / 10000 ** ((d - d % 2) / width)
            out[t, d] = math.cos(angle) if d % 2 else math.sin(angle)
    return out


def softmax(scores_S: np.ndarray) -> np.ndarray:
    """Softmax of one row of scores."""
    exponentials = np.exp(scores_S - scores_S.max())
    return exponentials / exponentials.sum()


def layer_norm(x_TD: np.ndarray, params: Mapping[str, Any], eps: float) -> np.ndarray:
    """γ (x - mean) / √(variance + ε) + β over the last axis."""
    centred = x_TD - x_TD.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return _f64(params["scale"]) * centred / np.sqrt(variance + eps) + _f64(params["bias"])


def linear(x_TI: np.ndarray, params: Mapping[str, Any], use_bias: bool) -> np.ndarray:
    """x W + b, W [in, out]; a bias that is there unasked, or missing, is an error."""
    if ("bias" in params) != use_bias:
        raise ValueError(f"use_bias is {use_bias} and the parameters are {sorted(params)}")
    y = x_TI @ _f64(params["kernel"])
    return y + _f64(params["bias"]) if use_bias else y


def _gelu(x: np.ndarray) -> np.ndarray:
    """x Φ(x), Φ the normal distribution function."""
    return x * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(x)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.0)


ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu}


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)
