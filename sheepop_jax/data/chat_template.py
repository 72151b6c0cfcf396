"""Chat templates: a conversation as the text that a chat model was trained on.

A template is a Jinja program that comes with a model. It runs in Jinja's sandbox, with what
transformers gives it: no file, no module and no attribute of Python's own is in reach.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sheepop_jax.errors import InputError

FIELD = "tokenizer.chat_template"
_ONE_LINE = 200  # characters of an error of a template


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Formats a conversation as transformers' `apply_chat_template` does.

    The text holds special tokens, BOS among them if the template writes one, to be encoded as
    tokens and not as text.

    Args:
        template: a Jinja template (`Tokenizer.chat_template`).
        messages: a dict with `role` and `content` for each message.
        add_generation_prompt: whether the text ends with the beginning of an answer.
        special_tokens: tokens that the template calls by name (`Tokenizer.special_tokens`).

    Raises:
        InputError: the package jinja2 is missing, or too old; or the template is not one, or
            refuses the conversation.
    """
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    try:
        return str(
            _compiled(environment, template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **(special_tokens or {}),
            )
        )
    except (MemoryError, RecursionError):
        raise
    except TemplateSyntaxError as error:
        got = f"not a template (line {error.lineno}: {_line(error)})"
        raise InputError(FIELD, got, "a Jinja template") from None
    except Exception as error:  # a program's errors are of any type
        got = f"an error ({_line(error)})"
        raise InputError(FIELD, got, "a conversation that the template accepts") from None


def check_jinja() -> None:
    """Checks that templates can be rendered.

    Raises:
        InputError: the package jinja2 is missing, or too old.
    """
    _environment()


@functools.lru_cache(maxsize=16)
def _compiled(environment: Any, template: str) -> Any:
    return environment.from_string(template)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_ONE_LINE]


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox with the names, filters and tags that templates for transformers use.

    Raises:
        InputError: the package jinja2 is missing, or older than 3.1.6, whose sandbox is not safe.
    """
    # Lazy: sampling without a conversation needs no Jinja.
    hint = "'pip install jinja2'"
    try:
        import jinja2
    except ModuleNotFoundError:
        raise InputError(FIELD, "no package jinja2", "jinja2 3.1.6 or newer", hint) from None
    from jinja2 import ext, nodes, sandbox, utils

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        got = f"jinja2 {jinja2.__version__}"
        raise InputError(FIELD, got, "jinja2 3.1.6 or newer", hint)

    class Generation(ext.Extension):
        """The tag that marks what the model is to learn; the text inside is as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(utils.Namespace):
        """Without names of Python's own, which the sandbox does not see being set."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *given = args
            values = dict(*given, **values)
            for name in values:
                _check_name(name)
            utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with {name!r}")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        known = ("ensure_ascii", "indent", "separators", "sort_keys")
        if unknown := options.keys() - {*known}:
            raise jinja2.TemplateError(f"tojson has no {', '.join(sorted(unknown))}")
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": Namespace,
    }
    return environment
