"""The prompt of `sample.py -i`: prompts and commands are typed, text appears as it is written."""

import contextlib
import importlib
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from sheepop_jax.cli.common import EXIT_INTERRUPTED, explained, print_text, wait_for_terminal
from sheepop_jax.cli.sample import Window
from sheepop_jax.data.chat import ChatEncoder
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import DEFAULT_MAX_NEW_TOKENS, Request, truncate_left
from sheepop_jax.generation.text import Text, write

if TYPE_CHECKING:  # imports jax
    from sheepop_jax.generation.engine import Engine

FIRST, MORE = ">>> ", "... "
QUOTES = '"""'
PASTED = "\x1b[200~", "\x1b[201~"  # what a terminal puts around pasted text

SAMPLING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}
CONTINUES = """\
Type a prompt, and the model continues it. The same prompt again gives its next sample.
An empty line continues the last text, or starts a new document if there is none.
"""
ANSWERS = """\
Type a message, and the model answers. It sees the conversation so far; the oldest turns are left
out when they exceed the context.
"""
HELP = """
  Ctrl-C          end the text that is being written
  \\ at the end    continue the prompt on the next line
  \"\"\" ... \"\"\"     a prompt of several lines, or one that begins with /
  /reset          start anew: forget the last text or the conversation
  /exit, Ctrl-D   leave

Settings; without a value, a command shows its setting:
"""


