"""Well-known chat templates are recognized by what they render, and written for Ollama."""

import json
import sys
from pathlib import Path

import pytest

from sheepop_jax.data import chat_template, chat_templates
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe
from sheepop_jax.data.tokenizer import END_OF_TEXT, ChatSettings, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.interop.ollama import FORMATS, modelfile, recognized

RECORDED = json.loads((Path(__file__).parent / "chat_templates.json").read_text(encoding="utf-8"))
TEMPLATES = RECORDED["templates"] | {"sheepop": chat_templates.TEMPLATES["sheepop"].jinja}
CONTENT = train_bpe(iter(["a cat"]), 257).to_json()
# Without white space around a text, which Llama 3's template removes, and Ollama's does not.
TURNS = [
    [{**message, "content": message["content"].strip()} for message in messages]
    for messages in (RECORDED["conversations"][0], RECORDED["conversations"][2][:5])
]


def chat_model(template: str, bos: bool = False, ends: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with the template; `a` is BOS, if asked for."""
    chat = ChatSettings(ends, template, {"bos_token": "a"} if bos else {})
    return Tokenizer.with_stream_tokens(CONTENT, "a" if bos else None, END_OF_TEXT, chat=chat)


def expanded(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a template that is a loop over messages and a text."""
    before, _, rest = template.partition("{{ range .Messages }}")
    turn, _, after = rest.partition("{{ end }}")
    assert not before and "{{" not in after
    done = [
        turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]
    return "".join(done) + after


@pytest.mark.parametrize(
    ("name", "bos", "form", "system"),
    [
        ("chatml", False, "chatml", ""),
        ("qwen", False, "chatml", 'You answer, "shortly".'),
        ("llama3", True, "llama3", ""),
        ("sheepop", False, "sheepop", ""),
        ("sheepop", True, "sheepop", ""),
    ],
)
def test_a_well_known_template_is_recognized_and_written(name, bos, form, system):
    tokenizer = chat_model(TEMPLATES[name], bos, ("c",))
    found, default = recognized(tokenizer)
    assert (found.name, default) == (form, system)
    text = modelfile(tokenizer, "x.gguf", 29)
    first, *rest = text.split('TEMPLATE """')
    template, rest = rest[0].split('"""', 1)
    assert first == "FROM ./x.gguf\n"
    said = f'\nSYSTEM """{system}"""\n' if system else "\n"
    stops = f'PARAMETER stop "{END_OF_TEXT}"\nPARAMETER stop "c"\n'
    assert rest == f"{said}PARAMETER num_ctx 29\n{stops}"
    for messages in TURNS:
        given = [{"role": "system", "content": system}] * bool(system) + messages
        rendered = chat_template.render_chat(
            TEMPLATES[name], messages, True, tokenizer.special_tokens
        )
        assert ("a" if bos else "") + expanded(template, given) == rendered


@pytest.mark.parametrize(
    "template",
    [
        *(TEMPLATES[name] for name in ("alternating", "everything")),
        TEMPLATES["chatml"].replace("message.role", "'user'"),
        TEMPLATES["chatml"].replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant'"),
        TEMPLATES["qwen"].replace('"shortly"', '""" '),
        "{{ nothing.at.all }}",
    ],
    ids=["alternating", "everything", "role", "answer", "quotes", "fails"],
)
def test_another_template_is_left_to_ollama(template):
    tokenizer = chat_model(template)
    assert recognized(tokenizer) is None
    text = modelfile(tokenizer, "x.gguf", 29)
    assert text == (
        "FROM ./x.gguf\n"
        "# No TEMPLATE: Ollama compares the one in the file with those it knows.\n"
        f'PARAMETER num_ctx 29\nPARAMETER stop "{END_OF_TEXT}"\n'
    )


def test_the_bos_of_conversations_and_texts_must_be_the_same():
    """Ollama puts it before both, or before none."""
    assert recognized(chat_model(TEMPLATES["chatml"], bos=True)) is None
    chat = ChatSettings((), TEMPLATES["llama3"], {"bos_token": "a"})
    tokenizer = Tokenizer.with_stream_tokens(CONTENT, None, END_OF_TEXT, chat=chat)
    assert recognized(tokenizer) is None


def test_a_chat_model_needs_jinja(monkeypatch):
    chat_template._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="no package jinja2"):
        recognized(chat_model(TEMPLATES["chatml"]))
    plain = Tokenizer.from_json(CONTENT)
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(plain, "x.gguf", 29)


def test_forms_differ():
    assert len({form.name for form in FORMATS}) == len({form.turn for form in FORMATS}) == 3
