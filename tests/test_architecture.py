"""Every file's imports, held against the table of allowed arrows; read with `ast`, never run."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sheepop_jax"

# For each package or module: what else of the project it may import. Every one may import itself,
# and the modules of SHARED. A file belongs to the longest entry that its dotted name starts with.
ARROWS: dict[str, set[str]] = {
    "sheepop_jax": set(),  # the package's own __init__: importing it must cost nothing
    "sheepop_jax.errors": set(),
    "sheepop_jax.faults": set(),
    "sheepop_jax.files": set(),
    "sheepop_jax.formatting": set(),
    "sheepop_jax.progress": set(),
    "sheepop_jax.config": set(),
    "sheepop_jax.runtime": set(),
    "sheepop_jax.data": {"config"},
    "sheepop_jax.model": {"config"},
    "sheepop_jax.checkpoint": {"config", "data", "faults", "model", "runtime.distributed"},
    "sheepop_jax.training": {"checkpoint", "config", "data", "faults", "model", "runtime"},
    "sheepop_jax.generation": {"config", "data.tokenizer", "model"},
    "sheepop_jax.evaluation": {"config", "data", "model"},
    "sheepop_jax.scoring": {"model"},
    # A leaf: it may look at all that a run needs, and only `pipeline` and `cli` import it.
    "sheepop_jax.planning": {"checkpoint.state", "config", "model", "runtime.devices", "training"},
    # A leaf: it reads finished runs, and only `cli` imports it.
    "sheepop_jax.interop": {"checkpoint", "config", "data", "generation", "model", "scoring"},
    # A leaf: it answers requests with a run's model, and only `cli` imports it.
    "sheepop_jax.serving": {"checkpoint", "config", "data", "generation", "model", "scoring"},
    "sheepop_jax.pipeline": {
        "checkpoint",
        "config",
        "data",
        "evaluation",
        "generation",
        "model",
        "planning",
        "runtime",
        "training",
    },
    "sheepop_jax.cli": {
        "checkpoint",
        "config",
        "data",
        "evaluation",
        "generation",
        "interop",
        "model",
        "pipeline",
        "planning",
        "runtime",
        "scoring",
        "serving",
        "training",
    },
    "sheepop_jax.__main__": {"cli"},
    "train": {"cli"},
    "sample": {"cli"},
    "configs": set(),
}
SHARED = {"errors", "files", "formatting", "progress"}

COMMAND_LINE = ("sheepop_jax.cli", "sheepop_jax.config.loading", "configs")
WITH_JAX = tuple(
    f"sheepop_jax.{name}"
    for name in (
        "checkpoint",
        "cli",
        "evaluation",
        "generation",
        "interop",
        "model",
        "pipeline",
        "planning",
        "runtime",
        "scoring",
        "training",
    )
)

# Libraries that only some packages may import; any other library is free to all.
OWNERS: dict[str, tuple[str, ...]] = {
    "absl": COMMAND_LINE,
    "argparse": COMMAND_LINE,
    "ml_collections": COMMAND_LINE,
    "orbax": ("sheepop_jax.checkpoint.storage",),
    "jax": WITH_JAX,  # not data and config: those are numpy's
    "flax": WITH_JAX,
    "optax": ("sheepop_jax.training", "sheepop_jax.planning"),
    # Loading one of these runs code that the file brings along.
    "pickle": (),
    "dill": (),
    "cloudpickle": (),
    # It asks transformers for safetensors only.
    "torch": ("sheepop_jax.interop.transformers_model",),
    "joblib": (),
    "shelve": (),
    "marshal": (),
}

# The modules of the project that sampling loads, without the empty __init__ files. A new one slows
# every `sample.py` and every opened run: add it only where sampling needs it.
SAMPLING_MODULES = """
    checkpoint.checkpoints checkpoint.run checkpoint.storage cli.common cli.sample config.data
    config.schema config.validation data.tokenizer errors files generation.batch
    generation.decode generation.engine generation.requests generation.sampling generation.text
    model.attention model.dropout model.feed_forward model.kv_cache model.linear model.norms
    model.partitioning model.positions model.transformer
    runtime.allocator runtime.devices runtime.platform runtime.xla_flags
""".split()

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

    `from sheepop_jax import files` counts as `sheepop_jax.files` where that is a module, and as
    `sheepop_jax` where it is a name in the package itself.
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
    allowed = {f"{PACKAGE}.{target}" for target in ARROWS[room] | SHARED} - {name} | {room}
    found = []
    for target in sorted(imports(name, tree, modules or set(SOURCES))):
        if inside(target, PACKAGE):
            if target == PACKAGE or not any(inside(target, a) for a in allowed):
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


def test_sampling_loads_what_sampling_needs() -> None:
    """In a new process, up to a command that has everything but a run."""
    program = """
import contextlib, json, sys
from sheepop_jax.cli import sample
with contextlib.suppress(SystemExit):
    sample.main(["--ckpt", "nowhere", "--platform", "cpu"])
modules = [name for name in sys.modules if name.startswith("sheepop_jax.")]
code = [name for name in modules if not hasattr(sys.modules[name], "__path__")]
others = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([sorted(name.removeprefix("sheepop_jax.") for name in code), sorted(others)]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules, libraries = json.loads(result.stdout)
    assert modules == sorted(SAMPLING_MODULES)
    assert len(modules) <= 30
    heavy = {"datasets", "grain", "matplotlib", "optax", "pandas", "pyarrow", "pypdf", "sqlalchemy"}
    assert not heavy & set(libraries)


def test_every_module_imports_without_what_only_linux_has() -> None:
    """In a new process: our imports of these modules fail, and Linux's functions are gone."""
    program = """
import builtins, importlib, os, pkgutil, sys
missing = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
real = builtins.__import__
def guarded(name, globals=None, *rest):
    if name in missing and (globals or {}).get("__name__", "").startswith("sheepop_jax"):
        raise ModuleNotFoundError(name=name)
    return real(name, globals, *rest)
import jax, numpy, ctypes, sheepop_jax
builtins.__import__ = guarded
for name in ("sched_getaffinity", "getuid", "posix_fadvise"):
    delattr(os, name)
for module in pkgutil.walk_packages(sheepop_jax.__path__, "sheepop_jax."):
    # The last needs an extra, wandb, and nothing else that is not everywhere.
    if not module.name.endswith(("__main__", "wandb_process")):
        importlib.import_module(module.name)
from sheepop_jax.files import try_lock
print(try_lock(sys.stdin))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


@pytest.mark.parametrize("package", sorted((ROOT / PACKAGE).rglob("__init__.py")), ids=str)
def test_packages_hold_no_code(package: Path) -> None:
    """So that importing one module loads no other."""
    tree = ast.parse(package.read_text(encoding="utf-8"))
    names = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if package.parent.name == PACKAGE:  # the version, which is no import
        names = [node for node in names if not isinstance(node, ast.Assign)]
    assert not names
