"""setup.sh's choices, tried on made-up machines, and the requirement files it installs from."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup.sh"
BASH = shutil.which("bash")
FILES = sorted([ROOT / "requirements.txt", *ROOT.glob("requirements/*.txt")])
ACCELERATORS = {"requirements.txt": "cuda12", "cpu.txt": "cpu", "tpu.txt": "tpu"}


class Machine:
    """A PATH, a home and a /sys of our own making; nothing of the real machine's Python shows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.venv = folder / "venv"
        for tool in ("bash", "cat", "dirname", "basename", "sed", "tail", "grep", "mkdir", "ls",
                     "mv", "rm", "chmod"):  # fmt: skip  # a list of words
            real = shutil.which(tool)
            assert real, tool
            (self.bin / tool).symlink_to(real)
        self.program("bin/sleep", "exit 0")  # setup.sh waits before it tries again

    def program(self, path: str, script: str) -> Path:
        """Puts an executable shell script at `path`, relative to the machine's folder."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{BASH}\n{script}\n")
        file.chmod(0o755)
        return file

    def python(self, path: str, version: str, kind: str = "venv") -> Path:
        """An interpreter that answers setup.sh's probe as Python `version` would."""
        file = self.folder / path
        return self.program(path, f'echo "{version} {kind} {file}"')

    def setup(self, *arguments: str, script: Path = SETUP, **env: str):
        """Runs setup.sh on this machine; never on the .venv that the tests themselves run in."""
        if script == SETUP:
            arguments = ("--venv", str(self.venv), *arguments)
        env = {
            "PATH": str(self.bin),
            "HOME": str(self.folder / "home"),
            "SETUP_SYSFS": str(self.folder / "sys"),
            **env,
        }
        return subprocess.run(
            [str(BASH), str(script), *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with no Python, no pyenv, no accelerator."""
    return Machine(tmp_path)


def one_line(text: str) -> str:
    """The text, which has to be one line that starts as every error does."""
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


def test_help_teaches(machine: Machine) -> None:
    """Every option that the script knows is explained, on stdout, with status 0."""
    result = machine.setup("--help")
    assert (result.returncode, result.stderr) == (0, "")
    parser = SETUP.read_text().split("while [ $# -gt 0 ]")[1].split("\n  done")[0]
    known = set(re.findall(r"--[a-z-]+", parser))
    explained = set(re.findall(r"--[a-z-]+", result.stdout))
    assert {"--dev", "--accelerator", "--python", "--venv"} <= known <= explained


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["extra"], "extra"),
        (["--accelerator", "cuda11"], "cuda11"),
        (["--accelerator"], "--accelerator"),
        (["--python", "no-such-python"], "no-such-python"),
        (["--python", ""], "--python"),
        (["--print-python", "middle"], "middle"),
    ],
)
def test_bad_option_is_one_line_and_status_2(
    machine: Machine, arguments: list[str], named: str
) -> None:
    """What was wrong is named, and nothing was made."""
    result = machine.setup(*arguments)
    assert result.returncode == 2
    assert named in one_line(result.stderr)
    assert not machine.venv.exists()


def test_broken_shim_is_passed_over(machine: Machine) -> None:
    """A newer name that fails, as pyenv's shims do, is not taken; nor one that says nothing."""
    machine.program("bin/python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    machine.program("bin/python3", "exit 0")
    good = machine.python("bin/python3.12", "3 12 1")
    machine.python("bin/python3.11", "3 11 9")
    result = machine.setup("--print-python", "newest")
    assert (result.returncode, result.stdout) == (0, f"{good}\n")


def test_newest_and_oldest_by_number(machine: Machine) -> None:
    """Versions are numbers (3.9 < 3.11), outside 3.11 to 3.13 they are left out, and a shim hides
    neither a system interpreter further down PATH nor pyenv's and uv's own directories."""
    machine.python("bin/python3.14", "3 14 0")
    machine.python("bin/python3", "3 9 18")
    machine.program("bin/python3.11", "exit 127")
    oldest = machine.python("usr/python3.11", "3 11 2")
    machine.python("home/.pyenv/versions/3.10.13/bin/python3", "3 10 13")
    machine.python("home/.pyenv/versions/3.11.10/bin/python3", "3 11 10")
    machine.python("home/.pyenv/versions/3.13.2/bin/python3", "3 13 2")
    newest = machine.python("home/.local/share/uv/python/cpython-3.13.10/bin/python3", "3 13 10")
    path = f"{machine.bin}:{machine.folder / 'usr'}"
    for which, expected in (("newest", newest), ("oldest", oldest)):
        result = machine.setup("--print-python", which, PATH=path)
        assert result.stdout == f"{expected}\n", which


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3",
        "bin/python3.11",
        "home/.pyenv/versions/3.11.7/bin/python3",
        "home/.local/share/uv/python/cpython-3.11.7-linux/bin/python3",
    ],
)
def test_each_place_is_looked_at(machine: Machine, place: str) -> None:
    """The only interpreter of a machine is found wherever it lies."""
    only = machine.python(place, "3 11 7")
    assert machine.setup("--print-python", "newest").stdout == f"{only}\n"


def test_interpreter_with_venv_goes_before_a_newer_one_without(machine: Machine) -> None:
    """Debian's python3 without python3-venv is the last resort."""
    machine.python("bin/python3.13", "3 13 0", kind="bare")
    good = machine.python("bin/python3.11", "3 11 2")
    assert machine.setup("--print-python", "newest").stdout == f"{good}\n"


def test_real_interpreter_answers_the_probe(machine: Machine) -> None:
    """The probe, run by the Python that runs this test; past NEWEST it fails: raise NEWEST then."""
    (machine.bin / "python3").symlink_to(sys.executable)
    result = machine.setup("--print-python", "newest")
    assert result.returncode == 0, result.stderr
    version = subprocess.check_output([result.stdout.strip(), "-V"], text=True)
    assert version.split()[1] == sys.version.split()[0]


def test_no_python_is_one_line(machine: Machine) -> None:
    """A machine without any says what to install; a too old named one is refused by name."""
    result = machine.setup()
    assert result.returncode == 1
    assert "python3-venv" in one_line(result.stderr)
    old = machine.python("old/python3", "3 10 13")
    for result in (machine.setup("--python", str(old)), machine.setup(PYTHON=str(old))):
        assert result.returncode == 2
        assert "3.10" in one_line(result.stderr)


def test_missing_venv_module_names_the_package(machine: Machine) -> None:
    """The Debian case with no way out: exact package name, one error line, no whole environment."""
    machine.python("bin/python3", "3 12 3", kind="bare")
    (machine.bin / "python3").write_text(
        f'#!{BASH}\n[ "$1" = -I ] && echo "3 12 3 bare $0" || exit 1\n'
    )
    result = machine.setup()
    assert result.returncode == 1
    assert "sudo apt install python3.12-venv" in one_line(result.stderr.splitlines(True)[-1])
    assert not (machine.venv / ".setup-done").exists()


@pytest.mark.parametrize(
    ("vendor", "device", "nvidia_smi", "expected"),
    [
        (None, None, None, "cpu"),
        (None, None, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "cuda12"),
        (None, None, "echo 'GPU 0: no driver'; exit 9", "cpu"),
        (None, None, "echo 'No devices were found'", "cpu"),
        ("0x1ae0", "0x0063", None, "tpu"),
        ("0x1ae0", "0x0042", None, "cpu"),  # Google's network card, in every one of its machines
        ("0x8086", "0x0063", None, "cpu"),
    ],
)
def test_accelerator(
    machine: Machine, vendor: str, device: str, nvidia_smi: str, expected: str
) -> None:
    """nvidia-smi has to work and to list a card; a TPU is a PCI device that jax knows."""
    if vendor:
        slot = machine.folder / "sys/bus/pci/devices/0000:00:04.0"
        slot.mkdir(parents=True)
        (slot / "vendor").write_text(f"{vendor}\n")
        (slot / "device").write_text(f"{device}\n")
    if nvidia_smi:
        machine.program("bin/nvidia-smi", nvidia_smi)
    assert machine.setup("--print-accelerator").stdout == f"{expected}\n"


class Installer:
    """A copy of setup.sh and the requirements, and a Python whose venv and pip only pretend.

    pip writes its arguments into `calls`, then runs `pip_then` with the process id of setup.sh.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.repo = machine.folder / "repo"
        self.repo.mkdir()
        shutil.copy(SETUP, self.repo)
        shutil.copy(ROOT / "requirements.txt", self.repo)
        shutil.copytree(ROOT / "requirements", self.repo / "requirements")
        self.calls = machine.folder / "calls"
        self.venv = self.repo / ".venv"
        self.pip_then = machine.program("pip_then", "exit 0")
        fake = machine.python("fake/python3", "3 13 0")
        fake.write_text(
            f"""#!{BASH}
case "$1 $2" in
  "-I -c") echo "3 13 0 venv {fake}" ;;
  "-m venv") mkdir -p "$3/bin"; cat {fake} >"$3/bin/python"; chmod +x "$3/bin/python" ;;
  "-m pip") echo "$@" >>{self.calls}; {self.pip_then} "$PPID" ;;
