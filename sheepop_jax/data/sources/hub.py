"""Datasets of the Hugging Face hub, or copies of them."""

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sheepop_jax.data.sources.documents import Document
from sheepop_jax.data.sources.paths import Walk, signature_of, walk_files
from sheepop_jax.data.sources.rows import (
    BATCH_ROWS,
    missing_column,
    reason_of,
    rows_to_documents,
)
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev")
_ANSWER_SECONDS = 2.0  # unless HF_HUB_ETAG_TIMEOUT says otherwise


class Hub:
    """The rows of a dataset, its validation split first, as held out; see `documents.Corpus`."""

    field = "data.name"

    def __init__(self, name: str, subset: str, text_column: str, join_rows: bool):
        self.value = name
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
        except InputError:  # the same when it is read, and said there
            return ""
        return signature_of((), (self.value, commit, *options)) if commit else ""

    def __iter__(self) -> Iterator[Document]:
        if self._copy is None:
            logger.info("data: opening %s on the Hugging Face hub", self.value)
            self._ask()  # of itself the library tries for half a minute before it gives up
        place = self.value if self._copy is None else os.path.abspath(self._copy)
        with self._refusals():
            datasets = import_datasets()
            splits = datasets.load_dataset(place, self._subset or None, streaming=True)
        if "train" not in splits:
            got = f"{self.value} (its splits: {', '.join(splits)})"
            raise InputError(self.field, got, "a dataset with a train split")
        held_out = next((name for name in HELD_OUT_SPLITS if name in splits), "")
        for split in filter(None, (held_out, "train")):
            name = self.value if split == "train" else f"{self.value}:{split}"
            rows = self._rows(name, splits[split])
            joined = name if self._join else ""
            yield from rows_to_documents(rows, self._column, joined, split != "train")

    def _rows(self, name: str, dataset: Any) -> Iterator[tuple[str, object]]:
        with self._refusals():
            for index, value in enumerate(values_of(dataset, self._column)):
                yield f"{name}#{index}", value

    def _ask(self) -> str:
        """The commit that the hub has now.

        Raises:
            InputError: there is no such dataset, or no answer.
        """
        import huggingface_hub  # here, not above: only this source needs it
        from huggingface_hub import errors

        huggingface_hub.logging.set_verbosity(logging.CRITICAL)
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _ANSWER_SECONDS)
        try:
            return _within(seconds, lambda: _commit(self.value, seconds))
        except errors.HFValidationError as error:
            expected = f"OWNER/NAME of a dataset on the hub, or a directory ({reason_of(error)})"
            raise InputError(self.field, self.value, expected) from None
        except errors.RepositoryNotFoundError:
            hint = "the spelling (or `hf auth login` if it is private); or data.name=DIRECTORY"
            raise InputError(self.field, self.value, "a dataset on the hub", hint) from None
        except Exception as error:  # of several HTTP libraries, by the installed version
            got = f"{self.value} (asking the hub failed: {reason_of(error)})"
            hint = (
                "the network; without one, data.path, or data.name=DIR with a copy made by "
                f"`hf download {self.value} --repo-type dataset --local-dir DIR`"
            )
            expected = "a hub that answers over the network"
            raise InputError(self.field, got, expected, hint) from error

    def _files(self, copy: Path) -> list[tuple[str, Path]]:
        return walk_files(self.field, copy, Walk(None, gitignore=False)).files

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # the library raises many kinds; all end the same for the user
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> InputError:
        said = str(error)[:500]
        if "BuilderConfig" in said or "Config name is missing" in said:
            return InputError("data.subset", self._subset, f"a subset of {self.value} ({said})")
        if "scripts are no longer supported" in said:
            expected = "a dataset of data files; programs that come with one are not run"
            hint = (
                f"its files as the hub converted them: `hf download {self.value} --repo-type "
                "dataset --revision refs/convert/parquet --local-dir DIR`, then data.name=DIR"
            )
            return InputError(self.field, self.value, expected, hint)
        expected = f"a dataset with a train split that can be read ({reason_of(error)})"
        hint = "the spelling and the network; without network, data.name=DIRECTORY or data.path"
        return InputError(self.field, self.value, expected, hint)


def open_hub(name: str, subset: str, text_column: str, *, join_rows: bool) -> Hub:
    """Nothing is read, and no network used, before it is iterated or asked for its signature.

    Args:
        name: OWNER/NAME on the hub, or a directory of data files such as a downloaded copy.
        subset: one of the dataset's configurations; "" where it has but one.
        text_column: the column that is read.
        join_rows: whether the rows of a split are the lines of one document.
    """
    return Hub(name, subset, text_column, join_rows)


def _commit(name: str, seconds: float) -> str:
    from huggingface_hub import HfApi

    # Nothing but the commit: the list of the files of a large dataset takes long.
    return HfApi().dataset_info(name, timeout=seconds, expand=["sha"]).sha or ""


def _within(seconds: float, call: Callable[[], str]) -> str:
    """What `call` returns or raises; a name server that is silent knows no timeout of its own.

    Raises:
        TimeoutError: it takes longer.
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
        said = f"silent for {seconds:g} s; HF_HUB_ETAG_TIMEOUT=30 waits longer"
        raise TimeoutError(said) from None


def import_datasets() -> Any:
    """The library, silent: what it would print or log is in the exception that follows."""
    import datasets  # here, not above: it takes seconds

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets


def values_of(dataset: Any, column: str) -> Iterator[object]:
    """The values of a column of a streamed dataset.

    Raises:
        InputError: there is no such column.
    """
    if dataset.features is not None:
        if column not in dataset.features:
            raise missing_column(column, dataset.features)
        # Other columns may hold images and the like, which would be decoded.
        dataset = dataset.select_columns([column])
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        if column not in batch:
            raise missing_column(column, batch)
        yield from batch[column]
