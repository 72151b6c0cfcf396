"""Text of a token stream: against decoding everything at once, for each kind of tokenizer."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.text import TextStream

GOLDEN = Path(__file__).parent.parent / "interop" / "golden"
TEXTS = ["the cat sat on the mat\r\n", "  the dog's, 'twas e\u0301 \U0001f411", "\tthe end."] * 5
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in (0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0x90, 0x91, 0xFF)]
WORDS = ["</s>", "\u2581", "\u2581the", "cat", "##s", "a</w>", "\u2581\u2581", ".", "\ufffd", "n't"]


def words(decoder: object) -> Tokenizer:
    """Words and bytes, with a decoder of choice."""
    tokens = [*WORDS, *BYTE_TOKENS, "?"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        inner.decoder = decoder
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner)


def golden(name: str) -> Tokenizer:
    return Tokenizer.from_file(GOLDEN / name / "tokenizer.json")


def mixed_bytes() -> Tokenizer:
    """A byte-level BPE with an added token whose text is not of the alphabet."""
    inner = tokenizers.Tokenizer.from_str(train_bpe(iter(TEXTS), 283).to_json())
    inner.add_tokens(["<a \u00e9>"])
    return Tokenizer(inner)


LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: train_bpe(iter(TEXTS), 283),
    "bytes": lambda: train_bpe(iter(TEXTS), 257),
    "bytes with an added token": mixed_bytes,
    "char": lambda: train_char(TEXTS),
    "gpt2": lambda: golden("gpt2"),
    "llama 2": lambda: golden("llama_rope_linear"),
    "llama 3": lambda: golden("llama_rope_llama3"),
    "qwen2": lambda: golden("qwen2"),
    "metaspace": lambda: words(decoders.Metaspace()),
    "wordpiece": lambda: words(decoders.WordPiece()),
    "no decoder": lambda: words(None),
    "gemma": lambda: words(decoders.Sequence(LLAMA)),
    "llama, strips two": lambda: words(decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)])),
    "bytes, then metaspace": lambda: words(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "replaced last": lambda: words(
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), LLAMA[0]])
    ),
    # The text of these is final only at the end.
    "end of word": lambda: words(decoders.BPEDecoder()),
    "cleans the text": lambda: words(decoders.Sequence([*LLAMA, decoders.WordPiece()])),
    "replaces words": lambda: words(decoders.Sequence([*LLAMA, decoders.Replace("cat", "at")])),
}
AT_THE_END = {"end of word", "cleans the text", "replaces words"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


def cut(text: str, stop: list[str]) -> str | None:
    """The text before its first stop string, found by letting it grow; None without one."""
    for end in range(1, len(text) + 1):
        found = [end - len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: min(found)]
    return None


def cases(tokenizer: Tokenizer, count: int) -> Iterator[tuple[list[int], list[int], random.Random]]:
    """Random prompts and tokens: of any ids, and of text that is cut between any two tokens."""
    rng = random.Random(0)
    extra = [tokenizer.end_of_text, tokenizer.vocab_size + 3]  # skipped: special, unknown
    for number in range(count):
        if number % 2 and tokenizer.is_lossless:
            text = "".join(rng.choices("the cat's \u00e9\U0001f411\n", k=30))
            allowed = text if not tokenizer.has_fixed_characters else "the cat's"
            ids = tokenizer.encode(allowed)
        else:
            few = rng.sample(range(tokenizer.vocab_size), min(6, tokenizer.vocab_size))
            ids = rng.choices([*few, *extra], k=rng.randrange(30))
        size = rng.randrange(min(len(ids) + 1, rng.choice([1, 3, 30])))
        yield ids[:size], ids[size:], rng


def chunks(ids: list[int], rng: random.Random) -> Iterator[list[int]]:
    while ids:
        size = rng.randrange(4)
        yield ids[:size]
        ids = ids[size:]


def test_text_is_that_of_all_tokens(kind: str, tokenizer: Tokenizer) -> None:
    for prompt, ids, rng in cases(tokenizer, 150):
        expected = tokenizer.decode_after(prompt, ids)
        stream = TextStream(tokenizer, prompt)
        shown = [stream.push(part) for part in chunks(ids, rng)]
        assert "".join(shown) + stream.finish() == expected, (prompt, ids)
        assert (stream.stopped, stream.num_tokens) == (False, len(ids))
        assert stream.finish() == ""
        if kind in AT_THE_END:
            assert not any(shown)


def test_text_is_shown_as_soon_as_nothing_can_change_it(kind: str, tokenizer: Tokenizer) -> None:
    """What is withheld ends differently with one of some tokens that could follow.

    A run of byte tokens is not: it is withheld until it ends, also if it is no UTF-8 anymore.
    """
    if kind in AT_THE_END or "ByteFallback" in str(tokenizer.decoder):
        return
    following = range(min(tokenizer.vocab_size, 260))
    for prompt, ids, _ in cases(tokenizer, 12):
        stream, shown = TextStream(tokenizer, prompt), ""
        for size, token in enumerate(ids, start=1):
            shown += stream.push([token])
            now = tokenizer.decode_after(prompt, ids[:size])
            assert now.startswith(shown)
            if now == shown:
                continue
            texts = [
                tokenizer.decode_after(prompt, [*ids[:size], *[more] * count])
                for more in following
                for count in (1, 2, 3)
            ]
            assert not all(text.startswith(now) for text in texts), (prompt, ids[:size])


def test_stop_strings_cut_the_text(tokenizer: Tokenizer) -> None:
    found = 0
    for prompt, ids, rng in cases(tokenizer, 150):
        text = tokenizer.decode_after(prompt, ids)
        places = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 4))]
        stop = [text[at : at + rng.randrange(1, 6)] or "aab" for at in places]
        stop = [s[:-1] + rng.choice([s[-1], "x", "\u00e9"]) for s in stop]
        expected = cut(text, stop)
        stream = TextStream(tokenizer, prompt, stop)
        shown = ""
        for part in chunks(ids, rng):
            shown += stream.push(part)
            # Only what may become a stop string is withheld.
            alone = TextStream(tokenizer, prompt)
            final = alone.push(ids[: stream.num_tokens])
            if not stream.stopped:
                held = final.removeprefix(shown)
                assert shown + held == final and any(s.startswith(held) for s in stop)
        shown += stream.finish()
        assert shown == (text if expected is None else expected), (prompt, ids, stop)
        assert stream.stopped == (expected is not None)
        if expected is None:
            assert stream.num_tokens == len(ids)
            continue
        found += 1
        by_token = TextStream(tokenizer, prompt, stop)
        for token in ids:
            assert not by_token.stopped
            by_token.push([token])
            if by_token.num_tokens == stream.num_tokens:
                break
        by_token.finish()
        assert by_token.stopped
        before = tokenizer.decode_after(prompt, ids[: stream.num_tokens])
        assert cut(before, stop) == expected
        assert stream.push(ids) == stream.finish() == ""
    assert found > 50


def letters() -> Tokenizer:
    return train_char(["abcxyz\u00e9\U0001f411"])


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("aaab", ["aab"], "a"),
        ("xabcx", ["abc", "b"], "xa"),  # the one that ends first
        ("xabcx", ["bc", "abc"], "x"),  # both end at c: the longest
        ("xabcx", ["abc", "bcx"], "x"),
        ("abab", ["abc"], "abab"),
        ("xyxyz", ["xyz", "y\u00e9"], "xy"),
        ("a\U0001f411\u00e9b", ["\U0001f411\u00e9"], "a"),
        ("abc", ["abc"], ""),
    ],
)
def test_which_stop_string_ends_a_text(text: str, stop: list[str], shown: str) -> None:
    tokenizer = letters()
    for size in (1, 2, len(text)):
        stream = TextStream(tokenizer, [], stop)
        ids = tokenizer.encode(text)
        parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(parts) + stream.finish() == shown
        assert stream.stopped == (shown != text)


def test_the_token_that_completes_a_stop_string_is_counted_last() -> None:
    tokenizer = letters()
    for size in (1, 3, 6):
        stream = TextStream(tokenizer, [], ["bc"])
        ids = tokenizer.encode("abcxyz")
        for i in range(0, len(ids), size):
            stream.push(ids[i : i + size])
        assert (stream.stopped, stream.num_tokens) == (True, 3)


def test_a_stop_string_is_not_found_in_the_prompt_or_across_its_end() -> None:
    tokenizer = letters()
    stream = TextStream(tokenizer, tokenizer.encode("abcab"), ["abc"])
    assert stream.push(tokenizer.encode("cabx")) == "cabx"


def test_a_character_is_withheld_until_it_is_complete_or_hopeless() -> None:
    tokenizer = train_bpe(iter(TEXTS), 257)
    sheep = tokenizer.encode("\U0001f411")
    stream = TextStream(tokenizer, tokenizer.encode("the "))
    assert [stream.push([token]) for token in sheep] == ["", "", "", "\U0001f411"]
    assert [stream.push([token]) for token in sheep[:2]] == ["", ""]
    assert stream.push(tokenizer.encode("a")) == "\ufffda"
    assert stream.push(sheep[1:2]) == "\ufffd"  # begins no character
    assert stream.push(sheep[:3]) == ""
    assert stream.finish() == "\ufffd"


def test_a_text_whose_end_is_stripped_is_final_at_the_end() -> None:
    """The decoder itself does not survive an empty text."""
    tokenizer = words(decoders.Sequence([*LLAMA, decoders.Strip(".", 0, 1)]))
    cat, point = WORDS.index("cat"), WORDS.index(".")
    stream = TextStream(tokenizer, [cat])
    assert [stream.push([token]) for token in (cat, point, cat, point)] == [""] * 4
    assert stream.finish() == tokenizer.decode_after([cat], [cat, point, cat, point]) == "cat.cat"


@pytest.mark.parametrize("stop", [[""], ["a", ""]], ids=["alone", "among others"])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    with pytest.raises(InputError) as error:
        TextStream(letters(), [], stop)
    assert error.value.field == "stop"


@pytest.mark.parametrize("name", ["bpe", "llama 2", "metaspace", "gemma"])
def test_the_work_for_a_token_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call decodes more than a few tokens, also if nothing but spaces are written."""
    tokenizer, decode, most = KINDS[name](), Tokenizer.decode, 0

    def counted(self: Tokenizer, ids: list[int], skip_special: bool = True) -> str:
        nonlocal most
        most = max(most, len(ids))
        return decode(self, ids, skip_special)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    rng = random.Random(0)
    for few in (range(tokenizer.vocab_size), [1], [tokenizer.end_of_text]):
        tokens = [token for token in few if not (tokenizer.token(token) or "").startswith("<0x")]
        stream = TextStream(tokenizer, [])
        for _ in range(300):
            stream.push([rng.choice(tokens)])
    assert most <= 4
