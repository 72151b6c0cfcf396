"""What the documents name exists: links, headings, files, functions of the formulas."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from configs import base

ROOT = Path(__file__).resolve().parent.parent

REFERENCE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def defined(tree: ast.Module) -> set[str]:
    """Dotted names of all functions and classes, those inside others included."""
    names = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return names


def references(text: str) -> list[tuple[str, str]]:
    """Every `path: name` of a document, once."""
    return sorted(set(REFERENCE.findall(text)))


def missing(root: Path, text: str) -> list[str]:
    """References to a file or a name that is not there."""
    found = []
    for path, name in references(text):
        file = root / path
        if not file.is_file():
            found.append(f"{path}: no such file")
        elif name not in defined(ast.parse(file.read_text(encoding="utf-8"))):
            found.append(f"{path}: no {name}")
    return found


def documents() -> list[Path]:
    """The Markdown files that belong to the repository; those git ignores do not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if listed.returncode:  # an unpacked archive has no git
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.md")]
        names += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")]
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


def anchors(path: Path) -> set[str]:
    """What `#…` may name in a document, as GitHub makes it from the headings."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        text = LINK.sub(lambda link: link[1], heading).lower().replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number = next(
            n for n in range(len(found) + 1) if (f"{slug}-{n}" if n else slug) not in found
        )
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(path: Path) -> list[str]:
    """Links of a document to files that are not there, or to headings that are not in them."""
    broken = []
    for _, target in LINK.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path: Path) -> None:
    """Its links and their anchors, and the functions and classes that it places in a file."""
    assert broken_links(path) == []
    assert missing(ROOT, path.read_text(encoding="utf-8")) == []


def test_design_names_every_package_and_module_of_the_top() -> None:
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / "sheepop_jax").iterdir()} - {"__init__", "__main__"}
    names -= {"__pycache__"}
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)} == set()


def test_broken_links_are_seen(tmp_path: Path) -> None:
    """Code blocks and other sites are not looked at."""
    (tmp_path / "there.md").write_text(
        "# A `word`, and more\n```\n# no heading\n```\n# Two\n# Two\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](there.md) [b](there.md#a-word-and-more) [c](#here) [d](https://x.org/y)\n"
        "[e](gone.md) [f](#gone) [g](there.md#no-heading) [h](there.md#two-1)\n"
        "```\n[i](in_code.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "#gone", "there.md#no-heading"]


def test_missing_names_are_seen(tmp_path: Path) -> None:
    """Methods and inner functions count; imports, wrong places and wrong files do not."""
    source = "import os\nclass A:\n    def f(self):\n        def g(): pass\n"
    (tmp_path / "a.py").write_text(source)
    assert missing(tmp_path, "`a.py: A` `a.py: A.f` `a.py: A.f.g`") == []
    wrong = "`a.py: f` `a.py: os` `b.py: A`"
    assert missing(tmp_path, wrong) == ["a.py: no f", "a.py: no os", "b.py: no such file"]


def test_the_configuration_page_has_every_field_and_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", text, re.MULTILINE)
    defaults = base.get_config().copy_and_resolve_references()
    wanted = {"seed": defaults.seed} | {
        f"{section}.{name}": value.to_dict() if hasattr(value, "to_dict") else value
        for section, fields in defaults.items()
        if section != "seed"
        for name, value in fields.items()
    }
    assert {name: ast.literal_eval(value) for name, value in rows} == wanted
    assert len(rows) == len(wanted)


def test_the_tour_is_short_and_knows_its_lines() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| \[[^\]]+\]\(\.\./([^)]+)\) \| (\d+) \| (.*) \|$", text, re.M)
    assert 6 <= len(rows) <= 7
    total = 0
    for path, lines, names in rows:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert abs(len(source.splitlines()) - int(lines)) <= 5, path
        total += len(source.splitlines())
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in defined(ast.parse(source)), f"{path}: no {name}"
    assert total <= 1500
