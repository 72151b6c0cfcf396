"""`sample.py`: generate text with a trained model."""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepop_jax.cli.common import (
    Parser,
    before_leaving,
    checked_step,
    execute,
    leave_on_interrupt,
    load_params,
    path_argument,
    print_text,
    wait_for_terminal,
)
from sheepop_jax.errors import InputError
from sheepop_jax.files import decode, read_text
from sheepop_jax.generation.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationConfig,
    Output,
    Request,
    SamplingConfig,
    new_token_limit,
    resolve_context,
    truncate_left,
)
from sheepop_jax.generation.text import Text, write

if TYPE_CHECKING:  # the first imports jax
    from sheepop_jax.data.tokenizer import Tokenizer
    from sheepop_jax.generation.engine import Engine

log = logging.getLogger("sheepop_jax.sample")

MOST_SLOTS = 32  # texts written at the same time with --stop or --logprobs
MAX_NEW_TOKENS_HELP = f"""\
default: the rest of the context, at most {DEFAULT_MAX_NEW_TOKENS}; may exceed the context, except
with learned positions"""
TRUNCATE_HELP = """\
drop the start of a prompt that does not fit; without --max_new_tokens, reserve at most half the
context for new tokens"""
STREAM_HELP = """\
show text as it is generated (default: on a terminal, for one sample of one prompt, without
--json)"""
STOP_HELP = """\
end the text before this string, which is not shown; repeatable; \\n, \\r, \\t and \\\\ mean line
feed, carriage return, tab and backslash"""
LOGPROBS_HELP = """\
with --json: add the log-probability of each token and of the N most probable ones, 0 to 20"""
EPILOG = """\
examples:
  python sample.py --ckpt runs/quickstart --prompt "def main"
  python sample.py --ckpt runs/quickstart -i                                       # type prompts
  python sample.py --ckpt runs/chat --chat --prompt "What is 2 + 3?"
  python sample.py --ckpt runs/quickstart --prompt "import" --prompt "class" --num_samples 3
  python sample.py --ckpt runs/base --prompt_file story.txt --temperature 0        # greedy
  python sample.py --ckpt runs/base --prompt "Once" --stop '\\n\\n' --min_p 0.05
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
    text = "each prompt is a user's message, and the text the answer; for models trained on chats"
    add("--chat", action="store_true", help=text)
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
    add(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less than P times as probable as the most probable one (default 0: off)",
    )
    for name, default, text in (
        ("repetition", 1.0, "divides the logits of tokens in the prompt and the text"),
        ("presence", 0.0, "subtracted from the logits of tokens in the new text"),
        ("frequency", 0.0, "the same, once for each occurrence"),
    ):
        text += f" (default {default:g}: off)"
        add(f"--{name}_penalty", type=float, default=default, metavar="X", help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help=STOP_HELP)
    add("--num_samples", type=int, default=1, metavar="N", help="samples per prompt (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    add("--json", action="store_true", help="print one JSON object per sample and line")
    add("--logprobs", type=int, metavar="N", help=LOGPROBS_HELP)
    add("--stream", action=argparse.BooleanOptionalAction, help=STREAM_HELP)
    add("-i", "--interactive", action="store_true", help="type prompts and commands; see /help")
    add("--truncate", choices=("left",), help=TRUNCATE_HELP)
    return parser.parse(argv)


def check(flags: argparse.Namespace) -> SamplingConfig:
    """Validates the flags that do not depend on the run, without importing jax.

    Raises:
        InputError: a flag is invalid.
    """
    sampling = SamplingConfig(
        *(flags.temperature, flags.top_k, flags.top_p, flags.min_p),
        *(flags.repetition_penalty, flags.presence_penalty, flags.frequency_penalty),
    )
    if flags.max_new_tokens is not None and flags.max_new_tokens < 0:
        raise InputError("max_new_tokens", flags.max_new_tokens, "at least 0")
    if flags.num_samples < 1:
        raise InputError("num_samples", flags.num_samples, "at least 1")
    Request((), seed=flags.seed, logprobs=flags.logprobs)  # checks both
    if "" in flags.stop:
        raise InputError("stop", "", "nonempty text")
    flags.stop = [unescape(text) for text in flags.stop]
    if flags.logprobs is not None and not flags.json:
        raise InputError("logprobs", flags.logprobs, "`json`, which prints them")
    if flags.interactive:
        for name in ("prompt", "prompt_file", "keep_newline", "json"):
            if value := getattr(flags, name):
                raise InputError(name, value, "no such flag with `interactive`")
        if flags.stream is not None:
            raise InputError("stream", flags.stream, "no such flag with `interactive`")
        if flags.num_samples > 1:
            raise InputError("num_samples", flags.num_samples, "1 with `interactive`")
    if flags.context is not None and flags.context < 2:
        raise InputError("context", flags.context, "at least 2 (one prompt token, one new token)")
    flags.step = checked_step(flags.step)
    return sampling


def unescape(text: str) -> str:
    """Replaces the escape sequences of `--stop`; a backslash before any other letter stays."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda found: meant[found[1]], text)


