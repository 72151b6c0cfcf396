"""`sample.py`: generate text with a trained model."""

import argparse
import functools
import json
import logging
import re
import sys
from pathlib import Path

from sheepop_jax.cli.common import (
    Parser,
    checked_step,
    execute,
    leave_on_interrupt,
    load_params,
    path_argument,
    print_text,
)
from sheepop_jax.errors import InputError
from sheepop_jax.files import decode, read_text
from sheepop_jax.generation.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationConfig,
    SamplingConfig,
    new_token_limit,
    resolve_context,
    truncate_left,
)

log = logging.getLogger("sheepop_jax.sample")

MAX_NEW_TOKENS_HELP = f"""\
default: the rest of the context, at most {DEFAULT_MAX_NEW_TOKENS}; may exceed the context, except
with learned positions"""
TRUNCATE_HELP = """\
drop the start of a prompt that does not fit; without --max_new_tokens, reserve at most half the
context for new tokens"""
EPILOG = """\
examples:
  python sample.py --ckpt runs/quickstart --prompt "def main"
  python sample.py --ckpt runs/quickstart --prompt "import" --prompt "class" --num_samples 3
  python sample.py --ckpt runs/base --prompt_file story.txt --temperature 0        # greedy
  python sample.py --ckpt runs/base --top_k 50 --top_p 0.95 --seed 7 --json | jq -r .completion
  echo "Once" | python sample.py --ckpt runs/base --max_new_tokens 2000

Text goes to stdout, everything else to stderr. The same flags give the same text: a sample depends
on its prompt, its number and the seed, not on the rest of the batch. Write a prompt with a leading
dash as --prompt=-x. Without a prompt, standard input is the prompt, without its last newline. On a
terminal, or with --prompt "", generation starts a new document.

exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; `check` validates them."""
    parser = Parser("sample.py", "Continue prompts with a trained model.", EPILOG)
    parser.add_run()
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt text; repeatable; - for stdin",
    )
    add(
        "--prompt_file",
        type=path_argument,
        metavar="FILE",
        help="read a prompt from a file; - for stdin",
    )
    add("--keep_newline", action="store_true", help="keep the newline at the end of stdin")
    add(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help=MAX_NEW_TOKENS_HELP,
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="divides the logits; 0 is greedy, 1 leaves them unscaled (default 0.8)",
    )
    add("--top_k", type=int, default=0, metavar="K", help="top-k sampling (default 0: off)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="top-p (nucleus) sampling, applied after top-k (default 1: off)",
    )
    add("--num_samples", type=int, default=1, metavar="N", help="samples per prompt (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    add("--json", action="store_true", help="print one JSON object per sample and line")
    add("--truncate", choices=("left",), help=TRUNCATE_HELP)
    return parser.parse(argv)


def check(flags: argparse.Namespace) -> SamplingConfig:
    """Validates the flags that do not depend on the run, without importing jax.

    Raises:
        InputError: a flag is invalid.
    """
    sampling = SamplingConfig(flags.temperature, flags.top_k, flags.top_p)
    if flags.max_new_tokens is not None and flags.max_new_tokens < 0:
        raise InputError("max_new_tokens", flags.max_new_tokens, "at least 0")
    if flags.num_samples < 1:
        raise InputError("num_samples", flags.num_samples, "at least 1")
    if not 0 <= flags.seed < 2**32:
        raise InputError("seed", flags.seed, "an integer in [0, 2**32)")
    if flags.context is not None and flags.context < 2:
        raise InputError("context", flags.context, "at least 2 (one prompt token, one new token)")
    flags.step = checked_step(flags.step)
    return sampling


def read_prompts(flags: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the flag and the text of each prompt, `--prompt_file` last.

    Without a prompt, reads standard input, unless it is a terminal: then the prompt is empty.

    Raises:
        InputError: the file cannot be read, a prompt is not UTF-8, or standard input is asked for
            twice.
    """
    given = [("prompt", prompt) for prompt in flags.prompt]
    if flags.prompt_file is not None:
        given.append(("prompt_file", flags.prompt_file))
    if not given:
        if sys.stdin.isatty():
            return [("prompt", "")]
        log.info("reading the prompt from standard input")
        given = [("prompt", "-")]
    if [value for _, value in given].count("-") > 1:
        raise InputError(given[-1][0], "-", "standard input once", "`prompt_file` FILE")
    prompts = []
    for name, prompt in given:
        if prompt == "-":
            text = decode(sys.stdin.buffer.read(), "stdin", name)
            if not flags.keep_newline:
                text = re.sub(r"\r?\n\Z", "", text)
            prompts.append((name, text))
            continue
        if name == "prompt_file":
            prompts.append((name, read_text(Path(prompt), name)))
            continue
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            expected = f"UTF-8 text (invalid character {error.start})"
            raise InputError("prompt", prompt, expected) from None
        prompts.append((name, prompt))
    return prompts


def sample(flags: argparse.Namespace) -> None:
    """Generates text and prints it to stdout.

    Raises:
        InputError: a flag, a prompt or the run is invalid.
    """
    sampling = check(flags)

    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)

    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.engine import generate

    run = open_run(flags.ckpt)
    run.checkpoints.resolve(flags.step or "latest")
    context = resolve_context(run.config.model, flags.context)
    named = read_prompts(flags)  # last: standard input may wait for a user who types
    tokenizer, trained = run.tokenizer, run.trained_length
    if sampling.top_k > run.vocab_size:
        log.warning("--top_k %d exceeds the vocabulary; using %d", sampling.top_k, run.vocab_size)
    if flags.num_samples > 1 and (flags.temperature == 0 or flags.top_k == 1):
        log.warning(
            "the %d samples of a prompt are the same: --temperature 0 and --top_k 1 are greedy",
            flags.num_samples,
        )
    learned = run.config.model.position == "learned"
    limit = functools.partial(
        new_token_limit,
        max_new_tokens=flags.max_new_tokens,
        context=context,
        slide=True,
        learned=learned,
    )
    # New tokens that exceed the context by themselves need no room in it: the window slides.
    beyond = not learned and (flags.max_new_tokens or 0) >= context
    prompts, longest = [], 0
    for name, text in named:
        tokenizer.check(text, name)
        ids, start = tokenizer.encode(text), tokenizer.prompt_start
        kept, room = ids, context - len(start)
        if flags.truncate == "left" and (learned or len(ids) >= room):
            kept = truncate_left(ids, None if beyond else flags.max_new_tokens, room)
        if len(kept) < len(ids):
            log.warning("dropped the first %d of %d prompt tokens", len(ids) - len(kept), len(ids))
        kept = [*start, *kept]
        # Check before loading the parameters.
        length = max(len(kept), 1)
        longest = max(longest, length + limit(length, name=name))
        prompts.append(kept)
    if longest > context:
        log.info(
            "up to %d tokens with a context of %d: each time a text fills the context, the model "
            "continues from its last %d tokens",
            *(longest, context, context // 2),
        )
    if min(longest, context) > trained:
        log.warning(
            "up to %d tokens, but the model was trained on windows of %d",
            *(min(longest, context), trained),
        )
    params, _ = load_params(run, flags.step, flags.quantize)
    completions = generate(
        run.model(machine.compute_dtype(flags.dtype)),
        params,
        prompts,
        tokenizer.end_of_text,
        GenerationConfig(
            sampling, flags.max_new_tokens, flags.num_samples, flags.seed, context, slide=True
        ),
    )
    texts = [text for _, text in named]
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
        print_text(prompt + text)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code.

    Args:
        argv: the flags. None uses `sys.argv` and makes Ctrl-C stop the program immediately.
    """
    if argv is None:
        argv = sys.argv[1:]
        leave_on_interrupt()
    return execute(sample, parse(argv))
