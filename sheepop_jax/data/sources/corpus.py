"""Opens the corpus that the `data` section describes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sheepop_jax.config.data import FILE_SUFFIXES, DataConfig, inner_suffix
from sheepop_jax.data.sources.conversations import Conversations
from sheepop_jax.data.sources.documents import Corpus, Document
from sheepop_jax.data.sources.files import TEXT_SUFFIXES, open_texts, standard_library
from sheepop_jax.data.sources.hub import Hub, open_hub
from sheepop_jax.data.sources.paths import Walk
from sheepop_jax.data.sources.pdf import open_pdfs
from sheepop_jax.data.sources.sql import open_sql
from sheepop_jax.data.sources.tables import Kind, Table, open_table
from sheepop_jax.errors import InputError

log = logging.getLogger(__name__)


def open_corpus(config: DataConfig, field: str = "data.path") -> Corpus:
    """Opens the source of one part; lists files but reads no text.

    Args:
        config: the source.
        field: the name of `config.path` in messages.

    Raises:
        InputError: the source does not exist, has no text files, or needs a package that is not
            installed.
    """
    match config.resolved_source:
        case "stdlib":
            return standard_library()
        case "hub":
            dataset = open_hub(
                config.name,
                config.subset,
                config.text_column,
                join_rows=config.join_rows,
                encoding_errors=config.encoding_errors,
            )
            return _read_as(config, dataset)
        case "sql":
            return open_sql(config.path, config.query, config.text_column, config.encoding_errors)
    training = _open_path(config, field, config.path)
    if not config.val_path:
        return training
    if _real_path(config.val_path) == _real_path(config.path):
        # Each document would count as a copy of a validation document.
        raise InputError("data.val_path", config.val_path, "files other than those of data.path")
    return _WithValidation(training, _open_path(config, "data.val_path", config.val_path))


def _open_path(config: DataConfig, field: str, spec: str) -> Corpus:
    def walk(suffixes: frozenset[str]) -> Walk:
        return Walk(suffixes, gitignore=config.gitignore, max_file_bytes=config.max_file_bytes)

    match config.resolved_source:
        case "files":
            named = [os.path.expanduser(item.strip()) for item in spec.split(",")]
            if config.source == "auto":
                _refuse_pages(field, named)
            texts = open_texts(
                field,
                spec,
                config.encoding_errors,
                walk(TEXT_SUFFIXES),
                config.cache_path / "downloads",
                as_they_are=config.source == "files",
            )
            if config.source == "auto" and not any(map(os.path.isdir, named)):
                _warn_of_tables(texts.paths)
            return texts
        case "pdf":
            return open_pdfs(field, spec, walk(frozenset({".pdf"})))
        case "json" | "csv" | "quoted_tsv" | "parquet" as kind:
            table: Kind = kind
            column, join_rows, errors = config.text_column, config.join_rows, config.encoding_errors
            return _read_as(config, open_table(table, field, spec, column, join_rows, walk, errors))
        case other:
            raise ValueError(f"no such source: {other!r}")


def _read_as(config: DataConfig, rows: Table | Hub) -> Corpus:
    """The corpus of rows that are texts or, by `data.format`, conversations."""
    return Conversations(rows, config.text_column, config.broken_rows) if config.is_chat else rows


def _real_path(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path.strip()))


def _refuse_pages(field: str, named: list[str]) -> None:
    """Refuses HTML files that are named, or meant by a glob: their tags are hardly wanted."""
    for item in named:
        path = item.partition("?")[0] if "://" in item else item
        if inner_suffix(Path(path)) in (".html", ".htm") and not os.path.isdir(item):
            hint = f"pandoc --to=plain {item}, or `data.source=files` to keep the tags"
            raise InputError(field, item, "text without tags", hint)


def _warn_of_tables(paths: list[Path]) -> None:
    """Warns about tables and PDFs matched by a glob or mixed with text: they are read as text."""
    kinds = Counter(FILE_SUFFIXES.get(inner_suffix(path)) for path in paths)
    for kind in ("json", "csv", "parquet", "pdf"):
        if kinds[kind]:
            log.warning(
                "data: %d files look like %s and are read as plain text; "
                "--config.data.source=%s parses them",
                kinds[kind],
                kind,
                kind,
            )


class _WithValidation:
    """A training corpus and a separate validation corpus."""

    def __init__(self, training: Corpus, is_val: Corpus):
        self._training, self._validation = training, is_val
        self.field, self.value = training.field, training.value
        self.skipped = training.skipped + is_val.skipped
        sizes = training.num_bytes, is_val.num_bytes
        self.num_bytes = sum(sizes) if all(sizes) else 0

    def signature(self) -> str:
        both = self._training.signature(), self._validation.signature()
        return " ".join(both) if all(both) else ""

    def __iter__(self) -> Iterator[Document]:
        for document in self._validation:
            yield replace(document, is_val=True)
        yield from self._training
