"""`sheepop-jax import`: a Hugging Face model directory becomes a run."""

import argparse
from pathlib import Path

from sheepop_jax.cli.common import Parser, path_argument

DESCRIPTION = """\
Import a Hugging Face model as a run that can be sampled, evaluated, fine-tuned and exported again.

Architectures: GPT-2, GPT-NeoX (Pythia), Starcoder2, Llama (SmolLM2, TinyLlama), Qwen2 (Qwen2.5) and
Qwen3. DIR is a local directory with config.json, safetensors and tokenizer.json; nothing is
downloaded, and no pickle file (.bin, .pt) is opened."""
EPILOG = """\
examples:
  hf download HuggingFaceTB/SmolLM2-135M --local-dir smollm2
  python -m sheepop_jax import --hf smollm2 --out runs/smollm2
  python sample.py --ckpt runs/smollm2 --prompt "The sheep"
  python -m sheepop_jax evaluate --ckpt runs/smollm2 --data my_text.txt

Every key of config.json and every tensor must be known; otherwise nothing is written. The weights
become fp32. The run's logits are compared with a float64 computation from the imported files, and
with transformers where it is installed.

exit codes: 0 done, 1 failed (disk full, or other logits), 2 bad input, 130 Ctrl-C"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("import", DESCRIPTION, EPILOG)
    add = parser.add_argument
    text = "local directory with config.json, *.safetensors and tokenizer.json"
    add("--hf", required=True, type=path_argument, metavar="DIR", help=text)
    text = "run directory to write; new or empty"
    add("--out", required=True, type=path_argument, metavar="RUN", help=text)
    add("--no-verify", action="store_true", help="skip the comparison of logits")
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> None:
    """Imports a model and prints what was imported and how it was verified.

    Raises:
        InputError: the model cannot be imported, or `out` exists.
        RunFailed: the disk is full, or the logits differ.
    """
    from sheepop_jax.runtime import platform

    platform.prepare("cpu")  # files to files; and a GPU may be too small for the fp32 weights
    from sheepop_jax.config.loading import load_config
    from sheepop_jax.interop.import_hf import import_hf

    defaults = load_config("base")
    files, verified = import_hf(
        Path(flags.hf), Path(flags.out), defaults, verify=not flags.no_verify
    )
    model, tokenizer = files.model.config, files.tokenizer

    def shown(index: int) -> str:
        return f"{index} {tokenizer.decode([index], skip_special=False)}"

    rows = {
        "architecture": files.model.family.architecture,
        "parameters": f"{files.num_parameters:,} (fp32, from {files.dtypes})",
        "layers": f"{model.num_layers} of width {model.d_model}",
        "heads": f"{model.num_heads}, {model.kv_heads} for keys and values",
        "context": f"{model.max_seq_len:,} tokens",
        "vocabulary": f"{files.model.vocab_size:,} rows, {tokenizer.vocab_size:,} tokens",
        "BOS": "none" if tokenizer.bos_id is None else shown(tokenizer.bos_id),
        "end-of-text": ", ".join(map(shown, tokenizer.end_ids)),
        "chat template": "none" if tokenizer.chat_template is None else "kept",
    }
    print(f"imported {flags.hf} as {flags.out}")
    for name, value in rows.items():
        print(f"  {name:24}{value}")
    if verified is None:
        return
    for result in verified.results:
        print(f"verified against {result.reference} from {flags.hf}")
        count = result.positions
        print(f"  {'max relative error':24}{result.max_error:.1e} of {count} positions' logits")
        print(f"  {'mean KL per token':24}{result.mean_kl:.1e} nats")
        print(f"  {'most likely token equal':24}{result.same_token} of {count}")
    for note in verified.notes:
        print(note)
