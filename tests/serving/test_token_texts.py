"""Names and bytes of single tokens, for byte-level, SentencePiece and character tokenizers."""

import json
from pathlib import Path

import pytest

from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.serving.token_texts import Offsets, TokenTexts
from tests.serving.fakes import make_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "interop/golden"
TEXT = "the naïve cat € 🙂 sat"


def llama() -> Tokenizer:
    content = (GOLDEN / "llama_rope_linear/tokenizer.json").read_text(encoding="utf-8")
    return Tokenizer.with_stream_tokens(content, "<s>", "</s>")


MAKERS = {"byte-level": make_tokenizer, "llama": llama, "characters": lambda: train_char([TEXT])}


@pytest.mark.parametrize("name", MAKERS)
def test_the_bytes_of_tokens_make_the_text(name):
    tokenizer = MAKERS[name]()
    texts, ids = TokenTexts(tokenizer), tokenizer.encode(TEXT)
    found = b"".join(texts.bytes(id) for id in ids)
    # SentencePiece writes a space before the first word, which decoding a text drops.
    assert found.decode().removeprefix(" ") == TEXT
    offsets = Offsets(texts)
    shift = len(found.decode()) - len(TEXT)
    places = [offsets.next(id) - shift for id in ids]
    for count in range(1, len(ids)):
        before = tokenizer.decode(ids[:count])
        if not before.endswith("\ufffd"):
            assert places[count] == len(before)


@pytest.mark.parametrize("name", MAKERS)
def test_names_of_tokens_are_keys(name):
    """No two have one, but for ASCII characters that Llama also has as bytes."""
    tokenizer = MAKERS[name]()
    texts = TokenTexts(tokenizer)
    end = tokenizer.end_of_text
    names = {id: texts.text(id) for id in range(tokenizer.vocab_size + 2)}
    assert names[end] == texts.special(end) == tokenizer.decode([end], skip_special=False)
    assert texts.bytes(end) == b""
    assert names[tokenizer.vocab_size] == f"token_id:{tokenizer.vocab_size}"
    equal = len(names) - len(set(names.values()))
    assert equal <= (128 if name == "llama" else 0)
    json.dumps(names, allow_nan=False).encode()
    for id, text in names.items():
        if text.startswith("bytes:"):
            assert bytes.fromhex(text[6:].replace("\\x", "")) == texts.bytes(id)
