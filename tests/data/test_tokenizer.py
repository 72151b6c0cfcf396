"""Round trips, special tokens, determinism and foreign files of the tokenizers."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sheepop_jax.data import tokenizer as module
from sheepop_jax.data.preprocess import train_tokenizer
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.tokenizer import END_OF_TEXT, ChatSettings, Tokenizer, split_text
from sheepop_jax.errors import InputError

TEXTS = ["the cat sat on the mat\r\n", "  the dog's, 'twas e\u0301 \U0001f411", "\tthe end."] * 5
BPE = train_bpe(iter(TEXTS), 283)
CHAR = train_char(TEXTS)
# Two in five of the examples hold the special token's text, the rest anything that UTF-8 can.
ANY_TEXT = st.lists(st.one_of(st.text(), st.just("<|endoftext|>"))).map("".join)


def test_bpe_learns_merges_and_reserves_end_of_text():
    assert BPE.vocab_size == 283
    assert BPE.end_of_text == 0
    assert len(BPE.encode("the mat")) < len("the mat")
    assert BPE.decode([BPE.end_of_text], skip_special=False) == "<|endoftext|>"


@settings(max_examples=150, deadline=None, database=None)
@given(ANY_TEXT)
def test_bpe_gives_any_text_back(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.end_of_text not in ids
    assert all(0 <= i < BPE.vocab_size for i in ids)


@settings(max_examples=100, deadline=None, database=None)
@given(ANY_TEXT)
def test_char_is_one_token_a_code_point(text):
    tokenizer = train_char([text, "<|endoftext|>"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids] == list(text)
    assert tokenizer.vocab_size == len(set(text + "<|endoftext|>")) + 1
    assert tokenizer.end_of_text not in ids


def test_char_names_the_character_that_it_never_saw_and_its_position():
    with pytest.raises(InputError, match=r"text: got .*u2603.*U\+2603\) at position 4.*data\.tok"):
        CHAR.encode("the \u2603 q\u2603")
    with pytest.raises(InputError, match=r"prompt: .* at position 1"):
        CHAR.check("tQ", "prompt")


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+D83D at position 3"):
        tokenizer.encode("the\ud83d")


def test_decoding_skips_end_of_text_unless_asked_and_cut_characters_are_marked():
    sheep = BPE.encode("\U0001f411")
    ids = [0, *BPE.encode("the"), 0]
    assert BPE.decode(ids) == "the"
    assert BPE.decode(ids, skip_special=False) == "<|endoftext|>the<|endoftext|>"
    assert BPE.decode(BPE.encode("\u2603")[:-1]) == "\ufffd"
    assert BPE.decode(sheep) == "\U0001f411"


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = Tokenizer.from_file(path)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, 0)
    for text in ("end", "the mat\r\n"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    if tokenizer is BPE:  # a loaded one, too, takes special text in a document for text
        assert 0 not in loaded.encode("<|endoftext|>")
    else:
        with pytest.raises(InputError):
            loaded.encode("Q")


def test_training_is_repeatable_in_other_processes():
    code = (
        "import json, sys;"
        "from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char;"
        "texts = json.loads(sys.argv[1]); "
        "print(train_bpe(iter(texts), 283).fingerprint, train_char(texts).fingerprint)"
    )
    for parallel, seed in (("true", "1"), ("false", "2")):
        out = subprocess.run(
            [sys.executable, "-c", code, json.dumps(TEXTS)],
            env={"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed},
            cwd=module.__file__.rsplit("/", 3)[0],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert out.split() == [BPE.fingerprint, CHAR.fingerprint]


def test_long_texts_are_cut_where_the_ids_stay_the_same(monkeypatch):
    odd = "\x1c a\x1d\n b\u3000 c's 'll 12 \n3"
    text = "".join(TEXTS) + " \n \n  x" * 9 + "\n\n" + "y" * 19 + odd
    for size in range(17, 60):
        monkeypatch.setattr(module, "_PIECE_CHARS", size)
        pieces = list(split_text([text]))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= size
    text += "the cat's sat-mat, " * 20
    for size in range(100, 112):  # a cut is always near: ids are those of the whole
        monkeypatch.setattr(module, "_PIECE_CHARS", size)
        pieces = list(split_text([text]))
        assert len(pieces) > 1
        assert sum(BPE.encode_batch(pieces), []) == BPE.encode(text)


def test_pieces_depend_on_the_text_and_not_on_the_parts_it_comes_in(monkeypatch):
    text = ("the cat's sat-mat, " * 9 + "y" * 61 + "\n\n  x ") * 4
    for size in (17, 40, 100):
        monkeypatch.setattr(module, "_PIECE_CHARS", size)
        expected = list(split_text([text]))
        for step in (1, 7, 50, 333):
            parts = [text[i : i + step] for i in range(0, len(text), step)]
            assert list(split_text(parts)) == expected
            assert list(split_text(["", *parts, ""])) == expected
    assert list(split_text([])) == list(split_text([""])) == [""]


def test_a_text_of_any_length_is_held_by_the_piece(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARS", 40)
    given = []

    def parts():
        for _ in range(1000):
            given.append(30)
            yield "the cat sat on the mat and so "

    taken = 0
    for piece in split_text(parts()):
        assert len(piece) <= 40
        assert sum(given) - taken <= 110
        taken += len(piece)
    assert taken == 30_000


def test_a_position_counts_from_where_the_user_does():
    with pytest.raises(InputError, match=r"a\.txt: got .* at position 1001;?"):
        CHAR.check("tQ", "a.txt", 1000)
    with pytest.raises(InputError, match=r"a\.txt: got 'U\+D83D at position 1002'"):
        BPE.check("tt\ud83d", "a.txt", 1000)
    assert (CHAR.has_fixed_characters, BPE.has_fixed_characters) == (True, False)


def foreign(end_of_text: str) -> tokenizers.Tokenizer:
    vocabulary = {"the": 5, "cat": 3, end_of_text: 11}  # ids with gaps
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=end_of_text))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_truncation(2)
    inner.enable_padding(length=7)
    return inner


@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_a_foreign_tokenizer_neither_cuts_nor_pads(end_of_text):
    loaded = Tokenizer.from_json(foreign(end_of_text).to_str())
    assert (loaded.vocab_size, loaded.end_of_text) == (12, 11)
    assert loaded.encode("the cat the") == [5, 3, 5]


def test_special_text_is_text_for_a_foreign_tokenizer():
    inner = tokenizers.Tokenizer(models.WordLevel({"s": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    loaded = Tokenizer.from_json(inner.to_str())
    assert loaded.end_of_text == 2
    assert loaded.encode("</s>") == [1, 0, 1]


SPECIAL = "</s>", "<pad>", "~"
LETTERS = [*"</s>pad the", "th"]
MERGES = [
    ("<", "/"),
    ("</", "s"),
    ("</s", ">"),
    ("<", "pad>"),
    ("p", "ad>"),
    ("t", "h"),
    ("<", "p"),
]
PARTS = ["</", "</s", "pad>", "ad>", "<p", *SPECIAL]


def indexed(*tokens):
    return {token: i for i, token in enumerate(tokens)}


MODELS = {
    "Unigram": models.Unigram([(t, -2.0) for t in [*LETTERS, *SPECIAL, "?"]], unk_id=15),
    "WordLevel": models.WordLevel(indexed(*LETTERS, *SPECIAL, "?"), unk_token="?"),
    "WordPiece": models.WordPiece(
        indexed(*LETTERS, *("##" + t for t in LETTERS), *SPECIAL, "?"), unk_token="?"
    ),
    "BPE": models.BPE(indexed(*LETTERS, *PARTS), MERGES),
    "BPE of words": models.BPE(indexed(*LETTERS, *PARTS), [("t", "h")], ignore_merges=True),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_text_becomes_a_special_token(model):
    """Where special tokens are in the model's vocabulary, it finds them in text."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(SPECIAL))
    content = inner.to_str()
    loaded = Tokenizer.from_json(content)
    special = {inner.token_to_id(token) for token in SPECIAL}
    assert loaded.end_of_text in special
    for text in ("</s>", "<pad>", "~", "the </s><pad> th~e", "</s></s> ~"):
        assert not special & set(loaded.encode(text))
    inner.encode_special_tokens = True
    assert special & set(inner.encode("</s> ~").ids)  # the library alone does not see to it
    for text in ("the th", "p a d s"):
        assert loaded.encode(text) == inner.encode(text).ids
    assert loaded.to_json() == content
    assert loaded.vocab_size == inner.get_vocab_size()


