"""Text to token ids and back, by a Hugging Face `tokenizers` tokenizer.

Whatever its kind, a tokenizer is one `tokenizer.json` that other programs load too. Special tokens
found in text are text: only the program itself puts an end-of-text token into a stream.
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

# An explicit value: unset, the library turns its threads off, with a warning, in any process that
# is forked after the first use. This package forks nothing (grain prefetches with threads).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"
# What public tokenizers call it, the most specific first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[EOS]", "<EOS>")

# Characters given to the library in one string: it holds over 50 bytes a character while at work.
_PIECE_CHARS = 2**18
CUT = re.compile(r"\S(?=[ \n])")  # where the ids of the two parts are those of the whole


class Tokenizer:
    """Text to ids in [0, vocab_size) and back.

    Attributes:
        vocab_size: the true size: one more than the largest id.
        end_of_text: the id that stands before the first and after each document.
    """

    vocab_size: int
    end_of_text: int

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "data.tokenizer"):
        """Takes over `inner`; `name` is what an error about it is called."""
        ids = inner.get_vocab(with_added_tokens=True)
        ends = [token for token in _END_OF_TEXT_NAMES if token in ids]
        if not ends:
            expected = "a tokenizer with an end-of-text token: " + ", ".join(_END_OF_TEXT_NAMES)
            raise InputError(name, f"a tokenizer of {len(ids)} tokens without one", expected)
        # A tokenizer.json may cut or pad what it encodes, or leave out merges at random, and never
        # says so again.
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None
        added = inner.get_added_tokens_decoder().get(ids[ends[0]])
        if added is not None and not added.special:  # it would be found in text
            inner.add_special_tokens(ends[:1])
        inner.encode_special_tokens = True  # not kept in the JSON, so it is set at each load
        self._inner = inner
        self.vocab_size = max(ids.values()) + 1
        self.end_of_text = ids[ends[0]]
        self._characters = _characters_of(inner)

    @property
    def has_fixed_characters(self) -> bool:
        """Whether it knows the characters of the text that it was made from only."""
        return self._characters is not None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any end-of-text.

        Raises:
            InputError: a character tokenizer never saw one of the characters, or a given one cannot
                encode them.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as `encode`, on all cores."""
        if self._characters is not None:
            for text in texts:
                self.check(text)
        try:
            encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception as error:  # of the library, plain; or half a surrogate pair: say where
            for text in texts:
                self.check(text)
            got = f"a tokenizer that cannot encode the text ({error})"
            raise InputError("data.tokenizer", got, "one that can encode any text") from error
        return [encoding.ids for encoding in encoded]

    def check(self, text: str, name: str = "text", offset: int = 0) -> None:
        """Refuses, by character and position, a text that cannot be encoded.

        Args:
            text: to be encoded.
            name: of the text, for the message.
            offset: the position of its first character in what the user knows by that name.
        """
        surrogate = re.search("[\ud800-\udfff]", text)
        if surrogate:
            got = f"U+{ord(surrogate[0]):04X} at position {offset + surrogate.start()}"
            raise InputError(name, got, "valid Unicode (half a surrogate pair is not)")
        if self._characters is None:
            return
        unseen = set(text) - self._characters
        if unseen:
            position = min(map(text.index, unseen))
            character = text[position]
            raise InputError(
                name,
                f"character {character!a} (U+{ord(character):04X}) at position {offset + position}",
                f"one of the {len(self._characters)} characters that the tokenizer knows",
                "leaving it out, or training with data.tokenizer=bpe, which knows them all",
            )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; end-of-text and other special tokens are left out unless asked for.

        Bytes that are not UTF-8 (a character cut in two) become U+FFFD.
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to a prompt: some tokenizers drop the space with which a text begins."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def is_lossless(self, texts: Iterable[str]) -> bool:
        """Whether decoding what it encodes gives each text again, white space at its ends aside."""
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
        """Loads what `to_json` gave, or any other `tokenizer.json`.

        Raises:
            InputError: not a tokenizer, or one without an end-of-text token.
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
            InputError: as `from_json`, or the file cannot be read.
        """
        name = f"data.tokenizer {path}"
        try:
            content = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            expected = "bpe, char or the path of a readable tokenizer.json"
            raise InputError("data.tokenizer", f"{path} ({reason})", expected) from error
        return cls.from_json(content, name)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pre-tokenizer; end-of-text is id 0, the bytes follow.

    The same texts in the same order give the same tokenizer. Every byte is a token, so any text
    comes back from its ids exactly. (Sennrich et al. 2016; bytes: Radford et al. 2019.)

    Args:
        texts: the training texts; read once.
        vocab_size: at most this many tokens, at least 257; fewer where no pair repeats.
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
    """One token for each character (code point) of the texts, in code point order after id 0.

    It is a BPE without merges or pre-tokenizer: the library then splits text into code points, 30
    times faster than by a pattern. Id 0 is end-of-text.
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
    """One text, given in any pieces, in pieces of a bounded length that depend on the text alone.

    A cut falls before a space or line break that follows something else, where GPT-2's
    pre-tokenizer always cuts: the ids of the pieces are then the ids of the whole. Where none is
    near (one word of a hundred thousand characters) it falls anywhere, and decoding is still exact.
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
    """The characters of a tokenizer like `train_char`'s, which drops what it does not know."""
    if inner.pre_tokenizer is not None or not isinstance(inner.model, models.BPE):
        return None
    model = json.loads(inner.to_str())["model"]
    if model["merges"] or model["unk_token"] is not None or model["byte_fallback"]:
        return None
    return frozenset(token for token in model["vocab"] if len(token) == 1)
