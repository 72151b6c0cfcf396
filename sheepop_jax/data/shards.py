"""Token shards: files of token ids and a manifest, verified on open."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.token_file import TokenFile, damaged
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.files import read_sealed, sealed, sha256_of_file

SIDES = ("train", "validation")
# Incremented when the same text would produce different files. An existing run keeps its format: up
# to 2, "auto" splits a few documents by "tail" instead of "tails".
FORMAT = 3
_HASH_BYTES = 2**30  # shards up to this size are hashed on every open: 1 s at most


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus, open for reading.

    Attributes:
        train: one training stream per source (one in all without a mixture).
        weights: the share of windows from each source; they sum to 1.
        validation: the validation stream of all sources together.
        tokenizer: the tokenizer that produced the tokens.
        identity: what determines the tokens and their order; equal identities give equal training.
        directory: the shard directory.
        gzip_bits_per_byte: `gzip -9` on the validation bytes (at most the first 64 MB).
        manifest: the content of `manifest.json`.
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
        """Training tokens of all sources."""
        return sum(len(stream) for stream in self.train)

    @property
    def restores_training_text(self) -> bool:
        """Whether decoding restores the training text."""
        return all(unit.get("train", {}).get("lossless", True) for unit in self.manifest["units"])

    @property
    def lossless(self) -> bool:
        """Whether decoding restores the validation text; otherwise bits per byte mean nothing."""
        return bool(self.manifest.get("lossless", True))  # absent in older manifests


def format_of(identity: dict[str, Any]) -> int:
    """The format of the shards with an identity; formats before 3 are not part of it."""
    return int(identity.get("format", 2))


def dtype_of(tokenizer: Tokenizer) -> str:
    """The narrowest little-endian unsigned dtype that holds every token id."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def open_shards(directory: Path) -> PreparedData:
    """Opens and verifies the shards that `prepare` wrote.

    Above 1 GiB in total only file sizes are compared; `verify_shards` reads everything.

    Raises:
        InputError: a file is missing or has changed.
    """
    try:
        manifest = sealed(read_sealed(directory / "manifest.json"))
        tokenizer_file = directory / "tokenizer.json"
        _compare(tokenizer_file, manifest["tokenizer"])
        tokenizer = Tokenizer.from_file(tokenizer_file)
        entries = list(_entries(manifest))
        _allow_open_files(4 * len(entries))
        size_of_token = np.dtype(manifest["dtype"]).itemsize
        for _, _, entry in entries:
            path = _path(directory, entry)
            found, size = path.stat().st_size, entry["tokens"] * size_of_token
            if found != size:
                raise damaged(path, f"{found} bytes", f"{size} bytes")
            if "marks" in entry:
                path = _path(directory, entry["marks"])
                if (found := path.stat().st_size) != entry["tokens"]:
                    raise damaged(path, f"{found} bytes", f"{entry['tokens']} bytes")
        if sum(entry["tokens"] for _, _, entry in entries) * size_of_token <= _HASH_BYTES:
            verify_shards(directory, manifest)
        train = [
            _stream(directory, manifest, "train", source, tokenizer)
            for source in range(len(manifest["sources"]))
        ]
        validation = _stream(directory, manifest, "validation", None, tokenizer)
        weights = [source["weight"] for source in manifest["sources"]]
        hashes = "".join(file["sha256"] for _, _, entry in entries for file in _files(entry))
        identity = {
            "source": manifest["source"],
            **({"format": manifest["format"]} if manifest["format"] > 2 else {}),
            "split": manifest["split"],
            "weights": weights,
            "tokenizer": manifest["tokenizer"],
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "train_tokens": sum(map(len, train)),
            "validation_tokens": len(validation),
            "grain": importlib.metadata.version("grain"),  # its shuffle orders the windows
        }
        gzip_figure = float(manifest["gzip_bits_per_byte"])
    except OSError as error:
        raise damaged(
            directory, f"{error.filename} ({error.strerror})", "every shard file"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(directory / "manifest.json", error, "a valid manifest") from error
    return PreparedData(
        train, weights, validation, tokenizer, identity, directory, gzip_figure, manifest
    )


def verify_shards(directory: Path, manifest: dict[str, Any]) -> int:
    """Checks the SHA-256 of every file and returns the number of files.

    Raises:
        InputError: a file differs from the manifest.
    """
    _compare(directory / "tokenizer.json", manifest["tokenizer"])
    entries = list(_entries(manifest))
    files = [file for _, _, entry in entries for file in _files(entry)]
    for file in files:
        _compare(_path(directory, file), file["sha256"])
    return 1 + len(files)


def _entries(manifest: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (split, source index, entry) of every token file, in stream order."""
    for unit in manifest["units"]:
        for side in SIDES:
            if side in unit:
                yield side, unit["source"], unit[side]


def _files(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a token file and, for conversations, of its marks."""
    return [entry, entry["marks"]] if "marks" in entry else [entry]


def _stream(
    directory: Path, manifest: dict[str, Any], side: str, source: int | None, tokenizer: Tokenizer
) -> TokenStream:
    chosen = [
        entry
        for entry_side, entry_source, entry in _entries(manifest)
        if entry_side == side and source in (None, entry_source)
    ]
    parts: list[np.ndarray | TokenFile] = [
        TokenFile(_path(directory, entry), manifest["dtype"]) for entry in chosen
    ]
    num_bytes = sum(entry["bytes"] for entry in chosen)
    documents = sum(entry["documents"] for entry in chosen)
    if manifest.get("chat"):
        entries = [entry["marks"] for entry in chosen]
        marks = [TokenFile(_path(directory, entry), "u1") for entry in entries]
        counted = sum(entry["counted"] for entry in entries)
        return TokenStream.of_conversations(parts, marks, num_bytes, documents, counted)
    parts.append(np.array([tokenizer.end_of_text], np.int32))
    return TokenStream(parts, num_bytes, documents, tokenizer.document_bos is not None)


def _path(directory: Path, entry: dict[str, Any]) -> Path:
    return directory / Path(entry["file"]).name  # file name only: no path traversal


def _allow_open_files(count: int) -> None:
    """Raises the open-file limit: 1024 in most shells, which a 40 GB corpus would reach."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # for the rest of the program
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _compare(path: Path, sha256: str) -> None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise damaged(path, error.strerror, f"SHA-256 {sha256[:12]}") from error
    if found != sha256:
        raise damaged(path, f"SHA-256 {found[:12]}", f"SHA-256 {sha256[:12]}")
