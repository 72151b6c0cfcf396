"""The model's forward pass in numpy float64, written from the formulas, for tests to compare with.

One sequence, one head and one query at a time, with no mask: query t meets the keys 0 … t, and
nothing else exists for it. Sources, by function: Vaswani et al. 2017 (attention, feed-forward,
sinusoids), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped heads), Ba et al. 2016 (LayerNorm),
Zhang & Sennrich 2019 (RMSNorm), Shazeer 2020 (gated), Hendrycks & Gimpel 2016 (GELU), Henry et al.
2020 (queries and keys normalized), Grattafiori et al. 2024 (llama3 scaling of RoPE).

Fed with random weights of `Starcoder2ForCausalLM` (transformers 5.23, torch 2.13, in float64; with
and without biases, tied and not, 6 query and 2 key/value heads), it gave that model's logits to
1e-7 relative, and to 1e-15 once that model's RoPE tables, which are fp32, were float64 as well.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sheepop_jax.config.schema import ModelConfig


def logits(params: Mapping[str, Any], config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits, float64 [B, T, V] over all V rows of the embedding, padded ones included."""
    table_VD = _f64(params["embedding" if config.tie_embeddings else "output_embedding"])
    logits_BTV = hidden_states(params, config, tokens_BT) @ table_VD.T
    cap = config.logit_softcap
    return logits_BTV if cap == 0 else cap * np.tanh(logits_BTV / cap)


def hidden_states(
    params: Mapping[str, Any], config: ModelConfig, tokens_BT: np.ndarray
) -> np.ndarray:
    """Hidden states after the final norm, float64 [B, T, D]."""
    return np.stack([_sequence(params, config, tokens_T) for tokens_T in np.asarray(tokens_BT)])


def _sequence(params: Mapping[str, Any], config: ModelConfig, tokens_T: np.ndarray) -> np.ndarray:
    x_TD = _f64(params["embedding"])[tokens_T]
    if config.position == "sinusoidal":
        x_TD = x_TD + sinusoids(len(tokens_T), config.d_model)
    if config.position == "learned":
        x_TD = x_TD + _f64(params["positions"])[: len(tokens_T)]
    for i in range(config.num_layers):
        block = params[f"block_{i}"]
        attended_TD = _multi_head(_norm(x_TD, block["attention_norm"], config), block, config)
        if config.parallel_residual:
            normed_TD = _norm(x_TD, block["feed_forward_norm"], config)
        else:
            normed_TD = _norm(x_TD + attended_TD, block["feed_forward_norm"], config)
        x_TD = x_TD + attended_TD + _feed_forward(normed_TD, block["feed_forward"], config)
    return _norm(x_TD, params["final_norm"], config)


def _feed_forward(x_TD: np.ndarray, params: Mapping[str, Any], config: ModelConfig) -> np.ndarray:
    act = ACTIVATIONS[config.activation]
    up_TF = linear(x_TD, params["up"], config.use_bias)
    if config.feed_forward == "gated":
        inner_TF = act(linear(x_TD, params["gate"], config.use_bias)) * up_TF
    else:
        inner_TF = act(up_TF)
    return linear(inner_TF, params["down"], config.use_bias)


def _norm(x_TD: np.ndarray, params: Mapping[str, Any], config: ModelConfig) -> np.ndarray:
    return {"layernorm": layer_norm, "rmsnorm": rms_norm}[config.norm](
        x_TD, params, config.norm_eps
    )


def _multi_head(x_TD: np.ndarray, block: Mapping[str, Any], config: ModelConfig) -> np.ndarray:
    params = block["attention"]
    width = config.head_dim if config.head_dim > 0 else config.d_model // config.num_heads
    kv_heads = config.num_kv_heads if config.num_kv_heads > 0 else config.num_heads
    group = config.num_heads // kv_heads
    queries, keys, values = (
        linear(x_TD, params[name], config.use_bias or config.qkv_bias)
        for name in ("query", "key", "value")
    )
    heads = []
    for head in range(config.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        q_TC, k_TC, v_TC = queries[:, own], keys[:, shared], values[:, shared]
        if config.qk_norm:
            q_TC = rms_norm(q_TC, params["query_norm"], config.norm_eps)
            k_TC = rms_norm(k_TC, params["key_norm"], config.norm_eps)
        if config.position == "rope":
            q_TC, k_TC = _rotate_part(q_TC, config), _rotate_part(k_TC, config)
        rows = []
        for t in range(len(x_TD)):
            first = max(0, t + 1 - config.sliding_window) if config.sliding_window else 0
            met = slice(first, t + 1)
            rows.append(softmax(k_TC[met] @ q_TC[t] / math.sqrt(width)) @ v_TC[met])
        heads.append(np.stack(rows))
    return linear(np.concatenate(heads, axis=1), params["output"], config.use_bias)


def _rotate_part(x_TC: np.ndarray, config: ModelConfig) -> np.ndarray:
    rotated = int(x_TC.shape[1] * config.partial_rotary)
    factors = [
        scaling(config.rope_theta ** (-2 * i / rotated), config) for i in range(rotated // 2)
    ]
    turned = rotate(x_TC[:, :rotated], config.rope_theta, factors=factors)
    return np.concatenate([turned, x_TC[:, rotated:]], axis=1)


def scaling(frequency: float, config: ModelConfig) -> float:
    """What RoPE's scaling multiplies a frequency (radians per token) with."""
    factor = config.rope_scaling_factor
    if config.rope_scaling == "none":
        return 1.0
    if config.rope_scaling == "linear":
        return 1 / factor
    wavelength = 2 * math.pi / frequency
    if wavelength < config.rope_original_length / config.rope_high_freq_factor:
        return 1.0
    if wavelength > config.rope_original_length / config.rope_low_freq_factor:
        return 1 / factor
    smooth = config.rope_original_length / wavelength - config.rope_low_freq_factor
    smooth /= config.rope_high_freq_factor - config.rope_low_freq_factor
    return (1 - smooth) / factor + smooth


def rotate(
    x_TC: np.ndarray, theta: float, first_position: int = 0, factors: Any = None
) -> np.ndarray:
    """RoPE as a product of complex numbers: (x_i + j x_{i + C/2}) · exp(j t θ^(-2i / C))."""
    steps, width = x_TC.shape
    half = width // 2
    out = np.empty((steps, width))
    for t in range(steps):
        for i in range(half):
            angle = (first_position + t) * theta ** (-2 * i / width)
            angle *= 1 if factors is None else factors[i]
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


def rms_norm(x_TD: np.ndarray, params: Mapping[str, Any], eps: float) -> np.ndarray:
    """γ x / √(mean x² + ε) over the last axis; a β would be an error."""
    if set(params) != {"scale"}:
        raise ValueError(f"RMSNorm has a scale, not {sorted(params)}")
    return _f64(params["scale"]) * x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + eps)


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


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "silu": _silu,
}


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)
