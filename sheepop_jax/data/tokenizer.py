"""Tokenization with Hugging Face `tokenizers`.

Every tokenizer is a standard `tokenizer.json` that other programs can load. Special tokens that
occur in text are encoded as text; only the program inserts end-of-text into a stream.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sheepop_jax.errors import InputError

# When unset, the library warns and disables its threads in any process forked after first use.
# This package never forks (grain prefetches with threads).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in public tokenizers, most specific first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[EOS]", "<EOS>")

# Longest string passed to the library, which uses over 50 bytes per character while encoding.
_PIECE_CHARS = 2**18
CUT = re.compile(r"\S(?=[ \n])")  # splitting here does not change the ids


class Tokenizer:
    """Encodes text to ids in [0, vocab_size) and decodes ids to text.

    Attributes:
        vocab_size: the largest id plus one.
        end_of_text: the id before the first document and after every document.
    """

    vocab_size: int
    end_of_text: int

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "data.tokenizer"):
        """Wraps and configures `inner`; `name` is the field named in error messages."""
        ids = inner.get_vocab(with_added_tokens=True)
        ends = [token for token in _END_OF_TEXT_NAMES if token in ids]
        if not ends:
            expected = "a tokenizer with an end-of-text token: " + ", ".join(_END_OF_TEXT_NAMES)
            raise InputError(name, f"a vocabulary of {len(ids)} tokens without one", expected)
        # A tokenizer.json may enable truncation, padding or BPE dropout; all are silent.
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None
        added = inner.get_added_tokens_decoder().get(ids[ends[0]])
        if added is not None and not added.special:  # otherwise it would match in text
            inner.add_special_tokens(ends[:1])
        inner.encode_special_tokens = True  # not stored in the JSON
        self._inner = inner
        self.vocab_size = max(ids.values()) + 1
        self.end_of_text = ids[ends[0]]
        self._characters = _characters_of(inner)

    @property
    def has_fixed_characters(self) -> bool:
        """Whether the vocabulary holds only the characters of the training text."""
        return self._characters is not None

    def encode(self, text: str) -> list[int]:
        """Encodes `text` without end-of-text.

        Raises:
            InputError: a character is not in a character tokenizer's vocabulary, or a custom
                tokenizer cannot encode the text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes each text as `encode` does, on all cores."""
        if self._characters is not None:
            for text in texts:
                self.check(text)
        try:
            encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception as error:  # the library's plain Exception, or a lone surrogate: locate it
            for text in texts:
                self.check(text)
            got = f"a tokenizer that cannot encode the text ({error})"
            raise InputError("data.tokenizer", got, "a tokenizer that encodes any text") from error
        return [encoding.ids for encoding in encoded]

    def check(self, text: str, name: str = "text", offset: int = 0) -> None:
        """Checks that a text can be encoded.

        Args:
            text: the text.
            name: name of the text in the message.
            offset: position of the text's first character within `name`.

        Raises:
            InputError: names the first character that cannot be encoded, and its position.
        """
        surrogate = re.search("[\ud800-\udfff]", text)
        if surrogate:
            got = f"U+{ord(surrogate[0]):04X} at position {offset + surrogate.start()}"
            raise InputError(name, got, "valid Unicode without lone surrogates")
        if self._characters is None:
            return
        unseen = set(text) - self._characters
        if unseen:
            position = min(map(text.index, unseen))
            character = text[position]
            raise InputError(
                name,
                f"character {character!a} (U+{ord(character):04X}) at position {offset + position}",
                f"one of the {len(self._characters)} characters in the vocabulary",
                "removing it, or training with `data.tokenizer=bpe`, which encodes any text",
            )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decodes `ids`, without special tokens by default.

        Bytes that are not valid UTF-8 (a split character) become U+FFFD.
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decodes `ids` as a continuation of `prompt`.

        Some tokenizers drop a leading space, so decoding `ids` alone would lose it.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def is_lossless(self, texts: Iterable[str]) -> bool:
        """Whether encode and decode restore each text, ignoring white space at its ends."""
        back = ((self.decode(self.encode(text), skip_special=False), text) for text in texts)
        return all(decoded.strip() == text.strip() for decoded, text in back)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._inner.to_str()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `to_json()`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, content: str, name: str = "data.tokenizer") -> "Tokenizer":
        """Loads the content of a `tokenizer.json`.

        Raises:
            InputError: not a tokenizer, or it has no end-of-text token.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            reason = str(error).splitlines()[0][:200]
            raise InputError(name, f"not a tokenizer ({reason})", "a tokenizer.json") from error
        return cls(inner, name)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Loads a `tokenizer.json`.

        Raises:
            InputError: the file cannot be read, or `from_json` rejects it.
        """
        name = f"data.tokenizer {path}"
        try:
            content = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            expected = "bpe, char or the path to a readable tokenizer.json"
            raise InputError("data.tokenizer", f"{path} ({reason})", expected) from error
        return cls.from_json(content, name)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pre-tokenizer.

    Sources: BPE, Sennrich et al. 2016; byte level, Radford et al. 2019.

    Id 0 is end-of-text; the 256 bytes follow, so encoding is lossless for any text. Training is
    deterministic: the same texts in the same order give the same tokenizer.

    Args:
        texts: the training texts; read once.
        vocab_size: maximum number of tokens, at least 257; fewer if no pair repeats.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once compresses nothing
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in split_text([text]))
    inner.train_from_iterator(pieces, trainer)
    return Tokenizer(inner)


def train_char(texts: Iterable[str]) -> Tokenizer:
    """Builds a character tokenizer: end-of-text (id 0), then the texts' code points in order.

    Implemented as a BPE without merges or pre-tokenizer, which splits text into code points 30
    times faster than a regular expression.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {END_OF_TEXT: 0}
    for index, character in enumerate(sorted(characters), start=1):
        vocabulary[character] = index
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)


def split_text(texts: Iterable[str]) -> Iterator[str]:
    """Re-splits one text, given in any pieces, into bounded pieces that depend on the text alone.

    A cut falls before a space or line break that follows another character. GPT-2's pre-tokenizer
    always splits there, so the ids equal those of the whole text. If no such place is near (a word
    of 100,000 characters) the cut falls anywhere; decoding is still exact.
    """
    text = ""
    for more in texts:
        text += more
        start = 0
        while len(text) - start > _PIECE_CHARS:
            end = start + _PIECE_CHARS
            for near in CUT.finditer(text, end - _PIECE_CHARS // 4, end):
                end = near.end()
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def _characters_of(inner: tokenizers.Tokenizer) -> frozenset[str] | None:
    """The vocabulary of a `train_char` tokenizer, which drops unknown characters; else None."""
    if inner.pre_tokenizer is not None or not isinstance(inner.model, models.BPE):
        return None
    model = json.loads(inner.to_str())["model"]
    if model["merges"] or model["unk_token"] is not None or model["byte_fallback"]:
        return None
    return frozenset(token for token in model["vocab"] if len(token) == 1)
