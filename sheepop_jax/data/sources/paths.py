"""Finds the files of a path: a file, a directory, a glob, or a comma-separated list."""

import collections
import errno
import glob
import hashlib
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pathspec

from sheepop_jax.config.data import FILE_SUFFIXES, inner_suffix
from sheepop_jax.errors import InputError

# Third-party or generated directories.
VENDORED = frozenset(
    "node_modules bower_components venv virtualenv __pycache__ site-packages dist-packages".split()
)
# A file may change twice within one tick of the file system clock: newer files are read again.
_SETTLED_SECONDS = 2.0
# Databases that are not read, and what exports their rows.
_MYSQL = "mysql --batch -e 'SELECT text FROM documents' DATABASE > rows.tsv"
_EXPORTS = {
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "mongodb": "mongoexport --collection=NAME --out=rows.jsonl DATABASE",
    "mssql": "exporting the rows to CSV",
    "oracle": "exporting the rows to CSV",
}
_MOST_KINDS = 5  # other suffixes that are listed each
_MOST_NAMED = 20  # that are named at all


@dataclass
class Found:
    """Files in reading order, and the skipped ones counted by reason."""

    files: list[tuple[str, Path]] = field(default_factory=list)  # (id, path)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass(frozen=True)
class Walk:
    """The rules that select files in a directory.

    Attributes:
        suffixes: lower case, with the dot; None selects all. One of `COMPRESSED` may follow.
        left_out: names of directories to skip.
        gitignore: whether to apply `.gitignore` files in the directory.
        max_file_bytes: skip larger files; 0 means no limit.
    """

    suffixes: Collection[str] | None
    left_out: Collection[str] = VENDORED
    gitignore: bool = True
    max_file_bytes: int = 0

    def wants(self, path: Path) -> bool:
        return self.suffixes is None or inner_suffix(path) in self.suffixes


def find_files(name: str, spec: str, walk: Walk) -> Found:
    """Finds the files of `spec`, without repeats.

    Args:
        name: the configuration field, for messages.
        spec: a file, a directory, a glob, or several separated by commas.
        walk: the rules for directories; a file named explicitly is always included.

    Raises:
        InputError: a path does not exist, cannot be read, or has no matching file.
    """
    # A file name may contain a comma, so try the whole string as a path first.
    whole = os.path.lexists(os.path.expanduser(spec))
    found = Found()
    for item in [spec] if whole else filter(None, map(str.strip, spec.split(","))):
        if "://" in item and not whole:
            expected = "a path (text is read from http and https URLs, tables from any)"
            hint = "downloading it and passing its path"
            if export := export_of(item.partition("://")[0]):
                expected = "a path, or a URL sqlite:///FILE or postgresql://USER@HOST/DATABASE"
                hint = export
            raise InputError(name, item, expected, hint)
        path = Path(os.path.expanduser(item))
        if glob.has_magic(item) and not os.path.lexists(path):
            found.files += _expand_glob(name, item, found.skipped)
            continue
        mode = _mode(name, path)
        if stat.S_ISDIR(mode):
            inside = walk_files(name, path, walk)
            if not inside.files:
                raise _nothing_in(name, path, walk, inside)
            found.files += inside.files
            found.skipped += inside.skipped
        elif stat.S_ISREG(mode):
            found.files.append((path.name, path))
        else:
            got = f"{item} (a pipe, socket or device)"
            raise InputError(name, got, "a regular file or a directory")
    if not found.files:
        raise InputError(name, spec, "a file, a directory or a glob")
    first: dict[str, tuple[str, Path]] = {}
    for id_and_path in found.files:
        first.setdefault(os.path.realpath(id_and_path[1]), id_and_path)
    found.files = list(first.values())
    return found


def export_of(scheme: str) -> str:
    """What exports the rows of a database that is not read, by the scheme of its URL; else ""."""
    return _EXPORTS.get(scheme.partition("+")[0].lower(), "")


