"""sample.py -i: prompts, commands, Ctrl-C; and what a terminal shows, through a real one."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheepop_jax.cli import interactive, sample
from sheepop_jax.data.tokenizer import ChatSettings, Tokenizer
from sheepop_jax.runtime import platform
from tests.tiny import MACHINE, SAYS

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--max_new_tokens", "9"]


def reader(*lines: Any) -> Callable[[str], str]:
    """Reads the lines in turn, then the end of the input; an exception is raised."""
    left = list(lines)

    def read(prompt: str) -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["line 3"], ("line 3", False)),
        ([""], ("", False)),
        (["  a "], ("  a ", False)),
        (["/help"], ("/help", True)),
        ([" /help"], (" /help", False)),
        (["a\\", "b\\", " c"], ("a\nb\n c", False)),
        (["pasted\nlines"], ("pasted\nlines", False)),
        (["pasted\nlines\\", "more"], ("pasted\nlines\nmore", False)),
        (['"""', "a", "", "b", '"""'], ("a\n\nb\n", False)),
        (['"""a', 'b"""'], ("a\nb", False)),
        (['"""/usr"""'], ("/usr", False)),
        (['"""a\\', '"""'], ("a\\\n", False)),
        (['"""a\nb', 'c"""'], ("a\nb\nc", False)),
        (['""""""'], ("", False)),
    ],
)
def test_an_entry_has_one_or_more_lines(lines: list[str], entry: tuple[str, bool]) -> None:
    read = reader(*lines)
    assert interactive.read_entry(read) == entry
    with pytest.raises(EOFError):  # all lines were read
        read("")


def test_marks_of_pasted_text_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "a\x1b[200~b\nc\x1b[201~d")
    assert interactive.read_line("") == "ab\ncd"


def test_what_is_typed_is_asked_for_on_stderr_if_stdout_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: f"<{prompt}>")
    assert interactive.read_line(">>> ") == "<>"
    assert capsys.readouterr() == ("", ">>> ")


@pytest.fixture
def talk(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`talk(lines, *flags)`: exit code, stdout, and stderr after the greeting."""
    monkeypatch.setattr(platform, "prepare", lambda *asked: MACHINE)

    def run(lines: list[Any], *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(interactive, "read_line", reader(*lines))
        capsys.readouterr()
        code = sample.main(["--ckpt", str(tiny_root / "run"), "-i", *SHORT, *flags])
        out, err = capsys.readouterr()
        return code, out, err.partition("or /help.\n")[2]

    return run


@pytest.fixture
def completions(tiny_root: Path, run_program: Any) -> Callable[..., list[str]]:
    """The completions of sample.py with these flags."""

    def run(*flags: str) -> list[str]:
        words = ["--ckpt", str(tiny_root / "run"), *SHORT, "--json", *flags]
        code, out, err, _ = run_program("sample", words)
        assert code == 0, err
        return [json.loads(line)["completion"] for line in out.splitlines()]

    return run


def test_texts_are_those_of_sample_py(talk: Any, completions: Any) -> None:
    """The same prompt again is its next sample."""
    two = completions("--prompt", "line", "--num_samples", "2", "--temperature", "2")
    [other] = completions("--prompt", "says", "--temperature", "2")
    lines = ["line", "line", "says", "/reset", "line"]
    code, out, err = talk(lines, "--temperature", "2")
    assert two[0] != two[1]
    assert (code, out, err) == (0, "".join(f"{t}\n" for t in [*two, other, two[0]]), "\n")


def test_an_empty_line_continues_the_last_text(talk: Any, completions: Any) -> None:
    greedy = ["--temperature", "0"]
    [first] = completions("--prompt", "line", *greedy)
    assert len(first) == 9
    [second] = completions("--prompt", "line" + first, *greedy)
    _, out, _ = talk(["line", "", "/reset", ""], *greedy)
    [document] = completions("--prompt", "", *greedy)
    assert out == f"{first}\n{second}\n{document}\n"
    # Text that fills the context is cut to make room.
    code, out, err = talk(["line", *[""] * 9], *greedy)
    assert (code, out.count("\n") >= 10, err) == (0, True, "\n")


def test_a_text_goes_on_after_a_stop_string_as_if_it_had_not_begun(
    talk: Any, completions: Any
) -> None:
    varied = ["--temperature", "2"]
    [first] = completions("--prompt", "line", *varied)
    stop = first[3:5]
    before, _, after = first.partition(stop)
    assert before and after
    [again] = completions("--prompt", "line" + before, "--stop", stop, *varied)
    _, out, _ = talk(["line", ""], "--stop", stop, *varied)
    assert again and out == f"{before}\n{again}\n"


def test_commands_change_the_settings(talk: Any, completions: Any) -> None:
    flags = ["--prompt", "line", "--temperature", "3"]
    expected = [
        completions(*flags, "--seed", "5"),
        completions(*flags, "--seed", "5", "--max_new_tokens", "4"),
        completions(*flags, "--top_k", "1", "--max_new_tokens", "4"),
        completions(*flags, "--min_p", "1", "--presence_penalty", "100"),
    ]
    lines = ["/temperature 3", "/seed 5", "line", "/max 4", "/reset", "line", "/top_k 1", "line"]
    lines += ["/max 9", "/min_p 1", "/top_k 0", "/presence_penalty 100", "line"]
    code, out, err = talk(lines)
    assert (code, err) == (0, "\n")
    assert out == "".join(f"{text}\n" for [text] in expected)
    cut = ["--truncate", "left"]
    [expected] = completions("--prompt", SAYS, "--max_new_tokens", "20", *cut)
    assert talk(["/max 20", SAYS], *cut)[1] == f"{expected}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temprature 1", "error: command: got '/temprature 1'; expected a command of /help"),
        ("/", "error: command: got '/'"),
        ("/temperature hot", "error: temperature: got 'hot'; expected a number"),
        ("/temperature -1", "error: temperature: got -1.0; expected a finite number"),
        ("/temperature nan", "error: temperature: got nan"),
        ("/temperature 1 2", "error: temperature: got '1 2'"),
        ("/top_k 1.5", "error: top_k: got '1.5'; expected an integer"),
        ("/seed -1", "error: seed: got -1"),
        ("/max 0", "error: max: got 0; expected at least 1"),
        ("/exit now", "error: command"),
        ("\u2603", "error: prompt: got \"character '\\\\u2603'"),
        (SAYS, "error: prompt: got '40 tokens'; expected fewer than 32 tokens"),
        ("/temperature", "temperature 0.8"),
        ("/max", "max 9"),
    ],
)
def test_other_lines_change_nothing(talk: Any, line: str, said: str) -> None:
    _, expected, _ = talk(["line", "line", ""])
    code, out, err = talk(["line", line, "line", line, ""])
    assert (code, out) == (0, expected)
    assert len(err.splitlines()) == 3 and err.startswith(said), err


