"""Write text with a trained run: flags → prompts → one call into the library → stdout."""

import argparse
import json
import logging
import sys
from pathlib import Path

from sheepop_jax.cli.common import (
    DTYPE_HELP,
    PLATFORM_HELP,
    Parser,
    checked_step,
    command,
    leave_on_interrupt,
)
from sheepop_jax.config.schema import DTYPES, PLATFORMS
from sheepop_jax.errors import InputError
from sheepop_jax.formatting import printable
from sheepop_jax.generation.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    SamplingConfig,
    new_token_limit,
    resolve_context,
    truncate_left,
)

log = logging.getLogger("sheepop_jax.sample")

TRUNCATE_HELP = """\
of a prompt that does not fit, drop the beginning; half the context at most is left for the new
tokens, unless --max_new_tokens says how many"""
EPILOG = """\
examples:
  python sample.py --ckpt runs/quickstart --prompt "def main"
  python sample.py --ckpt runs/quickstart --prompt "import" --prompt "class" --num_samples 3
  python sample.py --ckpt runs/base --prompt_file story.txt --temperature 0        # greedy
  python sample.py --ckpt runs/base --top_k 50 --top_p 0.95 --seed 7 --json | jq -r .completion
  echo -n "Once" | python sample.py --ckpt runs/base --prompt_file -

The text goes to stdout, everything else to stderr. The same flags give the same text: a sample
depends on its prompt, its number and the seed, not on what else is sampled along with it.
A prompt that begins with a dash is written --prompt=-x. Without a prompt, a new document begins.

exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C"""


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, each on its own still unchecked."""
    parser = Parser(
        prog="sample.py", description="Continue prompts with a trained model.", epilog=EPILOG
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="RUN", help="a run directory, as train.py leaves it")
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompt_file", metavar="FILE", help="a prompt that is a whole file; - for stdin")
    add(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help=f"default: what the context still holds, {DEFAULT_MAX_NEW_TOKENS} at most",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the most probable token, 1 draws as the model says (default 0.8)",
    )
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K best (default 0: off)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest best that reach probability P, after top_k (default 1: off)",
    )
    add("--num_samples", type=int, default=1, metavar="N", help="for each prompt (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--step", default="latest", help="checkpoint: latest (default), best or a number")
    add("--json", action="store_true", help="one object a line for each sample")
    add("--context", type=int, metavar="N", help="default: model.max_seq_len of the run")
    add("--truncate", choices=("left",), help=TRUNCATE_HELP)
    add("--platform", choices=PLATFORMS, default="auto", help=PLATFORM_HELP)
    add("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    add("--quantize", choices=("int8",), help="weights as int8 (default: as they were trained)")
    add("--debug", action="store_true", help="show tracebacks and debug logs")
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> SamplingConfig:
    """Refuses what no run could make right; imports no jax.

    Raises:
        InputError: names the flag.
    """
    sampling = SamplingConfig(flags.temperature, flags.top_k, flags.top_p)
    if flags.max_new_tokens is not None and flags.max_new_tokens < 0:
        raise InputError("--max_new_tokens", flags.max_new_tokens, "at least 0")
    if flags.num_samples < 1:
        raise InputError("--num_samples", flags.num_samples, "at least 1")
    if not 0 <= flags.seed < 2**32:
        raise InputError("--seed", flags.seed, "a whole number in [0, 2**32)")
    if flags.context is not None and flags.context < 2:
        raise InputError("--context", flags.context, "at least 2 (one token of prompt, one new)")
    flags.step = checked_step(flags.step)
    return sampling


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """The prompts, `--prompt_file` last; one empty prompt when there is none.

    Raises:
        InputError: the file cannot be read, or text is not UTF-8.
    """
    prompts = list(flags.prompt)
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError("--prompt", prompt, f"UTF-8 (character {error.start})") from None
    if flags.prompt_file is not None:
        try:
            file = flags.prompt_file
            raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            prompts.append(raw.decode().removeprefix("\ufeff"))
        except OSError as error:
            got = f"{flags.prompt_file} ({error.strerror})"
            raise InputError("--prompt_file", got, "a file that can be read") from None
        except UnicodeDecodeError as error:
            got = f"{flags.prompt_file}, invalid at byte {error.start}"
            raise InputError("--prompt_file", got, "UTF-8 text") from None
    return prompts or [""]


def sample(flags: argparse.Namespace) -> None:
    """Everything from the flags to the text on stdout.

    Raises:
        InputError: a flag, a prompt or the run is wrong.
    """
    sampling, texts = check(flags), read_prompts(flags)

    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)

    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.engine import generate

    run = open_run(flags.ckpt)
    tokenizer, trained = run.tokenizer, run.config.data.seq_len
    context = resolve_context(run.config.model, flags.context)
    if sampling.top_k > tokenizer.vocab_size:
        log.warning(
            "--top_k %d is above the vocabulary: %d it is", sampling.top_k, tokenizer.vocab_size
        )
    prompts, longest = [], 0
    names = ["--prompt"] * max(len(flags.prompt), not flags.prompt_file) + ["--prompt_file"]
    for name, text in zip(names, texts, strict=False):
        tokenizer.check(text, name)
        ids = tokenizer.encode(text)
        kept = ids
        if flags.truncate == "left":
            kept = truncate_left(ids, flags.max_new_tokens, context)
        if len(kept) < len(ids):
            log.warning("dropped the first %d of %d tokens", len(ids) - len(kept), len(ids))
        # Before the parameters are read.
        length = max(len(kept), 1)
        longest = max(
            longest, length + new_token_limit(length, flags.max_new_tokens, context, name)
        )
        prompts.append(kept)
    if longest > trained:
        log.warning("up to %d tokens; the model was trained on windows of %d", longest, trained)
    params, step = run.params(flags.step, flags.quantize)
    log.info("step %d of %s", step, run.directory)
    completions = generate(
        run.model(machine.compute_dtype(flags.dtype)),
        params,
        prompts,
        sampling=sampling,
        end_of_text=tokenizer.end_of_text,
        max_new_tokens=flags.max_new_tokens,
        num_samples=flags.num_samples,
        seed=flags.seed,
        context=context,
    )
    several = len(completions) > 1
    for i, completion in enumerate(completions):
        number = i // flags.num_samples
        prompt, text = texts[number], tokenizer.decode_after(prompts[number], completion.tokens)
        if flags.json:
            record = {
                "prompt": prompt,
                "completion": text,
                "tokens": completion.tokens,
                "stop_reason": completion.stop_reason,
            }
            print(json.dumps(record, ensure_ascii=False))
            continue
        if several:
            which = f"sample {i % flags.num_samples + 1} of {flags.num_samples}"
            if len(texts) > 1:
                which = f"prompt {number + 1} of {len(texts)}, {which}"
            print(f"--- {which} ---")
        shown = prompt + text
        print(printable(shown) if sys.stdout.isatty() else shown)
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Runs the program; leaves by `SystemExit` unless all went well."""
    flags = parse(argv)
    with command(flags.debug):
        sample(flags)


if __name__ == "__main__":
    leave_on_interrupt()
    main(sys.argv[1:])
