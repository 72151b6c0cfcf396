"""The tokenizer files of a Hugging Face directory, with which it encodes text as we do."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.files import write_atomic


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        directory: an existing directory.
        tokenizer: the tokenizer.
        max_length: the model's context, in tokens.

    Raises:
        OSError: a file cannot be written.
    """
    files = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": _tokenizer_config(tokenizer, max_length),
        "generation_config.json": {**special_ids(tokenizer), **_end_ids(tokenizer)},
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        write_atomic(directory / name, text)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Token ids for config.json and generation_config.json: end-of-text, or the BOS if any.

    Without a BOS, end-of-text begins the first document, so it also starts an empty prompt.
    """
    end = tokenizer.end_of_text
    bos = tokenizer.bos_id
    return {"bos_token_id": end if bos is None else bos, "eos_token_id": end, "pad_token_id": end}


def _end_ids(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """All ids that end a text, if there are several."""
    return {"eos_token_id": [*tokenizer.end_ids]} if len(tokenizer.end_ids) > 1 else {}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: it begins texts with the tokenizer's BOS, or with nothing.

    A public tokenizer.json may add tokens that the run was not trained with. Chat settings are left
    out: other programs read them in tokenizer_config.json.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_json())
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bos = tokenizer.bos_id
    plain = inner.encode("a", add_special_tokens=False).ids
    wanted = plain if bos is None else [bos, *plain]
    has_settings = len(tokenizer.end_ids) > 1 or tokenizer.chat_template is not None
    if has_settings or inner.encode("a", add_special_tokens=True).ids != wanted:
        content["post_processor"] = None if bos is None else _begins_with(tokenizer, bos)
    return content


def _begins_with(tokenizer: Tokenizer, index: int) -> dict[str, Any]:
    """A post-processor that puts one token before each text."""
    token = tokenizer.decode([index], skip_special=False)
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    ids = special_ids(tokenizer)
    names = {
        name.removesuffix("_id"): tokenizer.decode([index], skip_special=False)
        for name, index in ids.items()
    }
    has_chat = tokenizer.chat_template is not None
    if has_chat:  # the template may call them by these names, and ask whether there is a BOS
        names = {"pad_token": names["pad_token"], **tokenizer.special_tokens}
    return {
        # The only class that keeps character vocabularies in transformers 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers 4 would also give `token_type_ids`, which GPT-2 adds to its input.
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
        "clean_up_tokenization_spaces": False,
        # The text of a special token is text, as in training. But transformers encodes what a
        # template has rendered as any text.
        "split_special_tokens": not has_chat,
        "model_max_length": max_length,
        **({"chat_template": tokenizer.chat_template} if has_chat else {}),
    }
