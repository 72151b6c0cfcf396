"""`sheepop-jax checkpoints`: list, verify and delete the checkpoints of a run."""

import argparse
import json
import sys

from sheepop_jax.cli.common import Parser
from sheepop_jax.errors import RunFailed

DESCRIPTION = "List, verify and delete the checkpoints of a run."
EPILOG = """\
examples:
  python -m sheepop_jax checkpoints --ckpt runs/quickstart
  python -m sheepop_jax checkpoints --ckpt runs/base --verify
  python -m sheepop_jax checkpoints --ckpt runs/base --delete 500 1000"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("checkpoints", DESCRIPTION, EPILOG)
    add = parser.add_argument
    parser.add_ckpt()
    add(
        "--verify",
        action="store_true",
        help="check the SHA-256 of every file; exit code 1 if a checkpoint is damaged",
    )
    add("--json", action="store_true", help="print one JSON object per line")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--delete", type=int, nargs="+", metavar="STEP", help="delete these steps")
    some.add_argument("--keep", type=int, nargs="+", metavar="STEP", help="delete all other steps")
    add(
        "--force",
        action="store_true",
        help="let --delete and --keep delete the best or the only valid checkpoint",
    )
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> None:
    """Deletes the requested checkpoints of a run, then lists the rest.

    Raises:
        InputError: not a run, a missing step, an unreadable file, or, without `--force`, the best
            or the only complete checkpoint would be deleted.
        RunFailed: with --verify, a checkpoint is damaged.
    """
    from sheepop_jax.checkpoint.inventory import delete, inventory, keep_only, table
    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.checkpoint.saver import CheckpointSaver
    from sheepop_jax.checkpoint.workdir import WorkdirLock

    opened = open_run(flags.ckpt)
    if flags.delete or flags.keep:
        saver = CheckpointSaver(opened.checkpoints.directory)
        with WorkdirLock(opened.directory):
            if flags.delete:
                deleted = delete(saver, flags.delete, flags.force)
            else:
                deleted = keep_only(saver, flags.keep, flags.force)
        print("deleted:", ", ".join(map(str, deleted)) or "none", file=sys.stderr)
    items = inventory(opened.checkpoints, verify=flags.verify)
    if flags.json:
        for item in items:
            print(json.dumps(item.to_dict()))
    else:
        print(table(items, verified=flags.verify))
    damaged = sum(bool(item.damage) and not item.quarantined for item in items)
    if flags.verify and damaged:
        raise RunFailed(f"{damaged} of {len(opened.checkpoints.steps())} checkpoints are damaged")
