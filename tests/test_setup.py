"""setup.sh on this machine, with packages of a few bytes, and the files that it installs from."""

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sheepop_jax.cli import main as cli_main

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "bash cat cksum dirname grep ls mkdir rm sed tail tr".split()
PYTHON = getattr(sys, "_base_executable", sys.executable)


class Clone:
    """A copy of setup.sh, with a PATH on which this Python is `python3`, behind a broken shim."""

    def __init__(self, folder: Path):
        self.folder, self.venv, self.bin = folder, folder / "clone/.venv", folder / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "requirements", folder / "clone/requirements")
        shutil.copy(ROOT / "setup.sh", folder / "clone")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.program("python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
        self.program("python3", f'exec {PYTHON} "$@"')

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (self.bin / name).chmod(0o755)

    def setup(self, *words: str) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        environment = {"PATH": str(self.bin), "HOME": str(self.folder)}
        command = [str(self.folder / "clone/setup.sh"), *words]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=self.folder
        )
        return result.returncode, result.stdout + result.stderr


def test_an_environment_is_made_by_pip(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    for version in ("1.0", "2.0"):
        info = f"tiny-{version}.dist-info/"
        with zipfile.ZipFile(clone.folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                info + "METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}"
            )
            wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true")
            wheel.writestr(info + "RECORD", "")
    files = clone.folder / "clone/requirements"
    (files / "cpu.txt").write_text(f"--no-index\n--find-links {clone.folder}\ntiny\n")
    (files / "constraints.txt").write_text("tiny==1.0\n")
    code, text = clone.setup("--accelerator", "cpu")
    assert code == 0, text
    [package] = clone.venv.glob("lib/*/site-packages/tiny*.dist-info")
    assert package.stem == "tiny-1.0", "the version in constraints.txt"
    assert clone.setup() == (0, f"setup: {clone.venv} is ready\n"), "nothing was run"
    (files / "cpu.txt").write_text("--no-index\nabsent\n")
    code, text = clone.setup()
    assert code == 1 and re.search(r"\nerror: .*for absent; try .*\n$", "\n" + text)


def test_a_change_is_installed_and_a_failure_starts_again(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    working = '[ $1 != venv ] || exec python3 -m venv --without-pip "$6"'
    clone.program("uv", f"{working}; [ $1 = --version ]")
    assert clone.setup("--accelerator", "cpu", "--dev")[0] == 1
    leftover = clone.venv / "leftover"
    leftover.touch()
    clone.program("uv", working)
    code, text = clone.setup()
    assert code == 0 and "uv venv" in text and "-r requirements/dev.txt" in text
    assert not leftover.exists(), "nothing of the failed attempt is left"
    ready = f"setup: {clone.venv} is ready\n"
    assert clone.setup()[1] == clone.setup("--dev")[1] == ready
    with open(clone.folder / "clone/requirements/common.txt", "a") as file:
        file.write("another\n")
    text = clone.setup()[1]
    assert "uv venv" not in text and "-r requirements/cpu.txt -r requirements/dev.txt" in text
    assert "uv venv" in clone.setup("--accelerator", "tpu", "--dry-run")[1]
    assert clone.setup()[1] == ready, "a dry run changes nothing"
    assert "uv venv" in clone.setup("--accelerator", "tpu")[1]
    assert clone.setup()[1] == ready, "the accelerator is kept"


@pytest.mark.parametrize("accelerator", ["cpu", "cuda12", "tpu"])
def test_a_dry_run_prints_the_commands(tmp_path: Path, accelerator: str) -> None:
    clone = Clone(tmp_path)
    packages = f"-r requirements/{accelerator}.txt"
    make, install = f"{PYTHON} -m venv", f"{clone.venv}/bin/python -m pip install"
    log = f">>{clone.venv}/setup.log"
    _, text = clone.setup("--dry_run", "--accelerator", accelerator, "--latest")
    assert text == f"setup: {make} {clone.venv} {log}\nsetup: {install} {packages} {log}\n"
    packages += " -c requirements/constraints.txt"
    _, text = clone.setup("--dry-run", "--accelerator", accelerator)
    assert text == f"setup: {make} {clone.venv} {log}\nsetup: {install} {packages} {log}\n"
    assert not clone.venv.exists()


@pytest.mark.parametrize(
    "words",
    ["--no", "extra", "--accelerator cuda11", "--venv", "--python absent", "--venv bin"],
)
def test_a_bad_option_is_one_line(tmp_path: Path, words: str) -> None:
    clone = Clone(tmp_path)
    code, text = clone.setup(*words.split())
    assert code == 2 and re.fullmatch(r"error: .*; try .*\n", text)
    assert words.split()[-1] in text and not clone.venv.exists()


def test_a_machine_without_python_or_ensurepip_is_told_what_to_install(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    hint = "try 'sudo apt install python3-venv'"
    clone.program("python3", f"""[ "$2" != "import ensurepip" ] && echo {tmp_path}/bin/python3""")
    assert clone.setup() == (1, f"error: {tmp_path}/bin/python3 has no ensurepip; {hint}\n")
    clone.program("python3", "exit 0")
    code, text = clone.setup()
    assert code == 1 and re.fullmatch(r"error: --python: got none.*; try 'sudo apt .*\n", text)
    assert not clone.venv.exists()


def lines(name: str) -> list[str]:
    return re.findall(r"^(?!#|-r )(.+)$", (ROOT / f"requirements/{name}.txt").read_text(), re.M)


@pytest.mark.parametrize(
    ("python", "tested"),
    [("3.11.7", ("0.10.2", "0.12.8", "2.4.6")), ("3.13.0", ("0.12.0.1", "0.12.12", "2.5.5"))],
)
def test_constraints_have_one_version_of_each_requirement(python: str, tested: tuple) -> None:
    pins: dict[str, str] = {}
    for pin in map(Requirement, lines("constraints")):
        environment = {"python_full_version": python, "sys_platform": "linux"}
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins and re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    for name in ("common", "jax", "cuda12", "tpu", "extras", "dev"):
        for line in lines(name):
            needed = Requirement(line.split("  # ")[0])
            assert pins[needed.name.lower()] in needed.specifier, line
    assert (pins["jax"], pins["flax"], pins["numpy"]) == tested


def test_the_package_has_the_same_requirements_and_a_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    included = re.findall("^-r (.*)$", (ROOT / "requirements/cpu.txt").read_text(), re.M)
    assert files == [f"requirements/{name}" for name in included]
    assert project["project"]["scripts"] == {"sheepop-jax": "sheepop_jax.cli.main:main"}
    inspect.signature(cli_main.main).bind()  # a console script is called without arguments
