"""The command `export`: exit codes, what it prints where, and the card after the verification."""

import os
from pathlib import Path
from typing import Any

import pytest

from sheepop_jax.cli import main as program
from sheepop_jax.cli.main import main
from sheepop_jax.errors import InputError
from sheepop_jax.interop import verify
from sheepop_jax.interop.verification import Row, VerificationReport

SAVED = Path(__file__).parent.parent / "saved_run" / "run"
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`verify_hf` finds one difference if the list has an element, and appends its arguments."""
    calls: list[tuple[Any, ...]] = []

    def report(*given: Any) -> VerificationReport:
        differs = bool(calls)
        calls.append(given)
        row = Row("tensors", "x of y", "all", not differs, "proj differs" if differs else "")
        return VerificationReport((row,))

    monkeypatch.setattr(verify, "verify_hf", report)
    return calls


def export(out: Path, *flags: str) -> int:
    try:
        return main(["export", "--ckpt", str(SAVED), "--format", "hf", "--out", str(out), *flags])
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


def test_the_result_is_on_stdout_and_in_the_card(verified, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert export(out, "--step", "latest") == 0
    [(run, params, directory)] = verified
    assert run.directory == SAVED and directory == out and "embedding" in params
    shown = capsys.readouterr()
    assert shown.out.startswith(f"exported {SAVED} to {out}\n")
    assert "x of y" in shown.out and "Starcoder2ForCausalLM" in shown.err
    card = (out / "README.md").read_text()
    assert "| tensors | x of y | all | ok |" in card and "Not verified" not in card


def test_a_failed_verification_deletes_nothing_and_fails(verified, tmp_path, capsys) -> None:
    verified.append(())
    out = tmp_path / "out"
    assert export(out) == 1
    shown = capsys.readouterr()
    assert "proj differs" in shown.out
    last = shown.err.splitlines()[-1]
    assert last.startswith(f"error: {out}: differs from the run")
    assert "proj differs" in (out / "README.md").read_text()
    assert (out / "model.safetensors").exists()


def test_no_verify_says_so(verified, tmp_path) -> None:
    assert export(tmp_path / "out", "--no-verify", "--dtype", "bfloat16") == 0
    assert not verified
    assert "Not verified" in (tmp_path / "out/README.md").read_text()


def test_bad_input_ends_with_2_and_writes_nothing(verified, tmp_path, capsys) -> None:
    for flags, line in (
        (("--dtype", "q8_0"), "error: --dtype: got 'q8_0'; expected one of float32, bfloat16"),
        (("--step", "newest"), "error: --step: got 'newest'"),
        (("--step", "7"), "error: --step: got 7"),
    ):
        assert export(tmp_path / "out", *flags) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(line)
    assert export(SAVED) == 2
    assert "(a directory with files)" in capsys.readouterr().err
    assert not verified and not os.listdir(tmp_path)


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_removes_its_files_on_an_interrupt_is_not_stopped_at_once(command, monkeypatch):
    stopped = []
    monkeypatch.setattr(program, "leave_on_interrupt", lambda: stopped.append(command))
    for words in ([command, "--help"], ["checkpoints", "--help"]):
        monkeypatch.setattr("sys.argv", ["sheepop-jax", *words])
        with pytest.raises(SystemExit):
            program.main()
    assert len(stopped) == 1  # of checkpoints, which has nothing to remove


def test_a_file_that_cannot_be_verified_is_a_failed_verification(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("model.gguf", "a file that llama.cpp does not load", "a GGUF file")

    monkeypatch.setattr(verify, "verify_hf", refuse)
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as left:
        main(["export", "--ckpt", str(SAVED), "--format", "hf", "--out", out])
    shown = capsys.readouterr()
    assert left.value.code == 1 and "nothing was deleted" in shown.err
    assert "exported" in shown.out and "llama.cpp does not load" in shown.out
    assert "does not load" in (tmp_path / "out/README.md").read_text()
