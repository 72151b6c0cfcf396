"""Adds `config_v4.json` to each golden model: its configuration as transformers 4 writes it.

Most checkpoints on the hub have that form: `rope_theta` beside `rope_scaling` instead of
`rope_parameters`, and `rotary_pct` in GPT-NeoX. Run it after `make_golden.py`, which removes these
files, in an environment of its own:

    python -m venv ../hf4
    ../hf4/bin/pip install torch==2.13.0 transformers==4.57.6
    ../hf4/bin/python tests/interop/make_golden_v4.py

It raises AssertionError where transformers 4, given the new file, does not compute the recorded
logits, or its AutoTokenizer does not find the recorded ids.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"


def config_of(folder: Path) -> transformers.PretrainedConfig:
    """The configuration of a folder, under the names of transformers 4."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = fields.pop("model_type")
    rope = fields.pop("rope_parameters", None)
    if family == "gpt_neox":
        fields["rotary_pct"] = rope.pop("partial_rotary_factor")
        fields["rotary_emb_base"] = rope.pop("rope_theta")
    elif rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if rope and rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    return transformers.AutoConfig.for_model(family, **fields)


@torch.no_grad()
def check(folder: Path, config: transformers.PretrainedConfig) -> float:
    """The largest error of the logits, as a fraction of the largest logit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    ).eval()
    golden = np.load(folder / "golden.npz")
    logits_BTV = model(input_ids=torch.from_numpy(golden["ids_BT"]).long()).logits.numpy()
    wanted_BPV = golden["logits_BPV"]
    error = np.abs(logits_BTV[:, golden["positions_P"]] - wanted_BPV).max()
    return float(error / np.abs(wanted_BPV).max())


def check_tokenizer(folder: Path) -> None:
    """Transformers 4 reads every `tokenizer.json` as it is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for case in json.loads((folder / "tokenizer_cases.json").read_text(encoding="utf-8")):
        found = tokenizer.encode(case["text"], add_special_tokens=False)
        assert found == case["ids"], (folder.name, case["text"], found)


def main() -> None:
    assert transformers.__version__.startswith("4."), transformers.__version__
    torch.set_num_threads(1)
    for folder in sorted(path.parent for path in GOLDEN.glob("*/config.json")):
        config = config_of(folder)
        text = config.to_json_string()  # before loading adds where it loaded from
        error = check(folder, config)
        print(f"{folder.name}: within {error:.1e} of the largest logit")
        assert error < 1e-5, folder.name
        (folder / "config_v4.json").write_text(text, encoding="utf-8")
        if (folder / "tokenizer.json").exists():
            check_tokenizer(folder)
    versions = json.loads((GOLDEN / "versions.json").read_text(encoding="utf-8"))
    versions["transformers_4"] = transformers.__version__
    (GOLDEN / "versions.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
