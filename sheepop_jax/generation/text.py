"""Text of a token stream as soon as it is final: whole characters, up to a stop string.

Concatenated, the pieces are `Tokenizer.decode_after` of all tokens, cut before the first stop
string. Each token is decoded a constant number of times, so a text costs time linear in its length.
That requires places where a text can be split: later tokens change nothing before them, and nothing
before them changes what follows.

- A byte-level decoder (GPT-2, Llama 3, Qwen) joins the bytes of all tokens and decodes them as
  UTF-8. It can be split between any two characters.
- Most other decoders handle each token by itself, except for the first token of a text (a leading
  space is dropped) and runs of byte tokens such as <0xE2>, which become one string. They can be
  split after any token that is not a byte, given enough context that the next is not the first.
- The text of any other decoder is final only at the end.
"""

import codecs
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import pre_tokenizers

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import Output, Request, TokenLogprob

if TYPE_CHECKING:  # imports jax
    from sheepop_jax.generation.engine import Engine


class TextStream:
    """Turns new token ids into text that can be shown now.

    A stop string ends the text: of all occurrences the one that ends first, and of several that end
    there the longest. It is not shown, nor is anything after it.

    Attributes:
        stopped: whether a stop string was found.
        num_tokens: number of tokens up to the one that completed the stop string, or of all.
    """

    stopped: bool
    num_tokens: int

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        """Starts the text that follows a prompt, in which stop strings are not searched.

        Raises:
            InputError: a stop string is empty.
        """
        if "" in stop:
            raise InputError("stop", "", "nonempty strings")
        self._continuation = _Continuation(tokenizer, prompt_ids)
        self._stop = tuple(stop)
        self._held = ""  # the beginning of a possible stop string
        self.stopped = False
        self.num_tokens = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that has become final, without a possible stop string."""
        # One token at a time finds the token that completed a stop string.
        shown = ""
        for group in [[token] for token in tokens] if self._stop else [tokens]:
            if self.stopped:
                break
            self.num_tokens += len(group)
            shown += self._before_stop(self._continuation.push(group))
        return shown

    def finish(self) -> str:
        """Ends the text; returns the rest, with U+FFFD for a character that is incomplete."""
        if self.stopped:
            return ""
        shown = self._before_stop(self._continuation.finish())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _before_stop(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        parts = (text[len(text) - size :] for size in range(longest, 0, -1))
        self._held = next((part for part in parts if self._may_stop(part)), "")
        return text[: len(text) - len(self._held)]

    def _may_stop(self, part: str) -> bool:
        return any(stop.startswith(part) for stop in self._stop)


class Text:
    """A text that an engine writes, cut before a stop string.

    Attributes:
        request: the request.
        shown: its text so far.
        tokens: its tokens so far, up to the one that completed a stop string.
        logprobs: those of the tokens, and of a final end-of-text.
        stop_reason: as `Output`, or "stop" for a stop string; None until the text has ended.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, stop: Sequence[str]):
        self.request = request
        self.shown = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.stop_reason: str | None = None
        self._stream = TextStream(tokenizer, request.prompt, stop)

    def add(self, output: Output) -> str:
        """Adds what the engine has written and returns the text that can be shown."""
        new = self._stream.push(output.tokens)
        self.shown += new
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.stop_reason = output.stop_reason
        if output.stop_reason:
            new += self.finish()
        if self._stream.stopped:
            self.stop_reason = "stop"
            self.tokens = self.tokens[: self._stream.num_tokens]
            self.logprobs = self.logprobs[: self._stream.num_tokens]
        return new

    def finish(self) -> str:
        """Returns the rest of a text to which nothing is added."""
        new = self._stream.finish()
        self.shown += new
        return new


def write(engine: "Engine", texts: Sequence[Text]) -> Iterator[str]:
    """Writes texts together until all have ended; yields what is new, of any of them.

    Texts that have not ended when the iterator is closed are cancelled.

    Raises:
        InputError: see `Engine.add`.
    """
    open_texts = {engine.add(text.request): text for text in texts}
    try:
        while open_texts:
            for output in engine.step():
                text = open_texts[output.id]
                yield text.add(output)
                if text.stop_reason:
                    engine.cancel(output.id)
                    del open_texts[output.id]
    finally:
        for id in open_texts:
            engine.cancel(id)


