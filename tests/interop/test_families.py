"""The table of architectures: choice, config.json and tensors, there and back; refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.interop.families import FAMILIES, for_export
from sheepop_jax.interop.hub_config import read_config, write_config
from sheepop_jax.interop.hub_tensors import canonical_name, output_name, tensors
from sheepop_jax.interop.safetensors_files import WeightFiles
from sheepop_jax.model.transformer import Transformer, init_params
from tests.interop.models import MODELS, VOCAB, config_of, nested, random_params

every_model = pytest.mark.parametrize("name", MODELS)


def hub(name: str, **fields: Any):
    return for_export(config_of({**MODELS[name][1], **fields}), VOCAB)


@every_model
def test_config_json_restores_the_model(name: str) -> None:
    model = hub(name)
    assert model.family.name == MODELS[name][0]
    again = read_config(json.loads(json.dumps(write_config(model))))
    assert again == model


@every_model
def test_the_file_holds_every_parameter_once(name: str) -> None:
    model = hub(name)
    params = jax.eval_shape(lambda: init_params(Transformer(model.config, VOCAB), 0))
    wanted = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    found = [pair for t in tensors(model) for pair in zip(t.paths, t.shapes, strict=True)]
    assert len(found) == len(wanted) and dict(found) == wanted
    names = [tensor.name for tensor in tensors(model)]
    assert len(set(names)) == len(names)


@every_model
def test_tensors_restore_the_parameters_bit_for_bit(name: str) -> None:
    model = hub(name)
    params = random_params(model)
    file = {tensor.name: tensor.pack(params) for tensor in tensors(model)}
    read = read_config(write_config(model))  # as the importer knows it
    assert tensors(read) == tensors(model)
    again = nested(
        {
            path: part
            for tensor in tensors(read)
            for path, part in tensor.unpack(file[tensor.name]).items()
        }
    )
    for table in {"embedding", "output_embedding"} & again.keys():
        assert not again[table][VOCAB:].any()  # padding is not part of the model
        again[table][VOCAB:] = params[table][VOCAB:]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for tensor in tensors(model):
        assert file[tensor.name].shape == tensor.shape
        assert file[tensor.name].flags.c_contiguous


GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/config.json"))


@pytest.mark.parametrize("directory", GOLDEN, ids=lambda path: path.name)
def test_files_of_transformers_are_read_whole_and_packed_as_they_were(directory: Path) -> None:
    model = read_config(json.loads((directory / "config.json").read_text()))
    files = WeightFiles(directory)
    read = {canonical_name(model, name): files.load(name) for name in files.tensors}
    parts = [tensor.unpack(read[tensor.name]) for tensor in tensors(model)]
    params = nested({path: array for part in parts for path, array in part.items()})
    again = {tensor.name: tensor.pack(params) for tensor in tensors(model)}
    assert again.keys() == read.keys()
    for name, array in again.items():
        assert array.dtype == read[name].dtype and array.tobytes() == read[name].tobytes()


def packed(name: str) -> tuple[dict[str, np.ndarray], Any]:
    model = hub(name)
    params = random_params(model)
    return {tensor.name: tensor.pack(params) for tensor in tensors(model)}, params


def test_linear_layers_are_transposed() -> None:
    file, params = packed("llama")
    kernel = params["block_1"]["attention"]["key"]["kernel"]
    theirs = file["model.layers.1.self_attn.k_proj.weight"]
    assert theirs.shape == (8, 24) and theirs[5, 17] == kernel[17, 5]
    kernel = params["block_1"]["feed_forward"]["gate"]["kernel"]
    assert file["model.layers.1.mlp.gate_proj.weight"][30, 17] == kernel[17, 30]


def test_gpt2_joins_query_key_and_value_and_transposes_nothing() -> None:
    file, params = packed("gpt2")
    attention = params["block_1"]["attention"]
    for index, part in enumerate(("query", "key", "value")):
        kernel, bias = attention[part]["kernel"], attention[part]["bias"]
        assert file["transformer.h.1.attn.c_attn.weight"][3, 24 * index + 7] == kernel[3, 7]
        assert file["transformer.h.1.attn.c_attn.bias"][24 * index + 7] == bias[7]
    up = params["block_1"]["feed_forward"]["up"]["kernel"]
    assert file["transformer.h.1.mlp.c_fc.weight"][3, 30] == up[3, 30]


def test_gpt_neox_joins_query_key_and_value_head_by_head() -> None:
    file, params = packed("gpt_neox")
    attention = params["block_1"]["attention"]
    head, component, width = 4, 3, 4
    for index, part in enumerate(("query", "key", "value")):
        row = head * 3 * width + index * width + component
        kernel, bias = attention[part]["kernel"], attention[part]["bias"]
        name = "gpt_neox.layers.1.attention.query_key_value"
        assert file[f"{name}.weight"][row, 17] == kernel[17, head * width + component]
        assert file[f"{name}.bias"][row] == bias[head * width + component]


def test_missing_biases_are_zeros_in_the_file() -> None:
    file, _ = packed("starcoder2-qkv")
    assert write_config(hub("starcoder2-qkv"))["use_bias"] is True
    assert file["model.layers.0.self_attn.q_proj.bias"].all()
    for layer in ("self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"):
        assert not file[f"model.layers.0.{layer}.bias"].any()


def test_biases_that_are_not_zero_any_more_are_seen() -> None:
    """A program may have trained the exported biases."""
    [bias] = [t for t in tensors(hub("starcoder2")) if t.name.endswith("0.self_attn.q_proj.bias")]
    with pytest.raises(InputError) as error:
        bias.unpack(np.full(bias.shape, 1e-30, np.float32))
    assert error.value.field == bias.name and "sheepop_jax_biases" in str(error.value)


def test_a_tensor_of_another_shape_is_refused() -> None:
    [kernel] = [t for t in tensors(hub("llama")) if t.name.endswith("1.mlp.up_proj.weight")]
    with pytest.raises(InputError, match=r"up_proj.weight: got .*\(24, 37\).*\(37, 24\)"):
        kernel.unpack(np.zeros((24, 37), np.float32))


def test_a_tied_model_has_no_output_layer() -> None:
    for tied in (True, False):
        for family in ("llama", "gpt2", "gpt_neox", "starcoder2"):
            model = hub(family, tie_embeddings=tied)
            names = {tensor.name for tensor in tensors(model)}
            assert (output_name(model) in names) is not tied
            assert write_config(model)["tie_word_embeddings"] is tied


def test_numbers_are_written_for_both_versions_of_transformers() -> None:
    values = write_config(hub("llama-llama3"))
    assert values["rms_norm_eps"] == 1e-3
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.5,
        "original_max_position_embeddings": 11,
    }
    assert values["rope_theta"] == 77.5 and values["rope_scaling"] == scaling
    assert values["rope_parameters"] == {**scaling, "rope_theta": 77.5}
    neox = write_config(hub("gpt_neox"))
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (77.5, 0.5)
    assert neox["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert "rope_scaling" not in neox


def test_either_version_of_the_rope_keys_is_enough() -> None:
    for name in ("llama", "llama-linear", "llama-llama3", "gpt_neox", "gpt_neox-sequential"):
        model, values = hub(name), write_config(hub(name))
        new = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling")}
        new = {k: v for k, v in new.items() if not k.startswith("rotary_")}
        old = {k: v for k, v in values.items() if k != "rope_parameters"}
        assert read_config(new) == read_config(old) == model
        legacy = json.loads(json.dumps(old).replace('"rope_type"', '"type"'))
        assert read_config(legacy) == model


EXPORT_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"position": "sinusoidal", "rope_theta": 10000.0}, "position", "model.position=rope"),
    ({"logit_softcap": 30.0}, "logit_softcap", "model.logit_softcap=0.0"),
    ({"activation": "relu2"}, "activation", "model.activation=gelu"),
    ({**MODELS["llama"][1], "activation": "gelu"}, "activation", "model.activation=silu"),
    ({**MODELS["llama"][1], "use_bias": True}, "use_bias", "model.use_bias=False"),
    ({**MODELS["llama"][1], "feed_forward": "mlp"}, "norm", "model.norm=layernorm"),
    ({**MODELS["llama"][1], "sliding_window": 5}, "sliding_window", "model.sliding_window=0"),
    ({**MODELS["llama"][1], "parallel_residual": True}, "parallel_residual", "=False"),
    ({**MODELS["llama"][1], "partial_rotary": 0.5}, "partial_rotary", "=1.0"),
    ({**MODELS["qwen3"][1], "qkv_bias": True}, "qk_norm", "model.qk_norm=False"),
    ({"feed_forward": "gated"}, "feed_forward", "model.feed_forward=mlp"),
    ({"norm": "rmsnorm"}, "norm", "model.norm=layernorm"),
    ({"qk_norm": True}, "qk_norm", "model.qk_norm=False"),
    ({"head_dim": 10}, "head_dim", "model.head_dim=0"),
    ({"partial_rotary": 0.5}, "num_kv_heads", "model.num_kv_heads=0"),
    ({**MODELS["gpt2"][1], "num_kv_heads": 2}, "position", "model.position=rope"),
    ({**MODELS["llama"][1], "num_heads": 10, "head_dim": 4}, "num_heads", "model.num_heads=8"),
]


@pytest.mark.parametrize(("fields", "field", "hint"), EXPORT_REFUSALS, ids=lambda v: str(v)[:40])
def test_export_names_the_field_and_the_nearest_that_works(fields, field, hint) -> None:
    with pytest.raises(InputError) as error:
        for_export(config_of(fields), VOCAB)
    assert error.value.field == f"model.{field}"
    assert hint in error.value.hint


@pytest.mark.parametrize(("fields", "field", "hint"), EXPORT_REFUSALS, ids=lambda v: str(v)[:40])
def test_the_named_value_works(fields, field, hint) -> None:
    with pytest.raises(InputError) as error:
        for_export(config_of(fields), VOCAB)
    text = error.value.hint.partition("=")[2].rstrip("`")
    value = {"True": True, "False": False}.get(text, text)
    if isinstance(value, str) and text.replace(".", "").isdigit():
        value = float(text) if "." in text else int(text)
    for_export(config_of({**fields, field: value}), VOCAB)


REMOVED = ...
IMPORT_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mixtral"}, "model_type"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("qwen3", {"num_experts": 4, "decoder_sparse_step": 1}, "num_experts"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"sliding_window": 16}, "sliding_window"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "rope_parameters.rope_type",
    ),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
    (
        "llama-linear",
        {"rope_scaling": {"rope_type": "linear", "factor": 5.0}},
        "rope_scaling.factor",
    ),
    ("llama", {"rope_theta": 10000.0}, "rope_theta"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("starcoder2", {"hidden_act": "relu2"}, "hidden_act"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias"),
    ("gpt_neox", {"rotary_pct": 0.25}, "rotary_pct"),
    ("llama", {"hidden_size": REMOVED}, "hidden_size"),
    ("llama", {"hidden_size": "24"}, "hidden_size"),
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": 2**40}, "hidden_size"),
    ("llama", {"vocab_size": True}, "vocab_size"),
    ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("starcoder2", {"sheepop_jax_biases": "some"}, "sheepop_jax_biases"),
]


@pytest.mark.parametrize(("name", "changes", "key"), IMPORT_REFUSALS, ids=lambda v: str(v)[:40])
def test_import_names_the_key(name: str, changes: dict[str, Any], key: str) -> None:
    values = {**write_config(hub(name)), **changes}
    values = {key: value for key, value in values.items() if value is not REMOVED}
    with pytest.raises(InputError) as error:
        read_config(values, "some/config.json")
    assert error.value.field == f"some/config.json: {key}"
    assert "\n" not in str(error.value)


def test_an_incomplete_llama3_scaling_names_what_is_missing() -> None:
    values = write_config(hub("llama-llama3"))
    for outer in ("rope_scaling", "rope_parameters"):
        del values[outer]["low_freq_factor"]
    with pytest.raises(InputError, match=r"low_freq_factor: got None; expected a number"):
        read_config(values)


def test_missing_keys_mean_what_transformers_takes() -> None:
    """A configuration of GPT-2's first release: sizes, and names for tasks."""
    model = read_config(
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
            "bos_token_id": 50256,
            "initializer_range": 0.02,
            "summary_type": "cls_index",
            "task_specific_params": {"text-generation": {"do_sample": True}},
        }
    )
    config = model.config
    assert config.d_ff == 3072 and config.activation == "gelu_tanh" and config.tie_embeddings
    assert (config.norm_eps, config.dropout, config.use_bias) == (1e-5, 0.1, True)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6}
    sizes |= {"intermediate_size": 7, "vocab_size": 5, "max_position_embeddings": 9}
    neox = read_config({"model_type": "gpt_neox", **sizes, "hidden_size": 48}).config
    assert neox.rotary_width == 2
    assert neox.parallel_residual and not neox.tie_embeddings and neox.activation == "gelu"
    llama = read_config({"model_type": "llama", **sizes, "num_key_value_heads": None}).config
    assert (llama.norm_eps, llama.rope_theta, llama.kv_heads) == (1e-6, 10000.0, 6)
    qwen3 = read_config({"model_type": "qwen3", **sizes, "num_key_value_heads": 3}).config
    assert qwen3.head_width == 128 and qwen3.qk_norm and not qwen3.use_bias
    starcoder2 = read_config({"model_type": "starcoder2", **sizes, "use_bias": False})
    assert not starcoder2.config.use_bias and not starcoder2.stores_biases


def test_names_of_other_versions_are_recognized() -> None:
    gpt2, neox, llama = hub("gpt2"), hub("gpt_neox"), hub("llama")
    assert canonical_name(gpt2, "h.1.attn.c_attn.bias") == "transformer.h.1.attn.c_attn.bias"
    assert canonical_name(gpt2, "transformer.wte.weight") == "transformer.wte.weight"
    assert canonical_name(gpt2, "lm_head.weight") == "lm_head.weight"
    assert canonical_name(neox, "lm_head.weight") == "embed_out.weight"
    for model, buffer in (
        (gpt2, "h.1.attn.bias"),
        (gpt2, "transformer.h.1.attn.masked_bias"),
        (neox, "gpt_neox.layers.1.attention.bias"),
        (neox, "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
        (llama, "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ):
        assert canonical_name(model, buffer) is None
    for model in (gpt2, neox, llama):
        for tensor in tensors(model):
            assert canonical_name(model, tensor.name) == tensor.name


def test_every_family_is_exported_by_some_model() -> None:
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)
    for family in FAMILIES.values():
        fields = {field.name for field in dataclasses.fields(config_of({}))}
        assert {*family.keys, *family.values} <= fields
