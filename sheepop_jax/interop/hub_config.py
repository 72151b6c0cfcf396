"""Reads and writes the architecture in a Hugging Face `config.json`, by the table of `families`."""

from collections.abc import Mapping
from typing import Any

from sheepop_jax.config.schema import ADDED, HUGE_INT, ModelConfig
from sheepop_jax.errors import InputError
from sheepop_jax.interop.families import ACTIVATIONS, FAMILIES, Family, HubModel

# Which linear layers of the model have biases, where the file holds zeros for the others.
BIASES_KEY = "sheepop_jax_biases"
_SIZES = ("d_model", "num_layers", "num_heads", "d_ff", "max_seq_len")
# Keys that any architecture may have, with the only value that is built.
_CHECKED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
}
# Keys without effect on the logits: names, versions, training, tasks, and what `generate` does.
_IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    is_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_version use_bfloat16
    use_cache vocab_size architectures
    """.split()
)
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_NEOX_ROPE_KEYS = ("rotary_emb_base", "rotary_pct")
# Our field of each number of a rope scaling.
_SCALING: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
}
# Fields that a config.json does not hold. `defaults` of the family may override the dropouts.
_FIELDS: dict[str, Any] = {
    **ADDED["model"],
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "num_kv_heads": 0,
    "use_bias": False,
    "rope_theta": 10000.0,
    "remat": "none",
}


def write_config(model: HubModel) -> dict[str, Any]:
    """The `config.json` of a model, without token ids and dtype; every key that counts is there."""
    family, config = model.family, model.config
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": model.vocab_size,
    }
    for name, key in family.keys.items():
        values[key] = _to_hub(family, config, name)
    values |= {key: values[source] for key, source in family.copies.items()}
    values |= family.fixed
    if family.has_linear_biases is None:
        values["use_bias"] = model.stores_biases
    if model.stores_biases and not config.use_bias:
        values[BIASES_KEY] = "qkv" if config.qkv_bias else "none"
    if config.position == "rope":
        values |= _written_rope(family, config)
    return {**values, "use_cache": True}


def read_config(values: Mapping[str, Any], name: str = "config.json") -> HubModel:
    """The model that a parsed `config.json` describes.

    Args:
        values: its content.
        name: its path, for messages.

    Raises:
        InputError: not one of the six architectures, a size is missing, or a key changes the
            computation in a way that is not built; names the key.
    """
    family = _family(values, name)
    _refuse_unknown(family, values, name)
    fields = dict(_FIELDS)
    fields["norm"], fields["feed_forward"] = (family.values[k][0] for k in ("norm", "feed_forward"))
    fields["position"] = family.values["position"][0]
    fields["qk_norm"] = family.values["qk_norm"][0]
    for field, key in family.keys.items():
        fields[field] = _from_hub(family, values, field, key, name)
    if fields["position"] == "rope":
        fields |= _read_rope(family, values, name)
    stores_biases = family.has_linear_biases
    if stores_biases is None:
        stores_biases = _typed(values, "use_bias", bool, name, family.defaults["use_bias"])
    biases = _typed(values, BIASES_KEY, str, name, "all") if stores_biases else ""
    if biases not in ("", "all", "qkv", "none"):
        raise InputError(f"{name}: {BIASES_KEY}", biases, "none or qkv", "removing it")
    fields["use_bias"] = biases == "all"
    fields["qkv_bias"] = biases == "qkv" or family.values.get("qkv_bias") == (True,)
    vocab_size = _positive(values, "vocab_size", name)
    try:
        config = ModelConfig(**fields)
    except InputError as error:
        key = family.keys.get(error.field.removeprefix("model."), "")
        where = f"{name}: {key}" if key else f"{name}: {error.field}"
        raise InputError(where, error.got, error.expected) from None
    return HubModel(family, config, vocab_size, stores_biases)


def _family(values: Mapping[str, Any], name: str) -> Family:
    kind = values.get("model_type")
    expected = "one of " + ", ".join(FAMILIES)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{name}: model_type", kind, expected)
    family = FAMILIES[kind]
    architectures = values.get("architectures")
    if architectures not in (None, [family.architecture]):
        wanted = f"[{family.architecture!r}] for model_type {kind}"
        raise InputError(f"{name}: architectures", architectures, wanted)
    return family


def _refuse_unknown(family: Family, values: Mapping[str, Any], name: str) -> None:
    known = {*family.keys.values(), *family.copies, *family.ignored, *_IGNORED, BIASES_KEY}
    if family.values["position"] == ("rope",):
        known |= {*_ROPE_KEYS}
    if family.name == "gpt_neox":
        known |= {*_NEOX_ROPE_KEYS}
    if family.has_linear_biases is None:
        known.add("use_bias")
    checked = {**_CHECKED, **family.checked, **family.fixed}
    for key, value in values.items():
        if key in checked:
            if value is not checked[key] and value != checked[key]:
                raise InputError(f"{name}: {key}", value, f"{checked[key]} (all that is built)")
        elif key == "layer_types":
            if value is not None and (
                not isinstance(value, list) or any(kind != "full_attention" for kind in value)
            ):
                expected = "full_attention in all layers (window patterns are not built)"
                raise InputError(f"{name}: {key}", value, expected)
        elif key not in known and value not in (None, {}, []):
            expected = f"no such key for {family.title}: it may change the computation"
            raise InputError(f"{name}: {key}", value, expected)


def _to_hub(family: Family, config: ModelConfig, field: str) -> Any:
    value = getattr(config, field)
    match field:
        case "activation":
            names = ACTIVATIONS[value]
            return "gelu_new" if family.name == "gpt2" and "gelu_new" in names else names[0]
        case "num_kv_heads":
            return config.kv_heads
        case "head_dim":
            return config.head_width
        case "sliding_window":
            return value or None
    return value


def _from_hub(
    family: Family, values: Mapping[str, Any], field: str, key: str, name: str
) -> int | float | bool | str:
    default = family.defaults.get(key)
    width, heads = family.keys["d_model"], family.keys["num_heads"]
    match field:
        case "activation":
            value = _typed(values, key, str, name, default)
            built = family.values["activation"]
            for ours, names in ACTIVATIONS.items():
                if value in names and ours in built:
                    return ours
            expected = "one of " + ", ".join(n for ours in built for n in ACTIVATIONS[ours])
            raise InputError(f"{name}: {key}", value, expected)
        case "num_kv_heads":
            if key not in values and default is not None:
                return int(default)
            kv_heads = _positive(values, key, name, values.get(heads))
            return 0 if kv_heads == values.get(heads) else kv_heads
        case "head_dim":
            derived = _positive(values, width, name) // _positive(values, heads, name)
            head_dim = _positive(values, key, name, default or derived)
            return 0 if head_dim * values[heads] == values[width] else head_dim
        case "sliding_window":
            return 0 if values.get(key) is None else _positive(values, key, name)
        case "d_ff" if key == "n_inner":
            return _positive(values, key, name, 4 * _positive(values, width, name))
        case _ if field in _SIZES:
            return _positive(values, key, name, default)
        case "tie_embeddings" | "parallel_residual":
            return bool(_typed(values, key, bool, name, default))
    return float(_typed(values, key, float, name, default))


def _typed(values: Mapping[str, Any], key: str, kind: type, name: str, default: Any) -> Any:
    """A value of one type, or the default where it is missing or null."""
    value = values.get(key)
    if value is None:
        value = default
    if kind is float and type(value) is int:
        return float(max(-HUGE_INT, min(value, HUGE_INT)))  # float() raises beyond 2**1024
    if type(value) is not kind:
        expected = {int: "an integer", float: "a number", bool: "true or false", str: "a name"}
        raise InputError(f"{name}: {key}", value, expected[kind])
    return value


def _positive(values: Mapping[str, Any], key: str, name: str, default: Any = None) -> int:
    value: int = _typed(values, key, int, name, default)
    if not 1 <= value < 2**31:
        raise InputError(f"{name}: {key}", value, "an integer from 1 to 2**31 - 1")
    return value


def _written_rope(family: Family, config: ModelConfig) -> dict[str, Any]:
    """RoPE for transformers 5, which reads either, and 4, which ignores `rope_parameters`."""
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    scaling = {"rope_type": kind}
    scaling |= {key: getattr(config, field) for key, field in _SCALING[kind].items()}
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    parameters = {**scaling, "rope_theta": config.rope_theta}
    if family.name == "gpt_neox":
        values |= {"rotary_emb_base": config.rope_theta, "rotary_pct": config.partial_rotary}
        parameters["partial_rotary_factor"] = config.partial_rotary
    values["rope_parameters"] = parameters
    if kind != "default":
        values["rope_scaling"] = scaling
    return values


def _read_rope(family: Family, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Our RoPE fields from the keys of transformers 4 and 5, which must agree."""
    found: dict[str, tuple[str, Any]] = {}

    def add(name_in_file: str, key: str, value: Any) -> None:
        if value is None:
            return
        other, seen = found.setdefault(key, (name_in_file, value))
        if seen != value:
            raise InputError(f"{name}: {name_in_file}", value, f"{seen!r}, as in {other}")

    for outer in ("rope_parameters", "rope_scaling"):
        inner = values.get(outer) or {}
        if not isinstance(inner, Mapping):
            raise InputError(f"{name}: {outer}", inner, "an object")
        for key, value in inner.items():
            add(f"{outer}.{key}", "rope_type" if key == "type" else key, value)
    neox = family.name == "gpt_neox"
    add("rope_theta", "rope_theta", values.get("rope_theta"))
    add("partial_rotary_factor", "partial_rotary_factor", values.get("partial_rotary_factor"))
    if neox:
        add("rotary_emb_base", "rope_theta", values.get("rotary_emb_base"))
        add("rotary_pct", "partial_rotary_factor", values.get("rotary_pct"))
    read = {key: value for key, (_, value) in found.items()}
    where = {key: f"{name}: {path}" for key, (path, _) in found.items()}
    kind = read.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALING:
        raise InputError(where["rope_type"], kind, "one of " + ", ".join(_SCALING))
    fields: dict[str, Any] = {
        "rope_scaling": "none" if kind == "default" else kind,
        "rope_theta": _typed(read, "rope_theta", float, name, 10000.0),
        "partial_rotary": _typed(read, "partial_rotary_factor", float, name, 0.25 if neox else 1.0),
    }
    if not neox and fields["partial_rotary"] != 1:
        got = fields["partial_rotary"]
        raise InputError(where["partial_rotary_factor"], got, f"1.0 for {family.title}")
    for key, field in _SCALING[kind].items():
        if key == "original_max_position_embeddings":
            fields[field] = _positive(read, key, name)
        else:
            fields[field] = _typed(read, key, float, name, None)
    # transformers keeps this key for any kind, and only llama3 uses it.
    unused = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for key in read.keys() - _SCALING[kind].keys() - unused:
        expected = f"no such key: rope scaling {kind} is built without it"
        raise InputError(where[key], read[key], expected)
    return fields
