"""Encoding and decoding with Hugging Face `tokenizers`.

Every tokenizer is a standard `tokenizer.json` that other programs can load. Special tokens that
occur in text are encoded as text; only the program inserts end-of-text and BOS into a stream. A
long text is encoded in pieces, to the ids of the whole text.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from sheepop_jax.errors import InputError

# When unset, the library warns and disables its threads in any process forked after first use.
# This package never forks (grain prefetches with threads).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in public tokenizers, most specific first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[EOS]", "<EOS>")

# Longest string passed to the library, which uses over 50 bytes per character while encoding.
_PIECE_CHARS = 2**18
# A place to split a text: GPT-2's pre-tokenizer always splits there, other tokenizers often do.
CUT = re.compile(r"\S(?=[ \n])")
CONTEXT_CHARS = 2**10  # text on each side of a split that decides about the ids near it
_CUTS_TRIED = 64
_PLAIN_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Where `ChatSettings` are in a tokenizer.json: entries of the post-processor's table of tokens.
_END_TOKENS, _CHAT_TEMPLATE, _ROLE = "end_tokens", "chat_template", re.compile(r"[a-z]+_token")


@dataclass(frozen=True)
class ChatSettings:
    """What a chat model's tokenizer has more than that of a model that continues text.

    Attributes:
        end_tokens: tokens that end a text as end-of-text does, such as that of a turn.
        chat_template: the Jinja template of a conversation (`data.chat_template`); None for none.
        special_tokens: the template's variables, such as `eos_token`, and their tokens.
    """

    end_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


_NO_CHAT = ChatSettings()


class TextPart(NamedTuple):
    """A part of a text with special tokens.

    Attributes:
        text: its characters.
        is_template: whether it is a template's, so that its special tokens are tokens, not text.
        counted: whether its tokens count (`Tokenizer.encode_parts`).
    """

    text: str
    is_template: bool
    counted: bool = False


class Tokenizer:
    """Encodes text to ids in [0, vocab_size) and decodes ids to text.

    Attributes:
        vocab_size: the largest id plus one.
        end_of_text: the id after every document, and before the first unless it begins with BOS.
        bos_id: the id at the beginning of every document and prompt (BOS); None for none.
        end_ids: the ids that end a text while it is sampled; the first is `end_of_text`.
        chat_template: the Jinja template of a conversation; None for none.
        special_tokens: tokens by the names that a chat template calls them, such as `eos_token`.
        decoder: the decoder of the `tokenizer.json`; None joins the tokens with spaces.
    """

    vocab_size: int
    end_of_text: int
    bos_id: int | None
    end_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: Mapping[str, str]
    decoder: dict[str, Any] | None

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "data.tokenizer"):
        """Wraps and configures `inner`; `name` is the field named in error messages."""
        ids = inner.get_vocab(with_added_tokens=True)
        content = json.loads(inner.to_str())
        begin, end, chat = _stream_tokens(content)
        ends = [end] if end else [token for token in _END_OF_TEXT_NAMES if token in ids]
        if not ends:
            expected = "a tokenizer with an end-of-text token: " + ", ".join(_END_OF_TEXT_NAMES)
            raise InputError(name, f"a vocabulary of {len(ids)} tokens without one", expected)
        # A tokenizer.json may enable truncation, padding or BPE dropout; all are silent.
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None
        for token in (ends[0], *([begin] if begin else [])):
            added = inner.get_added_tokens_decoder().get(ids[token])
            if added is not None and not added.special:  # otherwise it would match in text
                inner.add_special_tokens([token])
        inner.encode_special_tokens = True  # not stored in the JSON
        self._inner = inner
        self.vocab_size = max(ids.values()) + 1
        self.end_of_text = ids[ends[0]]
        self.bos_id = ids[begin] if begin else None
        self.end_ids = tuple(dict.fromkeys(ids[token] for token in (ends[0], *chat.end_tokens)))
        self.chat_template = chat.chat_template
        roles = {"bos_token": begin, "eos_token": ends[0], **chat.special_tokens}
        self.special_tokens = {role: token for role, token in roles.items() if token is not None}
        content = json.loads(inner.to_str())
        self.decoder = content["decoder"]
        self._special = {token["content"] for token in content["added_tokens"] if token["special"]}
        self._stream_tokens = {ends[0], *([begin] if begin else [])}
        self._encoder = _without_special(inner, content, self._stream_tokens, name)
        self._characters = _characters_of(content)
        self._is_byte_level = _is_byte_level(content)
        self._cuts_at_spaces = self._is_byte_level or self._characters is not None

    @property
    def has_fixed_characters(self) -> bool:
        """Whether the vocabulary holds only the characters of the training text."""
        return self._characters is not None

    @property
    def is_lossless(self) -> bool:
        """Whether decoding restores every text that `encode` accepts, for any text."""
        return self._cuts_at_spaces

    @property
    def prompt_start(self) -> list[int]:
        """The ids before those of a prompt: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def document_bos(self) -> int | None:
        """The id that follows end-of-text at the beginning of each document of a stream, or None.

        A BOS that is end-of-text itself is in the stream already.
        """
        return None if self.bos_id == self.end_of_text else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Encodes `text` without end-of-text or BOS.

        Raises:
            InputError: a character is not in a character tokenizer's vocabulary, or a custom
                tokenizer cannot encode the text.
        """
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes `text` as the beginning of a document: BOS, if there is one, and its ids."""
        return [*self.prompt_start, *self.encode(text)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes each text as `encode` does, on all cores."""
        return [encoding.ids for encoding in self._encode(texts)]

    def encode_pieces(self, pieces: list[tuple[str, str]]) -> list[list[int]]:
        """Encodes the (context, text) of `pieces`: the ids of each text after its context."""
        ids = self.encode_batch([context + text for context, text in pieces])
        contexts = [context for context, _ in pieces if context]
        if not contexts:
            return ids
        sizes = iter(map(len, self.encode_batch(contexts)))
        return [
            whole[next(sizes) :] if context else whole
            for (context, _), whole in zip(pieces, ids, strict=True)
        ]

    def encode_parts(self, texts: list[list[TextPart]]) -> list[tuple[list[int], list[bool]]]:
        """Encodes texts, each in parts, as wholes: only a template's special tokens are tokens.

        Returns:
            The ids of each text, and whether each token holds a character of a counted part.

        Raises:
            InputError: see `encode`.
        """
        encoder, names = self._template_encoder
        special = _any_of(names)
        marked, counted = [], []
        for parts in texts:
            pieces = []
            for text, is_template, _ in parts:
                if self._characters is not None:
                    self.check(special.sub("", text) if is_template else text)
                marked_text = special.sub(lambda found: names[found[0]], text)
                pieces.append(marked_text if is_template else text)
            marked.append("".join(pieces))
            flags = zip(pieces, parts, strict=True)
            counts = (part.counted for piece, part in flags for _ in piece)
            counted.append([0, *itertools.accumulate(map(int, counts))])
        try:
            encodings = encoder.encode_batch(marked, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception as error:  # as in `_encode`
            for parts in texts:
                for part in parts:
                    self.check(part.text)
            got = f"a tokenizer that cannot encode the text ({error})"
            raise InputError("data.tokenizer", got, "a tokenizer that encodes any text") from error
        return [
            (encoding.ids, [before[stop] > before[start] for start, stop in encoding.offsets])
            for encoding, before in zip(encodings, counted, strict=True)
        ]

    def find_special(self, text: str) -> tuple[str, int] | None:
        """The first special token in a template's text, and where it ends; None without one."""
        found = _any_of(self._special | self._stream_tokens).search(text)
        return (found[0], found.end()) if found else None

    @functools.cached_property
    def _template_encoder(self) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
        """An encoder that finds special tokens under other names, and these names."""
        special = self._special | self._stream_tokens
        content = json.loads(self._inner.to_str())
        encoder, names = _renamed(self._inner, content, special, self._stream_tokens, "tokenizer")
        encoder.encode_special_tokens = False
        return encoder, names

    def _encode(self, texts: list[str], offsets: bool = False) -> list[tokenizers.Encoding]:
        if self._characters is not None:
            for text in texts:
                self.check(text)
        encode = self._encoder.encode_batch if offsets else self._encoder.encode_batch_fast
        try:
            return encode(texts, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception as error:  # the library's plain Exception, or a lone surrogate: locate it
            for text in texts:
                self.check(text)
            got = f"a tokenizer that cannot encode the text ({error})"
            raise InputError("data.tokenizer", got, "a tokenizer that encodes any text") from error

    def pieces(self, texts: Iterable[str], context: str = "") -> Iterator[tuple[str, str]]:
        """Splits a text into bounded pieces whose ids, in order, are those of the whole text.

        Args:
            texts: one text, in any pieces.
            context: the text before it, at most `CONTEXT_CHARS` of it, for `needs_context`.

        Yields:
            (context, text) for `encode_pieces`.
        """
        for text in split_text(texts, self):
            yield context, text
            context = (context + text)[-CONTEXT_CHARS:] if self.needs_context else ""

    @property
    def needs_context(self) -> bool:
        """Whether a piece of a text is encoded differently from a text of its own."""
        return not self._cuts_at_spaces

    def find_cut(self, text: str, places: Iterable[int], place: int, after: bool = False) -> int:
        """The first of `places` where splitting `text` leaves the ids as they are.

        If there is none, as within one long word, the border of two tokens next to `place`: before
        it, or `after` it. Only text near a place decides, `CONTEXT_CHARS` on each side.
        """
        tried = itertools.islice(places, _CUTS_TRIED)
        if self._cuts_at_spaces:
            for at in tried:
                return at
        if self._characters is not None:
            return place
        if (found := next(filter(functools.partial(self._can_cut, text), tried), -1)) >= 0:
            return found
        start = max(0, place - CONTEXT_CHARS) if after else 0
        [encoding] = self._encode([text[start : place + CONTEXT_CHARS]], offsets=True)
        spans = [(start + first, start + last) for first, last in encoding.offsets]
        borders = [a for (_, a), (b, _) in itertools.pairwise(spans) if a <= b]
        if after:
            borders = [border for border in [*borders, len(text)] if border >= place]
        else:
            borders = [border for border in borders[::-1] if border <= place] or [place]
        tried = itertools.islice(borders, _CUTS_TRIED)
        return next(filter(functools.partial(self._can_cut, text), tried), borders[0])

    def _can_cut(self, text: str, at: int) -> bool:
        left, right = text[max(0, at - CONTEXT_CHARS) : at], text[at : at + CONTEXT_CHARS]
        before, both, after = self.encode_batch([left, left + right, right])
        return both[: len(before)] == before and (self.needs_context or both == before + after)

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

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id; None if `decode` skips it, as it does special tokens."""
        token = self._inner.id_to_token(int(id))
        return None if token in self._special else token

    def token_text(self, id: int) -> str | None:
        """The vocabulary entry of an id, special tokens included."""
        return self._inner.id_to_token(int(id))

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decodes `ids` as a continuation of `prompt`.

        Some tokenizers drop a leading space, so decoding `ids` alone would lose it.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def restores(self, text: str, ids: Sequence[int]) -> bool:
        """Whether decoding `ids` restores `text`, ignoring white space at its ends."""
        return self.is_lossless or self.decode(ids, skip_special=False).strip() == text.strip()

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
        return cls(_parsed(content, name), name)

    @classmethod
    def with_stream_tokens(
        cls,
        content: str,
        bos: str | None,
        end_of_text: str,
        name: str = "data.tokenizer",
        chat: ChatSettings = _NO_CHAT,
    ) -> "Tokenizer":
        """Loads a `tokenizer.json` of a model with this BOS, end-of-text and chat settings.

        They are stored in its post-processor, where `from_json` finds them again: the template of
        one text is BOS and the text, that of two is their stream, with end-of-text in between. The
        chat settings are entries of its table of tokens, which other programs do not use: they
        refuse a `tokenizer.json` with fields that they do not know.

        Raises:
            InputError: not a tokenizer, or a token is not in its vocabulary.
        """
        inner = _parsed(content, name)
        ids = inner.get_vocab(with_added_tokens=True)
        for token in (bos, end_of_text, *chat.end_tokens, *chat.special_tokens.values()):
            if token is not None and token not in ids:
                raise InputError(name, token, f"one of the tokenizer's {len(ids)} tokens")
        template = _stream_template(bos, end_of_text, ids)
        template["special_tokens"] |= _chat_entries(chat, ids)
        changed = json.loads(inner.to_str()) | {"post_processor": template}
        return cls.from_json(json.dumps(changed), name)

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


def split_text(texts: Iterable[str], tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """Re-splits one text, given in any pieces, into bounded pieces that depend on the text alone.

    A cut falls before a space or line break that follows another character; for a tokenizer, only
    where its ids stay those of the whole text (`Tokenizer.find_cut`). If no such place is near (a
    word of 100,000 characters), the cut falls between two tokens, or anywhere without a tokenizer.
    """
    text = ""
    for more in texts:
        text += more
        start = 0
        while len(text) - start > _PIECE_CHARS:
            end = start + _PIECE_CHARS
            first = end - _PIECE_CHARS // 4
            places = [near.end() - start for near in CUT.finditer(text, first, end)][::-1]
            if tokenizer is None or (places and not tokenizer.needs_context):
                size = places[0] if places else _PIECE_CHARS
            elif len(text) - end > CONTEXT_CHARS:  # else wait for the text that decides
                around = text[start : end + CONTEXT_CHARS]
                size = tokenizer.find_cut(around, places, _PIECE_CHARS)
            else:
                break
            yield text[start : start + size]
            start += size
        text = text[start:]
    yield text


def _parsed(content: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0][:200]
        raise InputError(name, f"not a tokenizer ({reason})", "a tokenizer.json") from error


def _stream_template(bos: str | None, end_of_text: str, ids: dict[str, int]) -> dict[str, Any]:
    """The post-processor of `Tokenizer.with_stream_tokens`."""

    def special(token: str | None, number: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": number}}] if token is not None else []

    def text(name: str, number: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": number}}]

    single = special(bos, 0) + text("A", 0)
    second = special(end_of_text, 0) + special(bos, 1) + text("B", 1)
    tokens = sorted({end_of_text, *([bos] if bos is not None else [])})
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in tokens},
    }


def _chat_entries(chat: ChatSettings, ids: dict[str, int]) -> dict[str, Any]:
    """Entries of the post-processor's table of tokens that hold the settings."""
    named = {role: [token] for role, token in sorted(chat.special_tokens.items())}
    named |= {_END_TOKENS: [*chat.end_tokens]} if chat.end_tokens else {}
    entries: dict[str, Any] = {
        name: {"id": name, "ids": [ids[token] for token in tokens], "tokens": tokens}
        for name, tokens in named.items()
    }
    if chat.chat_template is not None:
        entries[_CHAT_TEMPLATE] = {"id": _CHAT_TEMPLATE, "ids": [], "tokens": [chat.chat_template]}
    return entries


def _chat_settings(entries: dict[str, Any]) -> ChatSettings:
    """The settings of `_chat_entries`, which are removed from `entries`."""
    found = {name: entries.pop(name)["tokens"] for name in [*entries] if _is_setting(name, entries)}
    return ChatSettings(
        tuple(found.pop(_END_TOKENS, ())),
        found.pop(_CHAT_TEMPLATE, [None])[0],
        {role: tokens[0] for role, tokens in found.items()},
    )


def _is_setting(name: str, entries: dict[str, Any]) -> bool:
    """Whether an entry is not a token of the template, which is its own only token."""
    known = name in (_END_TOKENS, _CHAT_TEMPLATE) or _ROLE.fullmatch(name)
    return bool(known) and entries[name]["tokens"] != [name]


def _stream_tokens(content: dict[str, Any]) -> tuple[str | None, str | None, ChatSettings]:
    """BOS, end-of-text and settings from `with_stream_tokens`; otherwise Nones and the defaults.

    Other tokenizers may have a template too, which says nothing about what separates documents.
    """
    found = content["post_processor"] or {}
    if found.get("type") != "TemplateProcessing":
        return None, None, _NO_CHAT
    named = [part["SpecialToken"]["id"] for part in found["pair"] if "SpecialToken" in part]
    bos, end = (named[0], named[1]) if len(named) > 1 else (None, *named) if named else (None, None)
    entries = {**found["special_tokens"]}
    chat = _chat_settings(entries)
    ids = {token: (entry["ids"] or [-1])[0] for token, entry in entries.items()}
    is_ours = end is not None and {**found, "special_tokens": entries} == _stream_template(
        bos, end, ids
    )
    return (bos, end, chat) if is_ours else (None, None, _NO_CHAT)


def _without_special(
    inner: tokenizers.Tokenizer,
    content: dict[str, Any],
    stream_tokens: set[str],
    name: str,
) -> tokenizers.Tokenizer:
    """A tokenizer with the same ids that no text can make produce a special one.

    A model finds a special token in text if it is an entry of its vocabulary (Unigram, WordLevel,
    WordPiece) or the result of a merge (BPE). The copy has these entries under names that no text
    contains: they are random and never stored. Text that says `</s>` becomes other pieces. An
    unknown word may still become the unknown token, unless that is end-of-text or BOS: then it is
    an error to encode one.

    Raises:
        InputError: the library does not accept the copy.
    """
    model = content["model"]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    special |= stream_tokens
    is_unigram = model["type"] == "Unigram"
    known = {piece for piece, _ in model["vocab"]} if is_unigram else set(model["vocab"])
    prefix = model.get("continuing_subword_prefix") or ""
    if model["type"] == "BPE":
        made = {left + right.removeprefix(prefix) for left, right in model["merges"]}
        if model["ignore_merges"]:
            made = known
        known &= made | {piece for piece in known if len(piece) == 1}
        known |= {model["unk_token"]} & stream_tokens
    if not special & known:
        return inner
    encoder, _ = _renamed(inner, content, special, stream_tokens, name)
    encoder.encode_special_tokens = True
    return encoder


def _renamed(
    inner: tokenizers.Tokenizer,
    content: dict[str, Any],
    special: set[str],
    stream_tokens: set[str],
    name: str,
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A copy whose special tokens have names that no text contains, and these names.

    Args:
        inner: the tokenizer.
        content: its `tokenizer.json`; changed.
        special: the special tokens.
        stream_tokens: end-of-text and BOS.
        name: the field named in error messages.

    Raises:
        InputError: the library does not accept the copy.
    """
    model = content["model"]
    is_unigram = model["type"] == "Unigram"
    prefix = model.get("continuing_subword_prefix") or ""
    mark = secrets.token_hex(16)
    names = {token: token + mark for token in special}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if is_unigram:
        if model["unk_id"] is not None and model["vocab"][model["unk_id"]][0] in stream_tokens:
            model["unk_id"] = None
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        if model["unk_token"] not in stream_tokens:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if not special & {left, right, left + right.removeprefix(prefix)}
        ]
    content["post_processor"] = None  # it may name a special token, and is not used
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        encoder, reason = None, str(error).splitlines()[0][:200]
    else:
        reason = "other ids"
    expected_ids = {names.get(t, t): i for t, i in inner.get_vocab(with_added_tokens=True).items()}
    if encoder is None or encoder.get_vocab(with_added_tokens=True) != expected_ids:
        got = f"a tokenizer that finds {', '.join(sorted(special))} in text ({reason})"
        raise InputError(name, got, "a tokenizer that encodes the text of special tokens as text")
    return encoder, names


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some tokens."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether a tokenizer is GPT-2's kind: byte-level BPE with every byte, splitting at spaces."""
    pre_tokenizer, model = content["pre_tokenizer"] or {}, content["model"]
    return (
        model["type"] == "BPE"
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and _PLAIN_PRE_TOKENIZER.items() <= pre_tokenizer.items()
        and (content["decoder"] or {}).get("type") == "ByteLevel"
        and content["normalizer"] is None
        and all(token["special"] for token in content["added_tokens"])
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    )


def _characters_of(content: dict[str, Any]) -> frozenset[str] | None:
    """The vocabulary of a `train_char` tokenizer, which drops unknown characters; else None."""
    model = content["model"]
    if content["pre_tokenizer"] is not None or model["type"] != "BPE":
        return None
    if model["merges"] or model["unk_token"] is not None or model["byte_fallback"]:
        return None
    return frozenset(token for token in model["vocab"] if len(token) == 1)
