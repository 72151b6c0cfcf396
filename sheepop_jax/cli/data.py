"""`sheepop-jax data`: preprocess a corpus and print statistics and samples."""

import argparse
import json
import sys

from sheepop_jax.cli.common import Parser, print_text
from sheepop_jax.errors import InputError

DESCRIPTION = """\
Read a corpus, split off the validation text, train the tokenizer and write the token shards for
training. Then print statistics and a few random windows."""
EPILOG = """\
Every field of configs/base.py can be set as --config.section.field=value. Training prepares its
data itself; use this command to prepare a large corpus ahead of time, or to inspect one.
With --process_index and --process_count a launcher can start it in several processes: the first
one prepares, the others wait and report the same shards. They do not share the work.

examples:
  python -m sheepop_jax data --config configs/base.py --config.data.path=corpus.jsonl
  python -m sheepop_jax data --config configs/wikitext103.py --verify"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags and the configuration overrides."""
    parser = Parser("data", DESCRIPTION, EPILOG)
    parser.add_config()
    add = parser.add_argument
    add("--windows", type=int, default=10, metavar="N", help="windows to print (default 10)")
    add("--verify", action="store_true", help="check the SHA-256 of every file")
    add("--json", action="store_true", help="print the manifest as JSON")
    add("--process_index", type=int, default=0, metavar="I", help="this process (default 0)")
    add(
        "--process_count",
        type=int,
        default=1,
        metavar="N",
        help="processes that share data.cache_dir: one prepares, the others wait (default 1)",
    )
    return parser.parse_with_overrides(argv)


def run(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Preprocesses the data of a configuration and prints statistics and samples.

    Raises:
        InputError: a flag, the configuration or the text is invalid.
    """
    if not 0 <= flags.process_index < flags.process_count:
        expected = f"at least 0 and below {flags.process_count} (`process_count`)"
        raise InputError("process_index", flags.process_index, expected)
    if flags.windows < 0:
        raise InputError("windows", flags.windows, "at least 0")
    from sheepop_jax.config.loading import load_config

    config = load_config(flags.config, overrides)
    from sheepop_jax.data.loader import PackingConfig
    from sheepop_jax.data.preprocess.prepare import prepare
    from sheepop_jax.data.preprocess.report import describe, random_windows
    from sheepop_jax.data.shards import verify_shards

    prepared = prepare(config.data)
    if flags.verify:
        files = verify_shards(prepared.directory, prepared.manifest)
        print(f"{prepared.directory}: {files} files match the manifest", file=sys.stderr)
    if flags.json:
        print(json.dumps(prepared.manifest))
        return
    tokenizer = prepared.tokenizer
    layout = PackingConfig.of(config.data, tokenizer.end_of_text, tokenizer.document_bos)
    print(describe(prepared, layout, config.seed))
    for number, text in enumerate(
        random_windows(prepared, layout, config.seed, flags.windows), start=1
    ):
        print(f"\n--- window {number} of {flags.windows} ---")
        print_text(text)
