"""The commands and programs that the documents show work."""

import contextlib
import importlib
import io
import json
import re
import shlex
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheepop_jax.checkpoint import workdir
from sheepop_jax.checkpoint.checkpoints import Checkpoints
from sheepop_jax.cli import sample
from sheepop_jax.cli import train as train_command
from sheepop_jax.config import loading
from sheepop_jax.config.loading import load_config, load_saved_config
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError
from sheepop_jax.runtime import platform
from sheepop_jax.training import loop
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


@pytest.mark.parametrize(
    "pages",
    [
        ["README.md"],
        pytest.param(["README.md", "docs/getting-started.md"], marks=pytest.mark.slow),
    ],
    ids=["README", "both"],
)
def test_the_commands_of_the_first_pages_run_in_order(
    pages: list[str], tmp_path: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `make train`, README and getting-started, in one directory.

    Models, texts and runs are small. Runs with a model of the same shape share a train step.
    """
    for name in ("stdlib/a.py", "my_texts/a.txt", "play.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n{TEXT}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    compiled: dict[str, Any] = {}
    compile_step = loop._Loop._compile

    def once(self: loop._Loop, batch: Any) -> Any:
        key = repr((self.job.model, self.job.config.optimizer, batch.inputs.shape))
        if key not in compiled:
            compiled[key] = compile_step(self, batch)
        return compiled[key]

    monkeypatch.setattr(loop._Loop, "_compile", once)
    monkeypatch.setattr(loop, "draw_curve", lambda directory: None)
    fast = {"optimizer.name": "adamw", "data.cache_dir": "cache", "train.num_steps": 2}
    fields = {**SMALL, **fast}
    shown = [(words[0], words[1:]) for words in recipe()]
    for page in pages:
        shown += commands((ROOT / page).read_text(encoding="utf-8"))
    done = []
    for program, words in shown:
        if words[0] == "plan" or "cuda" in words[-1]:
            continue  # tested with the estimates; needs a GPU
        if program == "train.py":
            words = [re.sub("(num_steps)=.*", r"\1=3", word) for word in words]
            small = dict(fields)
            if "shakespeare_char" in words:
                small["data.tokenizer"] = "char"
            if any("--config" == word for word in words):
                words = [*overrides(small), *words]  # of a flag given twice the last counts
        with one_device():
            name = {"-m sheepop_jax": "tools"}.get(program, program.removesuffix(".py"))
            code, out, err, _ = run_program(name, words)
        assert code == 0, (words, err)
        done.append(name)
        if name == "sample":
            prompt = words[words.index("--prompt") + 1]
            samples = words[words.index("--num_samples") + 1] if "--num_samples" in words else 1
            assert out.count(prompt) >= int(samples)
    assert done[:5] == ["train", "sample"] * 2 + ["train"]
    runs = {run.name: Checkpoints(run / "checkpoints").steps() for run in Path("runs").iterdir()}
    if len(pages) == 1:
        assert runs == {"quickstart": [2], "mine": [2]}
    else:
        assert runs == {"quickstart": [2], "mine": [2, 3], "play": [2]} and "tools" in done
