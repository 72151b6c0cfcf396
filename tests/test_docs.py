"""What the documents name exists: functions of the formulas, files of the tree, links."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MATH = ROOT / "docs" / "math.md"
DESIGN = ROOT / "DESIGN.md"

REFERENCE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


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


def badly_framed(text: str) -> list[str]:
    """Formulas without plain words right before them or a reference right after them."""
    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if line == "$$"]
    if len(fences) % 2:
        return [f"line {fences[-1] + 1}: a formula that does not end"]
    found = []
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        before = lines[first - 2] if first >= 2 and not lines[first - 1] else ""
        after = lines[last + 2] if len(lines) > last + 2 and not lines[last + 1] else ""
        if not before or before.startswith(("#", "$$", "Computed by", "```")):
            found.append(f"line {first + 1}: no plain words before the formula")
        if not (after.startswith("Computed by ") and REFERENCE.search(after)):
            found.append(f"line {last + 1}: no `Computed by` after the formula")
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


def broken_links(path: Path) -> list[str]:
    """Relative links of a document that lead nowhere."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in LINK.findall(text)]
    relative = [t for t in targets if t and not re.match(r"[a-z]+:", t)]
    return [t for t in relative if not (path.parent / t).exists()]


def tree_of(text: str) -> set[str]:
    """The paths of the file tree: the first block under "## The files", indented by two."""
    block = text.split("## The files", 1)[1].split("```")[1]
    paths, parents = set(), [""]
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = parents[depth] + name
        if name.endswith("/"):
            parents[depth + 1 :] = [path]
        paths.add(path)
    return paths


def test_math_names_what_exists() -> None:
    """Every function that a formula points at is in the file that it says."""
    text = MATH.read_text(encoding="utf-8")
    assert len(references(text)) > 30
    assert missing(ROOT, text) == []


def test_every_formula_is_framed() -> None:
    """Plain words, the formula, the function."""
    assert badly_framed(MATH.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links resolve from where the document lies."""
    assert broken_links(path) == []


def test_design_shows_the_files() -> None:
    """The tree has every file of the package, and nothing else."""
    tree = tree_of(DESIGN.read_text(encoding="utf-8"))
    assert [name for name in sorted(tree) if not (ROOT / name).exists()] == []
    package = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("sheepop_jax/**/*.py")}
    assert {p for p in package if not p.endswith("__init__.py")} - tree == set()


FORMULA = "Words:\n\n$$\nx\n$$\n\nComputed by `a.py: f`\n"


@pytest.mark.parametrize(
    "text",
    [
        FORMULA.replace("Words:", "# Heading"),
        FORMULA.replace("Words:\n\n", ""),
        FORMULA.replace("Computed by `a.py: f`", "More words."),
        FORMULA.replace("`a.py: f`", "f"),
        FORMULA + "\nWords:\n\n$$\ny\n",
        FORMULA + "\n$$\ny\n$$\n\nComputed by `a.py: g`\n",
    ],
)
def test_bad_frames_are_seen(text: str) -> None:
    """Each of these has one thing wrong."""
    assert badly_framed(FORMULA) == []
    assert len(badly_framed(text)) == 1


def test_missing_names_are_seen(tmp_path: Path) -> None:
    """Methods and inner functions count; imports, wrong places and wrong files do not."""
    source = "import os\nclass A:\n    def f(self):\n        def g(): pass\n"
    (tmp_path / "a.py").write_text(source)
    assert missing(tmp_path, "`a.py: A` `a.py: A.f` `a.py: A.f.g`") == []
    wrong = "`a.py: f` `a.py: os` `b.py: A`"
    assert missing(tmp_path, wrong) == ["a.py: no f", "a.py: no os", "b.py: no such file"]


def test_broken_links_are_seen(tmp_path: Path) -> None:
    """Code blocks, other sites and places in the same page are not files."""
    (tmp_path / "there.md").write_text("")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#x) [c](#x) [d](https://x.org/y) [e](gone.md)\n"
        "[f](docs/gone.md)\n"
        "```\n[g](in_code.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "docs/gone.md"]


def test_tree_is_read_by_indent() -> None:
    """Folders end in a slash; what follows deeper lies in them."""
    text = "## The files\n\n```\na.py  x\nb/   y\n  c.py\n  d/\n    e.py\nf.py\n```\n"
    assert tree_of(text) == {"a.py", "b/", "b/c.py", "b/d/", "b/d/e.py", "f.py"}