class _Decoder(Protocol):
    """Decodes a growing list of tokens."""

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that later tokens cannot change."""

    def finish(self) -> str:
        """Returns the rest."""


class _Continuation:
    """The final part of `Tokenizer.decode_after`.

    That is the text of prompt and tokens without the text of the prompt, if it begins with it. It
    need not if the prompt ends within a character; then the tokens are decoded alone.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._new = _decoder(tokenizer)
        self._whole = self._new(prompt)
        # What a prompt's end says by itself, and with the tokens that follow.
        self._before, self._after = self._new(prompt).finish(), ""
        self._tokens: list[int] | None = []  # None: the two are known to agree or not

    def push(self, tokens: Sequence[int]) -> str:
        if self._tokens is None:
            return self._whole.push(tokens)
        self._tokens += tokens
        self._after += self._whole.push(tokens)
        if len(self._after) < len(self._before) and self._before.startswith(self._after):
            return ""
        return self._decide()

    def finish(self) -> str:
        if self._tokens is None:
            return self._whole.finish()
        self._after += self._whole.finish()
        return self._decide() + self._whole.finish()

    def _decide(self) -> str:
        tokens, self._tokens = self._tokens or [], None
        if self._after.startswith(self._before):
            return self._after[len(self._before) :]
        self._whole = self._new([])
        return self._whole.push(tokens)


def _decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], _Decoder]:
    """Returns the constructor of a decoder of the text after a prompt's last split."""
    stages = _stages(tokenizer.decoder)
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return lambda prompt: _Bytes(tokenizer, prompt)
    can_split = _can_split(stages)
    return lambda prompt: _Pieces(tokenizer, prompt, can_split)


def _stages(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoders that run one after another."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [stage for part in decoder["decoders"] for stage in _stages(part)]


def _can_split(stages: list[dict[str, Any]]) -> Callable[[str], bool]:
    """Whether a text can be split after a token, for decoders that are not byte-level."""
    names = [stage["type"] for stage in stages]
    fused = names.index("Fuse") if "Fuse" in names else len(names)
    by_token = {"ByteFallback", "Metaspace", "Replace", "Strip", "WordPiece"}
    if not by_token.issuperset(names[:fused]) or not all(map(_is_by_character, stages[fused:])):
        return lambda token: False
    if "ByteFallback" in names:
        return lambda token: not (len(token) == 6 and token.startswith("<0x"))
    return lambda token: True


def _is_by_character(stage: dict[str, Any]) -> bool:
    """Whether a decoder of a whole text changes its characters one by one, or its beginning."""
    match stage["type"]:
        case "Fuse":
            return True
        case "Strip":
            return stage["stop"] == 0
        case "Replace":
            return len(stage["pattern"].get("String", "")) == 1
    return False


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary.

    A byte is the character of its number or, if that is not printable, the next one from U+0100.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    other = iter(sorted(character for character in alphabet if ord(character) > 255))
    return {chr(byte) if chr(byte) in alphabet else next(other): byte for byte in range(256)}


class _Bytes:
    """Decodes a byte-level vocabulary. Tokens that are not of its alphabet are UTF-8 text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._bytes, self._token = byte_alphabet(), tokenizer.token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Only the last three bytes may belong to an incomplete character.
        end = b""
        for token in reversed(prompt):
            end = self._encode(token) + end
            if len(end) >= 3:
                break
        self._utf8.decode(end)

    def push(self, tokens: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._encode, tokens)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _encode(self, token: int) -> bytes:
        text = self._token(token) or ""
        if all(character in self._bytes for character in text):
            return bytes(map(self._bytes.__getitem__, text))
        return text.encode()


class _Pieces:
    """Decodes up to the last token after which the text can be split, after some context."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], can_split: Callable[[str], bool]
    ):
        self._tokenizer, self._can_split = tokenizer, can_split
        self._context: list[int] = []  # tokens whose text is final
        self._before = ""  # their text
        self._rest: list[int] = []  # tokens since
        self._advance(prompt)

    def push(self, tokens: Sequence[int]) -> str:
        return self._advance(tokens)

    def finish(self) -> str:
        if not self._rest:
            return ""
        text = self._tokenizer.decode([*self._context, *self._rest])[len(self._before) :]
        self._rest = []
        return text

    def _advance(self, tokens: Sequence[int]) -> str:
        size = 0
        for token in tokens:
            if (text := self._tokenizer.token(token)) is not None:
                self._rest.append(token)
                if self._can_split(text):
                    size = len(self._rest)
        if not size:
            return ""
        final, self._rest = [*self._context, *self._rest[:size]], self._rest[size:]
        text = self._tokenizer.decode(final)[len(self._before) :]
        # The shortest context with text: the next token is not the first then, and no leading space
        # is left to drop.
        size = 1
        while not (before := self._tokenizer.decode(final[-size:])) and size < len(final):
            size *= 2
        self._context, self._before = final[-size:], before
        return text
