"""Token ids on disk: a corpus becomes memory-mapped token files, made once and kept in a cache.

The stream of a split is end-of-text, then each document's tokens and end-of-text. So every token
after the first is predicted from something, a document's first token from end-of-text.
"""

import hashlib
import importlib.metadata
import json
import logging
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.config import DataConfig
from sheepop_jax.data.documents import Corpus, Split, choose_split, open_corpus, split_documents
from sheepop_jax.data.tokenizer import Tokenizer, split_text, train_bpe, train_char
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1  # raised whenever the same text would give other files
_SHARD_TOKENS = 2**26
_BATCH_CHARS = 2**20  # characters encoded at a time
_GZIP_BYTES = 64_000_000  # held-out bytes that the gzip figure covers at most
_HASH_BYTES = 2**30  # shards up to this size are hashed each time they are opened, 1 s at most


class TokenStream:
    """The tokens of one split, read without loading them.

    Attributes:
        num_bytes: UTF-8 bytes of the documents.
        num_documents: how many documents there are.
    """

    def __init__(self, parts: Sequence["np.ndarray | _Shard"], num_bytes: int, num_documents: int):
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self.num_bytes = num_bytes
        self.num_documents = num_documents

    @classmethod
    def from_array(cls, tokens: np.ndarray, num_bytes: int, num_documents: int) -> "TokenStream":
        """A stream over tokens [N] in memory."""
        return cls([tokens], num_bytes, num_documents)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] int32, a copy; the range must lie within the stream."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")
        out = np.empty(stop - start, np.int32)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._starts[index])
            end = min(stop, int(self._starts[index + 1]))
            out[position - start : end - start] = self._parts[index][position - first : end - first]
            position, index = end, index + 1
        return out


class _Shard:
    """One memory-mapped token file, which refuses to be read once the file has shrunk."""

    def __init__(self, path: Path, dtype: str):
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._tokens = np.frombuffer(self._map, dtype)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> np.ndarray:
        # size() asks the file. Reading mapped pages beyond its end would kill the process (SIGBUS).
        if self._map.size() != self._tokens.nbytes:
            raise _damaged(self._path, f"{self._map.size()} bytes", f"{self._tokens.nbytes} bytes")
        return self._tokens[span]


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


