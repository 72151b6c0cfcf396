"""The Modelfile: Ollama's description of a GGUF file, with the template of a chat model.

Ollama's templates are of another language than a model's own. A template is recognized by what it
makes of two conversations, and then written in Ollama's language.
"""

import json
from dataclasses import dataclass

from sheepop_jax.data.chat_template import check_jinja, render_chat
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError


@dataclass(frozen=True)
class Format:
    """A well-known form of conversations.

    Attributes:
        name: its name.
        turn: one message, with {role} and {content}.
    """

    name: str
    turn: str

    @property
    def answer(self) -> str:
        """The beginning of an answer."""
        return self.turn.partition("{content}")[0].format(role="assistant")

    def text(self, messages: list[dict[str, str]]) -> str:
        """A conversation and the beginning of an answer, without BOS."""
        return "".join(self.turn.format(**message) for message in messages) + self.answer

    @property
    def template(self) -> str:
        """`text` in Ollama's language."""
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        return "{{ range .Messages }}" + turn + "{{ end }}" + self.answer


FORMATS = (
    Format("sheepop", "<|{role}|>{content}<|end|>"),
    Format("chatml", "<|im_start|>{role}\n{content}<|im_end|>\n"),
    Format("llama3", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"),
)
_SHORT = [{"role": "user", "content": "Where is the sheep?"}]
_LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    *_SHORT,
]


def recognized(tokenizer: Tokenizer) -> tuple[Format, str] | None:
    """The form of a chat model's conversations and its own system message; None if not well-known.

    Qwen's templates are ChatML with a system message, which is "" in others.

    Raises:
        InputError: the package jinja2 is missing.
    """
    if tokenizer.chat_template is None:
        return None
    check_jinja()
    bos = tokenizer.special_tokens.get("bos_token", "")
    texts = []
    for messages in (_LONG, _SHORT):
        try:
            text = render_chat(tokenizer.chat_template, messages, True, tokenizer.special_tokens)
        except InputError:  # one that refuses system messages, for instance
            return None
        begins = bool(bos) and text.startswith(bos)
        if begins != (tokenizer.bos_id is not None):  # which Ollama puts before any text, or not
            return None
        texts.append(text.removeprefix(bos))
    long, short = texts
    for form in FORMATS:
        if long == form.text(_LONG):
            before, after = form.turn.format(role="system", content="\0").split("\0")
            whole = after + form.text(_SHORT)
            if short == form.text(_SHORT):
                return form, ""
            if short.startswith(before) and short.endswith(whole):
                system = short[len(before) : len(short) - len(whole)]
                return None if '"""' in system else (form, system)
    return None


def modelfile(tokenizer: Tokenizer, gguf_file: str, context: int) -> str:
    """The content of the Modelfile: how the model continues a text, or a conversation.

    Args:
        tokenizer: the model's tokenizer.
        gguf_file: name of the GGUF file beside it.
        context: the model's context, in tokens.

    Raises:
        InputError: the model has a chat template, and the package jinja2 is missing.
    """
    lines = [f"FROM ./{gguf_file}"]
    found = recognized(tokenizer)
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif found is None:
        lines.append("# No TEMPLATE: Ollama compares the one in the file with those it knows.")
    else:
        form, system = found
        lines.append(f'TEMPLATE """{form.template}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    lines.append(f"PARAMETER num_ctx {context}")
    for index in tokenizer.end_ids:
        end = json.dumps(tokenizer.decode([index], skip_special=False), ensure_ascii=False)
        lines.append(f"PARAMETER stop {end}")
    return "\n".join(lines) + "\n"
