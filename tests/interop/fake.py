"""torch and transformers for tests, which have neither."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from sheepop_jax.interop import transformers_model
from sheepop_jax.interop.reference import HubReference


class FakeTensor(np.ndarray):
    """Just enough of torch's."""

    def long(self):
        return self

    def double(self):
        return self

    def numpy(self):
        return np.asarray(self, np.float64)


def fake_transformers(
    monkeypatch: pytest.MonkeyPatch, directory: Path, report: dict, scale: float = 1.0
) -> None:
    """torch and transformers whose model computes by the float64 reader."""
    reference = HubReference(directory)

    def forward(input_ids):
        logits = np.stack(list(reference.logits(np.asarray(input_ids)))) * scale
        return SimpleNamespace(logits=logits.view(FakeTensor))

    class Model:
        def float(self):
            return self

        def eval(self):
            return forward

    def load(path, **options):
        assert path == directory and options["use_safetensors"] and options["local_files_only"]
        return Model(), report

    torch, transformers = ModuleType("torch"), ModuleType("transformers")
    torch.no_grad = lambda: lambda function: function
    torch.from_numpy = lambda x: x.view(FakeTensor)
    transformers.AutoModelForCausalLM = SimpleNamespace(from_pretrained=load)
    transformers.__version__ = "5.0"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(transformers_model.importlib.util, "find_spec", lambda name: object())