class Session:
    """Reads prompts and commands from a terminal until the user leaves."""

    def __init__(
        self,
        engine: "Engine",
        tokenizer: Tokenizer,
        window: Window,
        request: Request,
        stop: Sequence[str],
    ):
        """Starts a session; `request` has the settings, of which commands change some."""
        self._engine, self._tokenizer, self._stop = engine, tokenizer, stop
        self._window, self._request = window, request
        self._shown = ""  # the last prompt and what was written after it
        self._last: Text | None = None
        self._samples: Counter[tuple[int, ...]] = Counter()
        self._is_writing = self._is_interrupted = False
        self._chat = None if tokenizer.chat_template is None else ChatEncoder(tokenizer)
        self._messages: list[dict[str, str]] = []  # of the conversation with a chat model

    def run(self) -> int:
        """Returns the exit code."""
        with contextlib.suppress(ImportError):  # not on every system; edits lines and has a history
            importlib.import_module("readline")
        say("Type a message, or /help." if self._chat else "Type a prompt, or /help.")
        is_leaving = False
        with self._interrupts():
            while True:
                try:
                    text, is_command = read_entry(read_line)
                    is_leaving = False
                    if is_command and text.split() == ["/exit"]:
                        return 0
                    if is_command:
                        self._command(text)
                    elif self._chat:
                        self._answer(self._chat, text)
                    else:
                        self._continue(text)
                except InputError as error:
                    say(f"error: {explained(error, {'truncate', 'context'})}")
                except EOFError:
                    print(file=sys.stderr)
                    return 0
                except KeyboardInterrupt:
                    wait_for_terminal()
                    print(file=sys.stderr)
                    if is_leaving:
                        return EXIT_INTERRUPTED
                    is_leaving = True
                    say("Press Ctrl-C again to leave.")

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Lets Ctrl-C end a text between two steps, and only the line that is being typed."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if not self._is_writing:
                raise KeyboardInterrupt
            self._is_interrupted = True

        wakeup = signal.set_wakeup_fd(-1)  # see `leave_on_interrupt`
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            signal.set_wakeup_fd(wakeup)

    def _encode(self, text: str) -> list[int]:
        """The ids of a prompt."""
        self._tokenizer.check(text, "prompt")
        return self._window.fit(self._tokenizer.encode(text), self._tokenizer.prompt_start)

    def _continue(self, prompt: str) -> None:
        """Continues a prompt or, if it is empty, the last text."""
        if self._last is not None and not prompt:
            ids = self._so_far(self._last)
        else:
            ids, self._shown = self._encode(prompt), prompt
        self._write(ids)

    def _answer(self, chat: ChatEncoder, message: str) -> None:
        """Answers a message; both become part of the conversation."""
        if not message:
            return
        self._tokenizer.check(message, "prompt")
        messages = [*self._messages, {"role": "user", "content": message}]
        context = self._window.context
        most = self._request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        ids = chat.answer_prompt(messages, context - min(most, context // 2))
        self._window.length(ids)
        shown = self._write(ids)
        self._messages = [*messages, {"role": "assistant", "content": shown}]

    def _write(self, ids: Sequence[int]) -> str:
        """Writes and shows the text after a prompt."""
        key = tuple(ids)
        text = Text(
            self._tokenizer,
            replace(self._request, prompt=key, sample=self._samples[key]),
            self._stop,
        )
        self._samples[key] += 1
        self._last = text
        self._is_interrupted, self._is_writing = False, True
        try:
            for new in write(self._engine, [text]):
                print_text(new, end="")
                if self._is_interrupted:
                    wait_for_terminal()
                    break
            if text.stop_reason is None:
                print_text(text.finish(), end="")
        finally:
            self._is_writing = False
            self._shown += text.shown
            print(flush=True)
        if text.stop_reason == "end_of_text" and not text.shown:
            say("The model ended the text here.")
        return text.shown

    def _so_far(self, last: Text) -> list[int]:
        """The ids of the last text, cut from the left to leave room for more."""
        start, context = self._tokenizer.prompt_start, self._window.context
        ids = [*last.request.prompt[len(start) :], *last.tokens]
        if last.stop_reason == "stop":  # the tokens have the stop string
            ids = self._tokenizer.encode(self._shown)
        room = min(self._request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, context // 2)
        return [*start, *truncate_left(ids, room, context - len(start))]

    def _command(self, line: str) -> None:
        """Runs a command.

        Raises:
            InputError: there is no such command, or the value is invalid; nothing changes.
        """
        word, *values = line.split()
        name = word[1:]
        value = " ".join(values)
        if name == "help" and not value:
            settings = (f"  /{name:<20} {shown}" for name, shown in self._settings().items())
            say((ANSWERS if self._chat else CONTINUES) + HELP + "\n".join(settings))
        elif name == "reset" and not value:
            self._last, self._shown, self._messages = None, "", []
            self._samples.clear()
        elif name not in self._settings():
            rule, hint = "a command of /help", f"{QUOTES} around a prompt that begins with /"
            raise InputError("command", line, rule, hint)
        elif value:
            self._set(name, value)
        else:
            say(f"{name} {self._settings()[name]}")

    def _settings(self) -> dict[str, str]:
        """The settings that commands change, as text."""
        sampling, most = self._request.sampling, self._request.max_new_tokens
        rest = f"the rest of the context, at most {DEFAULT_MAX_NEW_TOKENS}"
        return {
            **{name: f"{getattr(sampling, name):g}" for name in SAMPLING},
            "seed": str(self._request.seed),
            "max": rest if most is None else str(most),
        }

    def _set(self, name: str, value: str) -> None:
        kind = SAMPLING.get(name, int)
        try:
            number = kind(value)
        except ValueError:
            rule = "an integer" if kind is int else "a number"
            raise InputError(name, value, rule) from None
        if name in SAMPLING:
            sampling = replace(self._request.sampling, **{name: number})
            self._request = replace(self._request, sampling=sampling)
        elif name == "seed":
            self._request = replace(self._request, seed=number)
            self._samples.clear()
        else:
            if number < 1:
                raise InputError(name, number, "at least 1")
            self._request = replace(self._request, max_new_tokens=number)
            self._window = replace(self._window, max_new_tokens=number)


def read_entry(read: Callable[[str], str]) -> tuple[str, bool]:
    """Reads a prompt of one or more lines; the second value tells whether it is a command.

    A line that ends with a backslash continues on the next. Between triple quotes, all lines
    belong to the prompt, except for a line break after the first quotes.
    """
    line = read(FIRST)
    if line.startswith(QUOTES):
        text = line[len(QUOTES) :]
        while not text.endswith(QUOTES):
            text += "\n" + read(MORE)
        return text.removesuffix(QUOTES).removeprefix("\n"), False
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(MORE)
    return line, line.startswith("/")


def read_line(prompt: str) -> str:
    """Reads a line, which has line breaks if several lines were pasted.

    Raises:
        EOFError: the input has ended.
        InputError: the line is not text.
    """
    if not sys.stdout.isatty():  # only text goes there
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        line = input(prompt)
    except UnicodeDecodeError as error:
        raise InputError("prompt", error.object, f"{error.encoding} text") from None
    for mark in PASTED:
        line = line.replace(mark, "")
    return line


def say(text: str) -> None:
    """Prints what is not the model's text."""
    print(text, file=sys.stderr, flush=True)
