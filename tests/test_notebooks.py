"""Both notebooks, run from the first cell to the last on a CPU, small, in an empty directory."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 240  # on a busy machine; the whole takes less than one minute


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least_images"), [("train_and_sample", 1), ("inside_the_model", 10)]
)
def test_notebook_runs(
    name: str, least_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell runs, and the pictures are there; what must be equal, the cells check."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this very interpreter
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device: the suite asks for eight
        "SHEEPOP_STEPS": "6",
        "SHEEPOP_TEXT": str(ROOT / "sheepop_jax"),
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
    assert {path.name for path in tmp_path.iterdir()} == {"ipython", "work"}  # and no clone