def test_an_unknown_word_is_never_end_of_text():
    loaded = Tokenizer.from_json(foreign("</s>").to_str())
    assert loaded.encode("the cat") == [5, 3]
    with pytest.raises(InputError) as error:
        loaded.encode("the dog")
    assert error.value.field == "data.tokenizer"


def test_an_unknown_character_is_never_bos():
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<s>"))
    inner.add_special_tokens(["<s>", "</s>"])
    loaded = Tokenizer.with_stream_tokens(inner.to_str(), "<s>", "</s>")
    assert loaded.encode_prompt("ab") == [0, 2, 3]
    with pytest.raises(InputError) as error:
        loaded.encode("a?b")
    assert error.value.field == "data.tokenizer"


def test_a_tokenizer_whose_special_tokens_cannot_be_hidden_is_refused(monkeypatch):
    inner = tokenizers.Tokenizer(MODELS["BPE"])
    inner.add_special_tokens(["</s>"])
    monkeypatch.setattr(module.secrets, "token_hex", lambda size: "")  # no other name
    monkeypatch.setattr(inner.__class__, "from_str", lambda content: metaspace()._inner)
    with pytest.raises(InputError) as error:
        Tokenizer(inner, "data.tokenizer mine.json")
    assert error.value.field == "data.tokenizer mine.json" and "</s>" in error.value.got


