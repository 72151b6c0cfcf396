"""A corpus as token files: made once, described by a manifest, kept in a cache, and reused."""

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.config import DataConfig
from sheepop_jax.data.documents import Corpus, open_corpus
from sheepop_jax.data.progress import Progress
from sheepop_jax.data.split import Split, choose_split, split_documents
from sheepop_jax.data.stream import (
    SplitWriter,
    TokenFile,
    TokenStream,
    damaged,
    encode_text,
    sha256_of,
)
from sheepop_jax.data.tokenizer import Tokenizer, split_text, train_bpe, train_char
from sheepop_jax.errors import InputError

__all__ = ["PreparedData", "TokenStream", "encode_text", "prepare"]

logger = logging.getLogger(__name__)

FORMAT = 1  # raised whenever the same text would give other files
_GZIP_BYTES = 64_000_000  # held-out bytes that the gzip figure covers at most
_HASH_BYTES = 2**30  # shards up to this size are hashed each time they are opened, 1 s at most


@dataclass(frozen=True)
class PreparedData:
    """Both splits, ready to be read.

    Attributes:
        identity: what decides the tokens and their order; equal identities, equal training.
        directory: where the shards lie.
        gzip_bits_per_byte: `gzip -9` on the held-out bytes (the first 64 MB of them).
    """

    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    identity: dict[str, str | int]
    directory: Path
    gzip_bits_per_byte: float


def prepare(config: DataConfig) -> PreparedData:
    """Reads the corpus and gives its token streams, from the cache if nothing has changed.

    Raises:
        InputError: the corpus, the split, the tokenizer or the cache directory cannot be used.
    """
    corpus = open_corpus(config)
    given = None
    if config.tokenizer not in ("bpe", "char"):
        given = Tokenizer.from_file(config.tokenizer)
    split = choose_split(corpus, config.val_split, config.val_fraction)
    directory = _cache_dir(config) / _cache_key(config, split, given)
    if directory.exists():
        logger.info("data: token shards reused from %s", directory)
    else:
        _build(directory, config, corpus, split, given)
    prepared = _open(directory)
    _require_window(len(prepared.train), config)
    logger.info(
        "data: %d training and %d held-out tokens, vocabulary %d; gzip -9: %.3f bits per byte",
        len(prepared.train),
        len(prepared.validation),
        prepared.tokenizer.vocab_size,
        prepared.gzip_bits_per_byte,
    )
    return prepared


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sheepop_jax"