def split_urls(spec: str, schemes: Collection[str] | None = None) -> tuple[str, list[str]]:
    """Splits a comma-separated list into its local part and its URLs (of `schemes`, if given)."""
    if "://" not in spec or os.path.lexists(os.path.expanduser(spec)):
        return spec, []
    items = list(filter(None, map(str.strip, spec.split(","))))
    urls = [
        item
        for item in items
        if "://" in item and (schemes is None or item.partition("://")[0].lower() in schemes)
    ]
    return ",".join(item for item in items if item not in urls), urls


def walk_files(name: str, root: Path, walk: Walk) -> Found:
    """Finds regular files below `root`, by relative path; does not follow directory links."""

    def refuse(error: OSError) -> None:
        got = f"{error.filename} ({error.strerror})"
        raise InputError(name, got, "a readable directory")

    found = Found()
    others: collections.Counter[str] = collections.Counter()
    ignores: dict[Path, list[tuple[Path, pathspec.GitIgnoreSpec]]] = {}
    for parent, directories, names in os.walk(root, onerror=refuse):
        inside = Path(parent)
        rules = ignores.get(inside.parent, []) if inside != root else []
        if walk.gitignore and ".gitignore" in names and os.path.isfile(inside / ".gitignore"):
            rules = [*rules, (inside, _read_gitignore(name, inside / ".gitignore"))]
        ignores[inside] = rules
        for directory in list(directories):
            # pyvenv.cfg marks a virtual environment of any name.
            environment = os.path.lexists(inside / directory / "pyvenv.cfg")
            if directory.startswith(".") or directory in walk.left_out or environment:
                directories.remove(directory)
                found.skipped["hidden or vendored directories"] += 1
            elif _ignored(rules, inside / directory, "/"):
                directories.remove(directory)
                found.skipped["directories ignored by .gitignore"] += 1
            elif os.path.islink(inside / directory):  # os.walk does not follow them
                found.skipped["links to directories"] += 1
        for file in names:
            path = inside / file
            size = _regular_size(name, path)
            if file.startswith(".") or size is None:
                found.skipped["hidden or special files"] += 1
            elif _ignored(rules, path, ""):
                found.skipped["files ignored by .gitignore"] += 1
            elif not walk.wants(path):
                (found.skipped if _source(path) else others)[_kind(path)] += 1
            elif 0 < walk.max_file_bytes < size:
                found.skipped["files larger than data.max_file_bytes"] += 1
            else:
                found.files.append((path.relative_to(root).as_posix(), path))
    found.files.sort()
    by_count = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    found.skipped.update(dict(by_count[:_MOST_KINDS]))
    if rest := by_count[_MOST_KINDS:]:
        names = [f"{kind.removesuffix(' files')} x {n}" for kind, n in rest]
        if len(by_count) > _MOST_NAMED:
            names[_MOST_NAMED - _MOST_KINDS :] = ["..."]
        reason = f"files of other types ({', '.join(names)})"
        found.skipped[reason] = sum(n for _, n in rest)
    return found


