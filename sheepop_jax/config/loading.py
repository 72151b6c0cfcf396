"""Configuration loading: a config file, preset or saved run, plus field overrides."""

import contextlib
import json
import logging
import os
import re
import runpy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from sheepop_jax.config.data import (
    CHAT_FIELDS,
    FIELDS_OF,
    TABLE_SUFFIXES,
    UNUSED_BY_SOME,
    DataConfig,
    inner_suffix,
)
from sheepop_jax.config.initial import FIELD, check_field, free_fields, tokenizer_of
from sheepop_jax.config.schema import Config, saved_fields
from sheepop_jax.config.suggestions import suggest
from sheepop_jax.errors import InputError, is_masked

log = logging.getLogger(__name__)

PRESETS = Path(__file__).resolve().parents[2] / "configs"  # in a checkout and in an installation
# They choose another text than the preset's.
_SOURCE = ("data.source", "data.path", "data.name", "data.subset", "data.query")
_KINDS = {bool: "True or False", int: "an integer", float: "a number"}


def load_config(
    name: str, assignments: Sequence[str] = (), workdir: str | Path | None = None
) -> Config:
    """Loads a configuration, applies overrides, and validates it.

    With `train.init_from`, the model section and the tokenizer are those of that run.

    Args:
        name: path of a config file, which is executed, or name of a preset such as "quickstart".
        assignments: overrides as `section.field=value` strings.
        workdir: the run to train; None is `default_workdir`. If it has started from
            `train.init_from` already, that run is not read again.

    Raises:
        InputError: the file or a field is invalid, or contradicts the run in `train.init_from`.
    """
    path = _find(name)

    def resolve(values: ConfigDict, assigned: Collection[str]) -> ConfigDict:
        return _as_in_run(values, assigned, name, workdir)

    is_preset = Path(path).parent == PRESETS
    return _with_overrides(_run(path), assignments, preset=is_preset, resolve=resolve)


