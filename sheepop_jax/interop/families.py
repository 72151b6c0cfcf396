"""The six Hugging Face architectures that models are exported to and imported from.

One table for both directions: which values of `ModelConfig` an architecture computes, and how the
fields are called in its `config.json`. `hub_config` and `hub_tensors` read and write by this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError

# Names of activations in `config.json`; the first is written. `relu2` is missing: transformers has
# it, but llama.cpp does not compute it for these architectures.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_python_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
_MLP_ACTIVATIONS = tuple(ACTIVATIONS)
ROPE_KINDS = ("none", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        name: `model_type` of config.json.
        title: the name for messages.
        architecture: the class in transformers.
        values: field of `ModelConfig` → the values that the architecture computes, the usual one
            first. A field that is not listed may have any value.
        keys: field of `ModelConfig` → key of config.json.
        defaults: key → the value that transformers takes where the key is missing.
        fixed: key → the only value that is built. Written, so that no default counts.
        checked: as `fixed`, but not written, since transformers does not know these keys.
        ignored: keys without effect on the computation that only this architecture has.
        copies: key → the key with the same value, written for transformers' fine-tuning.
        grouped_heads: whether there may be fewer key/value heads than heads.
        free_head_dim: whether a head's width may differ from D / H.
        has_linear_biases: True: the file holds biases of all linear layers. False: none. None:
            `use_bias` of config.json says it.
    """

    name: str
    title: str
    architecture: str
    values: Mapping[str, tuple[Any, ...]]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    grouped_heads: bool = True
    free_head_dim: bool = False
    has_linear_biases: bool | None = False


# The fields that most architectures can compute in one way only.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "partial_rotary": (1.0,),
    "rope_scaling": ROPE_KINDS,
    "qk_norm": (False,),
    "parallel_residual": (False,),
    "sliding_window": (0,),
    "logit_softcap": (0.0,),
}
_LAYER_NORM = {**_PLAIN, "norm": ("layernorm",), "feed_forward": ("mlp",)}
_RMS_NORM = {
    **_PLAIN,
    "norm": ("rmsnorm",),
    "feed_forward": ("gated",),
    "activation": ("silu",),
    "use_bias": (False,),
}
_KEYS = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "attention_dropout": "attention_dropout",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}
_RMS_KEYS = {**_KEYS, "norm_eps": "rms_norm_eps"}
_RMS_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_NO_WINDOW = {"use_sliding_window": False}
_UNUSED_WINDOW = ("sliding_window", "max_window_layers")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "starcoder2",
            "Starcoder2",
            "Starcoder2ForCausalLM",
            # In all layers, the window of a query includes itself, as `model.sliding_window`.
            values={
                name: allowed
                for name, allowed in {**_LAYER_NORM, "activation": _MLP_ACTIVATIONS}.items()
                if name != "sliding_window"
            },
            keys={
                **_KEYS,
                "norm_eps": "norm_epsilon",
                "dropout": "residual_dropout",
                "sliding_window": "sliding_window",
            },
            defaults={
                "num_key_value_heads": 2,
                "hidden_act": "gelu_pytorch_tanh",
                "max_position_embeddings": 4096,
                "norm_epsilon": 1e-5,
                "attention_dropout": 0.0,
                "residual_dropout": 0.0,
                "sliding_window": None,
                "tie_word_embeddings": True,
                "use_bias": True,
            },
            checked={
                "mlp_type": "default",
                "norm_type": "layer_norm",
                "scale_attn_weights": True,
            },
            ignored=(
                "activation_function",
                "attention_softmax_in_fp32",
                "scale_attention_softmax_in_fp32",
                "rms_norm_eps",  # in the public starcoder2-15b, which has LayerNorm
            ),
            copies={"embedding_dropout": "residual_dropout"},
            has_linear_biases=None,
        ),
        Family(
            "gpt2",
            "GPT-2",
            "GPT2LMHeadModel",
            values={
                **_LAYER_NORM,
                "position": ("learned",),
                "rope_scaling": ("none",),
                "activation": ("gelu_tanh", "gelu", "relu", "silu"),
            },
            keys={
                "d_model": "n_embd",
                "num_layers": "n_layer",
                "num_heads": "n_head",
                "d_ff": "n_inner",
                "max_seq_len": "n_positions",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "dropout": "resid_pdrop",
                "attention_dropout": "attn_pdrop",
                "tie_embeddings": "tie_word_embeddings",
            },
            defaults={
                "n_inner": None,
                "n_positions": 1024,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
                "resid_pdrop": 0.1,
                "attn_pdrop": 0.1,
                "tie_word_embeddings": True,
            },
            fixed={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            # The last three: in old files of the public models, and read by no version.
            ignored=(
                "n_ctx",
                "reorder_and_upcast_attn",
                "n_special",
                "predict_special_tokens",
                "output_past",
            ),
            copies={"embd_pdrop": "resid_pdrop"},
            grouped_heads=False,
            has_linear_biases=True,
        ),
        Family(
            "gpt_neox",
            "GPT-NeoX",
            "GPTNeoXForCausalLM",
            values={
                name: allowed
                for name, allowed in {**_LAYER_NORM, "activation": _MLP_ACTIVATIONS}.items()
                if name not in ("partial_rotary", "parallel_residual")
            },
            keys={
                **{name: key for name, key in _KEYS.items() if name != "num_kv_heads"},
                "norm_eps": "layer_norm_eps",
                "dropout": "hidden_dropout",
                "parallel_residual": "use_parallel_residual",
            },
            defaults={
                "hidden_act": "gelu",
                "max_position_embeddings": 2048,
                "attention_dropout": 0.0,
                "layer_norm_eps": 1e-5,
                "hidden_dropout": 0.0,
                "use_parallel_residual": True,
                "tie_word_embeddings": False,
            },
            fixed={"attention_bias": True},
            ignored=("classifier_dropout",),
            grouped_heads=False,
            has_linear_biases=True,
        ),
        Family(
            "llama",
            "Llama",
            "LlamaForCausalLM",
            values={**_RMS_NORM, "qkv_bias": (False,)},
            keys={**_RMS_KEYS, "head_dim": "head_dim"},
            defaults={
                **_RMS_DEFAULTS,
                "num_key_value_heads": None,
                "max_position_embeddings": 2048,
                "head_dim": None,
            },
            fixed={"attention_bias": False, "mlp_bias": False},
            checked={"rope_interleaved": False},
            ignored=("pretraining_tp", "is_llama_config"),
            free_head_dim=True,
        ),
        Family(
            "qwen2",
            "Qwen2",
            "Qwen2ForCausalLM",
            values={**_RMS_NORM, "qkv_bias": (True,)},
            keys=_RMS_KEYS,
            defaults=_RMS_DEFAULTS,
            fixed=_NO_WINDOW,
            checked={"use_mrope": False},
            ignored=_UNUSED_WINDOW,
        ),
        Family(
            "qwen3",
            "Qwen3",
            "Qwen3ForCausalLM",
            values={**_RMS_NORM, "qkv_bias": (False,), "qk_norm": (True,)},
            keys={**_RMS_KEYS, "head_dim": "head_dim"},
            defaults={**_RMS_DEFAULTS, "head_dim": 128},
            fixed={**_NO_WINDOW, "attention_bias": False},
            ignored=_UNUSED_WINDOW,
            free_head_dim=True,
        ),
    )
}


