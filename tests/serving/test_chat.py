"""How a conversation becomes a prompt: by a template or as a transcript, within the context."""

import dataclasses
from typing import Any

import pytest

from sheepop_jax.data.chat import ChatEncoder, with_chat_template, within
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.serving.chat import Message, PlainChat, TemplateChat, chat_format
from sheepop_jax.serving.service import Service
from tests.serving.fakes import make_fake

CONVERSATION = [
    ("developer", "Be brief."),
    ("user", "the cat"),
    ("assistant", "sat"),
    ("user", "on <|end|>"),
    ("assistant", "the mat"),
    ("user", "and then?"),
]
MESSAGES = [Message(*message) for message in CONVERSATION]


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> Tokenizer:
    return with_chat_template(tokenizer, "sheepop")


def text(ids: list[int], talker: Tokenizer) -> str:
    return talker.decode(ids, skip_special=False)


def test_a_run_with_a_template_uses_it(tokenizer: Tokenizer, talker: Tokenizer) -> None:
    assert chat_format(tokenizer) == PlainChat()
    chat = chat_format(talker)
    assert chat.is_template and chat.stop == ()
    ids = chat.encode(talker, MESSAGES, 1000)
    assert text(ids, talker) == (
        "<|system|>Be brief.<|end|><|user|>the cat<|end|><|assistant|>sat<|end|>"
        "<|user|>on <|end|><|end|><|assistant|>the mat<|end|><|user|>and then?<|end|><|assistant|>"
    )
    [end] = [i for i in talker.end_ids if talker.token_text(i) == "<|end|>"]
    assert ids.count(end) == 6  # that in the text of a message is text


@pytest.mark.parametrize("is_template", [True, False])
def test_the_oldest_turns_are_dropped_whole(
    is_template: bool, tokenizer: Tokenizer, talker: Tokenizer
) -> None:
    """As many turns as necessary and no more; the instructions and the last message stay."""
    chat = TemplateChat(ChatEncoder(talker)) if is_template else PlainChat()
    kept = [MESSAGES, [MESSAGES[0], *MESSAGES[3:]], [MESSAGES[0], MESSAGES[5]]]
    whole = [chat.encode(talker, messages, 10**6) for messages in kept]
    assert len(whole[0]) > len(whole[1]) > len(whole[2])
    for room in range(len(whole[0]) + 2):
        expected = next((ids for ids in whole if len(ids) <= room), whole[2])
        assert chat.encode(talker, MESSAGES, room) == expected


def test_all_that_is_left_of_a_conversation_without_a_user_stays() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert within(messages, 0, lambda kept: [1] * len(kept)) == [1, 1]


@pytest.mark.parametrize("messages", [[], MESSAGES[:3]], ids=["none", "assistant"])
def test_a_template_answers_the_user(messages: list[Message], talker: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        chat_format(talker).encode(talker, messages, 1000)
    assert error.value.field == "messages"


def test_the_room_leaves_space_for_the_answer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gives the conversation what `max_tokens` leaves, at least half of the context."""
    fake = make_fake(tokenizer)
    service: Service = fake.service
    rooms: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(PlainChat):
        def encode(self, tokenizer: Tokenizer, messages: Any, room: int) -> list[int]:
            rooms.append(room)
            return super().encode(tokenizer, messages, room)

    model = dataclasses.replace(service.model, chat=Spy())
    monkeypatch.setattr(service, "model", model)
    for more in (b"", b', "max_tokens": 30', b', "max_tokens": 390'):
        service.prepare_chat(b'{"messages": [{"role": "user", "content": "hi"}]%s}' % more)
    context = model.context
    assert rooms == [context - min(256, context // 2), context - 30, context // 2]
    assert service.models()[0]["chat"] is False
    fake.close()
