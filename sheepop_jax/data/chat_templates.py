"""The chat templates that a run can be trained with, by name (`data.chat_template`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what a tokenizer needs for it.

    Attributes:
        jinja: the Jinja template, as it is stored in the run and exported.
        tokens: its special tokens; those that a tokenizer lacks are added, in this order.
        end_of_turn: the one that ends each message; it ends an answer while sampling.
        text: the characters that it writes besides tokens, for a character vocabulary.
    """

    jinja: str
    tokens: tuple[str, ...]
    end_of_turn: str
    text: str = ""


# BOS begins a conversation where the tokenizer has one.
_SHEEPOP = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
_CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Qwen2: a conversation without a system message gets one.
_QWEN = """\
{% if messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\
{% endif %}"""
# As Llama 3: content without white space at its ends.
_LLAMA3 = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{{ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\
{% endif %}"""
_ROLES = "system\nuser\nassistant\n"

TEMPLATES = {
    "sheepop": ChatTemplate(
        _SHEEPOP, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"
    ),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", _ROLES),
    "llama3": ChatTemplate(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        _ROLES,
    ),
    "qwen": ChatTemplate(
        _QWEN + _CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        _ROLES + "You are a helpful assistant.",
    ),
}
