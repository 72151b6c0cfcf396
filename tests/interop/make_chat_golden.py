"""Records what transformers makes of some conversations: `chat_templates.json`, a test's data.

Not part of the test suite: it needs torch and transformers (see `make_golden.py`).

    ../hf/bin/python tests/interop/make_chat_golden.py

`templates` holds Jinja templates by name, `conversations` lists of messages, and `cases` the text
of each with and without the beginning of an answer, or null where the template refuses.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

FILE = Path(__file__).parent / "chat_templates.json"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
TEMPLATES = {
    "chatml": _CHATML,
    # As Qwen2's: a system message of its own, where the conversation has none.
    "qwen": """\
{%- if messages[0].role != 'system' -%}
    {{ '<|im_start|>system\\nYou answer, "shortly".<|im_end|>\\n' }}
{%- endif -%}
"""
    + _CHATML,
    # As Llama 3's: BOS, trimmed texts, end-of-turn.
    "llama3": """\
{% set ns = namespace(first=true) %}
{% for message in messages %}
    {%- if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif -%}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
    {{- message.content | trim }}{{ '<|eot_id|>' -}}
{% endfor %}
{%- if add_generation_prompt -%}
    {{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
""",
    # As Llama 2's: refuses turns out of order, and ends answers with end-of-text.
    "alternating": """\
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('turns must alternate') }}
    {%- endif -%}
    {%- if message.role == 'user' -%}
{{ bos_token }}[INST] {{ message.content }} [/INST]
    {%- else %} {{ message.content }} {{ eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
    # White space control, filters, loop controls and tags of transformers' own.
    "everything": """\
{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {# a comment #}
  {% if loop.index > 4 %}{% break %}{% endif %}
  {{ message | tojson }}
  {{ dict(role=message.role, n=message.content | length) | tojson(indent=2) }}
  {% if message.role == 'assistant' %}{% generation %}{{ message.content | upper }}
{% endgeneration %}{% endif %}
  {{ strftime_now('%%') }}{{ tools is none }}{{ unknown }}
{% endfor %}
""",
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Where is the sheep? \n"},
        {"role": "assistant", "content": "In the café <&> 羊."},
        {"role": "user", "content": "'Thanks' {{ 1 }} <|im_end|>"},
    ],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "?\n\n"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
]


def main() -> None:
    """Writes the file."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    cases = []
    for name, template in TEMPLATES.items():
        for number, conversation in enumerate(CONVERSATIONS):
            for begins in (False, True):
                try:
                    text = tokenizer.apply_chat_template(
                        conversation,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=begins,
                    )
                except jinja2.TemplateError:
                    text = None
                cases.append([name, number, begins, text])
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    content = {
        "versions": versions, "special_tokens": SPECIAL, "templates": TEMPLATES,
        "conversations": CONVERSATIONS, "cases": cases,
    }  # fmt: skip
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