def streams(flags: argparse.Namespace, prompts: int) -> bool:
    """Whether text is shown as it is generated.

    Raises:
        InputError: `--stream` with several texts or `--json`.
    """
    possible = prompts == flags.num_samples == 1 and not flags.json
    if flags.stream and not possible:
        raise InputError("stream", True, "one sample of one prompt, without `json`")
    return possible and (sys.stdout.isatty() if flags.stream is None else flags.stream)


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


@dataclass(frozen=True)
class Window:
    """How many tokens fit, as far as they depend on the flags.

    Attributes:
        context: maximum positions of a text.
        learned: whether the model has learned positions, where no text exceeds the context.
        max_new_tokens: requested number of new tokens; None for the default.
        truncate: whether a prompt that does not fit loses its beginning.
    """

    context: int
    learned: bool
    max_new_tokens: int | None
    truncate: bool

    def fit(self, ids: Sequence[int], start: Sequence[int], name: str = "prompt") -> list[int]:
        """Returns the ids of a prompt after `start` (BOS or none), truncated if asked for.

        Raises:
            InputError: the prompt or its new tokens exceed the context; see `new_token_limit`.
        """
        kept, room = list(ids), self.context - len(start)
        if self.truncate and (self.learned or len(ids) >= room):
            # New tokens that exceed the context by themselves need no room in it.
            beyond = not self.learned and (self.max_new_tokens or 0) >= self.context
            kept = truncate_left(ids, None if beyond else self.max_new_tokens, room)
        if len(kept) < len(ids):
            log.warning("dropped the first %d of %d prompt tokens", len(ids) - len(kept), len(ids))
        self.length([*start, *kept], name)
        return [*start, *kept]

    def length(self, ids: Sequence[int], name: str = "prompt") -> int:
        """Returns the most tokens of a prompt and its completion.

        Raises:
            InputError: see `fit`.
        """
        prompt = max(len(ids), 1)  # an empty one starts from end-of-text
        return prompt + new_token_limit(
            prompt, self.max_new_tokens, self.context, name, slide=True, learned=self.learned
        )


_output = threading.Lock()  # of streamed text


def end_line() -> None:
    """Ends the line of a text that another thread is streaming; nothing is printed after it."""
    _output.acquire(timeout=1)  # the other thread may be blocked
    wait_for_terminal()
    with contextlib.suppress(OSError):
        os.write(1, b"\n")


def stream(engine: "Engine", prompt: str, text: Text) -> None:
    """Prints a prompt, and its continuation as it is written."""
    with before_leaving(end_line):
        try:
            print_text(prompt, end="")
            for new in write(engine, [text]):
                if new:
                    with _output:
                        print_text(new, end="")
        finally:
            print(flush=True)


