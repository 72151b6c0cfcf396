"""`sheepop-jax plan`: estimate memory, FLOPs and time of a run without reading data."""

import argparse
import json
import sys

from sheepop_jax.cli.common import Parser
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError

DESCRIPTION = """\
Estimate the resources of a run without compiling or reading data: parameters, memory per device,
FLOPs and time per update, and changes that make a run fit."""
EPILOG = """\
Every field of configs/base.py can be set as --config.section.field=value. Without --device, the
plan is for the devices of this machine. docs/scaling.md explains the estimates.

examples:
  python -m sheepop_jax plan --config configs/base.py
  python -m sheepop_jax plan --config configs/gpt2_124m.py --devices 32 --device "TPU v5p"
  python -m sheepop_jax plan --config base --device "RTX 2060" --device_memory 6e9
  python -m sheepop_jax plan --config base --device mine --device_memory 12e9 --device_flops 100e12
  python -m sheepop_jax plan --config configs/base.py --device H100 --json"""

_CHARACTERS = 256  # vocabulary assumed for a `char` tokenizer, which depends on the text


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags and the configuration overrides."""
    parser = Parser("plan", DESCRIPTION, EPILOG)
    parser.add_config()
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="default: all of this machine; 1 with --device")
    add("--device", metavar="KIND", help="H100, TPU v5p, cpu, … (default: of this machine)")
    add("--device_memory", type=float, metavar="BYTES", help="of one device, for any --device")
    add("--device_flops", type=float, metavar="X", help="peak FLOP/s of one device, dense bf16")
    add("--vocab_size", type=int, metavar="V", help="vocabulary size (default: data.vocab_size)")
    add(
        "--mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="expected model FLOPs utilization, a fraction of peak FLOP/s (default 0.4)",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_with_overrides(argv)


def run(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Prints the estimated resources of a run.

    Raises:
        InputError: a flag or the configuration is invalid, or does not fit the mesh.
    """
    for name in ("devices", "vocab_size"):
        value = getattr(flags, name)
        if value is not None and not 1 <= value < 2**31:
            raise InputError(f"{name}", value, "at least 1 and below 2**31")
    for name in ("device_memory", "device_flops"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < 1e30:
            raise InputError(name, value, "a positive finite number", "12e9 for 12 GB")
        if value is not None and not flags.device:
            raise InputError(
                name, value, "no value unless `device` is set", "`device` with any name"
            )
    if not 0 < flags.mfu <= 1:
        raise InputError("mfu", flags.mfu, "a number in (0, 1]")
    from sheepop_jax.config.loading import load_config

    config = load_config(flags.config, overrides)
    from sheepop_jax.runtime import devices, platform

    if flags.device:
        machine = devices.hypothetical(
            flags.device, flags.devices or 1, flags.device_memory, flags.device_flops
        )
    else:
        machine = platform.prepare(config.train.platform)
        if flags.devices:
            machine = machine.with_devices(flags.devices)
    from sheepop_jax.model.partitioning import abstract_mesh, check_mesh
    from sheepop_jax.pipeline import build_model
    from sheepop_jax.planning.plan import make_plan
    from sheepop_jax.planning.report import describe

    mesh = abstract_mesh(config.mesh, machine.device_count)
    check_mesh(config, mesh)
    vocab_size = flags.vocab_size or _likely_vocab_size(config)
    model = build_model(config, vocab_size, machine)
    planned = make_plan(config, model, mesh, machine)
    if flags.json:
        print(json.dumps(planned.to_dict(flags.mfu)))
    else:
        print(describe(planned, config, model, flags.mfu))


def _likely_vocab_size(config: Config) -> int:
    """The vocabulary size as far as known without reading the text."""
    from sheepop_jax.data.chat import with_chat_template
    from sheepop_jax.data.chat_templates import TEMPLATES

    template = TEMPLATES.get(config.data.chat_template) if config.data.is_chat else None
    new_tokens = len(template.tokens) if template else 0
    if config.train.init_from:
        from sheepop_jax.checkpoint.run import open_run

        run = open_run(config.train.init_from)
        tokenizer = run.tokenizer
        if config.data.is_chat:
            tokenizer = with_chat_template(tokenizer, config.data.chat_template)
        return max(run.vocab_size, tokenizer.vocab_size)
    match config.data.tokenizer:
        case "bpe":
            return config.data.vocab_size + new_tokens
        case "char":
            print(
                f"assuming a vocabulary of {_CHARACTERS} characters; set --vocab_size if known",
                file=sys.stderr,
            )
            return _CHARACTERS + new_tokens
    from sheepop_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(config.data.tokenizer)
    if config.data.is_chat:
        tokenizer = with_chat_template(tokenizer, config.data.chat_template)
    return tokenizer.vocab_size
