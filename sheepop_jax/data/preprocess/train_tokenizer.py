"""Training of tokenizers: a byte-level BPE, or the characters of a text."""

import itertools
import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sheepop_jax.data.tokenizer import END_OF_TEXT, Tokenizer, split_text

# Longest word to train a BPE on: its time grows with the square of the length. Ordinary text has no
# run of that many letters, digits, symbols or white space, which are the words of GPT-2.
_WORD_CHARS = 2**12
_LONG_WORD = re.compile(
    "|".join(rf"{kind}{{{_WORD_CHARS},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)


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
    inner.train_from_iterator(itertools.chain.from_iterable(map(_bounded_words, pieces)), trainer)
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


def _bounded_words(text: str) -> Iterator[str]:
    """Splits a text within words longer than `_WORD_CHARS`."""
    start = 0
    longest = max(map(len, text.split()), default=0)
    if longest > _WORD_CHARS or any(white * _WORD_CHARS in text for white in " \n\t"):
        for word in _LONG_WORD.finditer(text):
            for cut in range(word.start() + _WORD_CHARS, word.end(), _WORD_CHARS):
                yield text[start:cut]
                start = cut
    yield text[start:]
