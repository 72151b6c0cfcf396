"""The commands and programs that the documents show work."""

import contextlib
import importlib
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheepop_jax.checkpoint import workdir
from sheepop_jax.cli import sample
from sheepop_jax.cli import train as train_command
from sheepop_jax.config import loading
from sheepop_jax.config.loading import load_config, load_saved_config
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError
from sheepop_jax.runtime import platform
from tests.test_docs import ROOT, documents
from tests.tiny import MACHINE, TEXT, TINY, one_device, overrides

pytestmark = pytest.mark.usefixtures("fast_compile")

FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"python (train\.py|sample\.py|-m sheepop_jax)(?= |$)(.*)")
SHELL = {"&", "|", ";", "&&", "||", ">", "2>"}


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return [code for name, code in FENCED.findall(text) if name == language]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, words) of each command of ours in fenced blocks and between backticks.

    A command with a placeholder, `…` or `configs/NAME.py`, or without a flag is none. What is in
    brackets may be left out, and is.
    """
    fenced = [code.replace("\\\n", " ") for name, code in FENCED.findall(text) if name != "python"]
    inline = [" ".join(code.split()) for code in INLINE.findall(FENCED.sub("", text))]
    found = []
    for program, rest in PROGRAM.findall("\n".join([*fenced, *inline])):
        if "…" in rest or re.search(r"configs/[A-Z]", rest):
            continue
        rest = re.sub(
            r"\[[^\]]*\]", "", re.sub(r"\$\w+", "0", rest)
        )  # a shell's variable: a number
        words = shlex.split(rest, comments=True)
        end = next((i for i, word in enumerate(words) if word in SHELL), len(words))
        if any(word.startswith("--") for word in words[:end]):
            found.append((program, words[:end]))
    return found


COMMANDS = {
    f"{path.name}: {program} {shlex.join(words)}": (program, words)
    for path in documents()
    for program, words in commands(path.read_text(encoding="utf-8"))
}


def test_every_program_is_shown() -> None:
    assert {program for program, _ in COMMANDS.values()} == {
        "train.py",
        "sample.py",
        "-m sheepop_jax",
    }


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: ascii(shown)[1:70])
def test_a_command_has_known_flags_and_fields(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values may be refused: some commands show that."""
    monkeypatch.chdir(ROOT)
    program, words = COMMANDS[shown]
    if program == "sample.py":
        sample.check(sample.parse(words))
        return
    if program == "train.py":
        words = ["train", *words]
    module = "import_" if words[0] == "import" else words[0]
    parsed = importlib.import_module(f"sheepop_jax.cli.{module}").parse(words[1:])
    if isinstance(parsed, tuple):
        flags, fields = parsed
        try:
            load_config(flags.config or "base", fields)  # without one: that of a run
        except InputError as error:
            shown = any(f"error: {error.field}: got" in path.read_text() for path in documents())
            assert shown or (error.field != "config" and "a field of" not in error.expected), error


def recipe() -> list[list[str]]:
    """The commands of `make train`, as words."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^train:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert found
    return [shlex.split(line)[1:] for line in found[1].splitlines()]


def test_commands_copied_in_order_into_one_directory_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `make train`: no run is mistaken for that of another command, and each one is there.

    Nothing is trained: a run is its configuration.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def saved(run):
        return SimpleNamespace(config=load_saved_config(run), imported={})

    monkeypatch.setattr(workdir, "open_run", saved)
    shown = [(words[0], words[1:]) for words in recipe()]
    pages = ("README.md", "docs/getting-started.md", "docs/data.md", "docs/configuration.md")
    for page in pages:
        shown += commands((ROOT / page).read_text(encoding="utf-8"))
    trained = 0
    for program, words in shown:
        if program == "train.py":
            flags, fields = train_command.parse(words)
            try:
                config, directory = train_command.choose(flags, fields)
            except InputError as error:
                # The documents show an unknown field, and one that contradicts another run.
                assert "a field of" in error.expected or ", as in runs/" in error.expected
                continue
            workdir.check_run(directory, config)
            path = directory / "config.json"
            if path.exists():
                assert load_saved_config(directory).data == config.data, words
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"config": config.to_dict()}))
            trained += 1
        elif "--ckpt" in words:
            assert load_saved_config(words[words.index("--ckpt") + 1])
    assert trained > 8


SMALL = {**TINY, "data.tokenizer": "bpe", "data.vocab_size": 280, "model.max_seq_len": 256}


@pytest.fixture(scope="module")
def from_python(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """README's Python programs, run one after the other on every configuration made small.

    Gives the directory that they ran in, and what they printed.
    """
    place = tmp_path_factory.mktemp("readme")
    (place / "text.txt").write_text(TEXT)
    fields = {**SMALL, "data.path": "text.txt", "data.cache_dir": "cache"}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, one_device():
        patched.chdir(place)
        patched.setattr(platform, "prepare", lambda *asked: MACHINE)
        load = loading.load_config

        def small(name: str, assignments: Sequence[str] = ()) -> Config:
            return load(name, [*assignments, *(f"{key}={value}" for key, value in fields.items())])

        patched.setattr(loading, "load_config", small)
        with contextlib.redirect_stdout(printed):
            program: dict[str, Any] = {}
            for code in blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python"):
                exec(compile(code, "README.md", "exec"), program)
    return place, printed.getvalue()


def test_the_programs_of_the_readme_run(from_python: tuple[Path, str]) -> None:
    place, printed = from_python
    assert list(place.glob("runs/*/checkpoints/*/manifest.json"))
    assert len(printed.splitlines()) >= 2  # a figure and a text


def test_the_recipe_of_make_train_runs(
    from_python: tuple[Path, str], run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small, and on the run that README's programs trained."""
    monkeypatch.chdir(from_python[0])
    [run] = Path("runs").iterdir()
    done = []
    for program, *words in recipe():
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
        if program == "train.py":
            fields = {**SMALL, "data.path": "text.txt", "data.cache_dir": "cache"}
            saved = json.loads((run / "config.json").read_text())["config"]
            fields["train.num_steps"] = saved["train"]["num_steps"]  # so that none is left
            words += ["--workdir", str(run), *overrides(fields)]
        else:
            words[words.index("--ckpt") + 1] = str(run)
        with one_device():
            code, out, err, _ = run_program(program.removesuffix(".py"), words)
        assert code == 0, err
        done.append((program, out))
    assert [program for program, _ in done] == ["train.py", "sample.py"]
    prompt = words[words.index("--prompt") + 1]
    assert done[-1][1].count(prompt) == int(words[words.index("--num_samples") + 1])
