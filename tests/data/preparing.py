"""What the tests of a preparation share."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT_BYTES = 700  # some ten units

# A process that prepares, and dies before or after the n-th call of a function if it is told to.
CHILD = """
import dataclasses, importlib, json, logging, os, signal, sys, time
import numpy as np
from sheepop_jax.data import cache, encode, prepare, spool
from sheepop_jax.data.batches import Layout, TrainBatches
from sheepop_jax.data.sources import paths
from sheepop_jax.data_config import DataConfig

options = json.loads(sys.argv[1])
logging.basicConfig(level="INFO", format="%(message)s")
paths._SETTLED_SECONDS = 0
encode._UNIT_BYTES = options["unit_bytes"]
encode._TAKE_OVER_SECONDS = options.get("take_over", 60)
if "die" in options:
    place, name, calls, when = options["die"]
    holder = importlib.import_module(f"sheepop_jax.data.{place}")
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    name, count = name.split(".")[-1], 0
    inner = getattr(holder, name)
    def dying(*arguments, **named):
        global count
        count += 1
        if count == calls and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = inner(*arguments, **named)
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(holder, name, dying)
encode_unit = encode._encode_unit
def told(directory, unit, *rest):
    print("unit", unit.number, flush=True)
    time.sleep(options.get("slow", 0))
    encode_unit(directory, unit, *rest)
encode._encode_unit = told
config = DataConfig(**options["config"])
share = options.get("share", [0, 1])
data = prepare.prepare(config, *share)
if "steps" in options:
    layout = Layout.of(config, data.tokenizer.end_of_text)
    rows = range(8)[share[0] * 8 // share[1] : (share[0] + 1) * 8 // share[1]]
    batches = TrainBatches(data.train, layout, seed=3, accum=2, batch_size=8, weights=data.weights,
                           rows=rows)
    for batch in batches.iterate(0, options["steps"]):
        print("batch", json.dumps([array.tolist() for array in batch[:3]]))
"""


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def units_in(output):
    return [int(number) for number in re.findall(r"^unit (\d+)$", output, re.M)]


def names_in(directory):
    """What is in a cache, but for its memory."""
    there = directory.iterdir() if directory.exists() else ()
    return sorted(path.name for path in there if path.name != "sources")
