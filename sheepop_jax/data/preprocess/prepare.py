"""From sources to token shards: made once, kept in a cache, reused; resumed when interrupted."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from sheepop_jax.config.data import SOURCE_FIELDS, DataConfig, Part
from sheepop_jax.data.preprocess.cache import Cache, delete, delete_leftovers, write_text
from sheepop_jax.data.preprocess.compression import held_out_gzip
from sheepop_jax.data.preprocess.corpus_store import CorpusStore, write_corpus_store
from sheepop_jax.data.preprocess.encode import encode_units
from sheepop_jax.data.preprocess.progress import Progress
from sheepop_jax.data.preprocess.split import Segment, Split, choose_split
from sheepop_jax.data.shards import FORMAT, PreparedData, make_manifest, open_shards
from sheepop_jax.data.sources.corpus import open_corpus
from sheepop_jax.data.sources.documents import Corpus
from sheepop_jax.data.tokenizer import Tokenizer, split_text, train_bpe, train_char
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)


def prepare(config: DataConfig, check: Callable[[], None] = lambda: None) -> PreparedData:
    """Returns the token shards of the configured sources, from the cache if nothing has changed.

    Of several processes that prepare the same text at once, one does the work under a lock; the
    others wait for the lock and find the shards. If that one dies, the next resumes its work.

    Args:
        config: the sources, the split, the tokenizer and the cache directory.
        check: called often; may raise to leave. The units that are done are kept.

    Raises:
        InputError: the corpus, the split, the tokenizer or the cache directory cannot be used;
            nothing is left of the attempt.
    """
    sources = [(part, open_corpus(part.config)) for part in config.parts]
    given = None
    if config.tokenizer not in ("bpe", "char"):
        given = Tokenizer.from_file(config.tokenizer)
    signatures = [corpus.signature() for _, corpus in sources]
    fields = [asdict(part.config) for part, _ in sources]
    state = [FORMAT, signatures, [{name: f[name] for name in SOURCE_FIELDS} for f in fields]]
    cache = Cache(cache_dir(config), state, known=all(signatures))
    work = _Preparation(config, sources, given, cache, check)
    with cache.writable():
        data = work.run()
        try:
            _require_windows(config, data)
        except InputError:
            if work.built:
                delete(data.directory)
            raise
    for (part, corpus), made in zip(sources, data.manifest["sources"], strict=True):
        # Shards that are reused may be of a source that passed over other files.
        if skipped := made["skipped"] if work.built else corpus.skipped:
            of = f"{part.name}: " if part.name else ""
            reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
            logger.info("data: %spassed over: %s", of, reasons)
    logger.info(
        "data: %d training and %d held-out tokens, vocabulary %d; gzip -9: %.3f bits per byte",
        data.train_tokens,
        len(data.validation),
        data.tokenizer.vocab_size,
        data.gzip_bits_per_byte,
    )
    if not data.lossless:
        logger.warning(
            "data: THE TOKENIZER DOES NOT GIVE THE TEXT BACK: bits per byte count bytes that it "
            "drops or merges, and cannot be compared"
        )
    if len(data.validation) <= config.seq_len:
        logger.warning("data: held out is less than a window: its figures will say little")
    return data


def _require_windows(config: DataConfig, data: PreparedData) -> None:
    """Each source must fill a window; where windows are padded, a document will do."""
    least = 2 if config.packing == "one_per_window" else config.seq_len + 1
    for part, stream in zip(config.parts, data.train, strict=True):
        if len(stream) >= least:
            continue
        of = f" of data.mixture.{part.name}" if part.name else ""
        expected = f"at most {len(stream) - 1}: the training split{of} has {len(stream)} tokens"
        if len(stream) == 1:
            expected = f"text to train on{of}, not only held-out text"
        hint = "a smaller one, or more text"
        raise InputError("data.seq_len", config.seq_len, expected, hint)


def cache_dir(config: DataConfig) -> Path:
    """Where shards are kept."""
    if config.cache_dir:
        return Path(os.path.expanduser(config.cache_dir)).resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sheepop_jax"


class _Preparation:
    """The steps from opened sources to shards.

    Attributes:
        built: whether the shards were made, rather than found.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: list[tuple[Part, Corpus]],
        given: Tokenizer | None,
        cache: Cache,
        check: Callable[[], None],
    ):
        self._config, self._sources, self._given = config, sources, given
        self._cache, self._check = cache, check
        self.built = False

    def run(self) -> PreparedData:
        """Reads, splits, learns, encodes: each only if it is not done yet."""
        cache = self._cache
        if known := self._recall():  # no lock: the cache may be one that is only read
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
                    split = choose_split(spool, self._config.val_split, self._config.val_fraction)
                    pending.mkdir(exist_ok=True)
                    tokenizer = self._tokenizer(pending / "tokenizer.json", spool, split)
                    units = encode_units(pending, spool, split, tokenizer, self._check)
                manifest = make_manifest(
                    spool,
                    split,
                    tokenizer,
                    units,
                    split_rule=f"{self._config.val_split} {self._config.val_fraction}",
                    gzip_bits_per_byte=held_out_gzip(spool, split, self._check),
                    lossless=not self._given or self._given.is_lossless(_sample(spool, split)),
                )
                write_text(pending / "manifest.json", json.dumps(manifest, indent=1) + "\n")
                os.replace(pending, directory)
                self.built = True
                logger.info("data: token shards written to %s", directory)
                return self._open(directory, spool.directory)
            except OSError:  # another process prepared the same text from elsewhere
                if directory.exists():
                    return self._reuse(directory, spool.directory, pending)
                if pending.exists():
                    raise
        return self.run()  # it has deleted the work, since the input is bad; and says why

    def _recall(self) -> Path | None:
        """The shards, if they are there and it is known without reading the text."""
        fingerprint = self._cache.recall()
        directory = self._shards(fingerprint)
        return directory if fingerprint and directory.exists() else None

    def _shards(self, fingerprint: str) -> Path:
        """Where the shards of a corpus lie: named by what decides their content, and no more."""
        config = self._config
        bpe = config.tokenizer == "bpe"
        made_of = {
            "format": FORMAT,
            "source": fingerprint,
            "split": [config.val_split, config.val_fraction],
            "parts": [(part.name, part.weight) for part, _ in self._sources],
            "tokenizer": self._given.fingerprint if self._given else config.tokenizer,
            "training": [config.vocab_size, config.tokenizer_sample_bytes] if bpe else [],
            "tokenizers": importlib.metadata.version("tokenizers"),
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
        """Reads the sources, or finds them read by a preparation that did not come to its end."""
        spool = self._open_spool(fingerprint) if fingerprint else None
        if spool is not None:
            logger.info("data: the text was read before; going on from there")
            return spool
        with self._cache.reading() as directory:
            fingerprint = write_corpus_store(directory, self._sources, self._check).fingerprint
            spool = self._open_spool(fingerprint)  # another source may have given the same text
            if spool is None:
                os.replace(directory, self._cache.spool(fingerprint))
                spool = self._open_spool(fingerprint)
        if spool is None:
            raise FileNotFoundError(2, "No such directory", str(self._cache.spool(fingerprint)))
        return spool

    def _open_spool(self, fingerprint: str) -> CorpusStore | None:
        """None if there is none, or one that is not whole; that is deleted."""
        try:
            spool = CorpusStore(self._cache.spool(fingerprint))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            delete(self._cache.spool(fingerprint))
            return None
        # Names and weights are no part of the text: those of another mixture may stand there.
        for source, (part, _) in zip(spool.sources, self._sources, strict=True):
            source |= {"name": part.name, "weight": part.weight}
        return spool

    @contextlib.contextmanager
    def _nothing_left_of(self, *directories: Path) -> Iterator[None]:
        """Bad input deletes what came of it; whatever else goes wrong leaves it, to go on from."""
        try:
            yield
        except InputError:
            delete(*directories)
            raise

    def _tokenizer(self, path: Path, spool: CorpusStore, split: Split) -> Tokenizer:
        """The given one, one that an interrupted preparation has trained, or a new one."""
        if path.exists():
            return Tokenizer.from_file(path)
        tokenizer = self._given or self._train_tokenizer(spool, split)
        write_text(path, tokenizer.to_json())
        return tokenizer

    def _train_tokenizer(self, spool: CorpusStore, split: Split) -> Tokenizer:
        """A BPE learns from a sample, evenly spread over the training text.

        Characters are those of all text, or one that only held-out text has would stop the run.
        """
        config, share = self._config, 1.0
        characters = config.tokenizer == "char"

        def segments() -> Iterator[Segment]:
            return (s for s in split.segments(spool) if characters or not s.held_out)

        size = sum(segment.stop - segment.start for segment in segments())
        if characters:
            logger.info("data: collecting the characters of the text")
        else:
            share = min(1.0, config.tokenizer_sample_bytes / size)
            part = "" if share == 1.0 else f" ({share:.1%} of it)"
            logger.info("data: training a bpe tokenizer on the training split%s", part)
        with Progress("data: reading for the tokenizer", size, self._check) as progress:
            pieces = _pieces(spool, segments(), share, progress)
            return train_char(pieces) if characters else train_bpe(pieces, config.vocab_size)


def _pieces(
    spool: CorpusStore, segments: Iterable[Segment], share: float, progress: Progress
) -> Iterator[str]:
    """Their text; a piece is passed over while more than `share` of the text was given."""
    seen = given = 0
    for segment in segments:
        for piece in split_text(spool.text(segment.start, segment.stop)):
            progress.update(len(piece.encode()))
            if given <= share * seen:
                given += len(piece)
                yield piece
            seen += len(piece)


def _sample(spool: CorpusStore, split: Split) -> Iterator[str]:
    """The beginning of the training text."""
    training = (segment for segment in split.segments(spool) if not segment.held_out)
    texts = (text for segment in training for text in spool.text(segment.start, segment.stop))
    return itertools.islice(split_text(texts), 8)
