"""Conversations to token ids, and which of them a model learns to write."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from sheepop_jax.data.chat_template import FIELD, render_chat
from sheepop_jax.data.chat_templates import TEMPLATES
from sheepop_jax.data.marks import BEGINS, COUNTED
from sheepop_jax.data.tokenizer import ChatSettings, TextPart, Tokenizer
from sheepop_jax.errors import InputError

# White space that no template writes: `trim` removes it at the ends of a text.
_EDGE = "\x0b"
_MOST_SKELETONS = 1000  # most data has a few sequences of roles

Messages = Sequence[Mapping[str, str]]


class Example(NamedTuple):
    """A conversation to train on.

    Attributes:
        ids: token ids [N] int32.
        marks: [N] uint8, of the bits in `data.marks`.
        num_bytes: UTF-8 bytes of the contents that the loss counts.
    """

    ids: np.ndarray
    marks: np.ndarray
    num_bytes: int


class _Slot(NamedTuple):
    """The place of a message's content in a template's text."""

    message: int
    strip_left: bool
    strip_right: bool


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    The ids are those of the text that the template writes, except that content never becomes a
    special token: text such as `<|end|>` stays text.
    """

    def __init__(self, tokenizer: Tokenizer, loss: str = "assistant"):
        """Args:
        tokenizer: one with a chat template.
        loss: "assistant" counts the tokens of the assistant's content and the end-of-turn token
            after each; "all" counts every token but the first.

        Raises:
            InputError: the tokenizer has no chat template, or the package jinja2 is missing.
        """
        if tokenizer.chat_template is None:
            got = "a tokenizer without a chat template"
            raise InputError(FIELD, got, "that of a chat model", "`data.chat_template=sheepop`")
        self.tokenizer, self._template, self._loss = tokenizer, tokenizer.chat_template, loss
        self._skeletons: dict[tuple[str, ...], list[str | _Slot]] = {}
        ends = (tokenizer.token_text(index) for index in tokenizer.end_ids)
        self._ends = {token for token in ends if token is not None}

    def prompt(self, messages: Messages) -> list[int]:
        """The ids that an answer to the messages continues: up to its first token.

        Raises:
            InputError: the template refuses the messages or changes their texts.
        """
        parts = self._parts(messages, begins_answer=True)
        [(ids, _)] = self.tokenizer.encode_parts([parts])
        return ids

    def answer_prompt(self, messages: Messages, room: int) -> list[int]:
        """`prompt` of a conversation without the oldest turns that exceed `room` tokens.

        A turn is a message by the user and the answers to it, dropped whole. Instructions and the
        last turn are kept.

        Raises:
            InputError: as `prompt`; or the last message is the assistant's.
        """
        if not messages or messages[-1]["role"] == "assistant":
            got = "the assistant's" if messages else "none"
            raise InputError("messages", got, "a message by the user at the end")
        return within(messages, room, self.prompt)

    def examples(self, conversations: Sequence[Messages]) -> list[Example]:
        """Encodes conversations to train on.

        Raises:
            InputError: as `prompt`; or the template does not end a message by the assistant with
                a token that ends a text.
        """
        parts = [self._parts(messages) for messages in conversations]
        examples = []
        for (ids, counted), messages in zip(
            self.tokenizer.encode_parts(parts), conversations, strict=True
        ):
            marks = np.array(counted, np.uint8) * COUNTED
            marks[:1] = BEGINS  # nothing comes before the first token
            texts = [m["content"] for m in messages if self._counts(m["role"])]
            num_bytes = sum(len(text.encode()) for text in texts)
            examples.append(Example(np.array(ids, np.int32), marks, num_bytes))
        return examples

    def _counts(self, role: str) -> bool:
        return self._loss == "all" or role == "assistant"

    def _parts(self, messages: Messages, begins_answer: bool = False) -> list[TextPart]:
        """The text of a conversation in parts, of which the loss counts some."""
        skeleton = self._skeleton(tuple(m["role"] for m in messages), begins_answer)
        parts, after_answer = [], False
        for piece in skeleton:
            if isinstance(piece, _Slot):
                message = messages[piece.message]
                text = message["content"]
                text = text.lstrip() if piece.strip_left else text
                text = text.rstrip() if piece.strip_right else text
                parts.append(TextPart(text, False, self._counts(message["role"])))
                after_answer = message["role"] == "assistant"
            elif after_answer and not begins_answer:
                end = self._end_of_turn(piece)
                parts.append(TextPart(piece[:end], True, True))
                parts.append(TextPart(piece[end:], True, self._loss == "all"))
            else:
                parts.append(TextPart(piece, True, self._loss == "all"))
        special = self.tokenizer.special_tokens
        text = render_chat(self._template, messages, begins_answer, special)
        if "".join(part.text for part in parts) != text:
            got = "a template that changes the text of a message"
            raise InputError(FIELD, got, "one that writes each text as it is, or trimmed")
        return parts

    def _end_of_turn(self, text: str) -> int:
        """Where the end-of-turn token ends in the template's text after an answer."""
        found = self.tokenizer.find_special(text)
        if found is None or found[0] not in self._ends:
            got = f"{found[0] if found else 'no special token'} after a message by the assistant"
            expected = f"one that ends a text ({', '.join(sorted(self._ends))})"
            raise InputError(FIELD, got, expected)
        return found[1]

    def _skeleton(self, roles: tuple[str, ...], begins_answer: bool) -> list[str | _Slot]:
        """What the template writes around the contents of messages by `roles`."""
        key = (*roles, "…") if begins_answer else roles
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = [*self._find_slots(roles, begins_answer)]
        return self._skeletons[key]

    def _find_slots(self, roles: tuple[str, ...], begins_answer: bool) -> Iterator[str | _Slot]:
        mark = secrets.token_hex(8)
        names = [f"{_EDGE}{mark}.{number};{_EDGE}" for number in range(len(roles))]
        messages = [{"role": r, "content": n} for r, n in zip(roles, names, strict=True)]
        special = self.tokenizer.special_tokens
        text = render_chat(self._template, messages, begins_answer, special)
        pattern = re.compile(rf"({_EDGE}?){mark}\.(\d+);({_EDGE}?)")
        found = [*pattern.finditer(text)]
        if sorted(int(slot[2]) for slot in found) != [*range(len(roles))]:
            got = "a template that leaves out a message or repeats one"
            raise InputError(FIELD, got, "one that writes each message once")
        position = 0
        for slot in found:
            yield text[position : slot.start()]
            yield _Slot(int(slot[2]), not slot[1], not slot[3])
            position = slot.end()
        yield text[position:]


