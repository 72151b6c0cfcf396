"""What `python -m sheepop_jax` does, by command: flags → calls into the library → stdout."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from sheepop_jax.cli.common import checked_step, load_config
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.formatting import printable

_CHARACTERS = 256  # of a text, where nothing says how many


def data(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Prepares the data of a configuration and prints what is in it.

    Raises:
        InputError: a flag, the configuration or the text is wrong.
    """
    if not 0 <= flags.process_index < flags.process_count:
        expected = f"at least 0 and below --process_count {flags.process_count}"
        raise InputError("--process_index", flags.process_index, expected)
    if flags.windows < 0:
        raise InputError("--windows", flags.windows, "at least 0")
    config = load_config(flags.config, overrides)
    from sheepop_jax.data.loader import PackingConfig
    from sheepop_jax.data.preprocess.prepare import prepare
    from sheepop_jax.data.preprocess.report import describe, random_windows
    from sheepop_jax.data.shards import verify_shards

    prepared = prepare(config.data)
    if flags.verify:
        files = verify_shards(prepared.directory, prepared.manifest)
        print(f"{prepared.directory}: {files} files are what the manifest says", file=sys.stderr)
    if flags.json:
        print(json.dumps(prepared.manifest))
        return
    layout = PackingConfig.of(config.data, prepared.tokenizer.end_of_text)
    print(describe(prepared, layout, config.seed))
    for number, text in enumerate(
        random_windows(prepared, layout, config.seed, flags.windows), start=1
    ):
        shown = printable(text) if sys.stdout.isatty() else text
        print(f"\n--- window {number} of {flags.windows} ---\n{shown}")