@dataclass(frozen=True)
class HubModel:
    """A model as Hugging Face files hold it.

    Attributes:
        family: the architecture.
        config: our configuration of the same computation.
        vocab_size: rows of the embedding in the file, without padding.
        stores_biases: whether the file holds biases of all linear layers. Where `config` has none
            (see `has_bias`), they are zero.
    """

    family: Family
    config: ModelConfig
    vocab_size: int
    stores_biases: bool


def for_export(config: ModelConfig, vocab_size: int) -> HubModel:
    """Chooses the architecture that computes the same as a model of this project.

    Args:
        config: the model.
        vocab_size: the size of its vocabulary.

    Raises:
        InputError: no architecture does; names the field, and the nearest value that works.
    """
    if config.parallel_residual or config.partial_rotary != 1:
        order = ["gpt_neox", "starcoder2", "gpt2", "llama", "qwen2", "qwen3"]
    else:
        order = ["starcoder2", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3"]
    refusals = {name: _refusals(config, FAMILIES[name]) for name in order}
    nearest = min(order, key=lambda name: len(refusals[name]))
    if refusals[nearest]:
        raise refusals[nearest][0]
    family = FAMILIES[nearest]
    return HubModel(family, config, vocab_size, family.has_linear_biases is not False)


def _refusals(config: ModelConfig, family: Family) -> list[InputError]:
    """What an architecture cannot express of a model, one error per field."""
    found = []

    def refuse(name: str, expected: str, hint: str) -> None:
        got = getattr(config, name)
        wanted = f"{expected} to export as {family.title}"
        found.append(InputError(f"model.{name}", got, wanted, f"training with `model.{hint}`"))

    for name, allowed in family.values.items():
        if getattr(config, name) not in allowed:
            refuse(name, " or ".join(map(str, allowed)), f"{name}={allowed[0]}")
    if not family.grouped_heads and config.kv_heads != config.num_heads:
        refuse("num_kv_heads", f"0 or {config.num_heads} (model.num_heads)", "num_kv_heads=0")
    if config.d_model % config.num_heads and family.name != "qwen3":
        divisors = (h for h in range(config.num_heads, 0, -1) if config.d_model % h == 0)
        works = next((h for h in divisors if h % (config.num_kv_heads or 1) == 0), 1)
        expected = f"a divisor of {config.d_model} (model.d_model)"
        refuse("num_heads", expected, f"num_heads={works}")
    elif not family.free_head_dim and config.head_width * config.num_heads != config.d_model:
        width = config.d_model // config.num_heads
        refuse("head_dim", f"0 or {width} (model.d_model / model.num_heads)", "head_dim=0")
    return found


def has_bias(config: ModelConfig, layer: str) -> bool:
    """Whether a linear layer ("query", …, "down") has a bias in our model."""
    return config.use_bias or (config.qkv_bias and layer in ("query", "key", "value"))