def test_help_names_every_command_and_its_setting(talk: Any) -> None:
    code, out, err = talk(["/top_p 0.25", "/help", "/exit", "line"])
    assert (code, out) == (0, "")
    for command in ("/reset", "/exit", "/seed", "/max", *(f"/{n}" for n in interactive.SAMPLING)):
        assert command in err
    assert re.search(r"/top_p +0\.25\n", err)


@pytest.mark.parametrize("is_held", [False, True], ids=["shown", "held for a stop string"])
def test_ctrl_c_ends_the_text_and_an_empty_line_goes_on_with_it(
    talk: Any, completions: Any, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    """The signal comes with the first token; with Python's handler it would be raised."""
    [whole] = completions("--prompt", "line", "--temperature", "0")
    stop = ["--stop", whole[0] + "\u2603"] if is_held else []
    pieces: list[str] = []

    def show(text: str, end: str) -> None:
        pieces.append(text)
        print(text, end=end)
        if len(pieces) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(interactive, "print_text", show)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = talk(["line", ""], "--temperature", "0", *stop)
    assert signal.getsignal(signal.SIGINT) is before
    first, second, _ = out.split("\n", 2)
    assert (code, err) == (0, "\n")
    assert 0 < len(first) < len(whole) and whole.startswith(first)
    assert (first + second).startswith(whole)


def test_ctrl_c_at_the_prompt(talk: Any) -> None:
    """It drops the line; a second one leaves."""
    stop = KeyboardInterrupt()
    code, out, err = talk([stop, "line", stop, stop, "line"])
    assert (code, out.count("\n")) == (130, 1)
    assert err.count("Press Ctrl-C again to leave.") == 2


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *words: str):
        pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
        self.master, slave = pty.openpty()
        # The terminal sends Ctrl-C's signal to the session that it controls.
        start = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *words],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Returns what was shown until the pattern; the next call begins after it."""
        while not (found := re.search(pattern, self.seen)):
            self._read()
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def ends(self) -> int:
        """Returns the exit code."""
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                self._read()
        return self.process.wait(timeout=60)

    def _read(self) -> None:
        assert select.select([self.master], [], [], 60)[0], self.seen
        self.seen += os.read(self.master, 9999).decode().replace("\r\n", "\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


ENDLESS = ["--temperature", "0", "--max_new_tokens", "100000000"]


def test_on_a_terminal_text_is_streamed_and_ctrl_c_ends_its_line(
    tiny_root: Path, terminal: Any
) -> None:
    """A text that would take days is shown from its beginning."""
    words = ["--ckpt", str(tiny_root / "run"), "--prompt", "line", *ENDLESS]
    shown = terminal("-m", "sheepop_jax", "sample", *words)  # as sample.py
    text = shown.wait_for(r"(?m)^line[^\x03]{300}")
    assert "Traceback" not in text
    shown.type("\x03")
    assert shown.ends() == 130
    rest = shown.seen
    assert rest.endswith("\n") and "Traceback" not in rest and "Interrupt" not in rest


def test_a_conversation_on_a_terminal(tiny_root: Path, terminal: Any) -> None:
    shown = terminal("sample.py", "--ckpt", str(tiny_root / "run"), "-i", *ENDLESS)
    shown.wait_for("Type a prompt, or /help.\n>>> ")
    shown.type("line\n")
    shown.wait_for(r"line\n[^\x03]{300}")
    shown.type("\x03")
    shown.wait_for("\n>>> ")
    shown.type("/temperature 0.5\n/temperature\n")
    shown.wait_for("temperature 0.5\n>>> ")
    shown.type("/max 3\n/temperature 0\na\\\n")
    shown.wait_for(r"\n\.\.\. ")
    shown.type("line\n")
    shown.wait_for("line\n[^>]*\n>>> ")
    # The session goes on. What it says of that may be lost with the terminal's output, and a signal
    # that comes before readline waits is handled with the next line, which is lost.
    shown.type("\x03")
    shown.type("/top_k 7\n/top_k 7\n/top_k\n")
    shown.wait_for(r"\ntop_k 7\n>>> ")
    shown.type("\x04")
    assert shown.ends() == 0
    assert "Traceback" not in shown.seen


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """The tiny run, with a tokenizer that has a chat template."""
    run = tmp_path_factory.mktemp("chatty") / "run"
    shutil.copytree(tiny_root / "run", run)
    path = run / "tokenizer.json"
    opened = Tokenizer.from_file(path)
    # Without new ids, which the tiny model has no rows for.
    chat = ChatSettings((), CHAT_TEMPLATE, {})
    end = opened.token_text(opened.end_of_text)
    path.write_text(
        Tokenizer.with_stream_tokens(opened.to_json(), None, end, chat=chat).to_json(),
        encoding="utf-8",
    )
    return run


# Of the characters that the tiny run knows.
CHAT_TEMPLATE = """\
{% for message in messages %}\
{{ ('e ' if message['role'] == 'user' else 'a ') + message['content'] + ' ' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"""


def test_a_chat_model_answers_in_a_conversation(
    chatty: Path, talk: Callable[..., tuple[int, str, str]], run_program: Any
) -> None:
    """Each answer is that of `sample.py` to the conversation so far, until /reset."""
    lines = ["1", "", "2", "/reset", "2"]
    flags = ["--ckpt", str(chatty), "--max_new_tokens", "4", "--temperature", "1"]
    code, out, _ = talk(lines, *flags)
    assert code == 0

    def answer(prompt: str, *more: str) -> str:
        code, out, err, _ = run_program("sample", [*flags, "--json", "--prompt", prompt, *more])
        assert code == 0, err
        return json.loads(out)["completion"]

    first = answer("e 1 a ")
    assert answer("1", "--chat") == first
    second = answer(f"e 1 a {first} e 2 a ")
    assert out == f"{first}\n{second}\n{answer('2', '--chat')}\n"


def test_a_chat_needs_a_template(tiny_root: Path, run_program: Any) -> None:
    words = ["--ckpt", str(tiny_root / "run"), "--chat", "--prompt", "a"]
    code, out, err, _ = run_program("sample", words)
    assert (code, out) == (2, "")
    assert "--chat" in err.splitlines()[-1]
