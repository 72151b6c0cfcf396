"""Speed and memory of data preparation and of the batch loader.

    python benchmarks/data.py --gigabytes 5 --workdir /tmp/corpus

Generates a corpus of this size in WORKDIR (kept and reused). Then measures, each in a new process:

prepare   the whole corpus to token shards, with an empty cache
compare   encoding and sharding against bare `encode_batch_fast` and `datasets.map` with the same
          tokenizer on the same text, in turns; medians
load      batches on one core

Memory is the peak resident size of the process.
"""

import argparse
import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DOCUMENT_BYTES = 100_000
COMPARED_BYTES = 40_000_000
ROUNDS = 5
WINDOW, BATCH = 512, 64


def main() -> None:
    """Runs each measurement in a new process, since peak memory is per process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=0.2, metavar="N", help="default 0.2")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab_size", type=int, default=32_000, metavar="N", help="default 32000")
    parser.add_argument("--only", choices=STEPS, help="run one measurement, in this process")
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(STEPS[flags.only](flags)))
        return
    make_corpus(flags.workdir / "text", int(flags.gigabytes * 1e9))
    rows = {}
    for name in STEPS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[name] = json.loads(output.splitlines()[-1])
    print(f"{flags.gigabytes} GB in documents of {DOCUMENT_BYTES / 1e3:.0f} kB")
    for name, row in rows.items():
        print(f"  {name:10}" + "  ".join(f"{key} {value:,.2f}" for key, value in row.items()))


def make_corpus(directory: Path, size: int) -> None:
    """Generates distinct documents of source code; deterministic for a given size."""
    done = directory.with_suffix(".done")
    if done.exists() and done.read_text() == str(size):
        return
    from sheepop_jax.data.sources.files import standard_library

    lines: list[str] = []
    for document in standard_library():
        try:
            lines += "".join(document.pieces).splitlines(keepends=True)
        except Exception as error:  # a file that is not UTF-8
            print(f"{document.id}: {error}", file=sys.stderr)
    generator = random.Random(0)
    syllables = [
        a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ["", "n", "r", "s"]
    ]
    made = number = 0
    directory.mkdir(parents=True, exist_ok=True)
    while made < size:
        # About one line in 12 has unique words, like the names and numbers of real text.
        parts = [f"document {number}\n"]
        length = 0
        while length < DOCUMENT_BYTES:
            start = generator.randrange(len(lines) - 20)
            block = lines[start : start + generator.randrange(4, 20)]
            word = "".join(generator.choices(syllables, k=3))
            block.append(f"{word} {generator.randrange(10**6)} {word[::-1]}_{number}\n")
            parts += block
            length += sum(map(len, block))
        path = directory / f"{number // 1000:04}" / f"{number:07}.txt"
        if number % 1000 == 0:
            path.parent.mkdir(exist_ok=True)
        made += path.write_bytes("".join(parts).encode())
        number += 1
        if number % 5000 == 0:
            print(f"generating the corpus: {made / 1e9:.1f} GB", file=sys.stderr)
    done.write_text(str(size))


def prepare(flags: argparse.Namespace) -> dict[str, float]:
    """Measures `prepare` with an empty cache."""
    import logging
    import shutil

    from sheepop_jax.data.preprocess.prepare import prepare as run

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    shutil.rmtree(flags.workdir / "cache", ignore_errors=True)
    start = time.perf_counter()
    data = run(data_config(flags))
    total = time.perf_counter() - start
    size = (sum(stream.num_bytes for stream in data.train) + data.validation.num_bytes) / 1e6
    return {
        "MB": size,
        "MB_per_s": size / total,
        "minutes": total / 60,
        "tokens_M": (data.train_tokens + len(data.validation)) / 1e6,
        "peak_MB": peak(),
    }


def compare(flags: argparse.Namespace) -> dict[str, float]:
    """Measures three ways to encode text from the page cache, in turns; medians in MB/s."""
    import contextlib
    import io

    import datasets

    from sheepop_jax.data.preprocess.corpus_store import write_corpus_store
    from sheepop_jax.data.preprocess.encode import encode_units
    from sheepop_jax.data.preprocess.split import choose_split
    from sheepop_jax.data.sources.corpus import open_corpus

    datasets.disable_progress_bars()
    tokenizer = prepared(flags).tokenizer
    paths = sorted((flags.workdir / "text").glob("*/*.txt"))
    paths = paths[:: max(1, len(paths) * DOCUMENT_BYTES // COMPARED_BYTES)]
    texts = [path.read_text() for path in paths]
    size = sum(len(text.encode()) for text in texts) / 1e6

    def bare(directory: Path) -> None:
        for i in range(0, len(texts), 10):
            tokenizer._inner.encode_batch_fast(texts[i : i + 10], add_special_tokens=False)

    def ours(directory: Path) -> None:
        encode_units(directory, spool, split, tokenizer)

    def mapped(directory: Path) -> None:
        def encode(batch):
            return {"ids": [e.ids for e in tokenizer._inner.encode_batch_fast(batch["text"])]}

        rows.map(encode, batched=True, batch_size=10, remove_columns=["text"])

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=flags.workdir) as name:
        listed = Path(name) / "listed"
        listed.mkdir()
        for path in paths:
            (listed / path.name).symlink_to(path)
        config = dataclasses.replace(data_config(flags), path=str(listed))
        read = Path(name) / "spool"
        read.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            spool = write_corpus_store(read, [(p, open_corpus(p.config)) for p in config.parts])
        split = choose_split(spool, "auto", 0.1)
        rows = datasets.Dataset.from_dict({"text": texts})
        for turn in range(ROUNDS):
            for way in (bare, ours, mapped):
                out = Path(name) / f"{way.__name__}-{turn}"
                out.mkdir()
                start = time.perf_counter()
                way(out)
                seconds.setdefault(way.__name__, []).append(time.perf_counter() - start)
    found = {way: size / statistics.median(times) for way, times in seconds.items()}
    ratio = statistics.median(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True))
    return {**found, "ours/bare": ratio, "ours/mapped": found["ours"] / found["mapped"]}


def load(flags: argparse.Namespace) -> dict[str, float]:
    """Measures batches on one core, and the growth of memory."""
    from sheepop_jax.data.loader import PackingConfig, TrainBatches

    data = prepared(flags)
    before = peak()
    layout = PackingConfig(WINDOW, data.tokenizer.end_of_text)
    batches = TrainBatches(data.train, layout, seed=1, accum=1, batch_size=BATCH)
    steps = min(batches.steps_per_epoch, 4000)
    start = time.perf_counter()
    for step in range(steps):
        batches.batch_at(step)
    seconds = time.perf_counter() - start
    return {
        "tokens_M_per_s": steps * BATCH * WINDOW / seconds / 1e6,
        "read_MB": steps * BATCH * WINDOW * 2 / 1e6,
        "growth_MB": peak() - before,
        "peak_MB": peak(),
    }


def data_config(flags: argparse.Namespace):
    """Returns the data configuration: the corpus with a new BPE tokenizer."""
    from configs.base import get_config
    from sheepop_jax.config.schema import Config

    config = get_config()
    config.data.path = str(flags.workdir / "text")
    config.data.cache_dir = str(flags.workdir / "cache")
    config.data.vocab_size = flags.vocab_size
    return Config.from_dict(config).data


def prepared(flags: argparse.Namespace):
    """Opens the shards written by `prepare`."""
    from sheepop_jax.data.shards import open_shards

    [manifest] = (flags.workdir / "cache").glob("*/manifest.json")
    return open_shards(manifest.parent)


def peak() -> float:
    """Returns the peak resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


STEPS = {"prepare": prepare, "compare": compare, "load": load}

if __name__ == "__main__":
    main()
