"""Every file's imports, held against the table of allowed arrows; read with `ast`, never run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sheepop_jax"

LIBRARY = {
    "config", "data", "evaluation", "generation", "malloc", "model", "processes", "readable", "run",
    "runtime", "training",
}  # fmt: skip  # a list of words

# For each room: the rooms of our own package that it may import besides `errors`, which all may.
# A file belongs to the longest room that its dotted name starts with.
ARROWS: dict[str, set[str]] = {
    "sheepop_jax": set(),  # the package's own __init__: importing it must stay free
    "sheepop_jax.errors": set(),
    "sheepop_jax.faults": set(),
    "sheepop_jax.formatting": set(),
    "sheepop_jax.config.validation": set(),
    "sheepop_jax.config.data": {"rules"},
    "sheepop_jax.config.schema": {"data_config", "rules"},
    "sheepop_jax.runtime.distributed": set(),
    "sheepop_jax.runtime.allocator": set(),
    "sheepop_jax.runtime.platform": {"malloc", "processes"},
    "sheepop_jax.data": {"data", "data_config"},
    "sheepop_jax.model": {"config", "model"},
    "sheepop_jax.training": {
        "config",
        "data",
        "faults",
        "model",
        "processes",
        "readable",
        "training",
    },
    "sheepop_jax.generation": {"config", "model", "generation"},
    "sheepop_jax.evaluation": {"config", "data", "model", "training.loss"},
    "sheepop_jax.checkpoint.run": {"config", "data", "faults", "model", "training"},
    "sheepop_jax.pipeline": LIBRARY,
    "sheepop_jax.cli.common": {"config"},
    "sheepop_jax.commands": LIBRARY | {"cli", "pipeline"},
    "sheepop_jax.__main__": {"cli", "commands", "config"},
    "train": LIBRARY | {"cli", "pipeline"},
    "sample": LIBRARY | {"cli", "pipeline"},
    "configs": set(),
}

PROGRAMS = ("train", "sample", "sheepop_jax.__main__", "sheepop_jax.commands")
COMMAND_LINE = (*PROGRAMS, "sheepop_jax.cli.common", "configs")
# Every room but errors, config, data and the command line. The data are numpy's.
WITH_JAX = tuple(
    f"sheepop_jax.{room}"
    for room in (
        "evaluation",
        "generation",
        "model",
        "pipeline",
        "processes",
        "run",
        "runtime",
        "training",
    )
)

# Libraries that only some rooms may import; any other library is free to all.
OWNERS: dict[str, tuple[str, ...]] = {
    "absl": COMMAND_LINE,
    "argparse": COMMAND_LINE,
    "ml_collections": COMMAND_LINE,
    "orbax": ("sheepop_jax.checkpoint.storage",),
    "jax": (*PROGRAMS, *WITH_JAX),
    "flax": WITH_JAX,
    "optax": ("sheepop_jax.training",),
    # Loading one of these runs code that the file brings along.
    "pickle": (),
    "dill": (),
    "cloudpickle": (),
    "torch": (),
    "joblib": (),
    "shelve": (),
    "marshal": (),
}

DYNAMIC_IMPORTS = ("__import__", "import_module", "importlib.import_module")


def name_of(path: Path) -> str:
    """The dotted name of a file: sheepop_jax/data/loader.py → sheepop_jax.data.loader."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    name_of(path): path
    for pattern in (f"{PACKAGE}/**/*.py", "train.py", "sample.py", "configs/*.py")
    for path in sorted(ROOT.glob(pattern))
}


def inside(name: str, room: str) -> bool:
    """Whether a dotted name is a room or lies in it."""
    return name == room or name.startswith(room + ".")


def imports(name: str, tree: ast.AST, modules: set[str]) -> set[str]:
    """Every dotted name that a module imports, functions' own imports and TYPE_CHECKING included.

    `from sheepop_jax import runtime` counts as `sheepop_jax.runtime.platform` where that is a module, and
    as `sheepop_jax` where it is a name in the package itself.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: counted from the package that holds the file
                is_package = any(m.startswith(name + ".") for m in modules)
                package = name.split(".") if is_package else name.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in modules or any(inside(module, full) for module in modules)
                found.add(full if is_module else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS:
            argument = node.args[0] if node.args else None
            known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            found.add(argument.value if known else "<an import that cannot be read>")
    return found


def problems(name: str, source: str, modules: set[str] | None = None) -> list[str]:
    """All that is wrong with the source of a module called `name`; empty when nothing is."""
    tree = ast.parse(source)
    room = max((r for r in ARROWS if inside(name, r)), key=len)
    if room == PACKAGE and name != PACKAGE:
        return [f"{name}: no room in ARROWS; add one, and draw it in DESIGN.md"]
    allowed = {f"{PACKAGE}.{target}" for target in ARROWS[room] | {"errors"}} - {name}
    found = []
    for target in sorted(imports(name, tree, modules or set(SOURCES))):
        if inside(target, PACKAGE):
            # A program may read the version; nobody below may lean on the package itself.
            fine = any(inside(target, a) for a in allowed) or (
                target == PACKAGE and room in PROGRAMS
            )
            if not fine:
                found.append(f"{name} imports {target}; {room} may import {sorted(allowed)}")
        elif inside(target, "configs"):
            if room != "configs":
                found.append(
                    f"{name} imports {target}; a config is loaded by its path, by --config"
                )
        elif target.split(".")[0] in ("train", "sample", "tests", "benchmarks"):
            found.append(f"{name} imports {target}: nothing imports a program")
        elif target.startswith("<"):
            found.append(f"{name}: {target}")
        else:
            owners = OWNERS.get(target.split(".")[0])
            if owners is not None and not any(inside(name, owner) for owner in owners):
                found.append(f"{name} imports {target}; only {list(owners)} may")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"{name}:{node.lineno}: assert; python -O drops it, raise an InputError")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{name}:{node.value.lineno}: allow_pickle runs code from the file")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"{name}:{node.value.lineno}: trust_remote_code runs a data set's code")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "compile"):
            found.append(f"{name}:{node.lineno}: {ast.unparse(node.func)} runs text as code")
    if source.strip() and not ast.get_docstring(tree):
        found.append(f"{name}: no docstring that says its one job")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_file_obeys_the_architecture(name: str) -> None:
    """Every file of the package, the programs and the configs."""
    found = problems(name, SOURCES[name].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)
