"""Which part of a corpus is held out, and which documents are left out as duplicates."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

TRAIN, HELD_OUT, LEFT_OUT = range(3)


class Segment(NamedTuple):
    """Bytes [start, stop) of the spool that lie in one document and on one side."""

    document: int
    start: int
    stop: int
    held_out: bool
    begins: bool  # whether a document begins with it; the tail's cut makes two of one


@dataclass(frozen=True)
class Split:
    """What becomes of each document.

    Attributes:
        rules: how each source was split: "source" (its own validation split), "document" (by a hash
            of the content) or "tail" (the last characters).
        side: uint8 [N], TRAIN, HELD_OUT or LEFT_OUT.
        cuts: documents that begin on one side and end on the other: the first held-out byte.
        duplicates: documents left out because an equal one is kept.
    """

    rules: list[str]
    side: np.ndarray
    cuts: dict[int, int]
    duplicates: int

    def segments(
        self, spool: CorpusStore, start: int = 0, stop: int | None = None
    ) -> Iterator[Segment]:
        """The kept text within bytes [start, stop) of the spool, in order."""
        stop = spool.num_bytes if stop is None else stop
        ends = spool.documents["end"]
        document = int(np.searchsorted(ends, start, side="right"))
        while document < len(ends) and (first := int(spool.starts[document])) < stop:
            last = int(ends[document])
            borders = [(first, last, self.side[document] == HELD_OUT)]
            if document in self.cuts:
                cut = self.cuts[document]
                borders = [(first, cut, False), (cut, last, True)]
            if self.side[document] != LEFT_OUT:
                for low, high, held_out in borders:
                    a, b = max(low, start), min(high, stop)
                    if a < b:
                        yield Segment(document, a, b, bool(held_out), a == low)
            document += 1


def choose_split(spool: CorpusStore, val_split: str, val_fraction: float) -> Split:
    """Decides from the index alone.

    Of equal documents the first is kept, or one that its source holds out, so that no held-out
    document is also trained on.

    Args:
        spool: the corpus.
        val_split: "source", "document", "tail", or "auto": a source's own validation split if it
            has one; else by document, but the tail where there is one document or the hashes hold
            out less than half or more than twice the fraction.
        val_fraction: the share to hold out.

    Raises:
        InputError: the training or the held-out part would be empty, or no source has a validation
            split where one is asked for.
    """
    documents = spool.documents
    own = documents["held_out"]
    # A validation split that is not used does not make its twins duplicates.
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
        # It may have a validation split of which every document is kept in another source.
        if val_split == "auto" and (own & here).any():
            wanted = "source"
        rule = _split_source(spool, among, wanted, val_fraction, side, cuts)
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
    side: np.ndarray,
    cuts: dict[int, int],
) -> str:
    """Fills in `side` and `cuts` for the documents `among` of one source; gives the rule."""
    documents = spool.documents
    if val_split == "source":
        side[among] = np.where(documents["held_out"][among], HELD_OUT, TRAIN)
        return val_split
    # The first 64 bits of the hash as a share of 2^64: it depends on the document's content alone,
    # so adding documents moves none across.
    by_hash = documents["digest"][among, 0].byteswap() / 2.0**64 < val_fraction
    rule = val_split
    if rule == "auto":
        sizes = (documents["end"] - spool.starts)[among]
        share = sizes[by_hash].sum() / max(sizes.sum(), 1)
        near = 0.5 * val_fraction <= share <= 2 * val_fraction
        rule = "document" if len(among) > 1 and near else "tail"
    if rule == "document":
        side[among] = np.where(by_hash, HELD_OUT, TRAIN)
        return rule
    last_chars = np.cumsum(documents["chars"][among])
    cut = int(int(last_chars[-1]) * (1 - val_fraction)) if len(among) else 0
    side[among] = np.where(last_chars <= cut, TRAIN, HELD_OUT)
    split_one = int(np.searchsorted(last_chars, cut, side="right"))
    if split_one < len(among):
        before = int(last_chars[split_one - 1]) if split_one else 0
        if cut > before:
            document = int(among[split_one])
            cuts[document] = spool.byte_of_char(document, cut - before)
    return rule


def _duplicates(digests: np.ndarray, first_choice: np.ndarray) -> np.ndarray:
    """Which of the digests [N, 2] repeat another; of equals one of `first_choice` stays if any."""
    order = np.lexsort((~first_choice, digests[:, 1], digests[:, 0]))  # stable: then by place
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
    held_out = int(sizes[split.side == HELD_OUT].sum())
    train = int(sizes[split.side == TRAIN].sum())
    for document, cut in split.cuts.items():  # counted as held out as a whole, so far
        before = cut - int(spool.starts[document])
        train, held_out = train + before, held_out - before
    kept = int(np.count_nonzero(split.side != LEFT_OUT))
    total = train + held_out
    size = f"{kept} document{'s' * (kept != 1)}, "
    size += f"{total / 1e6:.2f} MB" if total >= 1e5 else f"{total:,} bytes"
    rules = ", ".join(dict.fromkeys(split.rules))
    if val_split == "source" and not held_out:
        expected = f"a source with a validation split of its own, or data.val_path ({size})"
        raise InputError("data.val_split", val_split, expected, "data.val_split=auto")
    if not train and set(split.rules) == {"source"}:
        expected = f"text to train on beside the source's own validation split ({size})"
        raise InputError("data.val_split", val_split, expected)
    if not held_out or not train:
        expected = f"a share that leaves text to train on and text held out (by {rules}: {size})"
        hint = "more text" if rules == "tail" else "data.val_split=tail, or more documents"
        raise InputError("data.val_fraction", val_fraction, expected, hint)
    trained_on = split.side == TRAIN
    trained_on[list(split.cuts)] = True
    for number, source in enumerate(spool.sources):
        if not trained_on[spool.documents["source"] == number].any():
            got = "a source with nothing to train on"
            expected = f"text that is not all held out (by {split.rules[number]}) or in another"
            raise InputError(f"data.mixture.{source['name']}", got, expected)
    share = 100 * held_out / total
    logger.info("data: %s; held out by %s: %.1f%% of the bytes", size, rules, share)
    if split.duplicates:
        logger.info("data: %d documents left out: equal to another", split.duplicates)
