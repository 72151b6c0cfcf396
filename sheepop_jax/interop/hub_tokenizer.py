"""Reads the tokenizer of a Hugging Face directory, with its BOS and its end-of-text.

Of `tokenizer.json`, not of the classes of transformers that rebuild it from other files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheepop_jax.data.tokenizer import END_OF_TEXT, ChatSettings, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.files import read_text

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What transformers gives to a template, of the keys of tokenizer_config.json.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    try:
        found = json.loads(read_text(path, str(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), f"not JSON ({error})", "a JSON object") from None
    if not isinstance(found, dict):
        raise InputError(str(path), type(found).__name__, "a JSON object")
    return found


def read_tokenizer(directory: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Reads the tokenizer of a model.

    Texts begin with BOS if `add_bos_token` of tokenizer_config.json says so; without that key, if
    the template of tokenizer.json begins with one. End-of-text is `<|endoftext|>`, or the model's
    `eos_token_id` (the first, if several), or `eos_token` of tokenizer_config.json. What else one
    of these names ends a text too, first `eos_token`, which in chat models ends a turn.

    Args:
        directory: a Hugging Face directory.
        config: its parsed config.json.
        vocab_size: rows of the model's embedding.

    Raises:
        InputError: no tokenizer.json, not a BPE, more tokens than rows, no end-of-text, or a chat
            template that is not text.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        present = sorted(p.name for p in directory.glob("*") if p.suffix in (".json", ".model"))
        hint = "saving it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        raise InputError(str(path), f"no file beside {', '.join(present)}", "a tokenizer", hint)
    text, content = read_text(path, str(path)), read_json(path)
    try:
        kind = content["model"].get("type") or ("BPE" if "merges" in content["model"] else None)
        ids = {**content["model"]["vocab"]} if kind == "BPE" else {}
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        first = _first_of_template(content.get("post_processor"))
        tokens = max(ids.values(), default=-1) + 1
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        got = f"not a tokenizer ({type(error).__name__}: {error})"
        raise InputError(str(path), got, "a tokenizer.json") from None
    if kind != "BPE":
        raise InputError(f"{path}: model", kind, "BPE (byte-level, or as SentencePiece's)")
    if tokens > vocab_size:
        expected = f"at most {vocab_size}, the rows of the model's embedding"
        raise InputError(str(path), f"{tokens} tokens", expected)
    names = {index: token for token, index in ids.items()}
    for key in ("bos_token_id", "eos_token_id"):
        for index in _listed(config.get(key)):
            if index not in names:
                expected = f"an id of one of the {len(names)} tokens of {TOKENIZER}"
                raise InputError(f"{directory / 'config.json'}: {key}", index, expected)
    options = {}
    if (directory / "tokenizer_config.json").is_file():
        options = read_json(directory / "tokenizer_config.json")
    bos = first
    if (adds := options.get("add_bos_token")) is not None:
        bos = (_content(options.get("bos_token")) or first) if adds else None
        if adds and bos is None:
            where = f"{directory / 'tokenizer_config.json'}: bos_token"
            raise InputError(where, None, "a token, since add_bos_token is true")
    ends = [END_OF_TEXT] if END_OF_TEXT in ids else []
    for values in (config, _generation_config(directory)):
        ends += [names[i] for i in _listed(values.get("eos_token_id")) if i in names]
    if (named := _content(options.get("eos_token"))) is not None:
        if ends and named not in ids:
            named = None  # a name that the tokenizer does not know ends nothing
        else:
            ends[1:1] = [named]
    if not ends:
        where = f"{directory / 'config.json'}: eos_token_id"
        raise InputError(where, config.get("eos_token_id"), "the id of an end-of-text token")
    further = tuple(token for token in dict.fromkeys(ends) if token != ends[0])
    if (template := _chat_template(directory, options)) is None:
        chat = ChatSettings(further)
    else:
        roles = {role: _content(options.get(role)) for role in _ROLES}
        known = {role: token for role, token in roles.items() if token is not None and token in ids}
        chat = ChatSettings(further, template, known)
    return Tokenizer.with_stream_tokens(text, bos, ends[0], str(path), chat)


def _chat_template(directory: Path, options: Mapping[str, Any]) -> str | None:
    """The template of a conversation: of its own file, or of tokenizer_config.json."""
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return read_text(path, str(path))
    found = options.get(key := "chat_template")
    if isinstance(found, list):  # one for each use, by name
        named = [entry for entry in found if isinstance(entry, Mapping)]
        found = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if found is None or isinstance(found, str):
        return found
    where = f"{directory / 'tokenizer_config.json'}: {key}"
    raise InputError(where, type(found).__name__, "text, or a list with one named default")


def _first_of_template(processor: Mapping[str, Any] | None) -> str | None:
    """The special token before a single text, or None."""
    for part in (processor or {}).get("processors", [processor]):
        if part and part.get("type") == "TemplateProcessing":
            first = part["single"][0]
            return first["SpecialToken"]["id"] if "SpecialToken" in first else None
    return None


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _listed(value: Any) -> list[int]:
    """The token ids of a value: one, several, or none."""
    return [
        index for index in (value if isinstance(value, list) else [value]) if type(index) is int
    ]


def _content(token: Any) -> str | None:
    """The text of a token, which may be an object."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