esac
"""
        )
        (machine.bin / "python3.13").symlink_to(fake)

    def run(self, *arguments: str):
        """Runs the copy; returns what it did and what pip was asked for meanwhile."""
        self.calls.write_text("")
        result = self.machine.setup(*arguments, script=self.repo / "setup.sh")
        return result, self.calls.read_text()


def test_second_run_does_nothing_until_something_changes(machine: Machine) -> None:
    """Ready: one line and no pip. A requirement, --dev and the accelerator each install; a comment
    does not; a choice once made is kept."""
    installer = Installer(machine)
    result, calls = installer.run()
    assert result.returncode == 0, result.stderr
    assert "-r requirements/cpu.txt" in calls and "dev.txt" not in calls

    result, calls = installer.run()
    assert (result.returncode, calls) == (0, "")
    assert re.fullmatch(r"setup: \.venv is ready [^\n]+\n", result.stderr)
    assert result.stdout == ""

    common = installer.repo / "requirements/common.txt"
    text = common.read_text()
    common.write_text("# a better comment\n" + text)
    assert installer.run()[1] == ""
    common.write_text(text + "another-library>=1.0  # a reason\n")
    assert "cpu.txt" in installer.run()[1]
    assert installer.run()[1] == ""

    assert "dev.txt" in installer.run("--dev")[1]
    assert installer.run()[1] == "", "without --dev what is there stays"
    assert "-r requirements.txt" in installer.run("--accelerator", "cuda12")[1]
    assert installer.run()[1] == "", "the user's choice of accelerator stays"
    leftover = installer.venv / "cuda-plugin"
    leftover.write_text("")
    assert "cpu.txt" in installer.run("--accelerator", "auto")[1]
    assert not leftover.exists(), "packages of another accelerator do not stay behind"


def test_half_made_environment_is_never_taken_for_whole(machine: Machine) -> None:
    """Killed, pip failing, an update that fails: each time the next run starts again."""
    installer = Installer(machine)
    installer.pip_then.write_text(f"#!{BASH}\nkill -9 $1\n")
    assert installer.run()[0].returncode == -9
    installer.pip_then.write_text(f"#!{BASH}\necho 'ERROR: no matching distribution'; exit 1\n")
    result, calls = installer.run()
    assert result.returncode == 1
    assert "no matching distribution" in one_line(result.stderr.splitlines(True)[-1])
    assert calls.count("install") == 3, "a download that breaks off is tried again"
    leftover = installer.venv / "leftover"
    leftover.write_text("")
    installer.pip_then.write_text(f"#!{BASH}\nexit 0\n")
    assert "cpu.txt" in installer.run()[1]
    assert not leftover.exists(), "a half-made environment is made again from nothing"
    assert installer.run()[1] == ""

    installer.pip_then.write_text(f"#!{BASH}\nexit 1\n")
    assert installer.run("--dev")[0].returncode == 1
    installer.pip_then.write_text(f"#!{BASH}\nexit 0\n")
    assert "cpu.txt" in installer.run()[1]


def test_directory_of_somebody_else_is_left_alone(machine: Machine) -> None:
    """--venv at a directory that setup.sh did not make: refused, and nothing in it is touched."""
    installer = Installer(machine)
    precious = machine.folder / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    result, calls = installer.run("--venv", str(precious))
    assert (result.returncode, calls) == (2, "")
    assert "precious" in one_line(result.stderr)
    assert (precious / "thesis.txt").read_text() == "years"


# --- The requirement files -----------------------------------------------------------------------


def requirements(path: Path) -> list[str]:
    """The lines of a file that ask for a package, comment and all."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_requirement_has_a_tested_lower_bound_and_a_reason(path: Path) -> None:
    """name>=1.2.3  # why; and -r lines only to files that exist."""
    for line in requirements(path):
        assert re.fullmatch(r"[A-Za-z0-9_-]+(\[[a-z0-9]+\])?>=\d[\d.]*  # \S.+", line), line
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            assert (path.parent / line.removeprefix("-r ")).is_file(), line


