"""Adapters in PEFT's files: its names and layout, its logits, and the command that writes them.

`golden_peft.npz` was recorded by `make_golden_peft.py`.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sheepop_jax.interop.export_peft import peft_config, peft_tensors
from sheepop_jax.interop.hub_tensors import tensors
from sheepop_jax.model.lora import adapted, merged
from sheepop_jax.model.transformer import Transformer, logits
from tests.interop.models import nested
from tests.interop.peft_adapters import CASES, GOLDEN, LORA, adapters_of, hub_model

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def recorded() -> Any:
    return np.load(Path(__file__).parent / "golden_peft.npz")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, recorded: Any) -> None:
    hub, files = hub_model(case), load_file(GOLDEN / case / "model.safetensors")
    params = nested(
        {k: v for t in tensors(hub) if t.name in files for k, v in t.unpack(files[t.name]).items()}
    )
    model, adapters = Transformer(hub.config, hub.vocab_size), adapters_of(hub)
    golden = np.load(GOLDEN / case / "golden.npz")

    @jax.jit
    def compute(params: Any) -> Any:
        hidden_BTD, _ = model.apply({"params": params}, golden["ids_BT"])
        return logits(model, params, hidden_BTD[:, golden["positions_P"]])

    expected = recorded[f"{case}/logits_BPV"]
    for whole in (merged(params, adapters, LORA), adapted(params, adapters, LORA)):
        found = compute(whole)[..., : hub.vocab_size]
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_one_that_peft_read(case: str, recorded: Any) -> None:
    model = hub_model(case)
    found = dict(peft_tensors(model, adapters_of(model)))
    names = {name.removeprefix(f"{case}/") for name in recorded.files if name.startswith(case)}
    assert {*found} == names - {"logits_BPV"}
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, recorded[f"{case}/{name}"], rtol=1e-6, atol=1e-7)


def test_each_layer_has_its_own_factor() -> None:
    """alpha / rank is 3 in every layer, of the joined one too."""
    for case, joined in (("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("llama", None)):
        config = peft_config(hub_model(case), LORA)
        assert (config["r"], config["lora_alpha"]) == (2, 6.0)
        assert config["rank_pattern"] == ({joined: 6} if joined else {})
        assert config["alpha_pattern"] == ({joined: 18.0} if joined else {})
        assert config["fan_in_fan_out"] == (case == "gpt2")
