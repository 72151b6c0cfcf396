"""`sheepop-jax evaluate`: metrics of a run on text, or on tasks of lm-evaluation-harness."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sheepop_jax.cli.common import Parser, checked_step, load_params, path_argument
from sheepop_jax.errors import InputError, masked

if TYPE_CHECKING:  # these import jax
    from sheepop_jax.checkpoint.run import Run
    from sheepop_jax.runtime.devices import Runtime

DESCRIPTION = "Compute loss, perplexity, bits per byte and accuracy on validation text."
EPILOG = """\
examples:
  python -m sheepop_jax evaluate --ckpt runs/quickstart
  python -m sheepop_jax evaluate --ckpt runs/base --data my_text.txt --step best --json
  python -m sheepop_jax evaluate --ckpt runs/base --lm_eval hellaswag,arc_easy"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("evaluate", DESCRIPTION, EPILOG)
    parser.add_run()
    add = parser.add_argument
    text = "file, directory or table, read as in training (default: the run's validation split)"
    add("--data", type=path_argument, metavar="PATH", help=text)
    add(
        "--overlap",
        type=int,
        default=0,
        metavar="N",
        help="tokens that a window repeats from the previous one as context (default 0)",
    )
    add("--batch_size", type=int, default=8, metavar="B", help="windows per batch (default 8)")
    add(
        "--lm_eval",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness, comma-separated, instead of text (pip install "
        "lm-eval)",
    )
    text = "directory of more task files for --lm_eval"
    add("--include_path", type=path_argument, metavar="DIR", help=text)
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> None:
    """Evaluates a run and prints the metrics.

    Raises:
        InputError: the run, the text or a flag is invalid.
    """
    if flags.batch_size < 1:
        raise InputError("batch_size", flags.batch_size, "at least 1")
    wanted = checked_step(flags.step)
    if flags.lm_eval is not None:
        _check_harness(flags)
    elif flags.include_path is not None:
        raise InputError("include_path", flags.include_path, "no value unless `lm_eval` is set")
    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)
    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.data.compression import GZIP_BYTES, gzip_bits_per_byte, xz_bits_per_byte
    from sheepop_jax.data.loader import PackingConfig
    from sheepop_jax.evaluation import Evaluator
    from sheepop_jax.generation.requests import resolve_context

    opened = open_run(flags.ckpt)
    if flags.lm_eval is not None:
        _run_harness(flags, opened, wanted, machine)
        return
    seq_len = opened.config.data.seq_len
    if flags.context is not None:
        seq_len = resolve_context(opened.config.model, flags.context)
        print(
            f"windows of {seq_len} tokens; trained on windows of {opened.config.data.seq_len}",
            file=sys.stderr,
        )
    if not 0 <= flags.overlap < seq_len:
        raise InputError("overlap", flags.overlap, f"at least 0 and below {seq_len} (the window)")
    if flags.data is None:
        data = opened.prepared_data()
        stream, lossless = data.validation, data.lossless
        compressed = {"gzip_bits_per_byte": opened.gzip_bits_per_byte}
        if stream.num_bytes > GZIP_BYTES:
            part = f"the first {GZIP_BYTES / 1e6:.0f} of {stream.num_bytes / 1e6:.0f} MB"
            print(f"gzip_bits_per_byte is that of {part}", file=sys.stderr)
    else:
        from sheepop_jax.data.preprocess.prepare import encode_path

        stream, content, lossless = encode_path(
            opened.config.data, flags.data, opened.tokenizer, "data"
        )
        compressed = {
            "gzip_bits_per_byte": gzip_bits_per_byte([content]),
            "xz_bits_per_byte": xz_bits_per_byte(content),
        }
    if opened.config.data.is_chat:  # its bytes are those of the assistant's texts
        compressed = {}
    params, step = load_params(opened, wanted, flags.quantize)
    model = opened.model(machine.compute_dtype(flags.dtype))
    tokenizer = opened.tokenizer
    packing = PackingConfig.of(opened.config.data, tokenizer.end_of_text, tokenizer.document_bos)
    evaluator = Evaluator(
        model, stream, replace(packing, seq_len=seq_len), flags.batch_size, flags.overlap
    )
    metrics = evaluator(params)
    found: dict[str, float | int | None] = {**metrics.to_dict(), **compressed}
    if not lossless:  # its bytes are not all predicted
        print(
            "bits_per_byte is left out: the tokenizer loses text, so decoding does not restore it",
            file=sys.stderr,
        )
        found["bits_per_byte"] = None
    if flags.json:
        print(json.dumps(found))
        return
    shown = masked(flags.data) if flags.data else "its validation split"
    print(f"step {step} of {opened.directory}, on {shown}:")
    for name, value in found.items():
        if value is not None:
            print(f"  {name:20}{value:,}" if isinstance(value, int) else f"  {name:20}{value:.4f}")


def _check_harness(flags: argparse.Namespace) -> None:
    """Checks the flags of `--lm_eval` before a device is touched."""
    for name, default in (("data", None), ("overlap", 0)):
        if (value := getattr(flags, name)) != default:
            raise InputError(name, value, "no value with `lm_eval`: tasks have their own text")
    if flags.include_path is not None and not Path(flags.include_path).is_dir():
        raise InputError("include_path", flags.include_path, "a directory of task files")


def _run_harness(
    flags: argparse.Namespace, opened: "Run", wanted: str | int | None, machine: "Runtime"
) -> None:
    """Prints the table of the harness, or its results as JSON."""
    from sheepop_jax.generation.requests import resolve_context
    from sheepop_jax.interop.lm_eval import Adapter, check_installed, evaluate_tasks

    check_installed(flags.lm_eval)
    context = resolve_context(opened.config.model, flags.context)
    params, step = load_params(opened, wanted, flags.quantize)
    model = opened.model(machine.compute_dtype(flags.dtype))
    adapter = Adapter(model, params, opened.tokenizer, context, flags.batch_size)
    results, table = evaluate_tasks(adapter, flags.lm_eval, flags.include_path)
    if flags.json:
        print(json.dumps(results, default=str))
        return
    print(f"step {step} of {opened.directory}:")
    print(table)
