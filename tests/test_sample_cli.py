"""sample.py as a process: stdin, exit codes, Ctrl-C. Its bad input is in test_errors.py."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.cli import sample
from sheepop_jax.errors import InputError
from tests.tiny import SAYS

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: str | bytes, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "sample.py", *arguments],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        env={**os.environ, **(env or {})},
        check=False,
        timeout=60,
    )


def test_a_bad_flag_is_refused_without_jax() -> None:
    """In a process that cannot import it."""
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None; sys.argv[0] = 'sample.py';"
        "import sample; sample.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--ckpt", "x", "--top_k", "-1"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"error: --top_k: got -1") and done.stderr.count(b"\n") == 1


def test_process_and_bytes_that_are_no_text(tiny_root: Path) -> None:
    done = run("--ckpt", str(tiny_root / "run"), "--prompt_file", "-", stdin=b"ab\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    *_, line = done.stderr.splitlines()
    assert line.startswith(b"error: --prompt_file: got 'stdin, invalid at byte 2'")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        sample.main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for flag in vars(sample.parse(["--ckpt", "x"])):
        assert f"--{flag}" in out


def test_debug_adds_the_traceback_to_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        sample.main(["--ckpt", "x", "--seed", "-1", "--debug"])
    error = left.value.__context__
    assert isinstance(error, InputError) and (error.field, error.got) == ("seed", -1)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("error: --seed: got -1")


LONG = """
from sheepop_jax.cli import common
common.leave_on_interrupt()
import jax

def count(carry):
    return carry[0] + 1, carry[1] * 0.5 + 1

program = jax.jit(lambda: jax.lax.while_loop(lambda carry: carry[0] < 2**31 - 1, count, (0, 0.0)))
program = program.lower().compile()
print("computing", flush=True)
program()[1].block_until_ready()
"""


@pytest.mark.parametrize(
    "arguments",
    [["sample.py", "--ckpt", "{root}/run"], ["-c", LONG]],
    ids=["waiting for stdin", "in compiled code"],
)
def test_interrupt_is_quiet_and_at_once(tiny_root: Path, arguments: list[str]) -> None:
    """Ctrl-C ends it with 130 and not a word, also where Python's own handler would wait."""
    process = subprocess.Popen(
        [sys.executable, *(word.replace("{root}", str(tiny_root)) for word in arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    if arguments[0] == "-c":
        assert process.stdout.readline() == b"computing\n"
    else:
        assert b"reading the prompt from standard input\n" in iter(process.stderr.readline, b"")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=60) == 130
        assert process.stdout.read() == b"" and process.stderr.read() == b""
    finally:
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def test_the_best_checkpoint_is_the_default(
    tiny_root: Path, tmp_path: Path, run_program: Any
) -> None:
    """Of an overfitted run; both losses and the flag for the other are said."""
    run = shutil.copytree(tiny_root / "run", tmp_path / "run")
    saved = CheckpointSaver(run / "checkpoints")
    note = r"step 2 \(.* loss 0\.5000\), .* step 4 \(.* loss 3\.5000\); .*--step latest"
    for losses, step, noted in (((0.5, 3.5), 2, True), ((4.0, 3.5), 4, False)):
        for number, loss in zip((2, 4), losses, strict=True):
            saved.record(number, {"val_loss": loss})
        for program, words in (
            ("sample", ["--prompt", "line", "--max_new_tokens", "0"]),
            ("tools", ["evaluate"]),
        ):
            code, _, err, _ = run_program(program, [*words, "--ckpt", str(run)])
            assert code == 0 and f"step {step} of {run}" in err, err
            assert bool(re.search(note, err)) == noted
    saved.record(2, {"val_loss": 0.5})
    words = ["--ckpt", str(run), "--step", "latest", "--prompt", "line", "--max_new_tokens", "0"]
    code, _, err, _ = run_program("sample", words)
    assert code == 0 and f"step 4 of {run}" in err and "the best" not in err


@pytest.mark.parametrize(
    ("words", "stdin", "prompts"),
    [
        ("--prompt -", b"line 1\n", ["line 1"]),
        ("--prompt_file -", b"line 1\n\n", ["line 1\n"]),
        ("", b"line 1\r\n", ["line 1"]),
        ("--keep_newline", b"line 1\n", ["line 1\n"]),
        ("", b"", [""]),
        ("--prompt says --prompt -", b"line", ["says", "line"]),
        ("--prompt says", b"line", ["says"]),  # standard input is not read
    ],
)
def test_standard_input_is_a_prompt(
    tiny_root: Path, run_program: Any, words: str, stdin: bytes, prompts: list[str]
) -> None:
    flags = ["--ckpt", str(tiny_root / "run"), "--max_new_tokens", "0", "--json", *words.split()]
    code, out, err, _ = run_program("sample", flags, stdin)
    assert code == 0, err
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts
    assert ("standard input" in err) == ("--prompt" not in words)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--ckpt {root}/nowhere", "ckpt"),
        ("--ckpt {root}/run --step 999", "step"),
    ],
)
def test_a_bad_run_is_refused_before_standard_input_is_read(
    tiny_root: Path, run_program: Any, words: str, field: str
) -> None:
    """Else a user types a prompt in vain. What is waiting there is no text, which would be said."""
    flags = words.format(root=tiny_root).split()
    code, _, err, error = run_program("sample", flags, b"\xff")
    assert (code, error.field) == (2, field), err


