"""The `data` section: text sources, tokenizer, packing and validation split."""

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sheepop_jax.config.validation import Section
from sheepop_jax.errors import InputError
from sheepop_jax.files import cache_directory

# Fields that each part of a mixture may set; all other fields apply to the whole mixture.
SOURCE_FIELDS = (
    "source",
    "path",
    "val_path",
    "name",
    "subset",
    "text_column",
    "join_rows",
    "query",
    "encoding_errors",
    "gitignore",
    "max_file_bytes",
    "max_bytes",
)
# For each source: the fields that have an effect on it; `source` and `max_bytes` always have one.
_WALK = ("path", "val_path", "gitignore", "max_file_bytes")
_TABLE = (*_WALK, "text_column", "join_rows", "encoding_errors")
FIELDS_OF: dict[str, tuple[str, ...]] = {
    "files": (*_WALK, "encoding_errors"),
    "json": _TABLE,
    "csv": _TABLE,
    "quoted_tsv": _TABLE,
    "parquet": _TABLE,
    "hub": ("name", "subset", "text_column", "join_rows", "encoding_errors"),
    "pdf": _WALK,
    "sql": ("path", "query", "text_column", "encoding_errors"),
    "stdlib": (),
}
SOURCES = tuple(FIELDS_OF)
UNUSED_BY_SOME = frozenset(SOURCE_FIELDS) - {"source", "max_bytes"}
TABLE_SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",  # rows if named explicitly; plain text within a directory
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
FILE_SUFFIXES = TABLE_SUFFIXES | {".pdf": "pdf"}
FILE_SUFFIXES |= dict.fromkeys((".db", ".db3", ".sqlite", ".sqlite3"), "sql")
# Sources whose rows can be conversations (`format="chat"`), and the templates for them by name.
CHAT_SOURCES = ("json", "parquet", "hub")
CHAT_TEMPLATES = ("sheepop", "chatml", "llama3", "qwen")
CHAT_FIELDS = ("broken_rows", "chat_template", "chat_loss", "long_conversations")
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})


