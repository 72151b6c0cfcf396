"""Hugging Face Hub datasets, streamed, or local copies of them."""

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from sheepop_jax.data.sources.conversations import conversation_columns
from sheepop_jax.data.sources.documents import Document
from sheepop_jax.data.sources.paths import Walk, signature_of, walk_files
from sheepop_jax.data.sources.rows import (
    BATCH_ROWS,
    Decoder,
    has_column,
    missing_column,
    reason_of,
    rows_to_documents,
    value_at,
)
from sheepop_jax.errors import InputError, masked

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

VAL_SPLITS = ("validation", "valid", "val", "dev")
_ANSWER_SECONDS = 2.0  # default; HF_HUB_ETAG_TIMEOUT overrides it


class Hub:
    """The rows of a dataset, its validation split first; see `documents.Corpus`."""

    field = "data.name"

    def __init__(self, name: str, subset: str, text_column: str, join_rows: bool, errors: str):
        self.value = name
        self._errors = errors
        self.skipped = Counter[str]()
        self.num_bytes = 0
        self._subset, self._column, self._join = subset, text_column, join_rows
        path = Path(os.path.expanduser(name))
        self._copy = path if path.is_dir() else None

    def signature(self) -> str:
        options = ("hub", 1, self._subset, self._column, self._join)
        if self._copy is not None:
            return signature_of((path for _, path in self._files(self._copy)), options)
        try:
            commit = self._ask()
        except InputError:  # iteration raises it again
            return ""
        return signature_of((), (self.value, commit, *options)) if commit else ""

    def __iter__(self) -> Iterator[Document]:
        for name, split, is_val in self._splits():
            rows = self._rows(name, values_of(split, self._column))
            joined = name if self._join else ""
            decoder = Decoder(self.field, self._errors)
            yield from rows_to_documents(rows, self._column, decoder, joined, is_val)

    def records(self) -> Iterator[tuple[str, Mapping[str, object], bool]]:
        """Yields the id, the columns that may hold a conversation, and the split of each row."""
        for name, split, is_val in self._splits():
            for row_name, row in self._rows(name, _records_of(split, self._column)):
                yield row_name, row, is_val

    def _splits(self) -> Iterator[tuple[str, Any, bool]]:
        """Yields the name, the rows and whether it is for validation of each split to read."""
        if self._copy is None:
            logger.info("data: opening %s on the Hugging Face Hub", masked(self.value))
            self._ask()  # fail fast: the library retries for 30 s
        place = self.value if self._copy is None else os.path.abspath(self._copy)
        with self._refusals():
            datasets = import_datasets()
            splits = datasets.load_dataset(place, self._subset or None, streaming=True)
        if "train" not in splits:
            got = f"{self.value} (its splits: {', '.join(splits)})"
            raise InputError(self.field, got, "a dataset with a train split")
        is_val = next((name for name in VAL_SPLITS if name in splits), "")
        for split in filter(None, (is_val, "train")):
            name = self.value if split == "train" else f"{self.value}:{split}"
            yield name, splits[split], split != "train"

    def _rows(self, name: str, values: Iterator[_T]) -> Iterator[tuple[str, _T]]:
        with self._refusals():
            for index, value in enumerate(values):
                yield f"{name}#{index}", value

    def _ask(self) -> str:
        """The dataset's current commit on the Hub.

        Raises:
            InputError: the dataset does not exist, or the Hub does not answer.
        """
        import huggingface_hub  # lazy: only this source needs it
        from huggingface_hub import errors

        huggingface_hub.logging.set_verbosity(logging.CRITICAL)
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _ANSWER_SECONDS)
        try:
            return _within(seconds, lambda: _commit(self.value, seconds))
        except errors.HFValidationError as error:
            expected = f"OWNER/NAME of a Hub dataset, or a directory ({reason_of(error)})"
            raise InputError(self.field, self.value, expected) from None
        except errors.RepositoryNotFoundError:
            hint = (
                "checking the spelling, `hf auth login` for a private dataset, or "
                "`data.name=DIRECTORY`"
            )
            raise InputError(self.field, self.value, "an existing Hub dataset", hint) from None
        except Exception as error:  # the HTTP library depends on the installed version
            got = f"{self.value} (Hub request failed: {reason_of(error)})"
            hint = (
                "checking the network; offline, `data.path`, or `data.name=DIR` with a copy made "
                f"by 'hf download {self.value} --repo-type dataset --local-dir DIR'"
            )
            expected = "a reachable Hugging Face Hub"
            raise InputError(self.field, got, expected, hint) from error

    def _files(self, copy: Path) -> list[tuple[str, Path]]:
        return walk_files(self.field, copy, Walk(None, gitignore=False)).files

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # the library raises many types; the user needs one message
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> InputError:
        said = str(error)[:500]
        if "BuilderConfig" in said or "Config name is missing" in said:
            return InputError("data.subset", self._subset, f"a subset of {self.value} ({said})")
        if "scripts are no longer supported" in said:
            expected = "a dataset of data files; loading scripts are not run"
            hint = (
                f"the Hub's parquet conversion: 'hf download {self.value} --repo-type dataset "
                "--revision refs/convert/parquet --local-dir DIR', then `data.name=DIR`"
            )
            return InputError(self.field, self.value, expected, hint)
        expected = f"a dataset with a readable train split ({reason_of(error)})"
        hint = (
            "checking the spelling and the network; offline, `data.name=DIRECTORY` or `data.path`"
        )
        return InputError(self.field, self.value, expected, hint)


