"""Token shards: files of ids, and a manifest of what they hold, checked when they are opened."""

import hashlib
import importlib.metadata
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.encode import SIDES, dtype_of
from sheepop_jax.data.preprocess.split import Split
from sheepop_jax.data.stream import TokenFile, TokenStream, damaged
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.data.windows import realised_shares
from sheepop_jax.errors import InputError

FORMAT = 2  # raised whenever the same text would give other files
_HASH_BYTES = 2**30  # so much is hashed each time that shards are opened: 1 s at most


@dataclass(frozen=True)
class PreparedData:
    """A corpus as tokens, ready to be read.

    Attributes:
        train: the training stream of each source; one, but for a mixture.
        weights: the share of windows that each is to give; they sum to 1.
        validation: the held-out stream, all sources together.
        identity: what decides the tokens and their order; equal identities, equal training.
        directory: where the shards lie.
        gzip_bits_per_byte: `gzip -9` on the held-out bytes (the first 64 MB of them).
        manifest: all that is known of the corpus.
    """

    train: list[TokenStream]
    weights: list[float]
    validation: TokenStream
    tokenizer: Tokenizer
    identity: dict[str, Any]
    directory: Path
    gzip_bits_per_byte: float
    manifest: dict[str, Any]

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, over all sources."""
        return sum(len(stream) for stream in self.train)

    @property
    def lossless(self) -> bool:
        """Whether the tokenizer gives the text back, so that bits per byte mean something."""
        return bool(self.manifest.get("lossless", True))  # shards of before do not say


def make_manifest(
    spool: CorpusStore,
    split: Split,
    tokenizer: Tokenizer,
    units: list[dict[str, Any]],
    *,
    split_rule: str,
    gzip_bits_per_byte: float,
    lossless: bool,
) -> dict[str, Any]:
    """What `manifest.json` says.

    Args:
        spool: the corpus.
        split: what became of its documents.
        tokenizer: what encoded it.
        units: from `encode_units`.
        split_rule: the rule as configured, with its fraction.
        gzip_bits_per_byte: of the held-out bytes.
        lossless: whether the tokenizer gives the text back.
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
        "format": FORMAT,
        "source": spool.fingerprint,
        "split": split_rule,
        "duplicates": split.duplicates,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype_of(tokenizer),
        "gzip_bits_per_byte": gzip_bits_per_byte,
        "lossless": lossless,
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "sources": sources,
        "units": units,
    }
    return {**manifest, "sha256": _sha256_of(manifest)}


def open_shards(directory: Path) -> PreparedData:
    """Opens what `prepare` made.

    Raises:
        InputError: a file is missing or has changed. Beyond 1 GiB in all only sizes are compared;
            `verify_shards` reads everything.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if manifest["sha256"] != _sha256_of(manifest):
            raise ValueError("its content has another SHA-256 than it says")
        tokenizer_file = directory / "tokenizer.json"
        _compare(tokenizer_file, manifest["tokenizer"])
        tokenizer = Tokenizer.from_file(tokenizer_file)
        entries = list(_entries(manifest))
        _allow_open_files(2 * len(entries))
        size_of_token = np.dtype(manifest["dtype"]).itemsize
        for _, _, entry in entries:
            path = _path(directory, entry)
            found, size = path.stat().st_size, entry["tokens"] * size_of_token
            if found != size:
                raise damaged(path, f"{found} bytes", f"{size} bytes")
        if sum(entry["tokens"] for _, _, entry in entries) * size_of_token <= _HASH_BYTES:
            verify_shards(directory, manifest)
        eot = tokenizer.end_of_text
        train = [
            _stream(directory, manifest, "train", source, eot)
            for source in range(len(manifest["sources"]))
        ]
        validation = _stream(directory, manifest, "validation", None, eot)
        weights = [source["weight"] for source in manifest["sources"]]
        hashes = "".join(entry["sha256"] for _, _, entry in entries)
        identity = {
            "source": manifest["source"],
            "split": manifest["split"],
            "weights": weights,
            "tokenizer": manifest["tokenizer"],
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "train_tokens": sum(map(len, train)),
            "validation_tokens": len(validation),
            "grain": importlib.metadata.version("grain"),  # its shuffle is the order of windows
        }
        gzip_figure = float(manifest["gzip_bits_per_byte"])
    except OSError as error:
        raise damaged(directory, f"{error.filename} ({error.strerror})", "all files") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(directory / "manifest.json", error, "a whole manifest") from error
    return PreparedData(
        train, weights, validation, tokenizer, identity, directory, gzip_figure, manifest
    )


def verify_shards(directory: Path, manifest: dict[str, Any]) -> int:
    """Compares every file with its SHA-256 in the manifest; gives the number of files.

    Raises:
        InputError: one differs.
    """
    _compare(directory / "tokenizer.json", manifest["tokenizer"])
    entries = list(_entries(manifest))
    for _, _, entry in entries:
        _compare(_path(directory, entry), entry["sha256"])
    return 1 + len(entries)


def _entries(manifest: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Side, source and entry of every token file, in the order of the streams."""
    for unit in manifest["units"]:
        for side in SIDES:
            if side in unit:
                yield side, unit["source"], unit[side]


def _stream(
    directory: Path, manifest: dict[str, Any], side: str, source: int | None, end_of_text: int
) -> TokenStream:
    chosen = [
        entry
        for entry_side, entry_source, entry in _entries(manifest)
        if entry_side == side and source in (None, entry_source)
    ]
    parts: list[np.ndarray | TokenFile] = [
        TokenFile(_path(directory, entry), manifest["dtype"]) for entry in chosen
    ]
    parts.append(np.array([end_of_text], np.int32))
    num_bytes = sum(entry["bytes"] for entry in chosen)
    return TokenStream(parts, num_bytes, sum(entry["documents"] for entry in chosen))


def _path(directory: Path, entry: dict[str, Any]) -> Path:
    return directory / Path(entry["file"]).name  # a name, never a way out of the directory


def _sha256_of(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says but this."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _allow_open_files(count: int) -> None:
    """Raises the limit, 1024 in most shells, that a corpus of 40 GB would reach."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # for the rest of the program
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _compare(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error.strerror, f"SHA-256 {sha256[:12]}") from error
    if found != sha256:
        raise damaged(path, f"SHA-256 {found[:12]}", f"SHA-256 {sha256[:12]}")