def load_saved_config(run: str | Path, assignments: Sequence[str] = ()) -> Config:
    """Loads the configuration saved in a run directory, applies overrides, and validates it.

    Raises:
        InputError: the directory contains no run, or the file or a field is invalid.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        expected = "the directory of an existing run, or `config` for a new run"
        raise InputError("workdir", str(run), expected, "--config quickstart")
    values = ConfigDict(_read_saved(path))
    given = {assignment.partition("=")[0] for assignment in assignments}
    for field, value in _flatten(values):
        if field not in given and isinstance(value, str) and is_masked(value):
            expected = "the whole URL (its password or token is not saved)"
            raise InputError(field, value, expected, f"`{field}=URL`")
    return _with_overrides(values, assignments, saved=True)


def _read_saved(path: Path) -> dict[str, Any]:
    """The fields of a run's `config.json`, with those added since."""
    try:
        return saved_fields(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        got = f"{kind}{error}"
        raise InputError(str(path), got, "a valid run configuration") from None


def _as_in_run(
    values: ConfigDict, assigned: Collection[str], name: str, workdir: str | Path | None
) -> ConfigDict:
    """Takes the model section and the tokenizer from the run in `train.init_from`, if any.

    Overrides of `free_fields` are kept; any other that contradicts the run is refused. The model
    section of a config file is replaced.
    """
    train = values.get("train")
    run = train.get("init_from") if isinstance(train, ConfigDict) else ""
    if not run or not isinstance(run, str):  # a wrong type is refused by the schema
        return values
    run = train.init_from = str(Path(run))  # without a slash at the end
    path = Path(run) / "config.json"
    # No section `data`, no run yet, or no path at all.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        own = Path(workdir or default_workdir(name, values)) / "config.json"
        started = _read_saved(own)["train"]["init_from"]
        if started and os.path.realpath(started) == os.path.realpath(run):
            path, run = own, started
            train.init_from = started
    if not os.path.isfile(path):  # not Path.is_file, which raises for overlong names
        raise InputError(FIELD, run, "the directory of a run (with config.json)")
    saved = _read_saved(path)
    try:
        config = Config.from_dict(saved)
    except InputError as error:
        raise InputError(str(path), str(error), "a valid run configuration") from None
    model = {**vars(config.model)}
    for field in sorted(name for name in assigned if name.startswith("model.")):
        key, value = field.removeprefix("model."), values.model[field.removeprefix("model.")]
        if key not in free_fields(config.model.position):
            check_field(field, value, model[key], run)
        model[key] = value
    values.model = ConfigDict(model)
    log.info("model section and tokenizer: those of %s, not those of %s", run, name)
    data = values.get("data")
    if isinstance(data, ConfigDict) and "tokenizer" in data:
        trained = data.tokenizer in ("bpe", "char")
        imported = "imported" in json.loads(path.read_text(encoding="utf-8"))
        if trained and "data.tokenizer" in assigned:
            own_kind = f"{run}/tokenizer.json" if imported else config.data.tokenizer
            check_field("data.tokenizer", data.tokenizer, own_kind, run)
        if "data.vocab_size" in assigned:
            own_size = "that of the imported tokenizer" if imported else config.data.vocab_size
            check_field("data.vocab_size", data.get("vocab_size"), own_size, run)
        if trained or "data.tokenizer" not in assigned:
            data.tokenizer = tokenizer_of(run)
        # The schema would suggest a longer context.
        length, longest = data.get("seq_len"), model["max_seq_len"]
        if isinstance(length, int) and length > longest:
            expected = f"at most {longest} (model.max_seq_len of {run})"
            raise InputError("data.seq_len", length, expected, f"`data.seq_len={longest}`")
    return values


def default_workdir(name: str, config: Config | ConfigDict) -> Path:
    """The run directory of a configuration: runs/NAME, or runs/NAME-TEXT for another text.

    A run that starts from another one (`train.init_from`) is runs/NAME-from-RUN.
    A text is another one if its file or dataset is not the one that the config file itself names.
    An existing run of this text in runs/NAME is kept.

    Args:
        name: the config file or preset.
        config: the configuration, with overrides.
    """
    directory = Path("runs") / Path(name).stem
    if config.train.init_from:
        origin = Path(config.train.init_from).resolve().name
        directory = directory.with_name(f"{directory.name}-from-{origin}")
    data, own = config.data, _run(_find(name)).data
    if Path(data.path or data.name).name == Path(own.path or own.name).name:
        return directory
    with contextlib.suppress(InputError):  # no run, or one that cannot be opened
        saved = load_saved_config(directory).data
        if (saved.path, saved.name) == (data.path, data.name):
            return directory
    return directory.with_name(f"{directory.name}-{_text_name(data)}")


def _text_name(data: DataConfig | ConfigDict) -> str:
    """A short name for a text, from the names of its files or its dataset."""
    names = []
    for item in filter(None, map(str.strip, (data.path or data.name).split(","))):
        # Of a URL, neither user and password nor the query.
        shown = item.partition("?")[0].rpartition("@")[2] if "://" in item else item
        path = Path(shown).absolute()
        # The part before the suffix; a glob such as texts/*.txt has none, but its directory does.
        parts = (re.sub(r"[^\w-]+", "_", p.name.partition(".")[0]) for p in (path, path.parent))
        names.append(next((part for part in parts if part.strip("_")), ""))
    return "-".join(filter(None, names))[:40] or "stdlib"


def _with_overrides(
    plain: ConfigDict,
    assignments: Sequence[str],
    *,
    preset: bool = False,
    saved: bool = False,
    resolve: Callable[[ConfigDict, Collection[str]], ConfigDict] = lambda values, assigned: values,
) -> Config:
    """Applies overrides to the fields of a config file or, if `saved`, of a run, and validates.

    The sample prompt of a preset is for the preset's own text. A run was checked when it started.
    """
    values = dict(_flatten(plain))
    assigned = dict(assignment.split("=", 1) for assignment in assignments)
    for field, value in assigned.items():
        if field not in values:
            hint = suggest(field, values) or "one of the fields in configs/base.py"
            raise InputError(field, value, "a field of the configuration", hint)
    prompt = "train.sample_prompt"
    other_text = any(f in _SOURCE or f.startswith("data.mixture.") for f in assigned)
    if preset and other_text and prompt in values and prompt not in assigned:
        assignments = [*assignments, f"{prompt}="]
    try:
        config = Config.from_dict(resolve(_assign(plain, assignments), assigned))
    except (absl_flags.Error, ValueError, TypeError):
        for field, value in assigned.items():  # find the invalid one
            try:
                _assign(plain, [f"{field}={value}"])
            except (absl_flags.Error, ValueError, TypeError):
                kind = type(values[field])
                expected = _KINDS.get(kind, f"a value of type {kind.__name__}")
                raise InputError(field, value, expected) from None
        raise
    if "data.source" not in assigned and not saved:
        _check_tables(config.data)
    _check_unused(config.data, set(assigned), saved)
    return config


def _find(name: str) -> str:
    """Returns the path of a config file or preset."""
    preset = f"{PRESETS}/{name}.py"
    # Not Path.is_file, which raises for overlong names.
    if "/" not in name and not name.endswith(".py") and os.path.isfile(preset):
        return preset
    if not os.path.isfile(name):
        presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.py")))
        raise InputError("config", name, "a config file or a preset", presets)
    return name


def _assign(plain: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """Returns a copy with overrides, parsed by the type of each field."""
    flags = absl_flags.FlagValues()
    argv = ["program", *(f"--config.{word}" for word in assignments)]
    copy = plain.copy_and_resolve_references()
    holder = config_flags.DEFINE_config_dict("config", copy, flag_values=flags, sys_argv=argv)
    flags(argv)
    return holder.value


def _run(path: str) -> ConfigDict:
    """Executes a config file. It is a program, so any exception becomes an InputError."""
    try:
        plain = SimpleNamespace(**runpy.run_path(path, run_name="config")).get_config()
        if not isinstance(plain, ConfigDict):
            raise TypeError(f"get_config() returned {plain!r}, not a ConfigDict")
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("config", path, f"a file with a working get_config() ({got})") from error
    return plain


def _check_tables(config: DataConfig) -> None:
    """Rejects table files that would be read as text, unless `data.source` was assigned."""
    for part in config.parts:
        if part.config.resolved_source != "files":
            continue
        for name in part.config.path.split(","):
            if inner_suffix(Path(name)) in TABLE_SUFFIXES:
                where = f"data.mixture.{part.name}.path" if part.name else "data.path"
                expected = "text files only, since the rows of a table would be read as text"
                hint = "tables alone to read their rows, or `data.source=files` to read plain text"
                raise InputError(where, name.strip(), expected, hint)


def _check_unused(config: DataConfig, assigned: set[str], saved: bool) -> None:
    """Rejects source fields that are set but have no effect on the chosen source.

    If an override chooses another source than the file, the file's fields may be unused; so may
    those of a saved run.
    """
    defaults = _run(f"{PRESETS}/base.py").data
    chosen = saved or not assigned.isdisjoint(
        ("data.source", "data.path", "data.name", "data.mixture")
    )
    sources = {part.name: part.config.resolved_source for part in config.parts}
    used = {field for source in sources.values() for field in FIELDS_OF[source]}
    values = {
        f"data.{field}": getattr(config, field)
        for field in UNUSED_BY_SOME - used
        if f"data.{field}" in assigned or not chosen
    }
    for name, fields in config.mixture.items():
        unused = UNUSED_BY_SOME.intersection(fields).difference(FIELDS_OF[sources[name]])
        values |= {f"data.mixture.{name}.{field}": fields[field] for field in unused}
    if not config.is_chat:
        for field in CHAT_FIELDS:
            value = getattr(config, field)
            if f"data.{field}" in assigned and value != defaults[field]:
                expected = f"{defaults[field]!r}: it has no effect on data.format=text"
                raise InputError(f"data.{field}", value, expected, "`data.format=chat`")
    for where, value in sorted(values.items()):
        default = defaults[where.rpartition(".")[2]]
        if value != default:
            part = where.removeprefix("data.mixture.").partition(".")[0]
            source = sources.get(part) or " and ".join(sorted(set(sources.values())))
            expected = f"{default!r}: it has no effect on data.source={source}"
            hint = "`data.path=''` to read the dataset" if where == "data.name" else ""
            raise InputError(where, value, expected, hint)


def _flatten(config: Any, prefix: str = "") -> list[tuple[str, object]]:
    fields: list[tuple[str, object]] = []
    for name, value in config.items():
        is_section = hasattr(value, "items")
        fields += _flatten(value, f"{prefix}{name}.") if is_section else [(prefix + name, value)]
    return fields
