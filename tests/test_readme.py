"""What README.md and GETTING_STARTED.md tell people to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from sheepop_jax import __main__ as tools
from sheepop_jax import cli, runtime
from sheepop_jax.model.partitioning import abstract_mesh
from sheepop_jax.pipeline import build_model, plan_run
from sheepop_jax.training.plan_report import summary

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "GETTING_STARTED.md"]
PROGRAM = re.compile(r"python (train\.py|sample\.py|-m sheepop_jax) ?(.*)")


def blocks(path, language):
    """Contents of the fenced code blocks of a language; "" are plain ones."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def commands():
    """(program, words) of each command line in plain blocks and in tables."""
    found = []
    for path in DOCUMENTS:
        text = "".join(blocks(path, "")) + "\n".join(
            re.findall(r"`(python [^`]+)`", path.read_text())
        )
        for program, rest in PROGRAM.findall(text.replace("\\\n", " ")):
            rest = rest.replace("[--data FILE]", "--data FILE")
            found.append((program, shlex.split(rest, comments=True)))
    return found


def test_there_are_commands_to_check():
    assert {program for program, _ in commands()} == {"train.py", "sample.py", "-m sheepop_jax"}
    assert len(commands()) > 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left(path):
    assert "@@" not in path.read_text()


@pytest.mark.parametrize(("program", "words"), commands(), ids=lambda x: str(x)[:60])
def test_every_command_has_known_flags_and_fields(program, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    match program:
        case "train.py":
            flags, overrides = train.parse(words)
            cli.load_config(flags.config, overrides)
        case "sample.py":
            sample.check(sample.parse(words))
        case _:
            tools.parse(words)


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {**kept, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_plan_that_is_shown_is_the_plan(path):
    """Of the quickstart, on one CPU, with the vocabulary that its tokenizer gets."""
    config = cli.load_config(str(ROOT / "configs/quickstart.py"), [])
    machine = runtime.imagine("cpu", 1)
    model = build_model(config, config.data.vocab_size, machine)
    plan = plan_run(config, model, abstract_mesh(config.mesh, 1), machine)
    for line in summary(plan):
        assert line + "\n" in path.read_text()


def test_what_fits_and_how_long_is_what_the_plan_says():
    table = re.findall(r"^\|(.*)\|$", (ROOT / "GETTING_STARTED.md").read_text(), re.MULTILINE)
    rows = [[cell.strip() for cell in row.split("|")] for row in table]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["", "updates"])
    devices, checked = rows[start][2:], 0
    for name, updates, *cells in rows[start + 2 :]:
        if not (config_file := ROOT / f"configs/{name.strip('`')}.py").exists():
            break
        config = cli.load_config(str(config_file), [])
        assert updates == f"{config.train.num_steps:,}"
        for device, cell in zip(devices, cells, strict=True):
            machine = runtime.imagine(device, 1)
            model = build_model(config, config.data.vocab_size, machine)
            plan = plan_run(config, model, abstract_mesh(config.mesh, 1), machine)
            hours = plan.seconds(0.4) * config.train.num_steps / 3600
            said = (
                f"{plan.memory.total / 1e9:.2g} GB, {hours:.2g} h" if plan.fits else "does not fit"
            )
            assert cell == said
            checked += 1
    assert checked == 9


@pytest.mark.slow
def test_the_library_from_python_as_the_readme_shows_it(tmp_path):
    shown = blocks(ROOT / "README.md", "python")
    assert len(shown) == 2
    for code in shown:
        assert len(code.splitlines()) < 20
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(shown)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    bits_per_byte, text = result.stdout.split("\n", 1)
    assert 1 < float(bits_per_byte) < 8
    assert text.startswith("def ")


@pytest.mark.slow
def test_make_train_made_short(tmp_path):
    """The Makefile's own lines, with fewer steps and another directory."""
    recipe = re.search(r"^train: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    lines = [line.strip().replace("$(PYTHON_IN_VENV)", "python") for line in recipe[1].splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["train.py", "sample.py"]
    short = ["--config.train.num_steps=5", "--config.train.eval_batches=2", f"--workdir={tmp_path}"]
    train_words = [*shlex.split(lines[0])[1:], *short]
    sample_words = [w.replace("runs/quickstart", str(tmp_path)) for w in shlex.split(lines[1])[1:]]
    for words in (train_words, sample_words):
        result = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("class Reader:") >= 2