def signature_of(paths: Iterable[Path], options: object) -> str:
    """Hashes the files' paths, sizes and times, and the options that affect their text.

    "" if a file is missing or has changed in the last two seconds.
    """
    digest = hashlib.sha256(repr(options).encode())
    now = time.time()
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            return ""
        # Include ctime: programs can reset mtime, but only the kernel sets ctime.
        if now - max(found.st_mtime, found.st_ctime) < _SETTLED_SECONDS:
            return ""
        state = (os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(repr(state).encode(errors="surrogateescape"))
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if unknown (reading it reports the error)."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _source(path: Path) -> str:
    """The other source that reads such a file, or ""."""
    kind = FILE_SUFFIXES.get(inner_suffix(path), "")
    return kind if kind in ("json", "csv", "parquet", "pdf") else ""


def _kind(path: Path) -> str:
    """The reason for skipping a file: its suffix, or the source that reads it."""
    if kind := _source(path):
        return f"{kind} files (data.source={kind} reads them)"
    inner, last = inner_suffix(path), path.suffix.lower()
    suffix = inner if inner == last else inner + last  # .tar.gz
    return f"{suffix or 'suffixless'} files"


def _regular_size(name: str, path: Path) -> int | None:
    """Bytes of a regular file; None for a pipe, a broken link, a loop of links."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise InputError(name, f"{path} ({error.strerror})", "a readable file") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _mode(name: str, path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        expected = "an existing file, directory or glob"
        raise InputError(name, str(path), expected, f"`{name}=PATH`") from None
    except OSError as error:  # a symlink loop, no permission, a name too long
        got = f"{path} ({error.strerror})"
        raise InputError(name, got, "a readable file or directory") from error


def _expand_glob(
    name: str, pattern: str, skipped: collections.Counter[str]
) -> list[tuple[str, Path]]:
    """The regular files that match; `*` and `**` skip hidden and vendored directories."""
    parts = Path(os.path.expanduser(pattern)).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = _matching(root, parts[fixed:], skipped)
    regular = [match for match in matches if _regular_size(name, match) is not None]
    named = [(match.relative_to(root).as_posix(), match) for match in regular]
    below = {parent for inside, _ in named for parent in Path(inside).parents} - {Path()}
    left_out = {
        inside
        for inside in below
        if inside.name in VENDORED or os.path.lexists(root / inside / "pyvenv.cfg")
    }
    files = sorted((n, p) for n, p in named if left_out.isdisjoint(Path(n).parents))
    if not files:
        raise InputError(name, pattern, "a pattern that matches a file")
    return files


def _matching(
    root: Path, parts: tuple[str, ...], skipped: collections.Counter[str]
) -> Iterator[Path]:
    """Like `glob.glob` below `root`, but `**` does not follow directory links (they may loop)."""
    if "**" not in parts:
        yield from map(Path, glob.glob(os.path.join(glob.escape(str(root)), *parts)))
        return
    at = parts.index("**")
    for top in _matching(root, parts[:at], skipped) if at else [root]:
        for directory, inside, files in os.walk(top):
            inside[:] = [name for name in inside if not name.startswith(".")]
            links = sum(os.path.islink(os.path.join(directory, name)) for name in inside)
            if links:
                skipped["links to directories"] += links
            if rest := parts[at + 1 :]:
                yield from _matching(Path(directory), rest, skipped)
            else:
                yield from (Path(directory, name) for name in files if not name.startswith("."))


def _nothing_in(name: str, root: Path, walk: Walk, inside: Found) -> InputError:
    """The error for a directory without matching files; lists the files it has."""
    anything = replace(walk, suffixes=None, max_file_bytes=0)
    there = collections.Counter(path.suffix for _, path in walk_files(name, root, anything).files)
    most = there.most_common(_MOST_KINDS)
    found = ", ".join(f"{suffix or 'no suffix'} x {count}" for suffix, count in most)
    passed = ", ".join(f"{count} {reason}" for reason, count in inside.skipped.items())
    wanted = "text files (.txt, .md, .py, ...)"
    if walk.suffixes is not None and len(walk.suffixes) < 10:
        wanted = f"{', '.join(sorted(walk.suffixes))} files"
    hint = f"a glob such as '{root}/**/*{most[0][0]}'" if most else ""
    if any(".gitignore" in reason for reason in inside.skipped):
        hint = "`data.gitignore=False` to read ignored files"
    got = f"{root} (files found: {found or 'none'}; skipped: {passed or 'none'})"
    return InputError(name, got, f"a directory with {wanted}", hint)


def _read_gitignore(name: str, path: Path) -> pathspec.GitIgnoreSpec:
    try:
        # As in git: a byte order mark is not part of a pattern, and only \n ends a line.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        return pathspec.GitIgnoreSpec.from_lines(text.split("\n"))
    except OSError as error:
        raise InputError(name, f"{path} ({error.strerror})", "a readable file") from error
    except (ValueError, re.error) as error:  # a pattern that git rejects too
        got = f"{path} ({error})"
        raise InputError(name, got, "valid patterns", "`data.gitignore=False`") from error


def _ignored(
    rules: list[tuple[Path, pathspec.GitIgnoreSpec]], path: Path, directory_mark: str
) -> bool:
    """Whether the path is ignored; the nearest `.gitignore` with a matching pattern decides."""
    for where, spec in reversed(rules):
        said = spec.check_file(path.relative_to(where).as_posix() + directory_mark).include
        if said is not None:
            return bool(said)
    return False
