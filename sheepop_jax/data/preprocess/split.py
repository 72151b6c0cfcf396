"""The train/validation split and the removal of duplicate documents."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

TRAIN, VAL, LEFT_OUT = range(3)


class Segment(NamedTuple):
    """Bytes [start, stop) of the corpus store, within one document and one split."""

    document: int
    start: int
    stop: int
    is_val: bool
    begins: bool  # whether it starts a document; a "tail" cut makes two of one


@dataclass(frozen=True)
class Split:
    """The assignment of documents to splits.

    Attributes:
        rules: the rule used for each source: "source" (its own validation split), "document" (by
            content hash), "tail" (the last characters of all documents) or "tails" (the last
            characters of each).
        side: uint8 [N]: TRAIN, VAL (validation) or LEFT_OUT (neither).
        cuts: document index → first validation byte, for documents that span both splits.
        duplicates: number of duplicate documents removed.
    """

    rules: list[str]
    side: np.ndarray
    cuts: dict[int, int]
    duplicates: int

    def start_of(self, spool: CorpusStore, segment: Segment) -> int:
        """The first byte of the document, or of its validation part, that a segment is of."""
        first = int(spool.starts[segment.document])
        return self.cuts.get(segment.document, first) if segment.is_val else first

    def segments(
        self, spool: CorpusStore, start: int = 0, stop: int | None = None
    ) -> Iterator[Segment]:
        """Yields the kept text within bytes [start, stop) of the corpus store, in order."""
        stop = spool.num_bytes if stop is None else stop
        ends = spool.documents["end"]
        document = int(np.searchsorted(ends, start, side="right"))
        while document < len(ends) and (first := int(spool.starts[document])) < stop:
            last = int(ends[document])
            borders = [(first, last, self.side[document] == VAL)]
            if document in self.cuts:
                cut = self.cuts[document]
                borders = [(first, cut, False), (cut, last, True)]
            if self.side[document] != LEFT_OUT:
                for low, high, is_val in borders:
                    a, b = max(low, start), min(high, stop)
                    if a < b:
                        yield Segment(document, a, b, bool(is_val), a == low)
            document += 1


def choose_split(
    spool: CorpusStore, val_split: str, val_fraction: float, few: str = "tails"
) -> Split:
    """Chooses the split from the document index alone; reads no text.

    Of equal documents one is kept: the first, or one from a source's own validation split, so that
    no validation document is also trained on.

    Args:
        spool: the corpus store.
        val_split: "source", "document", "tail", "tails" or "auto". "auto" uses a source's own
            validation split if it has one, else "document"; but "tail" for a single document, and
            `few` if hashing selects less than half or more than twice the fraction.
        val_fraction: fraction of the text for validation.
        few: "tails"; "tail" as in token shards before format 3; or "documents", which cuts none:
            the last ones, at least one of several, that hold about the fraction.

    Raises:
        InputError: the training or the validation split is empty, or "source" was requested and no
            source has a validation split.
    """
    documents = spool.documents
    own = documents["is_val"]
    # Copies of documents in an unused validation split are not duplicates.
    used = np.ones(len(own), bool) if val_split in ("auto", "source") else ~own
    duplicate = np.zeros(len(own), bool)
    duplicate[used] = _duplicates(documents["digest"][used], own[used])
    keep = used & ~duplicate
    side = np.full(len(own), LEFT_OUT, np.uint8)
    cuts: dict[int, int] = {}
    rules: list[str] = []
    for number, source in enumerate(spool.sources):
        here = documents["source"] == number
        among = np.flatnonzero(keep & here)
        wanted = val_split
        # Also when every document of its validation split is a duplicate kept in another source.
        if val_split == "auto" and (own & here).any():
            wanted = "source"
        rule = _split_source(spool, among, wanted, val_fraction, few, side, cuts)
        rules.append(rule)
        if source["name"]:
            logger.info("data: %s: %d documents, split by %s", source["name"], len(among), rule)
    split = Split(rules, side, cuts, int(np.count_nonzero(duplicate)))
    _require_both_sides(spool, split, val_split, val_fraction)
    return split


def _split_source(
    spool: CorpusStore,
    among: np.ndarray,
    val_split: str,
    val_fraction: float,
    few: str,
    side: np.ndarray,
    cuts: dict[int, int],
) -> str:
    """Fills in `side` and `cuts` for the documents `among` of one source; returns the rule."""
    documents = spool.documents
    if val_split == "source":
        side[among] = np.where(documents["is_val"][among], VAL, TRAIN)
        return val_split
    # The first 64 bits of the content hash, scaled to [0, 1): adding documents moves no other
    # document to the other split.
    by_hash = documents["digest"][among, 0].byteswap() / 2.0**64 < val_fraction
    rule = val_split
    if rule == "auto":
        sizes = (documents["end"] - spool.starts)[among]
        share = sizes[by_hash].sum() / max(sizes.sum(), 1)
        near = 0.5 * val_fraction <= share <= 2 * val_fraction
        rule = "document" if near else few
        if len(among) <= 1 and few != "documents":
            rule = "tail"
    if rule == "document":
        side[among] = np.where(by_hash, VAL, TRAIN)
        return rule
    if rule == "documents":
        before = np.cumsum(sizes) - sizes
        is_last = before >= sizes.sum() * (1 - val_fraction)
        is_last[-1:] |= len(among) > 1
        side[among] = np.where(is_last, VAL, TRAIN)
        return rule
    if rule == "tails":
        chars = documents["chars"][among]
        # Rounded over all documents, so that short ones do not add up to another fraction.
        wanted = np.diff(np.floor(np.cumsum(chars) * val_fraction), prepend=0).astype(np.int64)
        side[among] = np.where(wanted, VAL, TRAIN)
        for document, before in zip(among, chars - wanted, strict=True):
            if side[document] == VAL and before:
                cuts[int(document)] = spool.byte_of_char(int(document), int(before))
        return rule
    last_chars = np.cumsum(documents["chars"][among])
    cut = int(int(last_chars[-1]) * (1 - val_fraction)) if len(among) else 0
    side[among] = np.where(last_chars <= cut, TRAIN, VAL)
    split_one = int(np.searchsorted(last_chars, cut, side="right"))
    if split_one < len(among):
        before = int(last_chars[split_one - 1]) if split_one else 0
        if cut > before:
            document = int(among[split_one])
            cuts[document] = spool.byte_of_char(document, cut - before)
    return rule


def _duplicates(digests: np.ndarray, first_choice: np.ndarray) -> np.ndarray:
    """Marks repeated digests [N, 2]; of equal ones, keeps one of `first_choice` if any."""
    order = np.lexsort((~first_choice, digests[:, 1], digests[:, 0]))  # stable: then by position
    ordered = digests[order]
    again = np.zeros(len(order), bool)
    again[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    duplicate = np.empty(len(order), bool)
    duplicate[order] = again
    return duplicate


def _require_both_sides(
    spool: CorpusStore, split: Split, val_split: str, val_fraction: float
) -> None:
    sizes = spool.documents["end"] - spool.starts
    is_val = int(sizes[split.side == VAL].sum())
    train = int(sizes[split.side == TRAIN].sum())
    for document, cut in split.cuts.items():  # counted so far as validation as a whole
        before = cut - int(spool.starts[document])
        train, is_val = train + before, is_val - before
    kept = int(np.count_nonzero(split.side != LEFT_OUT))
    total = train + is_val
    size = f"{kept} document{'s' * (kept != 1)}, "
    size += f"{total / 1e6:.2f} MB" if total >= 1e5 else f"{total:,} bytes"
    rules = ", ".join(dict.fromkeys(split.rules))
    if val_split == "source" and not is_val:
        expected = f"a source with its own validation split, or `data.val_path` ({size})"
        raise InputError("data.val_split", val_split, expected, "`data.val_split=auto`")
    if not train and set(split.rules) == {"source"}:
        expected = f"training text besides the source's own validation split ({size})"
        raise InputError("data.val_split", val_split, expected)
    if not is_val or not train:
        expected = f"a fraction that leaves training and validation text (by {rules}: {size})"
        if "documents" in split.rules:
            raise InputError("data.val_fraction", val_fraction, expected, "more conversations")
        hint = "more text" if "tail" in rules else "`data.val_split=tail`, or more documents"
        raise InputError("data.val_fraction", val_fraction, expected, hint)
    trained_on = split.side == TRAIN
    trained_on[list(split.cuts)] = True
    for number, source in enumerate(spool.sources):
        if not trained_on[spool.documents["source"] == number].any():
            got = "a source without training text"
            expected = (
                f"text that is not all validation (by {split.rules[number]}) or duplicated in "
                "another source"
            )
            raise InputError(f"data.mixture.{source['name']}", got, expected)
    share = 100 * is_val / total
    logger.info("data: %s; validation split by %s: %.1f%% of the bytes", size, rules, share)
    if split.duplicates:
        logger.info("data: removed %d duplicate documents", split.duplicates)
