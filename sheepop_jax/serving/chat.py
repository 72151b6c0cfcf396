"""How a conversation becomes a prompt: by the run's chat template, or as a plain transcript.

A base model has no chat template. It is asked to continue a plain transcript:

    Answer briefly.

    User: What is JAX?
    Assistant: A Python library.
    User: Who makes it?
    Assistant:

and its answer ends before it writes the next "User:". Either way, the oldest turns of a
conversation that exceeds the context are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sheepop_jax.data.chat import ChatEncoder, within
from sheepop_jax.data.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One message of a conversation; the role is one of `ROLES`."""

    role: str
    content: str


class ChatFormat(Protocol):
    """Makes the prompt of a conversation.

    Attributes:
        stop: strings that end an answer, and are not part of it.
        is_template: whether the model was trained on conversations in this format.
    """

    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def is_template(self) -> bool: ...

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> list[int]:
        """The ids after which the model writes its answer; at most `room`, if turns can be dropped.

        Raises:
            InputError: the tokenizer cannot encode the text, or the template refuses it.
        """
        ...


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The format of a run with this tokenizer.

    Raises:
        InputError: it has a chat template, but the package jinja2 is missing.
    """
    if tokenizer.chat_template is None:
        return PlainChat()
    return TemplateChat(ChatEncoder(tokenizer))


@dataclass(frozen=True)
class TemplateChat:
    """The chat template of a run; the answer ends with its end-of-turn token."""

    encoder: ChatEncoder
    stop: tuple[str, ...] = ()
    is_template: bool = True

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> list[int]:
        """See `ChatFormat`; the last message must not be the assistant's."""
        return self.encoder.answer_prompt(_plain(messages), room)


@dataclass(frozen=True)
class PlainChat:
    """The transcript for base models, shown in the module's description.

    If the last message is the assistant's, the answer continues it.
    """

    stop: tuple[str, ...] = ("\nUser:",)
    is_template: bool = False

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> list[int]:
        """See `ChatFormat`."""

        def encode(kept: Sequence[Mapping[str, str]]) -> list[int]:
            return tokenizer.encode_prompt(self.text([Message(**message) for message in kept]))

        return within(_plain(messages), room, encode)

    def text(self, messages: Sequence[Message]) -> str:
        """The transcript, up to where the answer begins."""
        lines = []
        for message in messages:
            content = message.content.strip()
            match message.role:
                case "user":
                    lines.append(f"User: {content}\n")
                case "assistant":
                    lines.append(f"Assistant: {content}\n")
                case _:  # instructions stand before the conversation, without a name
                    lines.append(f"{content}\n\n")
        if messages and messages[-1].role == "assistant":
            return "".join(lines).removesuffix("\n")
        return "".join(lines) + "Assistant:"


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as templates read them: instructions by the developer are the system's."""
    names = {"developer": "system"}
    return [{"role": names.get(m.role, m.role), "content": m.content} for m in messages]
