"""Prompts and strings with which an exported model and tokenizer are compared with a run's."""

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.data.shards import open_shards
from sheepop_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import NO_END, generate
from sheepop_jax.generation.requests import GenerationConfig

NUM_TEXTS, NUM_STRINGS = 8, 1000
NEW_TOKENS = 8  # of each of the 8 texts: 64 in all
_LONG, _SHORT = 1024, 128  # tokens
_BEYOND_WINDOW = 64
_WHITE = " \t\n\r\u00a0\u2003\u3000\u200b\u2028"
_LOOK_ALIKES = (END_OF_TEXT, "<|im_start|>", "<|eot_id|>", "</s>", "<s>", "[EOS]", "<unk>", "<pad>")
# First and last code points of scripts whose characters take 1, 2, 3 and 4 bytes, combining marks
# included.
_BLOCKS = (
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x52F),
    (0x5D0, 0x6FF),
    (0x900, 0xE7F),
    (0x2000, 0x2BFF),
    (0x3040, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF),
)


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts to compare on: [T] each, and where they are from.

    One text is long, to compare many positions, and the others are short. The last `new_tokens`
    positions of each are to be replaced by greedy tokens.
    """

    ids: tuple[np.ndarray, ...]
    new_tokens: int
    source: str


def texts_of(run: Run, params: Any) -> Texts:
    """Texts from the run's validation text, or if it is missing, sampled from the model.

    Data is never prepared again for this, which can take hours.

    Args:
        run: the run.
        params: its parameters, to sample with.
    """
    model = run.config.model
    context = model.max_seq_len
    long = max(_LONG, model.sliding_window + _BEYOND_WINDOW if model.sliding_window else 0)
    lengths = [min(long, context)] + [min(_SHORT, context)] * (NUM_TEXTS - 1)
    new_tokens = min(NEW_TOKENS, lengths[-1] // 2)
    with suppress(InputError):
        data = open_shards(run.shards)
        stream = data.validation
        if data.tokenizer.fingerprint == run.tokenizer.fingerprint and len(stream) > 1:
            lengths = [min(length, len(stream)) for length in lengths]
            new_tokens = min(new_tokens, lengths[-1] // 2)
            last = len(stream) - lengths[0]
            starts = np.linspace(0, last, NUM_TEXTS).astype(int).tolist()
            ids = [stream.read(i, i + n) for i, n in zip(starts, lengths, strict=True)]
            return Texts(tuple(ids), new_tokens, "the run's validation text")
    ids = [
        np.array(text, np.int32)
        for length, group in groupby(lengths)
        for text in _sampled(run, params, length, len(list(group)))
    ]
    return Texts(tuple(ids), new_tokens, "samples of the model (no validation text was found)")


def _sampled(run: Run, params: Any, length: int, count: int) -> list[list[int]]:
    """Texts of `length` tokens, at temperature 1, after BOS or end-of-text."""
    start = run.tokenizer.prompt_start or [run.tokenizer.end_of_text]
    config = GenerationConfig(max_new_tokens=length - 1, num_samples=count)
    found = generate(run.model(), params, [start], NO_END, config)
    return [[*start, *completion.tokens] for completion in found]


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of a tokenizer's special tokens."""
    tokens = json.loads(tokenizer.to_json())["added_tokens"]
    return [token["content"] for token in tokens if token["special"]]


def strings_of(tokenizer: Tokenizer, ids: Sequence[np.ndarray], seed: int = 0) -> list[str]:
    """1,000 strings: of the texts, of random characters, of white space, with special tokens.

    A character tokenizer gets only characters that it has. Strings that the tokenizer refuses to
    encode are left out.

    Args:
        tokenizer: the run's tokenizer.
        ids: the texts' token ids.
        seed: of the choice.
    """
    rng = random.Random(seed)
    texts = [text for text in (tokenizer.decode(row.tolist()) for row in ids) if text] or ["a"]
    specials = [*special_texts(tokenizer), *_LOOK_ALIKES]
    own: list[str] = []
    if tokenizer.has_fixed_characters:
        own = [c for i in range(tokenizer.vocab_size) if len(c := tokenizer.decode([i])) == 1]

    def character() -> str:
        return rng.choice(own) if own else chr(rng.randint(*rng.choice(_BLOCKS)))

    def piece() -> str:
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        return text[start : start + rng.choice((1, 3, 10, 40, 200))]

    def white() -> str:
        allowed = [c for c in own if c.isspace()] if own else list(_WHITE)
        return "".join(rng.choice(allowed) * rng.randint(1, 9) for _ in range(3)) if allowed else ""

    def string(kind: int) -> str:
        match kind:
            case 0 | 1 | 2:
                return piece()
            case 3 | 4 | 5:
                return "".join(character() for _ in range(rng.randint(1, 30)))
            case 6 | 7:
                return piece() + white() + piece() + white()
            case _:
                return piece() + rng.choice(specials) + piece()

    found: list[str] = []
    for attempt in range(3 * NUM_STRINGS):
        text = string(attempt % 10)
        with suppress(InputError):
            tokenizer.encode(text)
            found.append(text)
        if len(found) == NUM_STRINGS:
            break
    return found
