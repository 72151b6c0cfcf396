"""Records what PEFT computes with adapters as we write them, on the recorded models.

Not part of the test suite: it needs torch, transformers and peft, in an environment of their own.

    python -m tests.interop.peft_adapters ../adapters                        # in ours
    ../hf/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    ../hf/bin/python tests/interop/make_golden_peft.py ../adapters           # in theirs

`golden_peft.npz` holds, by case, `<case>/logits_BPV`: float32 from a forward pass in float64, of
the ids and positions in `golden/<case>/golden.npz`; and `<case>/<tensor>`: the adapters by PEFT's
names. A file that PEFT does not read whole is refused.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

HERE = Path(__file__).parent


def main(adapters: Path) -> None:
    """Computes and writes all cases."""
    found = {}
    for directory in sorted(adapters.iterdir()):
        case, file = directory.name, load_file(directory / "adapter_model.safetensors")
        golden = np.load(HERE / "golden" / case / "golden.npz")
        base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "golden" / case).double()
        ids_BT = torch.from_numpy(golden["ids_BT"]).long()
        with torch.no_grad():
            before = base.eval()(input_ids=ids_BT).logits
            model = peft.PeftModel.from_pretrained(base, directory).double().eval()
            logits_BTV = model(input_ids=ids_BT).logits
        held = peft.get_peft_model_state_dict(model)
        assert {n: t.float().numpy().tobytes() for n, t in held.items()} == {
            n: t.tobytes() for n, t in file.items()
        }
        change = float((logits_BTV - before).abs().max() / before.abs().max())
        print(f"{case}: {len(held)} tensors, logits changed by {change:.3g} of the largest")
        assert change > 1e-2
        found[f"{case}/logits_BPV"] = logits_BTV[:, golden["positions_P"]].float().numpy()
        found |= {f"{case}/{name}": tensor for name, tensor in file.items()}
    np.savez_compressed(HERE / "golden_peft.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