def within(messages: Messages, room: int, encode: Callable[[Messages], list[int]]) -> list[int]:
    """The ids of a conversation, without the oldest turns until at most `room` are left.

    Those of its instructions and its last turn if even these are more.
    """
    kept = list(messages)
    while len(ids := encode(kept)) > room:
        begins = [place for place, message in enumerate(kept) if message["role"] == "user"]
        if len(begins) < 2:
            break
        instructions = [message for message in kept[: begins[1]] if message["role"] == "system"]
        kept = [*instructions, *kept[begins[1] :]]
    return ids


def with_chat_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """A tokenizer with a chat template and its special tokens; the same if it has them already.

    Tokens that it lacks get the ids from `vocab_size` on. The end-of-turn token ends a text.

    Args:
        tokenizer: of the base model, or of a chat model.
        name: of `TEMPLATES`; "" keeps the tokenizer's own.

    Raises:
        InputError: the tokenizer has no template of its own, or its ids leave no room.
    """
    if name == "":
        if tokenizer.chat_template is None:
            expected = f"one of {', '.join(TEMPLATES)}: the tokenizer has no template of its own"
            raise InputError("data.chat_template", name, expected)
        return tokenizer
    template = TEMPLATES[name]
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in template.tokens]
    )
    known = tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab(with_added_tokens=True)
    ids = [inner.token_to_id(token) for token in template.tokens if token not in known]
    if ids != [*range(tokenizer.vocab_size, tokenizer.vocab_size + len(ids))]:
        expected = f"a tokenizer that gives new tokens the ids from {tokenizer.vocab_size} on"
        raise InputError("data.tokenizer", f"ids {ids}", expected)
    special = {**tokenizer.special_tokens}
    bos, end = special.pop("bos_token", None), special.pop("eos_token")
    own_ends = [tokenizer.token_text(index) for index in tokenizer.end_ids[1:]]
    ends = dict.fromkeys([template.end_of_turn, *(t for t in own_ends if t is not None)])
    chat = ChatSettings(tuple(t for t in ends if t != end), template.jinja, special)
    return Tokenizer.with_stream_tokens(inner.to_str(), bos, end, chat=chat)
