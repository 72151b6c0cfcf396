"""A document and a corpus: what every source of text gives."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: names it in messages; it is no part of the content.
        pieces: the text in order, cut anywhere, so that memory does not grow with its length. Read
            once, before the next document is asked for. Reading may raise `SkipDocument`.
        held_out: whether the source itself sets it aside (a validation split of its own).
    """

    id: str
    pieces: Iterable[str]
    held_out: bool = False


class SkipDocument(Exception):
    """Raised while a document is read: it is left out, and its reason (the argument) is counted."""


class Corpus(Protocol):
    """The documents of one source, in an order that is the same at each iteration.

    Attributes:
        field: the configuration field that named the source, for messages.
        value: what the field said.
        skipped: what was passed over when the source was opened, by reason.
        num_bytes: about how much text there is, to tell how far reading is; 0 if unknown.
    """

    field: str
    value: str
    skipped: Counter[str]
    num_bytes: int

    def signature(self) -> str:
        """Names the present state of the source without reading its text.

        Equal signatures, equal documents. "" where that cannot be told: the text is then read.
        """
        ...

    def __iter__(self) -> Iterator[Document]:
        """Held-out documents first. Raises `InputError` at what cannot be read."""
        ...
