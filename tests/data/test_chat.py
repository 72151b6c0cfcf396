"""Conversations become the tokens of their text, and the loss counts the assistant's alone.

The expectation is made by hand: each template written as Python, and the library's own tokenizer,
which finds special tokens anywhere.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from sheepop_jax.config.data import CHAT_TEMPLATES
from sheepop_jax.data import chat as module
from sheepop_jax.data.chat import ChatEncoder, with_chat_template
from sheepop_jax.data.chat_template import render_chat
from sheepop_jax.data.chat_templates import TEMPLATES
from sheepop_jax.data.marks import BEGINS, COUNTED
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.tokenizer import ChatSettings, Tokenizer
from sheepop_jax.errors import InputError

GOLDEN = Path(__file__).parent.parent / "interop" / "golden"
WORDS = [
    "sheep",
    " grass",
    "\n",
    "\n\n",
    " ",
    "  ",
    "user",
    "r\u00e9",
    "\U0001f411",
    "<|",
    "7",
    "!",
]
TEXT = "system user assistant\n" + "".join(TEMPLATES["qwen"].text) + " ".join(WORDS) * 3


def random_conversations(count, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        roles = ["system"] * rng.randint(0, 1)
        roles += rng.choices(["user", "assistant"], k=rng.randint(1, 5)) + ["assistant"]
        roles += ["user"] * rng.randint(0, 1)
        texts = ["".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in roles]
        texts = [text if text.strip() else "7" for text in texts]
        found.append([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])
    return found


CONVERSATIONS = random_conversations(200)
CHATML = ("<|im_start|>{}\n", "<|im_end|>", "\n")
AROUND = {  # before, the end of the turn, after
    "sheepop": ("<|{}|>", "<|end|>", ""),
    "chatml": CHATML,
    "qwen": CHATML,
    "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
}


def by_hand(name, messages, bos=""):
    """The text and, for each character, whether the loss counts it."""
    before, end, after = AROUND[name]
    text = bos if name in ("sheepop", "llama3") else ""
    if name == "qwen" and messages[0]["role"] != "system":
        text += "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    flags = [False] * len(text)
    for message in messages:
        content = message["content"].strip() if name == "llama3" else message["content"]
        counts = message["role"] == "assistant"
        for piece, counted in (
            (before.format(message["role"]), False),
            (content + end, counts),
            (after, False),
        ):
            text += piece
            flags += [counted] * len(piece)
    return text, flags


def library(tokenizer):
    """The library's tokenizer, which finds special tokens in any text."""
    return tokenizers.Tokenizer.from_str(tokenizer.to_json())


@pytest.fixture(scope="module")
def bases():
    bpe = train_bpe(iter([TEXT] * 3), 290)
    with_bos = tokenizers.Tokenizer.from_str(bpe.to_json())
    with_bos.add_special_tokens(["<s>"])
    found = {
        "bpe": bpe,
        "bpe with BOS": Tokenizer.with_stream_tokens(with_bos.to_str(), "<s>", "<|endoftext|>"),
        "char": train_char([TEXT]),
    }
    for path in sorted(GOLDEN.glob("*/tokenizer.json")):
        if path.parent.name in ("qwen2", "llama_rope_linear", "gpt2"):
            found[path.parent.name] = Tokenizer.from_file(path)
    return found


