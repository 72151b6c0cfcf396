"""What a checkpoint's directory holds, file by file: recorded when it is saved, compared later."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are not those that were saved; the message names the file."""


def write_manifest(path: Path, files: dict[str, str], step: int, figures: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint that has all its other files."""
    manifest = {"format": FORMAT, "step": step, "figures": figures, "files": files}
    with path.open("w") as file:
        json.dump({**manifest, "sha256": _own_digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(root: Path, step: int) -> dict[str, Any]:
    """What was recorded with a step: `step`, `figures`, `files`.

    Raises:
        DamagedCheckpoint: there is no readable manifest.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest.pop("sha256") != _own_digest(manifest) or manifest["step"] != step:
            raise DamagedCheckpoint(f"{path}: its content has changed")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path}: format {manifest['format']}, not {FORMAT}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None


def verify(root: Path, step: int) -> dict[str, Any]:
    """Compares every file with the manifest, which is returned.

    A name that only the manifest knows is never opened, wherever it leads.

    Raises:
        DamagedCheckpoint: names the first file that is missing, added or changed.
    """
    manifest = read_manifest(root, step)
    present = file_names(root)
    for name in present:
        if name not in manifest["files"]:
            raise DamagedCheckpoint(f"{root / name}: not a file of this checkpoint")
    for name, recorded in manifest["files"].items():
        if name not in present:
            raise DamagedCheckpoint(f"{root / name}: missing")
        if _digest(root / name) != recorded:
            raise DamagedCheckpoint(f"{root / name}: its content has changed")
    return manifest


def digests(root: Path) -> dict[str, str]:
    """Relative name → SHA-256, of every file of a checkpoint but the manifest."""
    return {name: _digest(root / name) for name in file_names(root)}


def file_names(root: Path) -> list[str]:
    """Relative names of all files of a checkpoint but the manifest."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a disk that cannot read it any more
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