def test_on_a_terminal_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert sample.read_prompts(sample.parse(["--ckpt", "x"])) == [("prompt", "")]


def test_greedy_samples_are_said_to_be_the_same(tiny_root: Path, run_program: Any) -> None:
    words = ["--ckpt", str(tiny_root / "run"), "--max_new_tokens", "0", "--prompt", "line"]
    for more, said in (
        ("--temperature 0 --num_samples 3", True),
        ("--top_k 1 --num_samples 3", True),
        ("--temperature 0", False),
        ("--num_samples 3", False),
    ):
        code, _, err, _ = run_program("sample", [*words, *more.split()])
        assert code == 0 and ("3 samples of a prompt are the same" in err) == said


def test_more_tokens_than_the_context(tiny_root: Path, run_program: Any) -> None:
    """The window slides; a prompt that does not fit is cut as without a number of tokens."""
    words = ["--ckpt", str(tiny_root / "run"), "--max_new_tokens", "50", "--json"]
    for prompt, more in (("line", []), (SAYS, ["--truncate", "left"])):
        code, out, err, _ = run_program("sample", [*words, "--prompt", prompt, *more])
        assert code == 0, err
        record = json.loads(out)
        assert record["stop_reason"] == "end_of_text" or len(record["tokens"]) == 50
        assert "with a context of 32: " in err and "last 16 tokens" in err
        assert "up to 32 tokens, but the model was trained on windows of 16" in err
        assert ("dropped the first 24 of 40" in err) == bool(more)


SHORT = ["--prompt", "line", "--max_new_tokens", "9"]


@pytest.fixture
def records(tiny_root: Path, run_program: Any) -> Callable[..., list[dict[str, Any]]]:
    """The JSON objects that sample.py prints."""

    def run(*flags: str) -> list[dict[str, Any]]:
        words = ["--ckpt", str(tiny_root / "run"), *SHORT, "--json", *flags]
        code, out, err, _ = run_program("sample", words)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return run


@pytest.mark.parametrize("flags", [[], ["--temperature", "9"], ["--stop", "says"]], ids=str)
def test_streamed_text_is_the_same(tiny_root: Path, run_program: Any, flags: list[str]) -> None:
    words = ["--ckpt", str(tiny_root / "run"), *SHORT, *flags]
    code, whole, err, _ = run_program("sample", [*words, "--no-stream"])
    assert code == 0 and whole.startswith("line") and whole.endswith("\n"), err
    assert run_program("sample", [*words, "--stream"])[:2] == (0, whole)