def test_nothing_is_required_twice() -> None:
    """A package with its extra stands in one line of all files, and jax has one bound."""
    lines = [line for path in FILES for line in requirements(path)]
    names = [line.split(">=")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names)), names
    jax = [line.split("  #")[0] for line in lines if re.match(r"jax(\[|>)", line)]
    assert len(jax) == len(ACCELERATORS)
    assert len({line.split(">=")[1] for line in jax}) == 1, jax


def all_lines(path: Path) -> list[str]:
    """The requirements of a file and of those it includes."""
    included = re.findall(r"^-r (\S+)$", path.read_text(), flags=re.MULTILINE)
    return requirements(path) + [line for i in included for line in all_lines(path.parent / i)]


def test_each_set_is_the_common_list_and_one_jax() -> None:
    """The CPU set holds no CUDA, and the development set no jax at all."""
    common = set(requirements(ROOT / "requirements/common.txt"))
    for path in FILES:
        lines = all_lines(path)
        extra = ACCELERATORS.get(path.name)
        if extra:
            jax = "jax>" if extra == "cpu" else f"jax[{extra}]>"
            rest = set(lines) - common
            assert common <= set(lines)
            assert len(rest) == 1 and rest.pop().startswith(jax), path
        elif path.name != "jax.txt":
            assert not any(line.startswith("jax") for line in lines), path
    for line in all_lines(ROOT / "requirements/cpu.txt"):
        assert not re.search("cuda|nvidia|cudnn|tpu", line.split("  #")[0]), line


def test_package_reads_the_same_lists() -> None:
    """pyproject.toml names the files; setuptools takes no -r lines in them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    read = [line for file in files for line in requirements(ROOT / file)]
    assert sorted(read) == sorted(all_lines(ROOT / "requirements/cpu.txt"))
    for file in files:
        assert not re.search("^-", (ROOT / file).read_text(), flags=re.MULTILINE), file
    assert project["project"]["requires-python"] == ">=3.11"
    extras = project["project"]["optional-dependencies"]
    assert extras == {"cuda12": ["jax[cuda12]"], "tpu": ["jax[tpu]"]}


def test_scripts_hold_no_path_of_one_machine() -> None:
    """What runs on a fresh machine names no home, and the scripts can be executed."""
    for name in ("setup.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
        assert not re.search(r"/(home|root|Users)/", (ROOT / name).read_text()), name
