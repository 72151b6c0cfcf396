"""The vocabulary of a GGUF file, in the form in which llama.cpp reads byte-level BPE tokenizers."""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError

# Values of tokenizer.ggml.token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# llama.cpp refuses an empty list of merges. Byte 255 occurs in no UTF-8 text.
_NO_MERGES = ["ÿ ÿ"]
_WORKS = "a byte-level BPE tokenizer as GPT-2's, or a character tokenizer of ASCII text"
_TRAIN = "training with `data.tokenizer=bpe`"

# How public byte-level tokenizers split text into words -> llama.cpp's name for it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",  # Llama 3
    _WORDS + r"\p{N}" + _REST: "qwen2",  # Qwen2 to Qwen3
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer.

    Attributes:
        tokens: by id; one for each row of the embedding. Bytes are written as GPT-2 writes them.
        types: NORMAL, CONTROL, USER_DEFINED or UNUSED, as `tokens`.
        merges: pairs of tokens separated by a space, in order.
        pre_tokenizer: llama.cpp's name for the way in which text is split into words.
        end_of_text: an id.
        bos: the id that begins each text, or None.
        other_ends: further ids that end a text. llama.cpp is told of two, and knows the rest by
            name.
        chat_template: a Jinja template, or None.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    end_of_text: int
    bos: int | None
    other_ends: tuple[int, ...] = ()
    chat_template: str | None = None


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary that makes llama.cpp encode as `tokenizer` does.

    Args:
        tokenizer: the run's tokenizer.
        rows: the vocabulary size of the model, at least the tokenizer's; other rows are unused.

    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.to_json())
    pre_tokenizer = _pre_tokenizer(tokenizer, content)
    tokens = [f"[unused {index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for token, index in content["model"]["vocab"].items():
        tokens[index] = _as_bytes(token) if tokenizer.has_fixed_characters else token
        types[index] = NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [" ".join(pair) for pair in content["model"]["merges"]] or _NO_MERGES
    return Vocabulary(
        tokens,
        types,
        merges,
        pre_tokenizer,
        tokenizer.end_of_text,
        tokenizer.bos_id,
        tokenizer.end_ids[1:],
        tokenizer.chat_template,
    )


def normalizes(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer composes characters first (NFC), which llama.cpp does not do."""
    return json.loads(tokenizer.to_json())["normalizer"] is not None


def _pre_tokenizer(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text into words.

    Raises:
        InputError: it has none, or lacks another part of the tokenizer.
    """
    model = content["model"]
    if tokenizer.has_fixed_characters:
        others = sorted(c for c in model["vocab"] if len(c) == 1 and not c.isascii())
        if others:
            got = f"a character tokenizer with {others[0]!a} ({len(others)} outside ASCII)"
            raise InputError("data.tokenizer", got, _WORKS, _TRAIN)
        return "gpt-2"
    name = _byte_level(content["pre_tokenizer"] or {})
    plain = (
        model["type"] == "BPE"
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and (content["decoder"] or {}).get("type") == "ByteLevel"
        and (content["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    )
    if not (plain and name):
        parts = (content[part] for part in ("normalizer", "pre_tokenizer"))
        kinds = ", ".join([model["type"], *(part["type"] for part in parts if part)])
        got = f"another kind of tokenizer ({kinds})"
        raise InputError("data.tokenizer", got, _WORKS, "`format=hf`")
    return name


def _byte_level(splits: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer; "" if it has none."""
    first, last = {}, splits
    if splits.get("type") == "Sequence" and len(splits["pretokenizers"]) == 2:
        first, last = splits["pretokenizers"]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return ""
    match first.get("type"), last["use_regex"]:
        case None, True:
            return "gpt-2"
        case "Digits", True if first["individual_digits"]:
            return "smollm"
        case "Split", False if first["behavior"] == "Isolated" and not first["invert"]:
            return _EXPRESSIONS.get(first["pattern"].get("Regex", ""), "")
    return ""


def _as_bytes(token: str) -> str:
    """A token of a character tokenizer, its bytes written as GPT-2 writes them."""
    [(written, _)] = _BYTES.pre_tokenize_str(token)
    return written


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