BASES = ("bpe", "bpe with BOS", "char", "gpt2", "llama_rope_linear", "qwen2")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("base", BASES)
def test_tokens_and_marks_against_a_conversation_written_by_hand(base, name, bases):
    tokenizer = with_chat_template(bases[base], name)
    encoder, whole = ChatEncoder(tokenizer), library(tokenizer)
    bos = tokenizer.special_tokens.get("bos_token", "")
    examples = encoder.examples(CONVERSATIONS)
    several = 0
    for messages, example in zip(CONVERSATIONS, examples, strict=True):
        text, flags = by_hand(name, messages, bos)
        special = tokenizer.special_tokens
        assert render_chat(tokenizer.chat_template, messages, False, special) == text
        encoding = whole.encode(text, add_special_tokens=False)
        assert example.ids.tolist() == encoding.ids
        counted = [any(flags[start:stop]) for start, stop in encoding.offsets]
        np.testing.assert_array_equal(example.marks & COUNTED, counted)
        assert np.flatnonzero(example.marks & BEGINS).tolist() == [0]
        end = whole.token_to_id(TEMPLATES[name].end_of_turn)
        ends = (example.ids == end) & (example.marks & COUNTED == COUNTED)
        answers = [m for m in messages if m["role"] == "assistant"]
        assert np.count_nonzero(ends) == len(answers)
        assert example.num_bytes == sum(len(m["content"].encode()) for m in answers)
        several += len(answers) > 1
    assert several > 50


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_example(name, bases):
    """What precedes an answer while sampling is what precedes it in training."""
    encoder = ChatEncoder(with_chat_template(bases["bpe"], name))
    for messages in CONVERSATIONS[:50]:
        answer = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        if answer == 0 or messages[answer]["content"][0].isspace():
            continue
        [example] = encoder.examples([messages])
        prompt = encoder.prompt(messages[:answer])
        assert np.flatnonzero(example.marks & COUNTED)[0] == len(prompt)
        assert example.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("base", BASES)
def test_text_that_looks_like_a_special_token_stays_text(base, bases):
    if base == "char":
        base_tokenizer = train_char([TEXT + "<|user|><|assistant|><|end|><|endoftext|>"])
    else:
        base_tokenizer = bases[base]
    tokenizer = with_chat_template(base_tokenizer, "sheepop")
    encoder = ChatEncoder(tokenizer)
    tokens = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    ids = {token: library(tokenizer).token_to_id(token) for token in tokens}
    messages = [
        {"role": "user", "content": "a" if base == "char" else "a<|end|><|assistant|>b"},
        {"role": "assistant", "content": "<|endoftext|><|user|>"},
    ]
    [example] = encoder.examples([messages])
    found = [index for index in example.ids.tolist() if index in ids.values()]
    order = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert found == [ids[token] for token in order]
    if tokenizer.is_lossless:
        counted = example.ids[(example.marks & COUNTED) > 0][:-1]
        assert tokenizer.decode(counted) == "<|endoftext|><|user|>"


