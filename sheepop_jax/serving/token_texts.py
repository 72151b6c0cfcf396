"""What one token looks like: its text and its bytes."""

import codecs
import json
import re
from typing import Any

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.generation.text import byte_alphabet

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts and bytes of single tokens.

    A token of a byte-level tokenizer may hold part of a character. Its bytes are then not UTF-8,
    and its text is written as the OpenAI API does: `bytes:\\xe2\\x82`.
    """

    def __init__(self, tokenizer: Tokenizer):
        content = json.loads(tokenizer.to_json())
        model, decoders = content["model"], _types(content["decoder"])
        entries = model["vocab"]
        ids = entries.items() if isinstance(entries, dict) else _numbered(entries)
        pieces = {number: piece for piece, number in ids}
        self._tokenizer = tokenizer
        self._special = {t["id"]: t["content"] for t in content["added_tokens"] if t["special"]}
        self._special.setdefault(tokenizer.end_of_text, pieces.get(tokenizer.end_of_text, ""))
        self._bytes: dict[int, bytes] = {}  # filled as tokens are asked for
        if "ByteLevel" in decoders:
            added = {t["id"] for t in content["added_tokens"]}
            byte_of = byte_alphabet()
            for number, piece in pieces.items():
                if number not in added and set(piece) <= byte_of.keys():
                    self._bytes[number] = bytes(byte_of[c] for c in piece)
        elif "ByteFallback" in decoders:
            for number, piece in pieces.items():
                if found := _BYTE.fullmatch(piece):
                    self._bytes[number] = bytes([int(found[1], 16)])
        # Some tokenizers drop the space before the first word, so none is decoded alone.
        ordinary = (i for i in range(tokenizer.vocab_size) if i not in self._special)
        self._anchor = next((i for i in ordinary if tokenizer.decode([i]).strip()), None)

    def special(self, token: int) -> str | None:
        """The name of a special token, such as <|endoftext|>; None for others."""
        return self._special.get(token)

    def bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; b"" for special ones."""
        if token in self._special:
            return b""
        if token not in self._bytes:
            before = [] if self._anchor is None else [self._anchor]
            self._bytes[token] = self._tokenizer.decode_after(before, [token]).encode()
        return self._bytes[token]

    def text(self, token: int) -> str:
        """A name of a token for people and as a key: its text, if it is whole characters."""
        if (special := self._special.get(token)) is not None:
            return special
        content = self.bytes(token)
        if not content:  # a row of the model without a token
            return f"token_id:{token}"
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Offsets:
    """Where each token of a text begins, in characters."""

    def __init__(self, texts: TokenTexts, start: int = 0):
        self._texts, self._place = texts, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        """The place of the next token."""
        place = self._place
        self._place += len(self._decoder.decode(self._texts.bytes(token)))
        return place


def _types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", [])))


def _numbered(entries: list[list[Any]]) -> list[tuple[str, int]]:
    return [(piece, number) for number, (piece, _) in enumerate(entries)]