def _cache_key(config: DataConfig, split: Split, given: Tokenizer | None) -> str:
    """Names what decides the files' contents, and nothing else."""
    made_of = {
        "format": FORMAT,
        "source": split.fingerprint,
        "split": [split.rule, split.val_fraction],
        "tokenizer": given.fingerprint if given else config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else 0,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _build(
    directory: Path, config: DataConfig, corpus: Corpus, split: Split, given: Tokenizer | None
) -> None:
    """Writes everything beside `directory` and then renames it: it exists whole or not at all."""
    pending = directory.with_name(f".{directory.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        pending.mkdir(parents=True)
    except OSError as error:
        got = f"{directory.parent} ({error.strerror})"
        raise InputError("data.cache_dir", got, "a directory that can be written") from error
    try:
        tokenizer = given or _train_tokenizer(corpus, split, config)
        manifest = _write_splits(pending, corpus, split, tokenizer)
        _require_window(manifest["splits"]["train"]["tokens"], config)
        _write_text(pending / "tokenizer.json", tokenizer.to_json())
        _write_text(pending / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        try:
            os.replace(pending, directory)
            logger.info("data: token shards written to %s", directory)
        except OSError:
            if not directory.exists():
                raise
            logger.info("data: another process was first; its token shards are used")
    except OSError as error:
        free = shutil.disk_usage(directory.parent).free / 1e6
        got = f"{directory.parent} ({error.strerror}; {free:.0f} MB free)"
        raise InputError("data.cache_dir", got, "a directory with room for the tokens") from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def _train_tokenizer(corpus: Corpus, split: Split, config: DataConfig) -> Tokenizer:
    logger.info("data: training a %s tokenizer on the training split", config.tokenizer)
    with Progress("data: reading for the tokenizer", split.chars) as progress:
        pieces = _training_pieces(corpus, split, progress)
        if config.tokenizer == "char":
            return train_char(pieces)
        return train_bpe(pieces, config.vocab_size)


def _training_pieces(corpus: Corpus, split: Split, progress: Progress) -> Iterator[str]:
    for held_out, part in split_documents(corpus, split):
        for piece in split_text(part.text):
            if not held_out:
                yield piece
            progress.update(len(piece))


def _write_splits(
    directory: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer
) -> dict[str, Any]:
    progress = Progress("data: encoding", split.chars)
    names = ("train", "validation")
    writers = [SplitWriter(directory, name, tokenizer, progress) for name in names]
    compressor = zlib.compressobj(9, wbits=31)  # 31: with gzip's header, as the command writes it
    zipped = unzipped = 0
    with progress:
        for held_out, part in split_documents(corpus, split):
            content = part.text.encode()
            writers[held_out].add(part.id, part.text, len(content))
            if held_out and unzipped < _GZIP_BYTES:
                content = content[: _GZIP_BYTES - unzipped]
                unzipped += len(content)
                zipped += len(compressor.compress(content))
    zipped += len(compressor.flush())
    return {
        "format": FORMAT,
        "source": split.fingerprint,
        "split": f"{split.rule} {split.val_fraction}",
        "tokenizer": tokenizer.fingerprint,
        "dtype": writers[0].dtype,
        "splits": {writer.name: writer.close() for writer in writers},
        "gzip_bits_per_byte": 8 * zipped / unzipped,
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "tokenizers")},
    }


def _open(directory: Path) -> PreparedData:
    """Opens what `_build` wrote, refusing it if a file is missing or has changed."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        tokenizer_file = directory / "tokenizer.json"
        found = sha256_of(tokenizer_file)
        if found != manifest["tokenizer"]:
            expected = f"SHA-256 {manifest['tokenizer'][:12]}"
            raise damaged(tokenizer_file, f"SHA-256 {found[:12]}", expected)
        tokenizer = Tokenizer.from_file(tokenizer_file)
        streams = {
            name: _open_split(directory, split, manifest["dtype"])
            for name, split in manifest["splits"].items()
        }
        hashes = "".join(
            entry["sha256"] for split in manifest["splits"].values() for entry in split["files"]
        )
        identity = {
            "source": manifest["source"],
            "split": manifest["split"],
            "tokenizer": manifest["tokenizer"],
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "train_tokens": len(streams["train"]),
            "validation_tokens": len(streams["validation"]),
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
        streams["train"], streams["validation"], tokenizer, identity, directory, gzip_figure
    )


def _open_split(directory: Path, split: dict[str, Any], dtype: str) -> TokenStream:
    parts: list[np.ndarray | TokenFile] = []
    for entry in split["files"]:
        path = directory / Path(entry["file"]).name  # a name, never a way out of the directory
        size = entry["tokens"] * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            raise damaged(path, f"{path.stat().st_size} bytes", f"{size} bytes")
        if size <= _HASH_BYTES and sha256_of(path) != entry["sha256"]:
            raise damaged(path, "other bytes of the same size", f"SHA-256 {entry['sha256'][:12]}")
        parts.append(TokenFile(path, dtype))
    return TokenStream(parts, split["bytes"], split["documents"])


def _require_window(train_tokens: int, config: DataConfig) -> None:
    if train_tokens < config.seq_len + 1:
        expected = f"at most {train_tokens - 1}: the training split has {train_tokens} tokens"
        raise InputError("data.seq_len", config.seq_len, expected, "a smaller one, or more text")


def _write_text(path: Path, content: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
