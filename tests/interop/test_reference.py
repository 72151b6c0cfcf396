"""The float64 reader of Hugging Face directories gives the logits that transformers gave."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.interop import reference
from sheepop_jax.interop.reference import HubReference
from sheepop_jax.interop.safetensors_files import WEIGHTS, WeightFiles, write_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# transformers keeps norms and rotary angles in fp32, also where the rest is float64; the model in
# bf16 has the norms' results in bf16. Seen: 1.7e-6.
LIMIT = 5e-6


def copied(directory: Path, name: str, config: str = "config.json", **changes) -> Path:
    """A copy of a golden model, with changed keys of its configuration."""
    for path in (GOLDEN / name).glob("model*"):
        shutil.copy(path, directory)
    values = json.loads((GOLDEN / name / config).read_text()) | changes
    values = {key: value for key, value in values.items() if value != "removed"}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def relative_error(directory: Path, name: str) -> float:
    """The largest error of the logits, as a fraction of the largest logit."""
    with np.load(GOLDEN / name / "golden.npz") as golden:
        expected = golden["logits_BPV"]
        rows = list(HubReference(directory).logits(golden["ids_BT"]))
        found = np.stack(rows)[:, golden["positions_P"]]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("config", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name, config):
    assert relative_error(copied(tmp_path, name, config), name) < LIMIT


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(name):
    with np.load(GOLDEN / name / "golden.npz") as golden:
        prompt_T, greedy_N = golden["prompt_T"], golden["greedy_N"]
    [logits_TV] = HubReference(GOLDEN / name).logits(np.append(prompt_T, greedy_N)[None])
    chosen_T = logits_TV.argmax(-1)
    assert chosen_T[len(prompt_T) - 1 : -1].tolist() == greedy_N.tolist()


@pytest.mark.parametrize("name", ["starcoder2_window", "qwen3"])
def test_scores_of_few_queries_at_a_time_change_nothing(monkeypatch, name):
    monkeypatch.setattr(reference, "_QUERIES", 5)
    assert relative_error(GOLDEN / name, name) < LIMIT


def test_no_code_is_shared_with_the_model_or_the_export():
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {module for module in modules if module and module.startswith("sheepop_jax")}
    shared = {"errors", "files", "interop.safetensors_files"}
    assert ours == {f"sheepop_jax.{name}" for name in shared}


def test_files_without_the_prefix_are_read(tmp_path):
    copied(tmp_path, "gpt2")
    files = WeightFiles(tmp_path)
    tensors = {name.removeprefix("transformer."): files.load(name) for name in files.tensors}
    (tmp_path / WEIGHTS).unlink()
    write_weights(tmp_path, tensors)
    assert relative_error(tmp_path, "gpt2") < LIMIT


# Keys that a config.json may leave out, where the golden value is the default.
DEFAULTS = {
    "gpt2": ["activation_function", "layer_norm_epsilon", "tie_word_embeddings"],
    "gpt_neox": ["use_parallel_residual", "hidden_act", "tie_word_embeddings"],
    "starcoder2_window": ["use_bias", "norm_epsilon", "hidden_act", "tie_word_embeddings"],
    "llama": ["attention_bias", "mlp_bias", "hidden_act", "tie_word_embeddings", "head_dim"],
    "qwen2": ["rms_norm_eps"],
    "llama_sharded_bf16": ["rope_parameters"],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_missing_keys_have_the_values_of_transformers(tmp_path, name):
    copied(tmp_path, name, **dict.fromkeys(DEFAULTS[name], "removed"))
    assert relative_error(tmp_path, name) < LIMIT


def test_old_names_of_gpt_neox_are_read(tmp_path):
    """Pythia's files have these names only."""
    removed = dict.fromkeys(("rope_theta", "partial_rotary_factor", "rope_scaling"), "removed")
    copied(tmp_path, "gpt_neox_sequential", "config_v4.json", **removed)
    assert relative_error(tmp_path, "gpt_neox_sequential") < LIMIT


REFUSED = [
    ("llama", {"model_type": "mixtral"}, "model_type: got 'mixtral'"),
    ("llama", {"model_type": "removed"}, "KeyError"),
    ("llama", {"vocab_size": "61"}, "vocab_size: got '61'"),
    ("llama", {"hidden_act": "quick"}, "got 'quick'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type: got 'yarn'"),
    ("llama", {"attention_bias": True}, "no model.layers.0.self_attn.q_proj.bias"),
    ("llama", {"intermediate_size": 20}, r"gate_proj.weight: got \[19, 24\]; expected \[20, 24\]"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_it_does_not_compute_is_refused(tmp_path, name, changes, message):
    copied(tmp_path, name, **changes)
    with pytest.raises(InputError, match=message) as error:
        list(HubReference(tmp_path).logits(np.zeros((1, 2), int)))
    assert "\n" not in str(error.value)