def test_an_end_of_text_that_was_added_as_a_plain_token_is_special_all_the_same():
    plain = BPE.to_json().replace('"special":true', '"special":false')
    assert plain != BPE.to_json()
    loaded = Tokenizer.from_json(plain)
    assert loaded.end_of_text not in loaded.encode("the <|endoftext|> cat")
    assert loaded.decode(loaded.encode("the <|endoftext|> cat")) == "the <|endoftext|> cat"
    assert loaded.vocab_size == BPE.vocab_size


@pytest.mark.parametrize("flag", ["normalized", "lstrip", "rstrip"])
def test_an_end_of_text_that_is_special_stays_as_it_was(flag):
    """Or a run that was begun with it would not know its tokenizer again."""
    content = json.loads(BPE.to_json())
    content["added_tokens"][0][flag] ^= True
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert Tokenizer(inner).to_json() == tokenizers.Tokenizer.from_str(json.dumps(content)).to_str()


def test_merges_are_not_left_out_at_random():
    content = json.loads(BPE.to_json())
    content["model"]["dropout"] = 0.5
    loaded = Tokenizer.from_json(json.dumps(content))
    assert {tuple(loaded.encode(TEXTS[0])) for _ in range(9)} == {tuple(BPE.encode(TEXTS[0]))}


