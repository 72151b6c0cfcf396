"""llama.cpp ends the process that it runs in: never ours, and what it said is one line."""

import os
import sys
from pathlib import Path

import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.interop import llama_cpp
from sheepop_jax.interop.llama_cpp import LlamaCpp

SAVED = Path(__file__).parent.parent / "saved_run" / "run"
# A package that does what the name of the file says.
FAKE = """
import os, sys, threading
from types import SimpleNamespace as Space

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = Space(), Space(), Space()

ggml_type = Space(GGML_TYPE_F32=0)
llama_flash_attn_type = Space(LLAMA_FLASH_ATTN_TYPE_DISABLED=0)

def abort():
    sys.stderr.write("loading\\nmodel.cpp:7: GGML_ASSERT(n > 0)   failed\\n\\n")
    sys.stderr.flush()
    os.abort()

class Server:
    listening_address = "http://127.0.0.1:1"  # where nobody listens

    def __init__(self, params):
        self.word = os.path.basename(params.model.path)
        os.write(1, b"a line of llama.cpp's own\\n")
        match self.word:
            case "model.gguf":  # as the command line calls it
                abort()
            case "refuse":
                raise RuntimeError("bad\\nmagic")
            case "exit":
                sys.exit(3)
            case "never":
                threading.Event().wait()

    def handle_completions(self, request):
        assert os.environ["GGML_NO_BACKTRACE"] == "1"
        if self.word == "token":
            abort()
        tops = [{"id": t, "logprob": -0.1 * t} for t in request["prompt"]]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}
"""


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch) -> Path:
    """The package, for the processes that a test starts."""
    package = tmp_path / "packages"
    package.mkdir()
    (package / "xllamacpp.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(package))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: object())
    return package


ABORTED = "a file at which llama.cpp ends (SIGABRT: model.cpp:7: GGML_ASSERT(n > 0) failed)"


def test_answers_come_from_another_process(capfd):
    with LlamaCpp(Path("good"), 9) as llama:
        assert llama.next_token([7, 2], 5, 0) == {7: -0.7000000000000001, 2: -0.2}
        pid = llama._process.pid
        assert pid != os.getpid()
    assert llama._process.returncode == 0
    assert capfd.readouterr() == ("", "")


def test_an_abort_while_a_file_is_loaded_is_one_line():
    with pytest.raises(InputError) as caught:
        LlamaCpp(Path("some/model.gguf"), 9)
    assert (caught.value.field, caught.value.got) == ("some/model.gguf", ABORTED)


def test_an_abort_at_a_token_is_one_line():
    with LlamaCpp(Path("token"), 9) as llama:
        for _ in range(2):  # it is gone for good
            with pytest.raises(InputError) as caught:
                llama.next_token([1], 5, 0)
            assert caught.value.got == ABORTED


@pytest.mark.parametrize(
    ("word", "got"),
    [
        ("refuse", "a file that llama.cpp does not load (bad magic)"),
        ("exit", "a file at which llama.cpp ends (exit code 3: a line of llama.cpp's own)"),
    ],
)
def test_other_ends_are_one_line(word, got):
    with pytest.raises(InputError) as caught:
        LlamaCpp(Path(word), 9)
    assert caught.value.got == got


def test_an_error_of_the_library_is_one_line_and_the_process_goes_on():
    with LlamaCpp(Path("good"), 9) as llama:
        with pytest.raises(InputError, match=r"llama\.cpp fails \(ConnectionRefusedError: "):
            llama.encode("text")
        assert llama.next_token([3], 5, 0) == {3: -0.30000000000000004}


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(llama_cpp, "_SECONDS_TO_END", 0)
    monkeypatch.setattr(LlamaCpp, "_answer", lambda self: {})  # does not wait for it
    llama = LlamaCpp(Path("never"), 9)
    llama.close()
    assert llama._process.returncode == -9


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="no package xllamacpp"):
        LlamaCpp(Path("good"), 9)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGABRT")
def test_the_command_line_ends_with_the_line(run_program, tmp_path, fast_compile_once):
    out = tmp_path / "out"
    words = ["export", "--ckpt", str(SAVED), "--format", "gguf", "--out", str(out)]
    code, shown, err, _ = run_program("tools", words)
    assert code == 1, err
    assert ABORTED in shown and "FAILED" in shown and "Traceback" not in err
    assert (out / "model.gguf").exists()