def open_hub(
    name: str, subset: str, text_column: str, *, join_rows: bool, encoding_errors: str = "strict"
) -> Hub:
    """Opens a dataset; uses the network only for `signature` and iteration.

    Args:
        name: OWNER/NAME on the Hub, or a directory of data files such as a downloaded copy.
        subset: one of the dataset's configurations; "" if it has only one.
        text_column: the column to read.
        join_rows: whether to join the rows of a split as the lines of one document.
        encoding_errors: "strict", "replace" or "skip", for text that is not valid UTF-8.
    """
    return Hub(name, subset, text_column, join_rows, encoding_errors)


def _commit(name: str, seconds: float) -> str:
    from huggingface_hub import HfApi

    # Request only the commit: listing the files of a large dataset is slow.
    return HfApi().dataset_info(name, timeout=seconds, expand=["sha"]).sha or ""


def _within(seconds: float, call: Callable[[], str]) -> str:
    """Runs `call` with a timeout, needed because DNS lookups have none.

    Raises:
        TimeoutError: `call` takes longer than `seconds`.
    """
    answer: Future[str] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        said = f"no answer in {seconds:g} s; HF_HUB_ETAG_TIMEOUT=30 waits longer"
        raise TimeoutError(said) from None


def import_datasets() -> Any:
    """Imports `datasets` and silences it; its exceptions carry the same messages."""
    import datasets  # lazy: the import takes seconds

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _records_of(dataset: Any, column: str) -> Iterator[Mapping[str, object]]:
    if dataset.features is not None:
        dataset = dataset.select_columns(conversation_columns([*dataset.features], column))
    yield from dataset


def values_of(dataset: Any, column: str) -> Iterator[object]:
    """Yields the values of a column, or of a dotted path, of a streamed dataset.

    Text may be bytes that are yet to be decoded.

    Raises:
        InputError: the column does not exist.
    """
    features = dataset.features
    if features is not None:
        if not has_column(features, column):
            raise missing_column(column, features)
        top = column if column in features else column.partition(".")[0]
        # Other columns may hold images, which would be decoded.
        dataset = dataset.select_columns([top])
        if getattr(features[top], "dtype", "") in ("string", "large_string"):
            import pyarrow

            # Parquet does not check that its text is UTF-8.
            for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
                yield from table.column(top).cast(pyarrow.large_binary()).to_pylist()
            return
    found = False
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        found = found or any(has_column(row, column) for row in rows)
        if not found:
            raise missing_column(column, batch, "", rows)
        yield from (value_at(row, column) for row in rows)
