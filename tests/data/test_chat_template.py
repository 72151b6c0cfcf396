"""A conversation is rendered as transformers renders it, and no template gets at the machine.

The recorded texts are those of `tests/interop/make_chat_golden.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sheepop_jax.data import chat_template
from sheepop_jax.data.chat_template import render_chat
from sheepop_jax.errors import InputError

RECORDED = json.loads(
    (Path(__file__).parent.parent / "interop" / "chat_templates.json").read_text(encoding="utf-8")
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", RECORDED["templates"])
def test_the_text_is_that_of_transformers(name):
    template, special = RECORDED["templates"][name], RECORDED["special_tokens"]
    cases = [case[1:] for case in RECORDED["cases"] if case[0] == name]
    assert len(cases) == 2 * len(RECORDED["conversations"])
    for number, begins, text in cases:
        messages = RECORDED["conversations"][number]
        if text is None:
            with pytest.raises(InputError, match="turns must alternate"):
                render_chat(template, messages, begins, special)
        else:
            assert render_chat(template, messages, begins, special) == text
    assert any(text for *_, text in cases)


def test_each_call_stands_alone():
    before = [dict(message) for message in HELLO]
    with pytest.raises(InputError):  # the sandbox refuses changes
        render_chat("{{ messages.append(1) }}{{ messages[0].update(role='x') }}", HELLO)
    assert before == HELLO
    assert render_chat("{{ messages[0].role }}{{ bos_token }}", HELLO, special_tokens={}) == "user"


BAD = {
    "{% for %}": "not a template (line 1: ",
    "\n{{ raise_exception('two\nlines') }}": "an error (two lines)",
    "{{ messages[0].role / 2 }}": "an error (unsupported operand",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ namespace.__init__.__globals__ }}": "unsafe",
    "{% set n = namespace(__class__=1) %}": "a namespace with '__class__'",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": "a namespace with '__init__'",
    "{{ dict.__globals__.x }}": "unsafe",
    "{% include '/etc/passwd' %}": "an error (",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ messages | tojson(default=1) }}": "tojson has no default",
}


@pytest.mark.parametrize("template", BAD, ids=range(len(BAD)))
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(InputError) as caught:
        render_chat(template, HELLO)
    assert BAD[template] in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.field == "tokenizer.chat_template"


@pytest.mark.parametrize("version", [None, "3.1.5"])
def test_without_a_safe_jinja_the_error_says_what_to_install(version, monkeypatch):
    chat_template._environment.cache_clear()
    if version is None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
    else:
        monkeypatch.setattr("jinja2.__version__", version)
    with pytest.raises(InputError, match=r"expected jinja2 3\.1\.6 or newer; try 'pip install"):
        render_chat("", HELLO)


def test_jinja_is_loaded_when_a_conversation_is_rendered():
    program = (
        "import sys; from sheepop_jax.data import chat_template, tokenizer; "
        "assert 'jinja2' not in sys.modules; chat_template.render_chat('', []); "
        "assert 'jinja2' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