def test_a_tokenizer_that_cannot_encode_is_bad_input():
    inner = tokenizers.Tokenizer(models.WordLevel({"the": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    with pytest.raises(InputError, match=r"data\.tokenizer: got .*cannot encode.*UNK"):
        Tokenizer(inner).encode("the cat")


def metaspace():
    """As SentencePiece's: a space at the beginning of a text is put in, and taken out again."""
    words = {"\u2581the": 0, "\u2581cat": 1, "\u2581sat": 2, "</s>": 3, "[UNK]": 4, "\u2581": 5}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return Tokenizer(inner)


def sentencepiece_bpe():
    """As Llama 2's: a space is put before the text, and no pre-tokenizer splits it."""
    words = "".join(TEXTS).replace(" ", "\u2581") + "\u2581;0123456789"
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("a", "t"), ("e", ";")]
    made = [left + right for left, right in merges]
    vocabulary = indexed("</s>", *dict.fromkeys(words), "\n", *made)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return Tokenizer(inner)


def imported(bos, end_of_text):
    """Llama 2's kind with special tokens, and the BOS and end-of-text of a model."""
    inner = sentencepiece_bpe()._inner
    inner.add_special_tokens(["<s>", "<|im_end|>", "</s>"])
    return Tokenizer.with_stream_tokens(inner.to_str(), bos, end_of_text), inner


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("end_of_text", ["<|im_end|>", "</s>"])
def test_bos_and_end_of_text_are_stored_in_the_tokenizer_file(tmp_path, bos, end_of_text):
    tokenizer, inner = imported(bos, end_of_text)
    expected = inner.token_to_id(bos) if bos else None
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for found in (tokenizer, Tokenizer.from_file(tmp_path / "tokenizer.json")):
        assert found.bos_id == found.document_bos == expected
        assert found.end_of_text == inner.token_to_id(end_of_text)
        assert found.fingerprint == tokenizer.fingerprint
        ids = found.encode("the <s>cat</s>")
        assert not {inner.token_to_id(t) for t in ("<s>", "</s>", "<|im_end|>")} & {*ids}
        assert found.encode_prompt("the <s>cat</s>") == ([expected] if bos else []) + ids
        assert found.encode_prompt("") == ([expected] if bos else [])
    both = tokenizer._inner.encode("the", "cat").ids  # as other programs read the file
    the, cat = tokenizer.encode_batch(["the", "cat"])
    start = tokenizer.encode_prompt("")
    assert both == [*start, *the, tokenizer.end_of_text, *start, *cat]


CHAT = ChatSettings(
    ("</s>", "<|im_end|>", "<s>"),
    "{{ 'a\n\u00e9' }}",
    {"eos_token": "<|im_end|>", "pad_token": "</s>"},
)


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize(
    "chat", [CHAT, ChatSettings(("<s>",)), ChatSettings(chat_template="")], ids=["all", "end", ""]
)
def test_the_settings_of_a_chat_model_are_stored_in_the_tokenizer_file(tmp_path, bos, chat):
    plain, inner = imported(bos, "</s>")
    tokenizer = Tokenizer.with_stream_tokens(inner.to_str(), bos, "</s>", chat=chat)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for found in (tokenizer, Tokenizer.from_file(tmp_path / "tokenizer.json")):
        ends = [token for token in chat.end_tokens if token != "</s>"]
        assert found.end_ids == tuple(map(inner.token_to_id, ["</s>", *ends]))
        assert found.end_of_text == found.end_ids[0] == plain.end_of_text
        assert found.bos_id == plain.bos_id
        assert found.chat_template == chat.chat_template
        names = {"bos_token": "<s>"} if bos else {}
        assert found.special_tokens == {**names, "eos_token": "</s>", **chat.special_tokens}
        assert found.fingerprint == tokenizer.fingerprint != plain.fingerprint
        assert found.encode("the <s>cat</s>") == plain.encode("the <s>cat</s>")
    # Other programs read the file as that without the settings.
    for texts in (["the"], ["the", "cat"]):
        assert tokenizer._inner.encode(*texts).ids == plain._inner.encode(*texts).ids


def test_a_tokenizer_without_chat_settings_is_saved_as_before():
    """So that runs of older versions keep their fingerprint, and open."""
    tokenizer, inner = imported("<s>", "</s>")
    table = json.loads(tokenizer.to_json())["post_processor"]["special_tokens"]
    assert set(table) == {"<s>", "</s>"}
    assert (tokenizer.end_ids, tokenizer.chat_template) == ((tokenizer.end_of_text,), None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    trained = train_bpe(iter(["a cat"]), 257)
    assert trained.end_ids == (trained.end_of_text,) and trained.chat_template is None
    assert trained.special_tokens == {"eos_token": END_OF_TEXT}


def test_a_token_may_have_the_name_of_a_setting():
    inner = imported("<s>", "</s>")[1]
    inner.add_special_tokens(["eos_token", "end_tokens", "chat_template"])
    for bos, end in (("eos_token", "end_tokens"), ("end_tokens", "chat_template")):
        found = Tokenizer.with_stream_tokens(inner.to_str(), bos, end)
        assert (found.bos_id, found.end_ids) == (inner.token_to_id(bos), (inner.token_to_id(end),))
        assert found.chat_template is None


def test_a_setting_that_the_vocabulary_lacks_is_bad_input():
    inner = imported("<s>", "</s>")[1]
    for chat in (ChatSettings(("<none>",)), ChatSettings(special_tokens={"eos_token": "<none>"})):
        with pytest.raises(InputError, match="<none>"):
            Tokenizer.with_stream_tokens(inner.to_str(), None, "</s>", chat=chat)


def test_the_template_of_another_program_says_nothing_about_streams():
    """Runs whose tokenizer has one were trained without BOS."""
    content = json.loads(imported("<s>", "</s>")[0].to_json())
    template = content["post_processor"]
    template["pair"] = [part for part in template["pair"] if "</s>" not in str(part)]
    loaded = Tokenizer.from_json(json.dumps(content))
    assert (loaded.bos_id, loaded.prompt_start) == (None, [])
    template["single"] += [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    assert Tokenizer.from_json(json.dumps(content)).bos_id is None


def test_a_bos_that_is_end_of_text_begins_prompts_but_is_not_doubled_in_a_stream():
    tokenizer, _ = imported("</s>", "</s>")
    assert tokenizer.prompt_start == [tokenizer.end_of_text]
    assert tokenizer.document_bos is None


def test_a_stream_token_that_the_vocabulary_lacks_is_bad_input():
    for tokens in (("<bos>", "</s>"), (None, "<eot>")):
        with pytest.raises(InputError, match="got '<(bos|eot)>'; expected one of the tokenizer's"):
            imported(*tokens)


def newest_byte_level():
    """As Llama 3's: line breaks stay with the symbols before them, digits go by threes."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    inner = tokenizers.Tokenizer.from_str(
        train_bpe(iter(["the;\n cat;\n 123 123"] * 9), 280).to_json()
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    content = json.loads(inner.to_str())
    content["model"]["merges"].append([";", "\u010a"])
    content["model"]["vocab"][";\u010a"] = len(content["model"]["vocab"])
    return Tokenizer.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "tokenizer",
    [BPE, CHAR, metaspace, sentencepiece_bpe, newest_byte_level],
    ids=["bpe", "char", "metaspace", "sentencepiece", "newest byte level"],
)
def test_ids_of_pieces_are_those_of_the_whole_text(tokenizer, monkeypatch):
    """Also where a piece begins with a token that only a text begins with, and in long words."""
    monkeypatch.setattr(module, "CONTEXT_CHARS", 30)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer()
    texts = ["the cat sat on the;\n mat the;\n 1234567 " * 20, "the" * 150, "a" * 400]
    texts = [text for text in texts if tokenizer is not CHAR] or ["the cat " * 50, "the" * 150]
    for text in texts:
        for size in (97, 100, 131):
            monkeypatch.setattr(module, "_PIECE_CHARS", size)
            pieces = list(tokenizer.pieces([text[:50], text[50:]]))
            assert len(pieces) > 2 and "".join(piece for _, piece in pieces) == text
            assert max(len(piece) for _, piece in pieces) <= size + 30
            if tokenizer.vocab_size > 6 or " " in text:  # one word that is not known has no border
                assert sum(tokenizer.encode_pieces(pieces), []) == tokenizer.encode(text)


def test_a_bpe_is_trained_on_words_of_bounded_length():
    bound = train_tokenizer._WORD_CHARS
    long = 2 * bound + 5
    for word in ("ab", "7", "+_", " ", "\n"):
        text = "the cat " + word * long + "\n the end"
        parts = list(train_tokenizer._bounded_words(text))
        assert "".join(parts) == text and len(parts) == 1 + len(word) * long // bound
    for text in ("a+" * long, "the cat " * long, "", "\n\n"):  # no word of them is long
        assert list(train_tokenizer._bounded_words(text)) == [text]
    text = "acgt" * long
    tokenizer = train_bpe(iter([text]), 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size > 260


def test_what_is_written_after_a_prompt_keeps_its_space():
    tokenizer = metaspace()
    prompt = tokenizer.encode("the cat")
    assert (prompt, tokenizer.decode([2, 0])) == ([0, 1], "sat the")
    assert tokenizer.decode_after(prompt, [2, 0]) == " sat the"
    assert tokenizer.decode_after([], [2, 0]) == "sat the"
    sheep = BPE.encode("the \U0001f411")  # where it is cut, nothing ends in a character
    assert BPE.decode_after(sheep[:-1], sheep[-1:]) == BPE.decode(sheep[-1:])
    assert BPE.decode_after(BPE.encode("the"), BPE.encode(" cat")) == " cat"


@pytest.mark.parametrize(
    ("tokenizer", "text", "back"),
    [
        (BPE, " any \u2603 text\n", True),
        (metaspace(), "the cat sat", True),
        (metaspace(), " the cat ", True),
        (metaspace(), "the dog sat", False),
    ],
    ids=["bytes", "words", "white space at the ends", "an unknown word"],
)
def test_whether_a_tokenizer_gives_text_back(tokenizer, text, back):
    assert tokenizer.restores(text, tokenizer.encode(text)) is back


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.tokenizer: got '.*nowhere \(No such file"):
        Tokenizer.from_file(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"data\.tokenizer: .*Is a directory"):
        Tokenizer.from_file(tmp_path)
    for content, said in (
        (b"{", "not a tokenizer"),
        (b"\xff", "not UTF-8"),
        (foreign("<stop>").to_str().encode(), "end-of-text token"),
    ):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"data\.tokenizer.*t\.json.*{said}|{said}.*t\.json"):
            Tokenizer.from_file(tmp_path / "t.json")
