"""Preprocessing from sources to cached token shards; resumes when interrupted."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheepop_jax.config.data import CHAT_FIELDS, SOURCE_FIELDS, DataConfig, Part, inner_suffix
from sheepop_jax.data.chat import with_chat_template
from sheepop_jax.data.chat_templates import TEMPLATES
from sheepop_jax.data.compression import GZIP_BYTES, gzip_bits_per_byte
from sheepop_jax.data.preprocess.cache import Cache, delete, delete_leftovers
from sheepop_jax.data.preprocess.conversations import (
    DROPPED,
    REFUSED,
    TRUNCATED,
    ConversationEncoder,
    EncodedSide,
    count_counted,
)
from sheepop_jax.data.preprocess.corpus_store import CorpusStore, write_corpus_store
from sheepop_jax.data.preprocess.encode import encode_units, split_pieces
from sheepop_jax.data.preprocess.manifest import make_manifest
from sheepop_jax.data.preprocess.split import VAL, Segment, Split, choose_split
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.shards import FORMAT, PreparedData, open_shards
from sheepop_jax.data.sources.conversations import from_json
from sheepop_jax.data.sources.corpus import open_corpus
from sheepop_jax.data.sources.documents import Corpus
from sheepop_jax.data.stream import TokenStream, encode_pieces
from sheepop_jax.data.tokenizer import Tokenizer, split_text
from sheepop_jax.errors import InputError, masked
from sheepop_jax.files import write_atomic
from sheepop_jax.formatting import format_bytes
from sheepop_jax.progress import Progress, elapsed

logger = logging.getLogger(__name__)

# Kinds of source that a directory may hold, besides text.
_IN_DIRECTORIES = ("json", "csv", "quoted_tsv", "parquet", "pdf")

_SOURCES_FORMAT = 2  # incremented when the same sources would give another text


def prepare(
    config: DataConfig,
    check: Callable[[], None] = lambda: None,
    format: int = FORMAT,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """Returns the token shards of the configured sources, from the cache if nothing has changed.

    If several processes prepare the same text, one works under a lock and the others wait for its
    shards. If it dies, the next process resumes its work.

    Args:
        config: the sources, the split, the tokenizer and the cache directory.
        check: called often; may raise to stop. Finished units are kept.
        format: of the shards; that of an existing run (`format_of`) gives its tokens again.
        tokenizer: used instead of `config.tokenizer`.

    Raises:
        InputError: the corpus, the split, the tokenizer or the cache directory is invalid; the
            cache is left as it was.
    """
    sources = [(part, open_corpus(part.config)) for part in config.parts]
    given = tokenizer
    if given is None and config.tokenizer not in ("bpe", "char"):
        given = Tokenizer.from_file(config.tokenizer)
    if given is not None and config.is_chat:
        given = with_chat_template(given, config.chat_template)
    signatures = [corpus.signature() for _, corpus in sources]
    fields = [asdict(part.config) for part, _ in sources]
    state = [
        _SOURCES_FORMAT,
        signatures,
        [{name: f[name] for name in SOURCE_FIELDS} for f in fields],
    ]
    cache = Cache(config.cache_path, state, known=all(signatures))
    work = _Preparation(config, sources, given, cache, check, format)
    with cache.writable():
        data = work.run()
        try:
            _require_windows(config, data)
        except InputError:
            if work.built:
                delete(data.directory)
            raise
    for (part, corpus), made in zip(sources, data.manifest["sources"], strict=True):
        # Reused shards may come from a source that skipped other files.
        if skipped := made["skipped"] if work.built else corpus.skipped:
            of = f"{part.name}: " if part.name else ""
            reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
            logger.info("data: %sskipped: %s", of, reasons)
    if config.is_chat:
        _log_conversations(data)
    logger.info(
        "data: %d training and %d validation tokens, vocabulary %d; gzip -9: %.3f bits per byte",
        data.train_tokens,
        len(data.validation),
        data.tokenizer.vocab_size,
        data.gzip_bits_per_byte,
    )
    if not data.lossless:
        logger.warning(
            "data: THE TOKENIZER IS NOT LOSSLESS: decoding does not restore the validation text, "
            "so bits per byte are left out"
        )
    elif not data.restores_training_text:
        logger.warning(
            "data: THE TOKENIZER IS NOT LOSSLESS: decoding does not restore the training text"
        )
    if len(data.validation) <= config.seq_len:
        logger.warning(
            "data: the validation split is shorter than one window: its metrics are unreliable"
        )
    return data


def _log_conversations(data: PreparedData) -> None:
    left_out = Counter[str]()
    for unit in data.manifest["units"]:
        left_out.update(unit.get("left_out", {}))
    counted = sum(stream.num_targets for stream in data.train)
    logger.info(
        "data: %d conversations to train on; the loss counts %d of %d tokens",
        sum(stream.num_documents for stream in data.train),
        *(counted, data.train_tokens),
    )
    for reason, said in (
        (DROPPED, "dropped: longer than data.seq_len"),
        (TRUNCATED, "truncated to data.seq_len: their oldest turns are left out"),
        (REFUSED, "skipped: the chat template refuses them"),
    ):
        if number := left_out[reason]:
            logger.warning("data: %d conversations %s", number, said)


class EncodedText(NamedTuple):
    """Documents that are not part of a run's data.

    Attributes:
        stream: their tokens.
        content: their UTF-8 bytes, concatenated.
        lossless: whether decoding restores them.
    """

    stream: TokenStream
    content: bytes
    lossless: bool


def encode_path(config: DataConfig, path: str, tokenizer: Tokenizer, field: str) -> EncodedText:
    """Reads other text as `prepare` reads that of a run, and encodes every document of it.

    Args:
        config: the run's; its options for reading apply. The kind of source follows from `path`,
            and for a directory from the run's source.
        path: as `data.path`.
        tokenizer: the run's.
        field: the name of `path` in messages.

    Raises:
        InputError: the text cannot be read, or has a character that is not in the vocabulary.
    """
    try:
        kind, source = config.resolved_source, "auto"
        if os.path.isdir(os.path.expanduser(path)) and kind in _IN_DIRECTORIES:
            source = kind
        elif config.source == "files":
            source = "files"
        elif kind == "quoted_tsv" and inner_suffix(Path(path)) == ".tsv":
            source = kind
        config = replace(
            config, path=path, source=source, name="", val_path="", mixture={}, max_bytes=0
        )
        corpus = open_corpus(config, field)
        with tempfile.TemporaryDirectory(prefix="sheepop-") as directory:
            spool = write_corpus_store(Path(directory), [(config.parts[0], corpus)])
            if skipped := spool.sources[0]["skipped"]:
                reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
                logger.info("%s: skipped: %s", masked(path), reasons)
            split = Split(["source"], np.full(len(spool.documents), VAL), {}, 0)
            content = Path(directory, "text.bin").read_bytes()
            if config.is_chat:
                encoder = ConversationEncoder.of(config, tokenizer)
                sides = [s.sides[VAL] for s in encoder.encode(spool, split.segments(spool))]
                return EncodedText(_stream_of(sides, field, path), content, True)
            pieces = split_pieces(spool, split, 0, spool.num_bytes, tokenizer)
            tokens, lossless = [], True
            for batch in encode_pieces(tokenizer, pieces):
                tokens.append(batch.sides[VAL])
                lossless = lossless and bool(batch.restored[VAL])
    except InputError as error:
        if error.field == "data.query":  # of a run that has none
            expected = "a text or a table; this run has no query for a database"
            raise InputError(field, path, expected) from None
        # The options of the run are fixed: do not suggest others.
        hint = "" if "`data." in error.hint else error.hint
        raise InputError(error.field, error.got, error.expected, hint) from error
    stream = TokenStream(
        [*tokens, np.array([tokenizer.end_of_text], np.int32)],
        len(content),
        len(spool.documents),
        tokenizer.document_bos is not None,
    )
    return EncodedText(stream, content, lossless)


def _stream_of(sides: list[EncodedSide], field: str, path: str) -> TokenStream:
    """The stream of conversations."""
    marks = [side.marks for side in sides if side.marks is not None]
    counted = sum(map(count_counted, marks))
    if not counted:
        expected = "a conversation that is no longer than a window of the run"
        raise InputError(field, path, expected)
    return TokenStream.of_conversations(
        [side.tokens for side in sides],
        marks,
        sum(side.num_bytes for side in sides),
        sum(side.documents for side in sides),
        counted,
    )


def _require_windows(config: DataConfig, data: PreparedData) -> None:
    """Requires at least one window of training text per source, or one token if padded."""
    least = config.seq_len + 1 if config.packing == "stream" else 2
    longer = "a longer `data.seq_len`"
    if config.long_conversations == "drop":
        longer += ", or `data.long_conversations=truncate`"
    if config.is_chat and not len(data.validation):
        expected = "one that holds a conversation of the validation split: all are longer"
        raise InputError("data.seq_len", config.seq_len, expected, longer)
    for part, stream in zip(config.parts, data.train, strict=True):
        if len(stream) >= least:
            continue
        of = f" of data.mixture.{part.name}" if part.name else ""
        expected = f"at most {len(stream) - 1}: the training split{of} has {len(stream)} tokens"
        if config.is_chat:
            expected = f"one that holds a conversation of the training split{of}: all are longer"
            raise InputError("data.seq_len", config.seq_len, expected, longer)
        if len(stream) == 1:
            expected = f"training text{of}, not only validation text"
        hint = "a smaller `data.seq_len`, or more text"
        raise InputError("data.seq_len", config.seq_len, expected, hint)


class _Preparation:
    """The preprocessing steps from open sources to shards.

    Attributes:
        built: whether this process wrote the shards (False: they were in the cache).
    """

    def __init__(
        self,
        config: DataConfig,
        sources: list[tuple[Part, Corpus]],
        given: Tokenizer | None,
        cache: Cache,
        check: Callable[[], None],
        format: int,
    ):
        self._config, self._sources, self._given = config, sources, given
        self._cache, self._check, self._format = cache, check, format
        self.built = False

    def run(self) -> PreparedData:
        """Reads, splits, trains the tokenizer and encodes; skips finished steps."""
        cache = self._cache
        if known := self._recall():  # no lock: the cache may be read-only
            return self._reuse(known)
        with cache.lock(self._check):
            if known := self._recall():
                return self._reuse(known)
            cache.delete_abandoned()
            spool = self._read(cache.recall())
            cache.remember(spool.fingerprint)
            directory = self._shards(spool.fingerprint)
            pending = cache.tokens(directory.name)
            if directory.exists():
                return self._reuse(directory, spool.directory, pending)
            try:
                with self._nothing_left_of(spool.directory, pending):
                    split = choose_split(
                        spool,
                        self._config.val_split,
                        self._config.val_fraction,
                        few=self._few,
                    )
                    pending.mkdir(exist_ok=True)
                    tokenizer = self._tokenizer(pending / "tokenizer.json", spool, split)
                    conversations = None
                    if self._config.is_chat:
                        conversations = ConversationEncoder.of(self._config, tokenizer)
                    units = encode_units(
                        pending, spool, split, tokenizer, self._check, conversations
                    )
                facts = {
                    **self._chat,
                    "split": f"{self._config.val_split} {self._config.val_fraction}",
                    "gzip_bits_per_byte": _gzip_figure(spool, split, self._check),
                }
                manifest = make_manifest(spool, split, tokenizer, units, facts, self._format)
                write_atomic(pending / "manifest.json", json.dumps(manifest, indent=1) + "\n")
                os.replace(pending, directory)
                self.built = True
                logger.info("data: token shards written to %s", directory)
                return self._open(directory, spool.directory)
            except OSError:  # another process prepared the same text from another source
                if directory.exists():
                    return self._reuse(directory, spool.directory, pending)
                if pending.exists():
                    raise
        return self.run()  # the other process hit bad input and deleted the work: report it here

    @property
    def _few(self) -> str:
        """How `choose_split` splits a few documents."""
        if self._config.is_chat:
            return "documents"
        return "tail" if self._format < 3 else "tails"

    @property
    def _chat(self) -> dict[str, Any]:
        """What determines the tokens of conversations; empty for text."""
        if not self._config.is_chat:
            return {}
        return {"chat": {name: getattr(self._config, name) for name in (*CHAT_FIELDS, "seq_len")}}

    def _recall(self) -> Path | None:
        """The cached shards, if the source is unchanged; does not read the text."""
        fingerprint = self._cache.recall()
        directory = self._shards(fingerprint)
        return directory if fingerprint and directory.exists() else None

    def _shards(self, fingerprint: str) -> Path:
        """The shard directory of a corpus, named by a hash of all that determines its content."""
        config = self._config
        bpe = config.tokenizer == "bpe"
        made_of = {
            "format": self._format,
            "source": fingerprint,
            "split": [config.val_split, config.val_fraction],
            "parts": [(part.name, part.weight) for part, _ in self._sources],
            "tokenizer": self._given.fingerprint if self._given else config.tokenizer,
            "training": [config.vocab_size, config.tokenizer_sample_bytes] if bpe else [],
            "tokenizers": importlib.metadata.version("tokenizers"),
            **self._chat,
        }
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        return self._cache.directory / key

    def _reuse(self, directory: Path, *done_with: Path) -> PreparedData:
        logger.info("data: token shards reused from %s", directory)
        return self._open(directory, *done_with)

    def _open(self, directory: Path, *done_with: Path) -> PreparedData:
        delete(*done_with)
        delete_leftovers(directory)
        return open_shards(directory)

    def _read(self, fingerprint: str) -> CorpusStore:
        """Reads the sources, or opens the store that an interrupted run left."""
        spool = self._open_spool(fingerprint) if fingerprint else None
        if spool is not None:
            logger.info("data: resuming: the text is already read")
            return spool
        with self._cache.reading() as directory:
            fingerprint = write_corpus_store(directory, self._sources, self._check).fingerprint
            spool = self._open_spool(fingerprint)  # another source may have the same text
            if spool is None:
                os.replace(directory, self._cache.spool(fingerprint))
                spool = self._open_spool(fingerprint)
        if spool is None:
            raise FileNotFoundError(2, "No such directory", str(self._cache.spool(fingerprint)))
        return spool

    def _open_spool(self, fingerprint: str) -> CorpusStore | None:
        """Opens a corpus store; None if missing or incomplete (then it is deleted)."""
        try:
            spool = CorpusStore(self._cache.spool(fingerprint))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            delete(self._cache.spool(fingerprint))
            return None
        # Names and weights may be those of another mixture with the same text.
        for source, (part, _) in zip(spool.sources, self._sources, strict=True):
            source |= {"name": part.name, "weight": part.weight}
        return spool

    @contextlib.contextmanager
    def _nothing_left_of(self, *directories: Path) -> Iterator[None]:
        """Deletes the directories after bad input; other failures keep them for resuming."""
        try:
            yield
        except InputError:
            delete(*directories)
            raise

    def _tokenizer(self, path: Path, spool: CorpusStore, split: Split) -> Tokenizer:
        """The given tokenizer, the one that an interrupted run trained, or a new one."""
        if path.exists():
            return Tokenizer.from_file(path)
        tokenizer = self._given or self._train_tokenizer(spool, split)
        write_atomic(path, tokenizer.to_json())
        return tokenizer

    def _train_tokenizer(self, spool: CorpusStore, split: Split) -> Tokenizer:
        """Trains a BPE on an evenly spread sample of the training split.

        A character vocabulary covers all text: characters found only in the validation split would
        otherwise fail to encode.
        """
        config, share = self._config, 1.0
        characters = config.tokenizer == "char"

        def segments() -> Iterator[Segment]:
            return (s for s in split.segments(spool) if characters or not s.is_val)

        size = sum(segment.stop - segment.start for segment in segments())
        if characters:
            logger.info("data: building the character vocabulary")
        else:
            share = min(1.0, config.tokenizer_sample_bytes / size)
            part = "" if share == 1.0 else f"{share:.1%} of "
            logger.info(
                "data: training a bpe tokenizer on %sthe training split (%s)",
                *(part, format_bytes(share * size)),
            )
        with contextlib.ExitStack() as training:

            def pieces() -> Iterator[str]:
                with Progress("data: reading for the tokenizer", size, self._check) as progress:
                    yield from _pieces(spool, segments(), share, progress, config.is_chat)
                training.enter_context(elapsed("data: training the tokenizer"))

            texts = pieces()
            if config.is_chat:
                texts = itertools.chain(
                    [TEMPLATES[config.chat_template].text],
                    (m["content"] for m in itertools.chain.from_iterable(map(from_json, texts))),
                )
            tokenizer = train_char(texts) if characters else train_bpe(texts, config.vocab_size)
        if config.is_chat:
            tokenizer = with_chat_template(tokenizer, config.chat_template)
        return tokenizer


def _pieces(
    spool: CorpusStore,
    segments: Iterable[Segment],
    share: float,
    progress: Progress,
    whole: bool,
) -> Iterator[str]:
    """Yields pieces of the segments' text, evenly sampled to a fraction `share` of it.

    With `whole`, a piece is a whole segment.
    """
    seen = given = 0
    for segment in segments:
        texts = spool.text(segment.start, segment.stop)
        for piece in ["".join(texts)] if whole else split_text(texts):
            progress.update(len(piece.encode()))
            if given <= share * seen:
                given += len(piece)
                yield piece
            seen += len(piece)


def _gzip_figure(spool: CorpusStore, split: Split, check: Callable[[], None]) -> float:
    """Bits per byte of `gzip -9` on the first `GZIP_BYTES` of the validation text."""

    def pieces() -> Iterator[bytes]:
        left = GZIP_BYTES
        with Progress("data: gzip -9 baseline", 0, check) as progress:
            for segment in split.segments(spool):
                if not segment.is_val:
                    continue
                for text in spool.text(segment.start, segment.stop):
                    if left <= 0:
                        return
                    content = text.encode()[:left]
                    left -= len(content)
                    yield content
                    progress.update(len(content))

    return gzip_bits_per_byte(pieces())