def sample(flags: argparse.Namespace) -> int | None:
    """Generates text and prints it to stdout; returns an exit code, None for 0.

    Raises:
        InputError: a flag, a prompt or the run is invalid.
    """
    sampling = check(flags)
    if flags.interactive and not sys.stdin.isatty():
        hint = "`prompt` - to read a prompt"
        raise InputError("interactive", "standard input", "a terminal", hint)

    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)

    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.engine import Engine, EngineConfig, generate

    run = open_run(flags.ckpt)
    run.checkpoints.resolve(flags.step or "latest")
    context = resolve_context(run.config.model, flags.context)
    named = [] if flags.interactive else read_prompts(flags)  # last: a user may be typing them
    is_streamed = streams(flags, len(named) or 1)
    tokenizer, trained = run.tokenizer, run.trained_length
    if sampling.top_k > run.vocab_size:
        log.warning("--top_k %d exceeds the vocabulary; using %d", sampling.top_k, run.vocab_size)
    if flags.num_samples > 1 and (flags.temperature == 0 or flags.top_k == 1):
        log.warning(
            "the %d samples of a prompt are the same: --temperature 0 and --top_k 1 are greedy",
            flags.num_samples,
        )
    learned = run.config.model.position == "learned"
    window = Window(context, learned, flags.max_new_tokens, flags.truncate == "left")
    if flags.chat and tokenizer.chat_template is None:
        hint = "a run of configs/chat.py, or an imported chat model"
        raise InputError("chat", flags.ckpt, "a run with a chat template", hint)
    prompts = []
    for name, prompt in named:  # check before loading the parameters
        tokenizer.check(prompt, name)
        if flags.chat:
            prompts.append(question(tokenizer, prompt))
            window.length(prompts[-1], name)
        else:
            prompts.append(window.fit(tokenizer.encode(prompt), tokenizer.prompt_start, name))
    longest = max(map(window.length, prompts), default=0)
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
    model = run.model(machine.compute_dtype(flags.dtype))

    def engine(slots: int) -> Engine:
        settings = EngineConfig(context=context, slots=slots, slide=True)
        return Engine(model, params, tokenizer.end_ids, settings)

    first = Request((), sampling, flags.max_new_tokens, flags.seed, logprobs=flags.logprobs)
    if flags.interactive:
        from sheepop_jax.cli.interactive import Session

        return Session(engine(1), tokenizer, window, first, flags.stop).run()
    texts = [
        Text(tokenizer, replace(first, prompt=tuple(ids), sample=number), flags.stop)
        for ids in prompts
        for number in range(flags.num_samples)
    ]
    if is_streamed:
        stream(engine(1), "" if flags.chat else named[0][1], texts[0])
        return None
    if flags.stop or flags.logprobs is not None:
        for _ in write(engine(min(len(texts), MOST_SLOTS)), texts):
            pass
    else:
        settings = GenerationConfig(
            sampling, flags.max_new_tokens, flags.num_samples, flags.seed, context, slide=True
        )
        completions = generate(model, params, prompts, tokenizer.end_ids, settings)
        for text, completion in zip(texts, completions, strict=True):
            text.add(Output(0, completion.tokens, [], completion.stop_reason))
    for i, text in enumerate(texts):
        number = i // flags.num_samples
        prompt = named[number][1]
        if flags.json:
            print(json.dumps(as_record(tokenizer, prompt, text), ensure_ascii=False))
            continue
        if len(texts) > 1:
            which = f"sample {i % flags.num_samples + 1} of {flags.num_samples}"
            if len(prompts) > 1:
                which = f"prompt {number + 1} of {len(prompts)}, {which}"
            print(f"--- {which} ---")
        print_text(text.shown if flags.chat else prompt + text.shown)
    sys.stdout.flush()
    return None


def question(tokenizer: "Tokenizer", message: str) -> list[int]:
    """The ids after which the model answers a message."""
    from sheepop_jax.data.chat import ChatEncoder  # lazy: for chat models only

    return ChatEncoder(tokenizer).prompt([{"role": "user", "content": message}])


def as_record(tokenizer: "Tokenizer", prompt: str, text: Text) -> dict[str, Any]:
    """The JSON object of a text."""

    def token(id: int, logprob: float) -> dict[str, Any]:
        decoded = tokenizer.decode([id], skip_special=False)
        return {"id": id, "token": decoded, "logprob": logprob}

    record: dict[str, Any] = {
        "prompt": prompt,
        "completion": text.shown,
        "tokens": text.tokens,
        "stop_reason": text.stop_reason,
    }
    if text.request.logprobs is not None:
        record["logprobs"] = [
            token(found.token, found.logprob) | {"top": [token(*one) for one in found.top]}
            for found in text.logprobs
        ]
    return record


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code.

    Args:
        argv: the flags. None uses `sys.argv` and makes Ctrl-C stop the program immediately.
    """
    if argv is None:
        argv = sys.argv[1:]
        leave_on_interrupt()
    return execute(sample, parse(argv))