def inner_suffix(path: Path) -> str:
    """The suffix in lower case, ignoring a compression suffix: `.txt` for a.TXT.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


class Part(NamedTuple):
    """One source of a mixture; a corpus without a mixture has one part."""

    name: str
    weight: float
    config: "DataConfig"


@dataclass(frozen=True)
class DataConfig(Section):
    """Text sources, tokenizer, packing and validation split; see configs/base.py."""

    source: str
    path: str
    val_path: str
    name: str
    subset: str
    text_column: str
    join_rows: bool
    query: str
    mixture: dict[str, dict[str, Any]]
    format: str
    broken_rows: str
    chat_template: str
    chat_loss: str
    long_conversations: str
    encoding_errors: str
    gitignore: bool
    max_file_bytes: int
    max_bytes: int
    tokenizer: str
    vocab_size: int
    tokenizer_sample_bytes: int
    seq_len: int
    packing: str
    document_mask: bool
    val_fraction: float
    val_split: str
    cache_dir: str

    prefix = "data."

    def __post_init__(self) -> None:
        self.one_of("source", "auto", *SOURCES)
        self.one_of("encoding_errors", "strict", "replace", "skip")
        self.one_of("val_split", "auto", "source", "document", "tail", "tails")
        self.one_of("packing", "stream", "one_per_window", "whole")
        self.one_of("format", "text", "chat")
        self.one_of("broken_rows", "error", "skip")
        self.one_of("chat_template", "", *CHAT_TEMPLATES)
        self.one_of("chat_loss", "assistant", "all")
        self.one_of("long_conversations", "drop", "truncate")
        self.at_least(1, "seq_len", "tokenizer_sample_bytes")
        self.at_least(0, "max_file_bytes", "max_bytes", "vocab_size")
        self.require(0 < self.val_fraction < 1, "val_fraction", "a number in (0, 1)", "0.1 for 10%")
        self.require(self.tokenizer != "", "tokenizer", "bpe, char or the path of a tokenizer.json")
        if self.tokenizer == "bpe":
            self.require(
                self.vocab_size >= 257, "vocab_size", "at least 257 (256 bytes and end-of-text)"
            )
        # The BPE trainer allocates memory for the whole vocabulary up front.
        self.require(self.vocab_size <= 2**20, "vocab_size", "at most 2**20")
        if self.is_chat:
            self._check_chat()
        else:
            expected = "stream or one_per_window with data.format=text"
            self.require(self.packing != "whole", "packing", expected)
        if self.mixture:
            for field in ("path", "name", "query", "val_path"):
                self.require(getattr(self, field) == "", field, '"" with data.mixture')
            self._check_mixture()
            return
        source = self.resolved_source
        if source == "hub":
            self.require(self.name != "", "name", "the name of a Hugging Face dataset")
        elif source != "stdlib":
            self.require(self.path != "", "path", "a file, a directory or a glob")
        if "text_column" in FIELDS_OF[source]:
            self.require(self.text_column != "", "text_column", "the name of the text column")
        if source == "sql":
            self.require(self.query != "", "query", "a SELECT that returns the text column")
        if self.val_path:
            self.require(self.path != "", "val_path", '"" unless data.path is set')
            ruled_out = source in ("sql", "stdlib", "hub")
            self.require(not ruled_out, "val_path", f'"" with data.source={source}')

    def _check_chat(self) -> None:
        with_chat = "with data.format=chat"
        expected = f"whole or one_per_window {with_chat}: no conversation is cut"
        self.require(self.packing != "stream", "packing", expected, "`data.packing=whole`")
        expected = f"auto, source or document {with_chat}: no conversation is cut"
        self.require(not self.val_split.startswith("tail"), "val_split", expected)
        self.require(not self.join_rows, "join_rows", f"False {with_chat}")
        self.require(
            self.chat_template != "" or self.tokenizer not in ("bpe", "char"),
            "chat_template",
            f"one of {', '.join(CHAT_TEMPLATES)} for a new tokenizer",
        )
        if not self.mixture:
            self.require(
                self.resolved_source in CHAT_SOURCES,
                "format",
                f"text with data.source={self.resolved_source}; conversations are rows",
                f"`data.source` of {', '.join(CHAT_SOURCES)}, such as `data.path=FILE.jsonl`",
            )

    @property
    def is_chat(self) -> bool:
        """Whether the text is conversations."""
        return self.format == "chat"

    def _check_mixture(self) -> None:
        for name, fields in self.mixture.items():
            where = f"data.mixture.{name}"
            if not isinstance(fields, dict) or "weight" not in fields:
                expected = "a section with a weight and source fields"
                raise InputError(where, fields, expected, '{"weight": 1.0, "path": "a/"}')
            for field, value in fields.items():
                if field != "weight" and field not in SOURCE_FIELDS:
                    near = difflib.get_close_matches(field, SOURCE_FIELDS, n=1)
                    hint = near[0] if near else "one of " + ", ".join(SOURCE_FIELDS)
                    expected = "weight or a source field"
                    raise InputError(f"{where}.{field}", value, expected, hint)
                kind = float if field == "weight" else type(getattr(self, field))
                if type(value) is not kind and not (kind is float and type(value) is int):
                    expected = f"a value of type {kind.__name__}"
                    raise InputError(f"{where}.{field}", value, expected)
            if not 0 < fields["weight"] <= sys.float_info.max:
                raise InputError(f"{where}.weight", fields["weight"], "a positive finite number")
        weights = {name: float(fields["weight"]) for name, fields in self.mixture.items()}
        total = sum(weights.values())
        if total > sys.float_info.max:
            largest = max(weights, key=lambda name: weights[name])
            where = f"data.mixture.{largest}.weight"
            raise InputError(where, weights[largest], "weights whose sum is finite")
        for part in self.parts:  # building a part validates it
            if part.config.resolved_source == "stdlib" and part.config.source == "auto":
                expected = "a path, a name or source=stdlib"
                raise InputError(f"data.mixture.{part.name}", "no source", expected)

    @property
    def cache_path(self) -> Path:
        """The directory of token shards and downloads."""
        if self.cache_dir:
            return Path(os.path.expanduser(self.cache_dir)).resolve()
        return cache_directory()

    @property
    def parts(self) -> list[Part]:
        """The sources, with weights that sum to 1.

        Raises:
            InputError: a source is invalid.
        """
        if not self.mixture:
            return [Part("", 1.0, self)]
        total = sum(float(fields["weight"]) for fields in self.mixture.values())
        parts = []
        for name, fields in self.mixture.items():
            own = {field: value for field, value in fields.items() if field != "weight"}
            try:
                config = dataclasses.replace(self, mixture={}, **own)
            except InputError as error:
                raise InputError(f"data.mixture.{name}", str(error), "a valid source") from None
            parts.append(Part(name, float(fields["weight"]) / total, config))
        return parts

    @property
    def resolved_source(self) -> str:
        """Resolves `source="auto"` from the names alone; a directory counts as files.

        Uses the suffix or URL scheme of `path` if set, else `name`, else the standard library.
        """
        if self.source != "auto":
            return self.source
        if not self.path:
            return "hub" if self.name else "stdlib"
        scheme, _, _ = self.path.partition("://")
        if scheme in ("sqlite", "postgresql", "postgres"):
            return "sql"
        kinds = set()
        whole = os.path.lexists(os.path.expanduser(self.path))  # a file name may contain a comma
        for item in [self.path] if whole else filter(None, map(str.strip, self.path.split(","))):
            # Drop the query of a URL; a file name may contain a question mark.
            path = Path(item.partition("?")[0] if "://" in item else item)
            kinds.add(FILE_SUFFIXES.get(inner_suffix(path), "files"))
        return kinds.pop() if len(kinds) == 1 else "files"
