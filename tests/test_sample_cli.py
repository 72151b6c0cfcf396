"""sample.py as a process: stdin, exit codes, Ctrl-C. Its bad input is in test_errors.py."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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
