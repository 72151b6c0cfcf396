"""setup.sh on this machine, with packages of a few bytes, and the files that it installs from."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sheepop_jax import __main__ as tools

ROOT = Path(__file__).resolve().parent.parent
TOOLS = (
    "bash",
    "cat",
    "cksum",
    "dirname",
    "grep",
    "ls",
    "mkdir",
    "rm",
    "sed",
    "sort",
    "tail",
    "tr",
)
PYTHON = getattr(sys, "_base_executable", sys.executable)
WITHOUT_ENSUREPIP = "import sys; sys.modules['ensurepip'] = None; exec(sys.argv.pop())"


class Clone:
    """A copy of setup.sh, with a PATH on which this Python is `python3`, behind a broken shim."""

    def __init__(self, folder: Path):
        self.folder, self.venv = folder, folder / "clone" / ".venv"
        (folder / "bin").mkdir()
        shutil.copytree(ROOT / "requirements", folder / "clone/requirements")
        shutil.copy(ROOT / "setup.sh", folder / "clone")
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
        self.program("python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
        self.program("python3", f'exec {PYTHON} "$@"')

    def program(self, name: str, script: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        file.chmod(0o755)

    def requirements(self, name: str, *lines: str) -> None:
        """Replaces a requirements file; packages come from wheels in the test's folder alone."""
        lines = ("--no-index", f"--find-links {self.folder}", *lines)
        (self.folder / "clone/requirements" / f"{name}.txt").write_text("\n".join(lines) + "\n")

    def wheel(self, name: str, version: str) -> None:
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
            file.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
            )
            file.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
            )
            file.writestr(f"{info}/RECORD", "")

    def setup(self, *arguments: str):
        return subprocess.run(
            [str(self.folder / "clone/setup.sh"), *arguments],
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def installed(self) -> set[str]:
        folders = self.venv.glob("lib/python3.*/site-packages/tiny*.dist-info")
        return {folder.name.removesuffix(".dist-info") for folder in folders}


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_an_environment_is_made_once_and_updated(clone: Clone) -> None:
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("tinydev", "1.0")):
        clone.wheel(name, version)
    clone.requirements("dev", "tinydev")
    clone.requirements("constraints", "tiny==1.0")
    clone.requirements("cpu", "tiny", "absent")
    result = clone.setup("--accelerator", "cpu")
    assert result.returncode == 1
    assert re.search(r"\nerror: .*for absent; try .*\n$", result.stderr)
    leftover = clone.venv / "leftover"
    leftover.write_text("")

    clone.requirements("cpu", "tiny")
    assert clone.setup().returncode == 0
    assert not leftover.exists(), "an installation that failed starts again from nothing"
    assert clone.installed() == {"tiny-1.0"}, "the version in constraints.txt"

    ready = f"setup: {clone.venv} is ready\n"
    before = (clone.venv / "setup.log").stat().st_mtime_ns
    assert clone.setup().stderr == ready
    assert (clone.venv / "setup.log").stat().st_mtime_ns == before

    assert clone.setup("--dev").returncode == 0
    assert clone.installed() == {"tiny-1.0", "tinydev-1.0"}
    assert clone.setup().stderr == ready
    clone.requirements("constraints", "tiny==2.0")
    assert "-r requirements/cpu.txt -r requirements/dev.txt" in clone.setup().stderr
    assert clone.installed() == {"tiny-2.0", "tinydev-1.0"}
    assert "-m venv" in clone.setup("--accelerator", "tpu", "--dry-run").stderr
    assert clone.setup().stderr == ready, "a dry run changes nothing"


@pytest.mark.parametrize("accelerator", ["cpu", "cuda12", "tpu"])
@pytest.mark.parametrize("uv", [False, True])
def test_a_dry_run_prints_the_commands(clone: Clone, accelerator: str, uv: bool) -> None:
    if uv:
        clone.program("uv", "[ $1 = --version ]")
    result = clone.setup("--dry_run", "--accelerator", accelerator)
    make, install = result.stderr.splitlines()
    start = f"uv venv --seed --allow-existing -p {PYTHON}" if uv else f"{PYTHON} -m venv"
    assert make.startswith(f"setup: {start} {clone.venv} >>"), (
        "the broken python3.13 is passed over"
    )
    assert f"-r requirements/{accelerator}.txt -c requirements/constraints.txt >>" in install
    assert ("uv pip install -p" if uv else "python -m pip install") in install
    assert "constraints" not in clone.setup("--dry_run", "--latest").stderr
    assert not clone.venv.exists()


@pytest.mark.parametrize(
    "words",
    ["--nonsense", "extra", "--accelerator cuda11", "--venv", "--python absent", "--venv ."],
)
def test_a_bad_option_is_one_line(clone: Clone, words: str, monkeypatch) -> None:
    monkeypatch.chdir(clone.folder)  # where --venv . would replace what is there
    result = clone.setup(*words.split())
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*; try .*\n", result.stderr)
    assert words.split()[-1] in result.stderr
    assert (clone.folder / "bin").is_dir() and not clone.venv.exists()


def test_a_machine_without_python_or_ensurepip_is_told_what_to_install(clone: Clone) -> None:
    clone.program("python3", f'exec {PYTHON} -I -c "{WITHOUT_ENSUREPIP}" "$3"')
    result = clone.setup()
    package = f"python3.{sys.version_info.minor}-venv"
    expected = f"error: {PYTHON} has no ensurepip; try 'sudo apt install {package}'\n"
    assert (result.returncode, result.stderr) == (1, expected)
    clone.program("python3", "exit 0")
    result = clone.setup()
    assert result.returncode == 1
    assert re.fullmatch(r"error: --python: got none.*; try 'sudo apt .*\n", result.stderr)
    assert not clone.venv.exists()


def lines(name: str) -> list[str]:
    return re.findall(r"^(?!#|-r )(.+)$", (ROOT / f"requirements/{name}.txt").read_text(), re.M)


@pytest.mark.parametrize(
    ("python", "tested"),
    [("3.11.7", ("0.10.2", "0.12.8", "2.4.6")), ("3.13.0", ("0.12.0.1", "0.12.12", "2.5.5"))],
)
def test_constraints_have_one_tested_version_of_each_requirement(python, tested) -> None:
    pins = {}
    machine = {"python_full_version": python, "sys_platform": "linux"}
    for pin in map(Requirement, lines("constraints")):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.extras and not pin.url
        if pin.marker is None or pin.marker.evaluate(machine):
            assert pin.name not in pins, pin
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    for name in ("common", "jax", "cuda12", "tpu", "extras", "dev"):
        for line in lines(name):
            requirement, reason = line.split("  # ")
            found = Requirement(requirement)
            assert found.specifier and reason
            assert pins[found.name.lower()] in found.specifier, line
    assert (pins["jax"], pins["flax"], pins["numpy"]) == tested


def test_the_package_installs_the_same_requirements_and_a_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    assert files == ["requirements/common.txt", "requirements/jax.txt"]
    assert "-r" not in "".join((ROOT / file).read_text() for file in files), "setuptools takes none"
    assert project["project"]["scripts"] == {"sheepop-jax": "sheepop_jax.__main__:main"}
    inspect.signature(tools.main).bind()
    for name in ("setup.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