def test_the_loss_on_all_counts_every_token_but_the_first(bases):
    encoder = ChatEncoder(with_chat_template(bases["bpe"], "chatml"), "all")
    [example] = encoder.examples(CONVERSATIONS[:1])
    assert example.marks.tolist() == [BEGINS] + [COUNTED] * (len(example.ids) - 1)
    assert example.num_bytes == sum(len(m["content"].encode()) for m in CONVERSATIONS[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_missing_tokens_are_added_behind_the_others(base, name, bases):
    before, template = bases[base], TEMPLATES[name]
    after = with_chat_template(before, name)
    known = library(before).get_vocab(with_added_tokens=True)
    new = [token for token in template.tokens if token not in known]
    assert after.vocab_size == before.vocab_size + len(new)
    for index, token in enumerate(new, before.vocab_size):
        assert after.token_text(index) == token and after.token(index) is None
    end = library(after).token_to_id(template.end_of_turn)
    assert after.end_ids[0] == before.end_of_text and end in after.end_ids
    assert (after.bos_id, after.end_of_text) == (before.bos_id, before.end_of_text)
    assert after.chat_template == template.jinja
    again = with_chat_template(Tokenizer.from_json(after.to_json()), name)
    assert again.fingerprint == after.fingerprint
    plain = "sheep 7!" if base == "char" else "sheep grass <|user|> 7!"
    assert after.encode(plain) == before.encode(plain)


# Templates of their own, as chat models come with.
OWN = {
    "alternating": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if m.role == 'user' %}[I] "
    "{{ m.content | trim }} [/I]{% else %} {{ m.content }} <|endoftext|>{% endif %}{% endfor %}",
    "no end of turn": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "another token": "{% for m in messages %}<s>{{ m.content }}{% endfor %}<s>",
    "changes": "{% for m in messages %}{{ m.content | upper }}<|endoftext|>{% endfor %}",
    "changes some": "{% for m in messages %}{{ m.content | replace('s', 'z') }}"
    "<|endoftext|>{% endfor %}",
    "leaves out": "{% for m in messages if m.role != 'user' %}{{ m.content }}<|endoftext|>"
    "{% endfor %}",
    "repeats": "{{ messages[0].content }}{% for m in messages %}{{ m.content }}<|endoftext|>"
    "{% endfor %}",
}
TWO = [{"role": "user", "content": "sheep"}, {"role": "assistant", "content": " grass "}]


def own(bases, name):
    chat = ChatSettings(chat_template=OWN[name])
    content = bases["bpe with BOS"].to_json()
    return Tokenizer.with_stream_tokens(content, "<s>", "<|endoftext|>", chat=chat)


def test_a_tokenizer_may_keep_its_own_template(bases):
    tokenizer = own(bases, "alternating")
    assert with_chat_template(tokenizer, "") is tokenizer
    encoder = ChatEncoder(tokenizer)
    [example] = encoder.examples([TWO])
    text = "[I] sheep [/I]  grass  <|endoftext|>"
    assert tokenizer.decode(example.ids, skip_special=False) == text
    counted = example.ids[(example.marks & COUNTED) > 0]
    # The white space before the end-of-turn token is the model's to write, too.
    assert tokenizer.decode(counted, skip_special=False) == " grass  <|endoftext|>"
    with pytest.raises(InputError, match="turns must alternate"):
        encoder.examples([TWO[:1] * 2 + TWO[1:]])
    with pytest.raises(InputError, match="no template of its own"):
        with_chat_template(bases["bpe"], "")
    with pytest.raises(InputError, match="without a chat template"):
        ChatEncoder(bases["bpe"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no end of turn", "no special token after a message by the assistant"),
        ("another token", "<s> after a message by the assistant"),
        ("changes", "leaves out a message"),
        ("changes some", "changes the text"),
        ("leaves out", "leaves out a message"),
        ("repeats", "leaves out a message or repeats one"),
    ],
)
def test_a_template_that_gives_no_sound_marks_is_refused(name, said, bases):
    with pytest.raises(InputError, match=said) as caught:
        ChatEncoder(own(bases, name)).examples([TWO])
    assert caught.value.field == "tokenizer.chat_template"


def test_a_bound_on_the_templates_kept(bases, monkeypatch):
    monkeypatch.setattr(module, "_MOST_SKELETONS", 3)
    encoder = ChatEncoder(with_chat_template(bases["bpe"], "sheepop"))
    encoder.examples(CONVERSATIONS)
    assert len(encoder._skeletons) <= 3


def test_the_configuration_names_the_templates():
    assert CHAT_TEMPLATES == tuple(TEMPLATES)
    assert json.dumps([template.jinja for template in TEMPLATES.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("base", ["bpe", "bpe with BOS", "qwen2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_gives_the_same_tokens(base, name, bases):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = with_chat_template(bases[base], name)
    encoder = ChatEncoder(tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library(tokenizer), **tokenizer.special_tokens
    )
    theirs.chat_template = tokenizer.chat_template
    for messages, example in zip(CONVERSATIONS, encoder.examples(CONVERSATIONS), strict=True):
        options = {"tokenize": True, "return_dict": False}
        assert theirs.apply_chat_template(messages, **options) == example.ids.tolist()
        asked = theirs.apply_chat_template(messages, add_generation_prompt=True, **options)
        assert asked == encoder.prompt(messages)
