"""sample.py: what it refuses without looking at a run; fast, in one line, without a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sample

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


BAD = [
    ([], "--ckpt"),
    (["--ckpt"], "--ckpt"),
    (["--chkpt", "x"], "--ckpt"),
    (["--ckpt", "x", "--temp", "1"], "--temp 1"),  # no abbreviations
    (["--ckpt", "x", "--temperature", "-0.5"], "--temperature: got -0.5"),
    (["--ckpt", "x", "--temperature", "nan"], "--temperature: got nan"),
    (["--ckpt", "x", "--temperature", "inf"], "--temperature: got inf"),
    (["--ckpt", "x", "--temperature", "hot"], "--temperature"),
    (["--ckpt", "x", "--top_k", "-1"], "--top_k: got -1"),
    (["--ckpt", "x", "--top_k", "1.5"], "--top_k"),
    (["--ckpt", "x", "--top_p", "0"], "--top_p: got 0.0"),
    (["--ckpt", "x", "--top_p", "1.5"], "--top_p: got 1.5"),
    (["--ckpt", "x", "--top_p", "nan"], "--top_p: got nan"),
    (["--ckpt", "x", "--max_new_tokens", "-1"], "--max_new_tokens: got -1"),
    (["--ckpt", "x", "--num_samples", "0"], "--num_samples: got 0"),
    (["--ckpt", "x", "--seed", "-1"], "--seed: got -1"),
    (["--ckpt", "x", "--seed", "4294967296"], "--seed: got 4294967296"),
    (["--ckpt", "x", "--context", "1"], "--context: got 1"),
    (["--ckpt", "x", "--step", "newest"], "--step: got 'newest'"),
    (["--ckpt", "x", "--step", "-3"], "--step"),
    (["--ckpt", "x", "--truncate", "right"], "--truncate"),
    (["--ckpt", "x", "--platform", "gpu"], "--platform"),
    (["--ckpt", "x", "--dtype", "float16"], "--dtype"),
    (["--ckpt", "x", "--quantize", "int4"], "--quantize"),
    (["--ckpt", "x", "--prompt", "\udcff"], "--prompt"),
    (["--ckpt", "x", "--prompt_file", "/no/such/file"], "--prompt_file: got '/no/such/file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[-40:])
def test_refused_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, where a look at the run would be an error of another name."""
    monkeypatch.setitem(sys.modules, "sheepop_jax.run", None)
    monkeypatch.setitem(sys.modules, "sheepop_jax.runtime", None)
    with pytest.raises(SystemExit) as left:
        sample.main(arguments)
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_prompt_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("déjà".encode("latin-1"))
    with pytest.raises(SystemExit) as left:
        sample.main(["--ckpt", "x", "--prompt_file", str(path)])
    assert left.value.code == 2
    assert "latin1.txt, invalid at byte 1'; expected UTF-8" in capsys.readouterr().err


def test_without_jax_and_at_once() -> None:
    """A fresh process that cannot import jax still says what is wrong with a flag."""
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None; sys.argv[0] = 'sample.py';"
        "import sample; sample.main(sys.argv[1:])"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "--ckpt", "x", "--top_k", "-1"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == b"error: --top_k: got -1; expected at least 0; try 0 to turn it off\n"
    assert time.monotonic() - begin < 5  # 0.2 s on a quiet machine


def test_process_and_bytes_that_are_no_text() -> None:
    done = run("--ckpt", "x", "--prompt_file", "-", stdin=b"ab\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: --prompt_file: got '-, invalid at byte 2'; expected UTF-8 text\n"


def test_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (b"examples:", b"--prompt_file", b"exit codes", b"temperature 0"):
        assert word in done.stdout


def test_debug_shows_the_traceback() -> None:
    done = run("--ckpt", "x", "--seed", "-1", "--debug")
    assert done.returncode != 0
    assert b"Traceback" in done.stderr and b"--seed: got -1" in done.stderr


LONG = """
from sheepop_jax import cli
cli.leave_on_interrupt()
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
    [["sample.py", "--ckpt", "x", "--prompt_file", "-"], ["-c", LONG]],
    ids=["waiting for stdin", "in compiled code"],
)
def test_interrupt_is_quiet_and_at_once(arguments: list[str]) -> None:
    """Ctrl-C ends it with 130 and not a word, also where Python's own handler would wait."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    if arguments[0] == "-c":
        assert process.stdout.readline() == b"computing\n"
        time.sleep(0.5)
    else:
        _wait_until_reading(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=20) == 130
        assert process.stdout.read() == b"" and process.stderr.read() == b""
    finally:
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def _wait_until_reading(pid: int) -> None:
    """Until the process has the thread that waits for signals, and sleeps."""
    for _ in range(400):
        time.sleep(0.05)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        states = [(task / "stat").read_text().rsplit(")", 1)[1].split()[0] for task in tasks]
        if len(tasks) > 1 and set(states) == {"S"}:
            return
    raise TimeoutError("sample.py never came to read stdin")
