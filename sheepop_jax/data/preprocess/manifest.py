"""The manifest of token shards: statistics per source, files per unit."""

import importlib.metadata
from typing import Any

import numpy as np

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.split import Split
from sheepop_jax.data.shards import SIDES, dtype_of
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.data.windows import realised_shares
from sheepop_jax.files import sealed


def make_manifest(
    spool: CorpusStore,
    split: Split,
    tokenizer: Tokenizer,
    units: list[dict[str, Any]],
    facts: dict[str, Any],
    format: int,
) -> dict[str, Any]:
    """Builds the content of `manifest.json`.

    Args:
        spool: the corpus store.
        split: the split of its documents.
        tokenizer: the tokenizer of the shards.
        units: the entries from `encode_units`.
        facts: `split`, the configured rule and fraction; `gzip_bits_per_byte`, of `gzip -9` on the
            validation bytes.
        format: of the shards (`shards.FORMAT`).

    Returns:
        The manifest with a checksum of its own content (`files.sealed`).
    """

    def total(side: str, what: str, source: int | None = None) -> int:
        chosen = [unit for unit in units if source in (None, unit["source"])]
        return sum(unit.get(side, {}).get(what, 0) for unit in chosen)

    sources = []
    shares = realised_shares([source["weight"] for source in spool.sources])
    for number, source in enumerate(spool.sources):
        documents = {side: total(side, "documents", number) for side in SIDES}
        tokens = {side: total(side, "tokens", number) for side in SIDES}
        size = {side: total(side, "bytes", number) for side in SIDES}
        read = int(np.count_nonzero(spool.documents["source"] == number))
        sources.append(
            {
                **source,
                "share": shares[number],
                "split": split.rules[number],
                "documents_read": read,
                "documents": documents,
                "bytes": size,
                "tokens": tokens,
            }
        )
    versions = ("numpy", "tokenizers", "datasets", "grain")
    manifest = {
        "format": format,
        "source": spool.fingerprint,
        **facts,
        "lossless": all(unit.get("validation", {}).get("lossless", True) for unit in units),
        "duplicates": split.duplicates,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype_of(tokenizer),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "sources": sources,
        "units": units,
    }
    return sealed(manifest)