def plan(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Prints what a run of a configuration will need, before any data is read.

    Raises:
        InputError: a flag or the configuration is wrong, or does not fit the mesh.
    """
    for name in ("devices", "vocab_size"):
        value = getattr(flags, name)
        if value is not None and not 1 <= value < 2**31:
            raise InputError(f"--{name}", value, "at least 1 and below 2**31")
    if not 0 < flags.mfu <= 1:
        raise InputError("--mfu", flags.mfu, "a number in (0, 1]")
    config = load_config(flags.config, overrides)
    from sheepop_jax.runtime import platform

    if flags.device:
        machine = platform.imagine(flags.device, flags.devices or 1)
    else:
        machine = platform.prepare(config.train.platform)
        if flags.devices:
            machine = machine.with_devices(flags.devices)
    from sheepop_jax.model.partitioning import abstract_mesh, check_mesh
    from sheepop_jax.pipeline import build_model, plan_run
    from sheepop_jax.training.plan_report import describe

    mesh = abstract_mesh(config.mesh, machine.device_count)
    check_mesh(config, mesh)
    vocab_size = flags.vocab_size or _likely_vocab_size(config)
    model = build_model(config, vocab_size, machine)
    planned = plan_run(config, model, mesh, machine)
    if flags.json:
        print(json.dumps(planned.to_dict(flags.mfu)))
    else:
        print(describe(planned, config, model, flags.mfu))


def _likely_vocab_size(config: Config) -> int:
    """Of the tokenizer, as far as it is known without reading the text."""
    match config.data.tokenizer:
        case "bpe":
            return config.data.vocab_size
        case "char":
            print(
                f"a vocabulary of {_CHARACTERS} characters is a guess; --vocab_size says better",
                file=sys.stderr,
            )
            return _CHARACTERS
    from sheepop_jax.data.tokenizer import Tokenizer

    return Tokenizer.from_file(config.data.tokenizer).vocab_size


def evaluate(flags: argparse.Namespace) -> None:
    """Evaluates a run and prints the figures.

    Raises:
        InputError: the run, the text or a flag is wrong.
    """
    if flags.batch_size < 1:
        raise InputError("--batch_size", flags.batch_size, "at least 1")
    wanted = checked_step(flags.step)
    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)
    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.data.loader import PackingConfig
    from sheepop_jax.data.stream import TokenStream, encode_text
    from sheepop_jax.evaluation import compression_figures, evaluate_stream
    from sheepop_jax.generation.requests import resolve_context

    run = open_run(flags.ckpt)
    seq_len = run.config.data.seq_len
    if flags.context is not None:
        seq_len = resolve_context(run.config.model, flags.context)
        print(f"windows of {seq_len} tokens; trained on {run.config.data.seq_len}", file=sys.stderr)
    if not 0 <= flags.overlap < seq_len:
        raise InputError("--overlap", flags.overlap, f"at least 0 and below the window, {seq_len}")
    if flags.data is None:
        stream = run.held_out().validation
        compressed = {"gzip_bits_per_byte": run.gzip_bits_per_byte}
    else:
        text = _read_text(flags.data)
        run.tokenizer.check(text, flags.data)
        tokens = encode_text(run.tokenizer, [text])
        stream = TokenStream.from_array(tokens, len(text.encode()), 1)
        compressed = compression_figures(text.encode())
    params, step = run.params(wanted, flags.quantize)
    model = run.model(machine.compute_dtype(flags.dtype))
    layout = replace(PackingConfig.of(run.config.data, run.tokenizer.end_of_text), seq_len=seq_len)
    figures = evaluate_stream(
        model,
        params,
        stream,
        layout,
        batch_size=flags.batch_size,
        overlap=flags.overlap,
    )
    found = figures.to_dict() | compressed
    if flags.json:
        print(json.dumps(found))
        return
    print(f"step {step} of {run.directory}, on {flags.data or 'its held-out split'}:")
    for name, value in found.items():
        print(f"  {name:20}{value:,}" if isinstance(value, int) else f"  {name:20}{value:.4f}")


def _read_text(name: str) -> str:
    try:
        text = Path(name).read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise InputError("--data", f"{name} ({error.strerror})", "a text file") from None
    except UnicodeDecodeError as error:
        got = f"{name}, not UTF-8 at byte {error.start}"
        raise InputError("--data", got, "a UTF-8 text file") from None
    if not text.strip():
        raise InputError("--data", f"{name}, without text", "a text file")
    return text


def bench(flags: argparse.Namespace) -> None:
    """Measures decoding, prints a table, and writes JSON and a plot.

    Raises:
        InputError: the run or a flag is wrong.
    """
    wanted = checked_step(flags.step)
    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)
    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.benchmark import benchmark
    from sheepop_jax.generation.benchmark_report import format_table, write_results
    from sheepop_jax.generation.requests import resolve_context

    run = open_run(flags.ckpt)
    context = resolve_context(run.config.model, flags.context)
    longest = max(flags.prompt_lengths) + flags.new_tokens
    if longest > context:
        got = f"{longest} tokens with --new_tokens {flags.new_tokens}"
        raise InputError("--prompt_lengths", got, f"at most the context, {context}", "--context")
    out = Path(flags.out) if flags.out else run.directory / "bench"
    if not next(path for path in (out, *out.absolute().parents) if path.exists()).is_dir():
        raise InputError("--out", str(out), "a directory that can be made")  # before measuring
    params, step = run.params(wanted, flags.quantize)
    dtype = machine.compute_dtype(flags.dtype)
    rows = benchmark(
        run.model(dtype),
        params,
        prompt_lengths=flags.prompt_lengths,
        batch_sizes=flags.batch_sizes,
        new_tokens=flags.new_tokens,
        repeats=flags.repeats,
        context=context,
        report=lambda line: print(line, file=sys.stderr),
    )
    about = {
        "run": str(run.directory),
        "step": step,
        "device": machine.device_kind,
        "dtype": dtype.name,
        "quantize": flags.quantize,
    }
    print(format_table(rows))
    for path in write_results(rows, out, about):
        print(f"written: {path}", file=sys.stderr)


def checkpoints(flags: argparse.Namespace) -> None:
    """Lists the checkpoints of a run, after deleting what was asked for.

    Raises:
        InputError: not a run, a step that is not there, or no whole checkpoint would be left.
        RunFailed: with --verify, one of them is damaged.
    """
    from sheepop_jax.checkpoint.inventory import delete, inventory, keep_only, table
    from sheepop_jax.checkpoint.run import WorkdirLock, open_run

    run = open_run(flags.ckpt)
    if flags.delete or flags.keep:
        with WorkdirLock(run.directory):
            if flags.delete:
                deleted = delete(run.checkpoints, flags.delete)
            else:
                deleted = keep_only(run.checkpoints, flags.keep)
        print("deleted:", ", ".join(map(str, deleted)) or "none", file=sys.stderr)
    items = inventory(run.checkpoints, verify=flags.verify)
    if flags.json:
        for item in items:
            print(json.dumps(item.to_dict()))
    else:
        print(table(items, verified=flags.verify))
    damaged = sum(bool(item.damage) and not item.quarantine for item in items)
    if flags.verify and damaged:
        raise RunFailed(f"{damaged} of {len(run.checkpoints.steps())} checkpoints are damaged")
