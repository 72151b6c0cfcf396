"""`Document` and `Corpus`, the interface of every text source."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: its name in messages; not part of the content.
        pieces: the text in order, split anywhere, so that memory does not grow with its length.
            Iterated once, before the next document. Iteration may raise `SkipDocument`.
        is_val: whether it belongs to the source's own validation split.
        whole: whether it is left out where `data.max_bytes` would cut it.
    """

    id: str
    pieces: Iterable[str]
    is_val: bool = False
    whole: bool = False


class SkipDocument(Exception):
    """Raised while reading a document to skip it; skips are counted by reason (the argument)."""


class Corpus(Protocol):
    """The documents of one source, in the same order at each iteration.

    Attributes:
        field: the configuration field of the source, for messages.
        value: the value of that field.
        skipped: files skipped when the source was opened, counted by reason.
        num_bytes: approximate text size for the progress bar; 0 if unknown.
    """

    field: str
    value: str
    skipped: Counter[str]
    num_bytes: int

    def signature(self) -> str:
        """Identifies the current state of the source without reading its text.

        Equal signatures imply equal documents. "" if unknown: the text is then read.
        """
        ...

    def __iter__(self) -> Iterator[Document]:
        """Yields validation documents first.

        Raises:
            InputError: a document cannot be read.
        """
        ...
