"""Which part of a corpus is held out: by a hash of each document's content, or the tail."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sheepop_jax.data.documents import Corpus, Document
from sheepop_jax.data.progress import Progress
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Which part of a corpus is held out, decided by one reading of it.

    Attributes:
        rule: "document" (by a hash of the content) or "tail" (the last characters).
        fingerprint: SHA-256 of the documents' contents in order; names and places do not count.
        cut: where the tail begins, in characters.
    """

    rule: str
    val_fraction: float
    fingerprint: str
    chars: int
    cut: int


def choose_split(corpus: Corpus, val_split: str, val_fraction: float) -> Split:
    """Reads the corpus once and decides what is held out.

    Args:
        corpus: the documents.
        val_split: "document", "tail", or "auto": by document, but the tail where there is one
            document or the hashes hold out less than half or more than twice the fraction.
        val_fraction: the share to hold out.

    Raises:
        InputError: the training or the held-out part would be empty.
    """
    fingerprint = hashlib.sha256()
    documents = num_bytes = chars = hashed_documents = hashed_bytes = 0
    with Progress("data: reading", 0) as progress:
        for document in corpus:
            content = document.text.encode()
            digest = hashlib.sha256(content).digest()
            fingerprint.update(digest)
            documents += 1
            num_bytes += len(content)
            chars += len(document.text)
            if _held_out_by_hash(digest, val_fraction):
                hashed_documents += 1
                hashed_bytes += len(content)
            progress.update(len(document.text))
    share = hashed_bytes / num_bytes
    rule = val_split
    if rule == "auto":
        near = 0.5 * val_fraction <= share <= 2 * val_fraction
        rule = "document" if documents > 1 and near else "tail"
    cut = int(chars * (1 - val_fraction))
    size = f"{documents} documents, {num_bytes / 1e6:.2f} MB"
    if rule == "document":
        held_out = f"{hashed_documents} documents, {share:.1%} of the bytes"
        empty = hashed_documents in (0, documents)
    else:
        held_out = f"the last {chars - cut} characters"
        empty = cut in (0, chars)
    if empty:
        expected = f"a share that leaves text to train on and text held out (by {rule}: {size})"
        hint = "more text" if rule == "tail" else "data.val_split=tail, or more documents"
        raise InputError("data.val_fraction", val_fraction, expected, hint)
    logger.info("data: %s; held out by %s: %s", size, rule, held_out)
    return Split(rule, val_fraction, fingerprint.hexdigest(), chars, cut)


def split_documents(corpus: Corpus, split: Split) -> Iterator[tuple[bool, Document]]:
    """The documents, each with whether it is held out; the tail's cut makes two of one.

    Args:
        corpus: what `split` was chosen for.
        split: from `choose_split`.

    Raises:
        InputError: the corpus is no longer what `split` was chosen for.
    """
    fingerprint = hashlib.sha256()
    position = 0
    for document in corpus:
        digest = hashlib.sha256(document.text.encode()).digest()
        fingerprint.update(digest)
        if split.rule == "document":
            yield _held_out_by_hash(digest, split.val_fraction), document
            continue
        before = max(split.cut - position, 0)
        position += len(document.text)
        head, tail = document.text[:before], document.text[before:]
        if head:
            yield False, Document(document.id, head)
        if tail:
            name = f"{document.id} from character {before}" if head else document.id
            yield True, Document(name, tail)
    if fingerprint.hexdigest() != split.fingerprint:
        got = f"fingerprint {fingerprint.hexdigest()[:12]} after {split.fingerprint[:12]}"
        raise InputError("data", got, "text that does not change while it is read")


def _held_out_by_hash(digest: bytes, val_fraction: float) -> bool:
    """Depends on the document's content alone, so adding documents moves none across."""
    return int.from_bytes(digest, "big") / 2**256 < val_fraction
