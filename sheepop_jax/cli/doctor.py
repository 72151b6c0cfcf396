"""`sheepop-jax doctor`: report the machine's capabilities and performance problems."""

import argparse
import json

from sheepop_jax.cli.common import PLATFORM_HELP, Parser
from sheepop_jax.config.schema import PLATFORMS

DESCRIPTION = "Report versions, devices, precision, caches and performance problems."
EPILOG = """\
examples:
  python -m sheepop_jax doctor
  python -m sheepop_jax doctor --platform cuda --json

exit codes: 0 the machine can train, 1 it computes wrong numbers, 2 the platform is missing"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("doctor", DESCRIPTION, EPILOG)
    parser.add_argument("--platform", choices=PLATFORMS, default="auto", help=PLATFORM_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> int:
    """Prints a diagnosis; returns 1 if the machine computes wrong numbers."""
    from sheepop_jax.runtime.diagnosis import diagnose

    found = diagnose(flags.platform)
    if flags.json:
        print(json.dumps(found.to_dict()))
    else:
        print("\n".join(_lines(found.to_dict())))
    return 0 if found.numbers == "right" else 1


def _lines(found: dict) -> list[str]:
    """Formats a diagnosis as lines of text."""
    versions = (f"{name} {number or 'MISSING'}" for name, number in found["versions"].items())
    memory, peak = found["device_memory"], found["peak_flops"]
    figures = f" ({memory / 1e9:.0f} GB each, {peak:.3g} FLOP/s)" if peak else ""
    cache = "none"
    if found["compile_cache"]:
        cache = f"{found['compile_cache']} ({found['compile_cache_bytes'] / 1e6:.0f} MB)"
    rows = {
        "versions": ", ".join(versions),
        "platform": f"{found['platform']} ({found['reason']})",
        "devices": found["devices"] + figures,
        "bfloat16": "yes" if found["bf16"] else "no: float32",
        "flash attention": "yes" if found["flash_attention"] else "no: XLA attention",
        "numbers": found["numbers"],
        "compile cache": cache,
        "CPUs": str(found["cpu_count"]),
        "free memory": f"{found['memory_available'] / 1e9:.1f} GB",
        "free disk": f"{found['disk_free'] / 1e9:.1f} GB",
    }
    lines = [f"{name:16}{value}" for name, value in rows.items()]
    return [*lines, *(f"{'note':16}{line}" for line in found["advice"])]