def test_text_is_streamed_on_a_terminal_if_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for isatty in (False, True):
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: isatty))  # noqa: B023
        for words, prompts, streamed in (
            ("", 1, isatty),
            ("--stream", 1, True),
            ("--no-stream", 1, False),
            ("--json", 1, False),
            ("--num_samples 2", 1, False),
            ("", 2, False),
        ):
            flags = sample.parse(["--ckpt", "x", *words.split()])
            assert sample.streams(flags, prompts) == streamed, (words, prompts, isatty)


def test_a_streamed_text_is_written_in_pieces(
    tiny_root: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(sample, "print_text", lambda text, end: pieces.append(text))
    run_program("sample", ["--ckpt", str(tiny_root / "run"), *SHORT, "--stream"])
    assert pieces[0] == "line" and len(pieces) > 2 and all(pieces)


def test_a_stop_string_ends_each_text(records: Any) -> None:
    flags = ["--prompt", "says", "--num_samples", "3", "--temperature", "2"]
    whole = records(*flags)
    stop = whole[1]["completion"][2:4]
    found = records(*flags, "--stop", "\u2603", "--stop", stop)
    assert len(found) == len(whole) == 6
    stopped = 0
    for one, other in zip(found, whole, strict=True):
        text, _, rest = other["completion"].partition(stop)
        if stop not in other["completion"]:
            assert one == other
            continue
        stopped += 1
        size = len(text + stop)  # a token is a character
        assert one == other | {
            "completion": text,
            "tokens": other["tokens"][:size],
            "stop_reason": "stop",
        }
    assert stopped


def test_escapes_of_a_stop_string() -> None:
    """A backslash that escapes nothing stays."""
    for text, meant in (
        (r"\n\n", "\n\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        ("\\d\\", "\\d\\"),
        ("\n", "\n"),
        ("\u00e9", "\u00e9"),
    ):
        assert sample.unescape(text) == meant
    flags = sample.parse(["--ckpt", "x", "--stop", r"\n", "--stop", "a"])
    sample.check(flags)
    assert flags.stop == ["\n", "a"]


def test_log_probabilities_of_the_tokens_and_the_most_probable_ones(records: Any) -> None:
    [plain] = records("--temperature", "0")
    [found] = records("--temperature", "0", "--logprobs", "3")
    logprobs = found.pop("logprobs")
    assert found == plain
    assert [one["id"] for one in logprobs][: len(plain["tokens"])] == plain["tokens"]
    assert len(logprobs) - len(plain["tokens"]) == (plain["stop_reason"] == "end_of_text")
    assert "".join(one["token"] for one in logprobs[:9]) == plain["completion"]
    for one in logprobs:
        first, *others = one.pop("top")
        assert first == one and len(others) == 2
        assert 0 >= first["logprob"] >= others[0]["logprob"] >= others[1]["logprob"]
    [bare] = records("--temperature", "0", "--logprobs", "0")
    assert [one["top"] for one in bare["logprobs"]] == [[]] * len(logprobs)
    [varied] = records("--temperature", "2")
    stop = varied["completion"][2:4]
    [cut] = records("--temperature", "2", "--logprobs", "0", "--stop", stop)
    assert [one["id"] for one in cut["logprobs"]] == cut["tokens"]
    assert cut["tokens"] == varied["tokens"][: varied["completion"].index(stop) + 2]


def test_options_of_sampling_reach_the_sampler(records: Any) -> None:
    [greedy] = records("--temperature", "0")
    assert records("--temperature", "9") != [greedy]
    assert records("--temperature", "9", "--min_p", "1") == [greedy]
    assert len(set(greedy["tokens"])) < len(greedy["tokens"])
    for name in ("presence", "frequency"):
        [varied] = records("--temperature", "0", f"--{name}_penalty", "100")
        assert len(set(varied["tokens"])) == len(varied["tokens"])
    [varied] = records("--temperature", "0", "--repetition_penalty", "1000")
    assert varied != greedy
    [longer] = records("--temperature", "0", "--frequency_penalty", "0.5", "--top_k", "1")
    assert longer["tokens"] != greedy["tokens"]
