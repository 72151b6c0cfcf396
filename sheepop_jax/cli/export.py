"""`sheepop-jax export`: write a run for other programs, and prove that it is the same model."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sheepop_jax.cli.common import (
    STEP_HELP,
    Parser,
    checked_step,
    load_params,
    path_argument,
)
from sheepop_jax.errors import InputError, RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sheepop_jax.checkpoint.run import Run
    from sheepop_jax.interop.verification import VerificationReport

DESCRIPTION = """\
Write a run for other programs, and verify that they compute the same.

hf    a Hugging Face model directory: transformers, vLLM, SGLang
peft  the adapters of a run with train.lora_rank alone, for the PEFT library
gguf  one file with weights and tokenizer, and a Modelfile: llama.cpp, Ollama, LM Studio

The architecture follows from the model (docs/interop.md). A model that no architecture computes is
refused before anything is written."""
EPILOG = """\
examples:
  python -m sheepop_jax export --ckpt runs/quickstart --format hf --out exports/quickstart
  python -m sheepop_jax export --ckpt runs/base --format hf --dtype bfloat16 --out exports/base
  python -m sheepop_jax export --ckpt runs/base --format gguf --dtype q8_0 --out exports/gguf

exit codes: 0 exported, 1 the verification failed or a file cannot be written, 2 bad input"""
FORMATS = ("hf", "gguf", "peft")
DTYPES = ("float32", "bfloat16", "float16", "q8_0")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("export", DESCRIPTION, EPILOG)
    add = parser.add_argument
    parser.add_ckpt()
    add("--format", required=True, choices=FORMATS, help="what to write")
    text = "directory to create; must not exist, or be empty"
    add("--out", required=True, type=path_argument, metavar="DIR", help=text)
    text = "dtype of the weights in the file (default float32; q8_0: 8 bits, gguf only)"
    add("--dtype", choices=DTYPES, default="float32", help=text)
    add("--step", help=STEP_HELP)
    text = "do not compare the written files with the run"
    add("--no-verify", action="store_true", dest="no_verify", help=text)
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> None:
    """Exports a run, verifies the files and prints the result.

    Raises:
        InputError: the run, the directory or a flag is invalid, or no architecture computes the
            model. Nothing is written.
        RunFailed: a file cannot be written; nothing is left. Or the verification failed: the files
            stay.
    """
    wanted = checked_step(flags.step)
    from sheepop_jax.runtime import platform

    platform.prepare("cpu")  # an accelerator's memory may be in use by training
    from sheepop_jax.checkpoint.run import open_run

    opened, out = open_run(flags.ckpt), Path(flags.out)
    write = {"hf": _hf, "gguf": _gguf, "peft": _peft}[flags.format]
    report = write(flags, opened, wanted, out)
    print(f"exported {opened.directory} to {out}")
    if report is not None:
        print(report.table())
        if not report.passed:
            raise RunFailed(f"{out}: differs from the run, see the rows above; nothing was deleted")


def _hf(
    flags: argparse.Namespace, opened: "Run", wanted: str | int | None, out: Path
) -> "VerificationReport | None":
    from sheepop_jax.interop.export_hf import check_hf, export_hf, write_card
    from sheepop_jax.interop.verify import verify_hf

    model = check_hf(opened, out, flags.dtype)
    params, step = load_params(opened, wanted, None)
    _say(f"writing {model.family.architecture}, {flags.dtype}")
    export_hf(opened, params, step, out, flags.dtype)
    if flags.no_verify:
        return None
    _say("verifying")
    report = _measured(lambda: verify_hf(opened, params, out))
    write_card(opened, model, step, out, flags.dtype, report.markdown())
    return report


def _gguf(
    flags: argparse.Namespace, opened: "Run", wanted: str | int | None, out: Path
) -> "VerificationReport | None":
    from sheepop_jax.interop.export_gguf import GGUF_FILE, check_gguf, export_gguf

    model = check_gguf(opened, out, flags.dtype)
    params, step = load_params(opened, wanted, None)
    _say(f"writing {model.family.title} as GGUF, {flags.dtype}")
    export_gguf(opened, params, step, out, flags.dtype)
    if flags.no_verify:
        return None
    if importlib.util.find_spec("xllamacpp") is None:
        _say("not verified: the Python package xllamacpp is not installed (pip install xllamacpp)")
        return None
    from sheepop_jax.interop.verify_gguf import verify_gguf

    _say("verifying")
    return _measured(lambda: verify_gguf(opened, params, out / GGUF_FILE, flags.dtype))


def _peft(flags: argparse.Namespace, opened: "Run", wanted: str | int | None, out: Path) -> None:
    from sheepop_jax.interop.export_peft import check_peft, export_peft

    model = check_peft(opened, out, flags.dtype)
    from sheepop_jax.checkpoint.frozen import FrozenParams, adapters_of

    adapters, _ = adapters_of(opened, wanted)
    base = FrozenParams.of(opened)
    _say(f"writing adapters of {model.family.architecture}, of step {base.step} of {base.path}")
    export_peft(opened, adapters, out)
    _say(f"not verified: PEFT needs the base, 'export --ckpt {base.path} --step {base.step}'")


def _measured(verify: "Callable[[], VerificationReport]") -> "VerificationReport":
    """A verification that could not be done, as with a file that is not read, has failed."""
    from sheepop_jax.interop.verification import Row, VerificationReport

    try:
        return verify()
    except InputError as error:
        return VerificationReport((Row("verification", "not done", "", False, str(error)),))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
