"""Good values next to the refused ones, closed streams, and files that must not be executed.

Bad input itself is in test_errors.py, bad data in test_sources.py.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from configs import base
from tests.tiny import SAYS, overrides, tiny

pytestmark = pytest.mark.usefixtures("fast_compile")

SHORT = ["--max_new_tokens", "9", "--num_samples", "2"]  # one shape, compiled once
GREEDY = [*SHORT, "--temperature", "0"]


def texts(run_program: Any, run: Path, *words: str) -> tuple[list[str], str]:
    code, out, err, _ = run_program("sample", ["--ckpt", str(run), "--json", *words])
    assert code == 0, err
    return [json.loads(line)["completion"] for line in out.splitlines()], err


class TestNearestGoodValues:
    """Values next to those that test_errors.py shows refused."""

    def test_temperature_0_is_greedy_whatever_the_seed(
        self, tiny_root: Path, run_program: Any
    ) -> None:
        run, prompt = tiny_root / "run", ["--prompt", "line"]
        [first, second], _ = texts(run_program, run, *prompt, *GREEDY)
        [third, _], _ = texts(run_program, run, *prompt, *GREEDY, "--seed", "5", "--top_k", "3")
        assert first == second == third
        drawn, _ = texts(run_program, run, *prompt, *SHORT, "--temperature", "9")
        assert len({first, *drawn}) == 3

    def test_top_k_is_off_at_0_and_clamped_above_the_vocabulary(
        self, tiny_root: Path, run_program: Any
    ) -> None:
        words = [*SHORT, "--prompt", "line", "--temperature", "9", "--top_k"]
        off, logged = texts(run_program, tiny_root / "run", *words, "0")
        assert "--top_k" not in logged
        for many in ("99", str(10**30)):
            clamped, logged = texts(run_program, tiny_root / "run", *words, many)
            assert clamped == off
            [line] = [line for line in logged.splitlines() if line.startswith("--top_k")]
            asked, used = map(int, re.findall(r"\d+", line))
            assert asked == int(many) and 20 < used < 40
        assert texts(run_program, tiny_root / "run", *words, "1")[0] != off

    def test_no_new_tokens_give_the_prompt_back(self, tiny_root: Path, run_program: Any) -> None:
        for prompt in ("line 3", "<|endoftext|>", ""):
            words = ["--ckpt", str(tiny_root / "run"), "--prompt", prompt, "--max_new_tokens", "0"]
            code, out, _, _ = run_program("sample", words)
            assert (code, out) == (0, prompt + "\n")

    def test_an_empty_prompt_begins_a_document(self, tiny_root: Path, run_program: Any) -> None:
        given = texts(run_program, tiny_root / "run", *SHORT, "--prompt", "")[0]
        assert given == texts(run_program, tiny_root / "run", *SHORT)[0]
        assert len(given) == 2

    def test_truncate_drops_the_beginning_and_says_how_much(
        self, tiny_root: Path, run_program: Any
    ) -> None:
        words = ["--max_new_tokens", "3", "--temperature", "0", "--prompt"]
        cut, logged = texts(run_program, tiny_root / "run", *words, SAYS, "--truncate", "left")
        assert re.search(r"\b11\b.*\b40\b", logged)
        assert texts(run_program, tiny_root / "run", *words, SAYS[11:])[0] == cut

    def test_a_text_of_one_character_is_evaluated(
        self, tiny_root: Path, tmp_path: Path, run_program: Any
    ) -> None:
        (tmp_path / "one.txt").write_text("l")
        words = ["--ckpt", str(tiny_root / "run"), "--data", str(tmp_path / "one.txt"), "--json"]
        code, out, err, _ = run_program("tools", ["evaluate", *words])
        assert code == 0, err
        assert json.loads(out)["bytes"] == 1

    def test_bits_are_counted_per_byte_not_per_character(
        self, tiny_root: Path, tmp_path: Path, run_program: Any
    ) -> None:
        (tmp_path / "two.txt").write_text("\u00e9l", encoding="utf-8")
        words = ["--ckpt", str(tiny_root / "run"), "--data", str(tmp_path / "two.txt"), "--json"]
        _, out, _, _ = run_program("tools", ["evaluate", *words])
        found = json.loads(out)
        assert (found["bytes"], found["tokens"]) == (3, 3)
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))

    def test_a_byte_order_mark_is_no_text(
        self, tiny_root: Path, tmp_path: Path, run_program: Any
    ) -> None:
        for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
            (tmp_path / name).write_bytes(mark + b"line 3 says 9")
            words = ["--ckpt", str(tiny_root / "run"), "--data", str(tmp_path / name), "--json"]
            code, out, err, _ = run_program("tools", ["evaluate", *words])
            assert code == 0, err
            assert json.loads(out)["bytes"] == 13
        prompts = [["--prompt_file", str(tmp_path / name)] for name in ("plain", "marked")]
        plain, marked = (
            texts(run_program, tiny_root / "run", *GREEDY, *words)[0] for words in prompts
        )
        assert plain == marked


def test_bad_input_leaves_the_directory_that_the_user_made(
    tiny_root: Path, tmp_path: Path, run_program: Any
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name, there in (("own", True), ("link", True), ("new", False)):
        fields = tiny(tiny_root) | {"data.path": "nowhere.txt"}
        words = ["--workdir", str(tmp_path / name), *overrides(fields)]
        code, _, err, _ = run_program("train", ["--config", "configs/base.py", *words])
        assert code == 2 and "data.path" in err
        assert (tmp_path / name).exists() == there
    assert not list((tmp_path / "own").iterdir())


def test_held_out_text_is_the_same_whatever_orders_the_training_text(
    tiny_root: Path, tmp_path: Path, run_program: Any
) -> None:
    run = shutil.copytree(tiny_root / "run", tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    saved["data"]["grain"] = "0.0.1"
    (run / "config.json").write_text(json.dumps(saved))
    code, _, err, _ = run_program("tools", ["evaluate", "--ckpt", str(run)])
    assert code == 0, err


def test_a_prompt_that_fills_the_context_is_given_back(tiny_root: Path, run_program: Any) -> None:
    words = ["--prompt", SAYS[:32], "--max_new_tokens", "0"]
    for more in ([], ["--truncate", "left"]):
        [text], said = texts(run_program, tiny_root / "run", *words, *more)
        assert text == "" and "dropped" not in said


def test_texts_longer_than_the_windows_of_training_are_reported(
    tiny_root: Path, run_program: Any
) -> None:
    """The context holds 32 tokens, the windows were of 16: 7 + 9 fit, 8 + 9 do not."""
    for prompt, longer in (("line 12", False), ("line 12 ", True)):
        _, logged = texts(run_program, tiny_root / "run", *GREEDY, "--prompt", prompt)
        assert ("windows of 16" in logged) == longer


def test_a_full_device_is_one_line(
    tiny_root: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 9 bytes.\nat")

    monkeypatch.setattr("sheepop_jax.generation.engine.generate", full)
    code, out, err, _ = run_program("sample", ["--ckpt", str(tiny_root / "run")])
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "RESOURCE_EXHAUSTED: allocating 9 bytes." in last


def test_a_full_host_is_one_line(tiny_root: Path, run_program: Any) -> None:
    words = f"evaluate --ckpt {tiny_root}/run --data {tiny_root}/text.txt --batch_size {10**14}"
    code, out, err, _ = run_program("tools", words.split())
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: out of memory")


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_changes_nothing(
    closed: str, tiny_root: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `>&-` in a shell: Python then has None there."""
    monkeypatch.setattr(sys, closed, None)
    code, *_ = run_program("sample", ["--ckpt", str(tiny_root / "run"), "--max_new_tokens", "0"])
    assert code == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample", "--max_new_tokens 0"),
        ("tools", "evaluate --json --data {root}/text.txt"),
        ("train", "--config configs/base.py --workdir {run}"),
    ],
)
def test_a_closed_pipe_ends_quietly(
    command: str,
    words: str,
    tiny_root: Path,
    tmp_path: Path,
    run_program: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`… | head -0`: also where so little is written that only leaving flushes it."""
    run = shutil.copytree(tiny_root / "run", tmp_path / "run")
    typed = words.format(root=tiny_root, run=run).split()
    if command == "train":
        typed += overrides(tiny(tiny_root))
    else:
        typed += ["--ckpt", str(run)]
    read_end, write_end = os.pipe()
    os.close(read_end)
    with monkeypatch.context() as patched, os.fdopen(write_end, "w") as closed:
        patched.setattr(sys, "stdout", closed)
        code, _, err, _ = run_program(command, typed)
    assert code == 0
    assert "error" not in err.lower() and "Traceback" not in err


def test_a_program_beside_a_run_stays_a_file(
    tiny_root: Path, tmp_path: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name Python or a config loader might look for it, from wherever."""
    run = shutil.copytree(tiny_root / "run", tmp_path / "run")
    proof = tmp_path / "executed"
    canary = f"open({str(proof)!r}, 'a').write(__file__)\nraise SystemExit('executed')\n"
    for place in (run, run / "checkpoints", *(run / "checkpoints").glob("0*")):
        for name in ("config.py", "base.py", "conftest.py", "sitecustomize.py", "__init__.py"):
            (place / name).write_text(canary)
    monkeypatch.chdir(run)
    config = str(Path(base.__file__))
    for command, words in [
        ("sample", ["--ckpt", str(run), *GREEDY]),
        ("sample", ["--ckpt", ".", "--max_new_tokens", "0"]),
        ("tools", ["evaluate", "--ckpt", "."]),
        ("train", ["--config", config, "--workdir", ".", *overrides(tiny(tiny_root))]),
    ]:
        code, _, err, _ = run_program(command, words)
        assert code == 0, err
    assert not proof.exists()
