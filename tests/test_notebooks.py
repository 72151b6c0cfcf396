"""Both notebooks, run from the first cell to the last on a CPU, small, in an empty directory."""

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import TEXT

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 1200  # a limit against hanging, not a speed
# What a notebook does not set itself is small.
SMALL = """

shipped = get_config

def get_config():
    c = shipped()
    c.model.num_layers, c.model.d_model, c.model.num_heads, c.model.d_ff = 1, 24, 2, 40
    c.data.vocab_size, c.train.batch_size, c.train.grad_accum_steps = 300, 8, 1
    return c
"""


def images(notebook: nbformat.NotebookNode) -> int:
    """How many pictures the cells show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path: Path) -> None:
    """A stored output goes stale, and may hold paths of somebody's machine."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def setup_functions(path: Path) -> dict[str, Any]:
    """The functions of the setup cell; nothing is cloned or installed."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    [setup] = [source for source in cells if "def find_checkout" in source]
    names: dict[str, Any] = {"Path": Path}
    exec(setup.partition("\ncheckout = find_checkout()")[0], names)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_installation_is_no_checkout(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site-packages holds the package and the configurations."""
    for folder in ("site/sheepop_jax", "site/configs", "code/sheepop_jax", "code/configs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "site/sheepop_jax/pipeline.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "code")])
    find = setup_functions(path)["find_checkout"]
    assert find() is None
    (tmp_path / "code/requirements").mkdir()
    assert find() == tmp_path / "code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_what_is_missing_or_too_old_for_the_code_is_installed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = setup_functions(path)["missing"]
    versions = {"numpy": "2.0.2", "pandas": "2.2.2", "jax": "0.7.2", "flax": "99"}

    def version(name: str) -> str:
        if name == "zstandard":
            raise importlib.metadata.PackageNotFoundError
        return versions.get(name, "99")

    monkeypatch.setattr(importlib.metadata, "version", version)
    names = [re.split("[<>=]", text)[0] for text in missing(ROOT)]
    assert sorted(names) == ["jax", "zstandard"]


def test_one_variable_keeps_the_run_on_a_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = nbformat.read(ROOT / "notebooks/train_and_sample.ipynb", as_version=4).cells
    [settings] = [cell.source for cell in cells if "\nDRIVE = " in cell.source]
    mounted: list[str] = []
    colab = SimpleNamespace(drive=SimpleNamespace(mount=mounted.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    for typed, runs in (("", Path("work").absolute()), ("a", Path("/content/drive/MyDrive/a"))):
        names: dict[str, Any] = {}
        exec(settings.replace('DRIVE = ""', f'DRIVE = "{typed}"'), names)
        assert names["RUNS"] == runs
    assert mounted == ["/content/drive"]


def small_checkout(folder: Path) -> None:
    """What a notebook looks for: the code as it is, and configurations made small."""
    (folder / "configs").mkdir(parents=True)
    for name in ("sheepop_jax", "requirements"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "configs").glob("*.py"):
        small = SMALL if path.stem == "quickstart" else ""
        (folder / "configs" / path.name).write_text(path.read_text() + small)


@pytest.mark.parametrize(
    ("name", "least_images"), [("train_and_sample", 1), ("inside_the_model", 10)]
)
def test_notebook_runs(
    name: str, least_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell runs, and the pictures are there; what must be equal, the cells check."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this very interpreter
    small_checkout(tmp_path / "checkout")
    (tmp_path / "text.txt").write_text(TEXT)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # as on a machine that has never run it
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device: the suite asks for eight
        "SHEEPOP_STEPS": "4",
        "SHEEPOP_TEXT": str(tmp_path / "text.txt"),
        "SHEEPOP_WORK": str(tmp_path / "work"),
    }
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)
    assert images(notebook) >= least_images
    assert (tmp_path / "work").is_dir()
    assert not (tmp_path / "checkout" / ".git").exists()  # no clone