def encode_text(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Tokens [N] int32 of the texts, one document each, laid out as a split's stream."""
    parts: list[np.ndarray] = []
    encoder = _Encoder(tokenizer, parts.append)
    for text in texts:
        encoder.add(text, "text")
    encoder.flush()
    return np.concatenate(parts)


class _Encoder:
    """Lays documents out as a stream and hands its tokens on, a bounded batch at a time."""

    def __init__(self, tokenizer: Tokenizer, sink: Callable[[np.ndarray], None]):
        self._tokenizer, self._sink = tokenizer, sink
        self._pieces: list[str] = []
        self._last: list[bool] = []  # whether the piece ends its document
        self._chars = 0
        sink(np.array([tokenizer.end_of_text], np.int32))

    def add(self, text: str, name: str) -> None:
        self._tokenizer.check(text, name)  # here, where the position is the document's
        pieces = list(split_text(text))
        for index, piece in enumerate(pieces):
            self._pieces.append(piece)
            self._last.append(index == len(pieces) - 1)
            self._chars += len(piece)
            if self._chars >= _BATCH_CHARS:
                self.flush()

    def flush(self) -> None:
        tokens: list[int] = []
        encoded = self._tokenizer.encode_batch(self._pieces)
        for ids, last in zip(encoded, self._last, strict=True):
            tokens += ids
            if last:
                tokens.append(self._tokenizer.end_of_text)
        if tokens:
            self._sink(np.array(tokens, np.int32))
        self._pieces, self._last, self._chars = [], [], 0


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
    parts = split_documents(corpus, split, f"data: reading for {config.tokenizer}")
    texts = (part.text for held_out, part in parts if not held_out)
    if config.tokenizer == "char":
        return train_char(texts)
    logger.info("data: training a bpe of %d tokens on the training split", config.vocab_size)
    return train_bpe(texts, config.vocab_size)


def _write_splits(
    directory: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer
) -> dict[str, Any]:
    writers = [_SplitWriter(directory, name, tokenizer) for name in ("train", "validation")]
    compressor = zlib.compressobj(9, wbits=31)  # 31: with gzip's header, as the command writes it
    zipped = unzipped = 0
    for held_out, part in split_documents(corpus, split, "data: encoding"):
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


class _SplitWriter:
    """Encodes the documents of one split into files NAME-00000.bin and on."""

    def __init__(self, directory: Path, name: str, tokenizer: Tokenizer):
        self.name = name
        self.dtype = "<u2" if tokenizer.vocab_size < 2**16 else "<u4"
        self._directory, self._vocab_size = directory, tokenizer.vocab_size
        self._files: list[dict[str, Any]] = []
        self._documents = self._bytes = 0
        self._encoder = _Encoder(tokenizer, self._append)

    def add(self, name: str, text: str, num_bytes: int) -> None:
        self._encoder.add(text, name)
        self._documents += 1
        self._bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """Writes what is left and gives the split's part of the manifest."""
        self._encoder.flush()
        for entry in self._files:
            path = self._directory / entry["file"]
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            entry["sha256"] = _sha256(path)
        return {
            "tokens": sum(entry["tokens"] for entry in self._files),
            "bytes": self._bytes,
            "documents": self._documents,
            "files": self._files,
        }

    def _append(self, tokens: np.ndarray) -> None:
        # An id beyond the vocabulary would not fail later: the embedding would give NaN.
        if tokens.max() >= self._vocab_size:
            expected = f"ids below its vocabulary size {self._vocab_size}"
            raise InputError("data.tokenizer", f"id {tokens.max()}", expected)
        while len(tokens):
            if not self._files or self._files[-1]["tokens"] == _SHARD_TOKENS:
                name = f"{self.name}-{len(self._files):05d}.bin"
                self._files.append({"file": name, "tokens": 0})
            entry = self._files[-1]
            fitting = tokens[: _SHARD_TOKENS - entry["tokens"]]
            with (self._directory / entry["file"]).open("ab") as file:
                file.write(fitting.astype(self.dtype).tobytes())
            entry["tokens"] += len(fitting)
            tokens = tokens[len(fitting) :]


def _open(directory: Path) -> PreparedData:
    """Opens what `_build` wrote, refusing it if a file is missing or has changed."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        tokenizer_file = directory / "tokenizer.json"
        found = _sha256(tokenizer_file)
        if found != manifest["tokenizer"]:
            expected = f"SHA-256 {manifest['tokenizer'][:12]}"
            raise _damaged(tokenizer_file, f"SHA-256 {found[:12]}", expected)
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
        raise _damaged(directory, f"{error.filename} ({error.strerror})", "all files") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(directory / "manifest.json", error, "a whole manifest") from error
    return PreparedData(
        streams["train"], streams["validation"], tokenizer, identity, directory, gzip_figure
    )


def _open_split(directory: Path, split: dict[str, Any], dtype: str) -> TokenStream:
    parts: list[np.ndarray | _Shard] = []
    for entry in split["files"]:
        path = directory / Path(entry["file"]).name  # a name, never a way out of the directory
        size = entry["tokens"] * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            raise _damaged(path, f"{path.stat().st_size} bytes", f"{size} bytes")
        if size <= _HASH_BYTES and _sha256(path) != entry["sha256"]:
            raise _damaged(path, "other bytes of the same size", f"SHA-256 {entry['sha256'][:12]}")
        parts.append(_Shard(path, dtype))
    return TokenStream(parts, split["bytes"], split["documents"])


def _require_window(train_tokens: int, config: DataConfig) -> None:
    if train_tokens < config.seq_len + 1:
        expected = f"at most {train_tokens - 1}: the training split has {train_tokens} tokens"
        raise InputError("data.seq_len", config.seq_len, expected, "a smaller one, or more text")


def _damaged(path: Path, got: object, expected: str) -> InputError:
    directory = path if path.is_dir() else path.parent
    hint = f"deleting {directory}; it is then made again"
    return InputError(str(path), str(got), f"{expected}, as its manifest says", hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, content: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
