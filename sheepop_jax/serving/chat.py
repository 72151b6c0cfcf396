"""How a conversation becomes a prompt.

A base model has no chat template. It is asked to continue a plain transcript:

    Answer briefly.

    User: What is JAX?
    Assistant: A Python library.
    User: Who makes it?
    Assistant:

and its answer ends before it writes the next "User:".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """

    @property
    def stop(self) -> tuple[str, ...]: ...

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model writes its answer.

        If the last message is the assistant's, the answer continues it.

        Raises:
            InputError: the tokenizer cannot encode the text.
        """
        ...


@dataclass(frozen=True)
class PlainChat:
    """The transcript for base models, shown in the module's description."""

    stop: tuple[str, ...] = ("\nUser:",)

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat`."""
        return tokenizer.encode_prompt(self.text(messages))

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
